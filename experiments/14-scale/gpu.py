"""One row of gpu.csv: a job on one GPU, in a process of its own.

python experiments/14-scale/gpu.py ROW FOLDER OUT.csv [DEVICE] [WINDOWS LENGTH]

streamed   FOLDER of make.py: table of the default palette from 64 x 256 tokens, weights in the host's
           memory, and exact plan
resident   the same with all weights on the device
gptq       GPTQ at 4 bits of everything, packed into FOLDER-packed
generate   FOLDER-packed writes 64 tokens in bf16, and the reference does, too

device_gb is torch.cuda.max_memory_reserved, 0 on a CPU, where the script is only tried out.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import optimizer
from experiments.rows import append
from optimizer.commands import deploy
from optimizer.commands.optimize import optimize
from optimizer.config import Optimize
from optimizer.data.text import Data, Part
from optimizer.models.model import Model, take_inventory
from optimizer.plan import Budget
from optimizer.quantization.methods import Gptq, Rtn
from optimizer.search import Search
from optimizer.sensitivity import Fisher

TOKENS = 64  # that are written


def job(row: str, folder: Path, device: str, windows: int, length: int) -> None:
    """The table and the plan; with gptq the packed folder, too."""
    few = Part(sequences=2, length=length)
    data = Data(
        source="text", path=str(folder / "words.txt"), search=few, heldout=few,
        calibration=Part(sequences=windows, length=length),
    )  # fmt: skip
    gptq = row == "gptq"
    config = Optimize(
        model=str(folder), budget=Budget(bits=4.5), data=data, device=device, scope=["all"],
        quantizer=Gptq(inputs="reference") if gptq else Rtn(), search=Search(space="exact"),
        sensitivity=Fisher(windows=min(8, windows) if gptq else None),
        offload="none" if row == "resident" else "cpu",
    )  # fmt: skip
    config.proof.certify = False
    found = optimize(config, Path(f"{folder}-{row}"))
    if gptq:
        deploy.apply(found.plan, Path(f"{folder}-packed"), config.store, overwrite=True)


def written(net: Any, device: str) -> float:
    """Tokens a second."""
    ids = torch.arange(5, 21, device=device)[None]
    with torch.inference_mode():
        net.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        begun = time.perf_counter()
        net.generate(
            ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
    return TOKENS / (time.perf_counter() - begun)


def generate(folder: Path, device: str) -> dict[str, Any]:
    packed = Path(f"{folder}-packed")
    net = optimizer.load(packed, device=device, fast=True)
    own, held = written(net, device), _reserved(device)
    del net
    if device != "cpu":
        torch.cuda.empty_cache()
    reference = Model.load(folder, take_inventory(folder)).net.to(torch.bfloat16).to(device)
    file = sum(x.stat().st_size for x in packed.glob("*.safetensors"))
    return {
        "packed_words_s": f"{own:.2f}",
        "reference_words_s": f"{written(reference, device):.2f}",
        "packed_gb": f"{held / 1e9:.3f}",
        "file_gb": f"{file / 1e9:.3f}",
    }


def _reserved(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.max_memory_reserved()


def main(row: str, folder: Path, out: Path, device: str, windows: int, length: int) -> None:
    begun = time.monotonic()
    found: dict[str, Any] = {"row": row, "model": folder.name, "device": device}
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name()
    more = {}
    if row == "generate":
        more = generate(folder, device)
    else:
        job(row, folder, device, windows, length)
    found["seconds"] = f"{time.monotonic() - begun:.0f}"
    found["device_gb"] = f"{_reserved(device) / 1e9:.3f}"
    found["host_gb"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.3f}"
    append(out, found | more, row, folder.name, windows, length)


if __name__ == "__main__":
    own = sys.argv
    main(own[1], Path(own[2]), Path(own[3]), (own[4:5] or ["cuda"])[0],
         *map(int, own[5:7] or ["64", "256"]))  # fmt: skip
