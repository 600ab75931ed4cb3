"""What do the floats that GPUs multiply lose, beside integers of as many bytes?

measure.py MODEL rtn|gptq NAME.csv   MODEL: smollm2, stories, a folder. Adds a row an arm; arms that
are there are left out, so that a killed run goes on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

from experiments.rows import append, read
from optimizer.data.text import Data
from optimizer.plan import Precision
from optimizer.quantization import floats
from optimizer.quantization.methods import Gptq, bind
from optimizer.quantization.uniform import Nearest
from optimizer.stages.session import Session

WINDOWS, LENGTH = 12, 128
INT4, INT4_WIDE = Precision("int", 4, 32, True), Precision("int", 4, 64, True)
NVFP4, MXFP4, FP8 = (Precision.floating(kind) for kind in ("nvfp4", "mxfp4", "fp8"))
LARGEST = ((0,), (0,))  # the scales of the standards: from the largest weight alone
ARMS = {
    "int4_g32_sym": (INT4, None), "nvfp4, largest / 6": (NVFP4, LARGEST), "nvfp4": (NVFP4, None),
    "int4_g64_sym": (INT4_WIDE, None), "mxfp4, largest": (MXFP4, LARGEST), "mxfp4": (MXFP4, None),
    "int8_channel_sym": (Precision("int", 8, None, True), None), "fp8": (FP8, None),
}  # fmt: skip


def log_p(net: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([torch.log_softmax(net(input_ids=x[None]).logits, -1) for x in ids])


def main(model: str, quantizer: str, file: Path) -> None:
    store = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    session = Session.open(model, Data(), store)
    ids = torch.from_numpy(session.windows("heldout").ids[:WINDOWS, :LENGTH])
    layers = session.inventory.scoped(["blocks"])
    reference = log_p(session.model.net, ids)
    done = {row["arm"] for row in read(file)}
    for arm, (precision, searched) in ARMS.items():
        own = f"{quantizer} {arm}"
        if own in done or (searched and quantizer != "rtn"):
            continue
        near, exponents = floats.NEAR, floats.EXPONENTS
        floats.NEAR, floats.EXPONENTS = searched or (near, exponents)  # type: ignore[assignment]
        choice = {x.name: precision.nearest(x.cols) for x in layers}
        rounder = Nearest() if quantizer == "rtn" else bind(Gptq(), session).rounder(choice)
        try:
            with session.model.rounded(rounder, choice):
                found = log_p(session.model.net, ids)
        finally:
            floats.NEAR, floats.EXPONENTS = near, exponents
        each = (reference.exp() * (reference - found)).sum(-1).mean(-1).double().numpy()
        flips = float((reference.argmax(-1) != found.argmax(-1)).float().mean())
        size = 8 * sum(x.bytes(choice[x.name]) for x in layers) / sum(x.weights for x in layers)
        row = [model, own, f"{size:.4f}", f"{each.mean():.5g}",
               f"{each.std(ddof=1) / np.sqrt(len(each)):.2g}", f"{flips:.4f}"]  # fmt: skip
        names = ("model", "arm", "bits", "kl", "stderr", "flips")
        append(file, dict(zip(names, row, strict=True)), model, own)
        print(*row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
