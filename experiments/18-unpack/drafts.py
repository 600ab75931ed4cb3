"""How many of the base's words the refined model keeps while it writes, beside what its
certificate says.

    drafts.py FOLDER OUT.csv [PROMPTS]

In bf16, sampled at temperature 1, four words drafted at a time, after 24 tokens of held-out
windows, the first ones first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

import optimizer
from experiments.rows import write
from optimizer.data.text import Data, Part
from optimizer.plan import Plan
from optimizer.stages.session import Session

BEGUN, WRITTEN, DRAFTED = 24, 64, 4


def main(argv: list[str]) -> None:
    folder, count = argv[0], int(argv[2]) if len(argv) > 2 else 24
    plan = Plan.load(folder)
    assert plan.refinement is not None
    said = dict(plan.provenance["data"])
    parts = {k: Part(**v) for k, v in said.items() if isinstance(v, dict)}
    store = argv[3] if len(argv) > 3 else os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    session = Session.open(str(plan.model["name"]), Data(**(said | parts)), store)
    net = optimizer.load(folder, unpack="draft", fast=True, wide=True)
    torch.manual_seed(0)
    rates = []
    drafts = (
        net.generate.__closure__
    )  # the assistant's own settings decide how many words it drafts
    assistant = next(
        c.cell_contents for c in drafts if hasattr(c.cell_contents, "generation_config")
    )
    assistant.generation_config.num_assistant_tokens = DRAFTED
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    windows = session.windows("heldout").ids
    each = windows.shape[1] // BEGUN
    for i in range(min(count, each * len(windows))):
        ids = windows[i % len(windows), BEGUN * (i // len(windows)) :]
        net.unpacking.reset()
        net.generate(
            torch.from_numpy(ids[None, :BEGUN]), do_sample=True, top_k=0, top_p=1.0,
            temperature=1.0, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, pad_token_id=0,
        )  # fmt: skip
        rates.append((net.unpacking.acceptance(WRITTEN), WRITTEN / len(net.unpacking.rounds)))
    kept, passes = np.array(rates).T
    error = kept.std(ddof=1) / np.sqrt(len(kept))
    foretold = plan.refinement.certificate["acceptance"]
    row = {
        "folder": Path(folder).name, "prompts": len(kept), "acceptance": kept.mean(),
        "stderr": error, "foretold": foretold["value"], "tokens a pass": passes.mean(),
        "expected a pass": sum(foretold["value"] ** i for i in range(DRAFTED + 1)),
    }  # fmt: skip
    print(row)
    write(Path(argv[1]), [row])


if __name__ == "__main__":
    main(sys.argv[1:])
