"""vLLM's online quantization: 16-bit weights that vLLM rounds as it loads them, layer by layer.

    vllm serve MODEL --quantization online --quantization-config "$(cat online.json)"
(vLLM 0.33, vllm/config/quantization.py: `targets`, expressions after `re:` -> a scheme's name; at most
one matches a layer, and joined ones must agree; `ignore`, names of single parts.) vLLM multiplies with
activations in 8 bits where its scheme has them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from optimizer.formats import rules
from optimizer.formats.safetensors.checkpoint import module, untouched
from optimizer.plan import Inventory, Layer, Plan, Precision

EXECUTES = ["none", "mxfp4", "fp8", "fp8_block"]
EXPERTS = "block"
NOTES = (
    "vLLM rounds by itself as it loads, to nearest, and activations to 8 bits with FP8: measure the "
    "result.",
)
SCHEMES = {"mxfp4": "mxfp4", "fp8": "fp8_per_channel", "fp8_block": "fp8_per_block"}
FILE = "online.json"


def holds(layer: Layer, precision: Precision) -> str | None:
    """None, or why vLLM can't round the layer by itself."""
    if layer.kind == "head":
        return "vLLM's online quantization takes the Linear layers of blocks, not the head"
    return rules.linear_only(layer, precision)


def config(plan: Plan, inventory: Inventory) -> dict[str, Any]:
    """For `--quantization-config`."""
    targets = {
        f"re:^{re.escape(module(x.name))}$": SCHEMES[plan.choice[x.name].kind]
        for x in rules.quantized(plan, inventory)
    }
    return {"targets": targets, "ignore": untouched(plan, inventory)}


def write(plan: Plan, inventory: Inventory, out: Path) -> None:
    text = json.dumps(config(plan, inventory), indent=2) + "\n"
    (out / FILE).write_text(text, encoding="utf-8")
    text = f"""# Recipe for vLLM's online quantization, plan {plan.id}

```
vllm serve MODEL --quantization online --quantization-config "$(cat {FILE})"
```

MODEL is the reference with its 16-bit weights: they are rounded as they are loaded, to nearest.
MXFP4 is multiplied as such on Blackwell, FP8 on Ada, Hopper and later; earlier GPUs unpack the
weights. Mezzotint's promise is about its own rounding, so measure the result.
"""
    (out / "README.md").write_text(text, encoding="utf-8")
