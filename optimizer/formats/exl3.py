"""EXL3: a recipe that puts a model together from finished conversions of whole widths.

`convert.py` of exllamav3 takes one width for all layers. `util/recompile.py -i BASE -o OUT -or FILE`
copies tensors of other conversions over those of BASE, as a YAML file says:
    sources:   [{id, model_dir}]
    overrides: [{key: glob of tensors, source: id}], the later wins
A plan's integer widths are EXL3's; its trellis has no groups, so only the allocation is carried.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from optimizer.formats import rules
from optimizer.formats.safetensors.checkpoint import module
from optimizer.plan import Inventory, Layer, Plan, Precision

EXECUTES = ["none", "int[2-6]_*", "int8_*"]
EXPERTS = "tensor"
NOTES = (
    "EXL3 rounds with its own trellis at these widths, so what the result loses has to be measured; "
    "embeddings stay in 16 bits.",
)
HEADS = 6  # exllamav3's own width of the output head, where nothing else is said


def holds(layer: Layer, precision: Precision) -> str | None:
    """None, or why EXL3 can't hold the layer."""
    return rules.linear_only(layer, precision)


def refused(plan: Plan, inventory: Inventory) -> list[str]:
    """What speaks against a plan as a whole: the rule, the value and the remedy."""
    bare = [x.name for x in inventory.layers if x.kind == "linear" and x.block is not None]
    bare = [name for name in bare if plan.choice[name].kind == "none"]
    if not bare:
        return []
    return [
        f"exl3 quantizes every Linear layer of the blocks, and the plan leaves {rules.listed(bare)} "
        "untouched. Make the plan without 16 in palette.bits."
    ]


def base_of(plan: Plan, inventory: Inventory) -> int:
    """The width of most weights, whose conversion the others are copied into."""
    counts: Counter[int] = Counter()
    for layer in rules.quantized(plan, inventory):
        counts[plan.choice[layer.name].bits] += layer.weights
    return min(counts, key=lambda bits: (-counts[bits], bits))


def head_of(plan: Plan, inventory: Inventory) -> int:
    """The width of the output head."""
    heads = [plan.choice[x.name] for x in inventory.layers if x.kind == "head"]
    return next((p.bits for p in heads if p.kind == "int"), HEADS)


def overrides(plan: Plan, inventory: Inventory) -> str:
    """The YAML file. JSON is YAML, too: names are quoted as JSON has them."""
    base = base_of(plan, inventory)
    layers = [x for x in rules.quantized(plan, inventory) if x.kind != "head"]
    widths = sorted({plan.choice[x.name].bits for x in layers} - {base})
    lines = ["sources:"] if widths else ["sources: []"]
    for bits in widths:
        lines += [f"  - id: {bits}", f"    model_dir: {json.dumps(f'./exl3-{bits}bpw')}"]
    lines.append("overrides:" if widths else "overrides: []")
    for layer in layers:
        bits = plan.choice[layer.name].bits
        if bits != base:
            key = json.dumps(f"{module(layer.name)}.*")
            lines += [f"  - key: {key}", f"    source: {bits}"]
    return "\n".join(lines) + "\n"


def write(plan: Plan, inventory: Inventory, out: Path) -> None:
    (out / "overrides.yaml").write_text(overrides(plan, inventory), encoding="utf-8")
    base, head = base_of(plan, inventory), head_of(plan, inventory)
    layers = [x for x in rules.quantized(plan, inventory) if x.kind != "head"]
    widths = sorted({base, *(plan.choice[x.name].bits for x in layers)})
    made = "\n".join(
        f"python convert.py -i MODEL -o exl3-{bits}bpw -w work-{bits} -b {bits} -hb {head}"
        for bits in widths
    )
    text = f"""# Recipe for ExLlamaV3, plan {plan.id}

In a checkout of exllamav3, with MODEL the reference:

```
{made}
python util/recompile.py -i exl3-{base}bpw -o OUT -or overrides.yaml
```

EXL3 quantizes every Linear layer of the blocks, and the head. Rounding and its quality are EXL3's;
Mezzotint's promise is about its own rounding, so measure the result.
"""
    (out / "README.md").write_text(text, encoding="utf-8")
