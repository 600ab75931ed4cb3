"""AutoRound's AutoScheme on the same model, choices and tokens -> one allocation per budget.

Runs in an environment of its own that has auto-round. Usage: autoscheme.py MODEL_FOLDER TEXT.jsonl
OUT.json BITS... The allocations are measured by allocation.py with our rounding and evaluator.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ["AR_ALLOW_W8_ASYM"] = "1"

import torch
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme, GenScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, text: str, out: Path, budgets: list[float]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]
    options = [
        QuantizationScheme(bits=b, group_size=64, sym=False, data_type="int", act_bits=16)
        for b in (2, 3, 4, 5, 6, 8)
    ]
    samples = len(Path(text).read_text(encoding="utf-8").splitlines())
    scheme = AutoScheme(
        avg_bits=budgets, options=options, ignore_scale_zp_bits=True, nsamples=samples,
        seqlen=128, batch_size=1, dataset=text, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    began = time.perf_counter()
    made = GenScheme(scheme, model, layers, {}, dataset=text, device_map="cpu",
                     tokenizer=tokenizer, enable_torch_compile=False)  # fmt: skip
    found = made.get_layer_config()
    seconds = time.perf_counter() - began
    if not all(isinstance(value, dict) and "bits" not in value for value in found.values()):
        found = {budgets[0]: found}
    plans = {
        str(bits): {f"{name}.weight": int(value["bits"]) for name, value in plan.items()}
        for bits, plan in found.items()
    }
    out.write_text(json.dumps({"seconds": seconds, "samples": samples, "plans": plans}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), [float(b) for b in sys.argv[4:]])
