"""AutoRound's format: what transformers loads with the auto-round package, and vLLM (inc).

The tensors are GPTQ's (see `gptq`, version 1 of the zero points, no g_idx). config.json names the
commonest precision, the blocks that it reaches, and in `extra_config` every module that differs, in
full and as the checkpoint has it: vLLM looks its joined layers up part by part, and refuses parts
that disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer import untrusted
from optimizer.formats import rules
from optimizer.formats.rules import Demands, Verdict
from optimizer.formats.safetensors import checkpoint, gptq
from optimizer.formats.safetensors.checkpoint import module, untouched
from optimizer.formats.safetensors.loader import Loading
from optimizer.plan import Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor


def holds(loading: Loading) -> Callable[[Layer, Precision], str | None]:
    """loading: transformers', which puts packed modules in the place of Linear ones."""

    def reason(layer: Layer, precision: Precision) -> str | None:
        if layer.name in loading.bare:
            return "its model's class in transformers touches its weight while it is loaded"
        return gptq.shaped(layer, precision)

    return reason


def check(plan: Plan, inventory: Inventory, demands: Demands) -> Verdict:
    name, errors = demands.profile.name, demands.errors(plan, inventory)
    used = sorted({plan.choice[layer.name] for layer in rules.quantized(plan, inventory)})
    if not used:
        errors.append("An AutoRound checkpoint holds quantized layers; this plan quantizes none.")
    if errors:
        return Verdict(name, tuple(errors))
    odd = sorted({p.bits for p in used} - set(gptq.IN_VLLM))
    notes = ["auto-round's CPU kernels compute in 16 bits; load with dtype float16 or bfloat16."]
    if odd:
        notes.append(
            f"{', '.join(map(str, odd))} bits need an NVIDIA GPU in vLLM (Humming kernels); 4 and "
            "8 run on its other kernels, too."
        )
    stored = {p.name: f"auto_round:auto_gptq, {p.bits} bits" for p in used}
    size = checkpoint.size(plan, inventory, sizes)
    return Verdict(name, (), (*demands.notes, *notes), stored=stored, bytes=size)


def sizes(layer: Layer, precision: Precision) -> dict[str, tuple[str, list[int]]]:
    found = gptq.sizes(layer, precision)
    return {name: part for name, part in found.items() if not name.endswith(".g_idx")}


def config(plan: Plan, inventory: Inventory) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    base = gptq.commonest(plan, inventory)
    extra: dict[str, dict[str, Any]] = {}
    for layer in rules.quantized(plan, inventory):
        precision = plan.choice[layer.name]
        if precision != base or layer.block is None:
            extra[module(layer.name)] = {**gptq.scheme(precision), "data_type": "int"}
    for name in untouched(plan, inventory):
        extra[name] = {"bits": 16, "data_type": "float"}
    blocks = {x.name.partition(f".{x.block}.")[0] for x in inventory.layers if x.block is not None}
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        **gptq.scheme(base),
        "data_type": "int",
        "block_name_to_quantize": ",".join(sorted(blocks)),
        "extra_config": extra,
    }


def write(
    plan: Plan, inventory: Inventory, packed: Mapping[str, Tensor], folder: Path, out: Path
) -> None:
    """packed: the plan's stored tensors. folder: what to copy beside the weights."""

    def make(layer: Layer, precision: Precision) -> dict[str, Tensor]:
        found = gptq.tensors(layer, precision, packed)
        return {name: part for name, part in found.items() if not name.endswith(".g_idx")}

    checkpoint.write(plan, inventory, packed, make, config(plan, inventory), folder, out)


def decode(folder: Path, plan: Plan, inventory: Inventory) -> dict[str, Tensor]:
    """What the file says, by its own config: layer -> W' [rows, cols] fp32. Raises PlanError."""
    settings = untrusted.read(folder / "config.json", "keep")
    given = settings["quantization_config"]

    def bits(name: str) -> int | None:
        found = int(given["extra_config"].get(name, given)["bits"])
        return None if found >= 16 else found

    return gptq.unpacked(folder, plan, inventory, bits)
