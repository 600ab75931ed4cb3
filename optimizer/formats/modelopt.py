"""NVIDIA ModelOpt: a recipe for `mtq.quantize`, and the hf_quant_config.json that it leads to.

quantize.py holds the `quant_cfg`, an ordered list whose later entries win (modelopt 0.47,
torch/quantization/config.py). hf_quant_config.json names the algorithm of every layer, as vLLM,
TensorRT-LLM and SGLang read it:
    {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {MODULE: {...}}, ...}}
vLLM loads it as modelopt_mixed, which refuses joined layers that differ. FP8 has one scale of the
tensor there, and an input scale from calibration; so rounding is ModelOpt's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimizer.formats import rules
from optimizer.formats.safetensors.checkpoint import module, untouched
from optimizer.plan import Inventory, Layer, Plan, Precision

EXECUTES = ["none", "nvfp4", "fp8", "fp8_block"]
EXPERTS = "block"
NOTES = ("Rounding is ModelOpt's, and its FP8 has one scale of the tensor: measure the result.",)
ALGORITHMS: dict[str, dict[str, Any]] = {
    "nvfp4": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "fp8": {"quant_algo": "FP8"},
    "fp8_block": {"quant_algo": "FP8_PB_WO"},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "nvfp4": {
        "num_bits": (2, 1),
        "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)},
    },
    "fp8": {"num_bits": (4, 3), "axis": None},
    "fp8_block": {"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 128}},
}
INPUTS = {"num_bits": (4, 3), "axis": None}  # of FP8, which ModelOpt multiplies in 8 bits
HEAD = '''"""Quantize MODEL with ModelOpt as plan {plan} says: python quantize.py MODEL OUT

Needs nvidia-modelopt 0.47 and a GPU. `texts` is what FP8's input scales are calibrated with: put
your own there.
"""

import sys

import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

CONFIG = {{
    "quant_cfg": [
{entries}
    ],
    "algorithm": "max",
}}
'''
TAIL = """
source, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(source)
texts = ["Put some hundreds of texts of your own here."]


def calibrate(net):
    for text in texts:
        net(**tokenizer(text, return_tensors="pt").to(net.device))


export_hf_checkpoint(mtq.quantize(model, CONFIG, calibrate), export_dir=out)
tokenizer.save_pretrained(out)
"""


def holds(layer: Layer, precision: Precision) -> str | None:
    """None, or why ModelOpt can't hold the layer."""
    return rules.linear_only(layer, precision)


def config(plan: Plan, inventory: Inventory) -> dict[str, Any]:
    """hf_quant_config.json."""
    layers = {
        module(x.name): ALGORITHMS[plan.choice[x.name].kind]
        for x in rules.quantized(plan, inventory)
    }
    return {
        "producer": {"name": "mezzotint", "plan": plan.id},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "quantized_layers": layers,
            "exclude_modules": untouched(plan, inventory),
        },
    }


def entries(plan: Plan, inventory: Inventory) -> list[dict[str, Any]]:
    """The `quant_cfg`: everything off, then layer by layer what is on."""
    found: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer in rules.quantized(plan, inventory):
        kind, stem = plan.choice[layer.name].kind, module(layer.name)
        found.append({"quantizer_name": f"{stem}.weight_quantizer", "cfg": WEIGHTS[kind]})
        if kind == "fp8":
            found.append({"quantizer_name": f"{stem}.input_quantizer", "cfg": INPUTS})
    return found


def write(plan: Plan, inventory: Inventory, out: Path) -> None:
    text = json.dumps(config(plan, inventory), indent=2) + "\n"
    (out / "hf_quant_config.json").write_text(text, encoding="utf-8")
    lines = "\n".join(f"        {entry!r}," for entry in entries(plan, inventory))
    script = HEAD.format(plan=plan.id, entries=lines) + TAIL
    (out / "quantize.py").write_text(script, encoding="utf-8")
    text = f"""# Recipe for NVIDIA ModelOpt, plan {plan.id}

```
python quantize.py MODEL OUT
vllm serve OUT
```

hf_quant_config.json is what `quantized_layers` of the result must say. Rounding and its quality are
ModelOpt's; Mezzotint's promise is about its own rounding, so measure the result.
"""
    (out / "README.md").write_text(text, encoding="utf-8")
