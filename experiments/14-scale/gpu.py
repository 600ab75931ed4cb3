"""One row of gpu.csv: a job on one GPU, in a process of its own.

python experiments/14-scale/gpu.py ROW FOLDER OUT.csv [DEVICE] [WINDOWS LENGTH]

streamed   FOLDER of make.py: table of the default palette from 64 x 256 tokens, weights in the host's
           memory, and exact plan
resident   the same with all weights on the device
fp32       as resident, multiplied in fp32
gptq       GPTQ at 4 bits of everything, packed into FOLDER-packed
generate   FOLDER-packed writes 64 tokens after 64 in bf16, packed and unpacked for each use;
           so does the reference. The memory that was foretold, and what it took
agree      tables on the CPU, on the device in fp32 and in bf16, and the reference against itself

device_gb is torch.cuda.max_memory_reserved, 0 on a CPU, where the script is only tried out.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import optimizer
from experiments.rows import append
from optimizer.commands import deploy
from optimizer.commands.optimize import optimize
from optimizer.config import Optimize
from optimizer.data.text import Data, Part
from optimizer.hardware import geometry, memory
from optimizer.models.source import read_config
from optimizer.plan import Budget, Palette
from optimizer.plan.plan import Plan
from optimizer.quantization.methods import Gptq, Rtn
from optimizer.search import Search
from optimizer.sensitivity import Fisher
from optimizer.stages.session import Session
from optimizer.stages.space import search_space
from optimizer.stages.table import measure_table

BEFORE, TOKENS = 64, 64  # that are read, and written


def settings(row: str, folder: Path, device: str, windows: int, length: int) -> Optimize:
    few = Part(sequences=2, length=length)
    data = Data(
        source="text", path=str(folder / "words.txt"), search=few, heldout=few,
        calibration=Part(sequences=windows, length=length),
    )  # fmt: skip
    gptq = row == "gptq"
    config = Optimize(
        model=str(folder), budget=Budget(bits=4.5), data=data, device=device, scope=["all"],
        palette=Palette(bits=[4]) if gptq else Palette(), search=Search(space="exact"),
        quantizer=Gptq(inputs="reference") if gptq else Rtn(),
        sensitivity=Fisher(windows=min(8, windows) if gptq else None),
        offload="cpu" if row == "streamed" else "none",
        arithmetic="fp32" if row == "fp32" else "auto", store=os.environ["MEZZOTINT_STORE"],
    )  # fmt: skip
    config.proof.certify = False
    return config


def job(row: str, folder: Path, device: str, windows: int, length: int) -> dict[str, Any]:
    """The table and the plan; with gptq the packed folder, too."""
    config, begun = settings(row, folder, device, windows, length), time.monotonic()
    found = optimize(config, Path(f"{folder}-{row}"))
    if row != "gptq":
        return {}
    taken = time.monotonic() - begun
    deploy.apply(found.plan, Path(f"{folder}-packed"), config.store, overwrite=True)
    return {"packing_s": f"{time.monotonic() - begun - taken:.0f}"}


def written(net: Any, device: str) -> tuple[float, torch.Tensor]:
    """Tokens a second, and the logits of the first."""
    ids = torch.arange(5, 5 + BEFORE, device=device)[None]
    with torch.inference_mode():
        logits = net(ids).logits[0].float()
        net.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        begun = time.perf_counter()
        net.generate(
            ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )
    return TOKENS / (time.perf_counter() - begun), logits


def generate(folder: Path, device: str) -> dict[str, Any]:
    packed = Path(f"{folder}-packed")
    found: dict[str, Any] = {}
    plan = Plan.load(packed / "plan.json")
    shape = geometry.geometry(read_config(folder))
    budget = Budget(memory="80GB", context=BEFORE + TOKENS, overhead="0B")
    logits = {}
    for name, fast in (("packed", True), ("unpacked", False)):
        _empty(device)
        net = optimizer.load(packed, torch.bfloat16, device, fast)
        _empty(device)
        speed, logits[name] = written(net, device)
        once = 0 if fast else memory.unpacked_bytes(plan, "gpu")
        need = memory.use(shape, "torch", budget, memory.resident_weights(plan), once)
        found |= {
            f"{name}_words_s": f"{speed:.2f}",
            f"{name}_gb": f"{_reserved(device) / 1e9:.3f}",
        }
        found[f"{name}_foretold_gb"] = f"{need.total / 1e9:.3f}"
        del net
    _empty(device)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    found["reference_words_s"] = f"{written(reference, device)[0]:.2f}"
    apart = (logits["packed"] - logits["unpacked"]).norm() / logits["unpacked"].norm()
    found["packed_from_unpacked"] = f"{float(apart):.1e}"
    found["file_gb"] = f"{sum(x.stat().st_size for x in packed.glob('*.safetensors')) / 1e9:.3f}"
    return found


def agree(folder: Path, device: str, windows: int, length: int) -> dict[str, Any]:
    config = settings("agree", folder, device, windows, length)
    tables, found = {}, {}
    for name, where, how in (
        ("cpu", "cpu", "fp32"), ("fp32", device, "fp32"), ("bf16", device, "bf16"),
    ):  # fmt: skip
        own = replace(config, device=where, arithmetic=how, store=f"{config.store}-{name}")
        session = Session.open(
            own.model, own.data, own.store, device=where, residence=own.residence
        )
        space = search_space(own, session.inventory)
        session.calibration(), session.model
        begun = time.monotonic()
        tables[name] = measure_table(session, own, space).loss
        found[f"{name}_s"] = f"{time.monotonic() - begun:.1f}"
        if name == "fp32":
            teacher = session.teacher("heldout")
            for what, scores in teacher.noise(session.model.net).items():
                found[what] = f"{scores.kl.mean():.1e}"
    for name in ("fp32", "bf16"):
        real = tables["cpu"] > 0
        wrong = np.abs(tables[name][real] / tables["cpu"][real] - 1)
        found |= {
            f"{name}_off": f"{np.median(wrong):.1e}",
            f"{name}_off_most": f"{wrong.max():.1e}",
        }
    return found


def _empty(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _reserved(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.max_memory_reserved()


def main(row: str, folder: Path, out: Path, device: str, windows: int, length: int) -> None:
    begun = time.monotonic()
    found: dict[str, Any] = {"row": row, "model": folder.name, "device": device}
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name()
    if row == "generate":
        more = generate(folder, device)
    elif row == "agree":
        more = agree(folder, device, windows, length)
    else:
        more = job(row, folder, device, windows, length)
    found["seconds"] = f"{time.monotonic() - begun:.0f}"
    found["device_gb"] = f"{_reserved(device) / 1e9:.3f}"
    found["host_gb"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.3f}"
    append(out, found | more, row, folder.name, windows, length)


if __name__ == "__main__":
    own = sys.argv
    main(own[1], Path(own[2]), Path(own[3]), (own[4:5] or ["cuda"])[0],
         *map(int, own[5:7] or ["64", "256"]))  # fmt: skip
