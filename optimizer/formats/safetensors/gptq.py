"""GPTQ's format with per-layer precisions (`dynamic`), as GPTQModel and vLLM (auto_gptq) load it.

A quantized Linear NAME is, in model.safetensors,
    NAME.qweight  int32 [cols bits / 32, rows]: codes counted from 0, a dense little-endian bit
                  stream down each column
    NAME.qzeros   int32 [groups, rows bits / 32]: zero points less one (version 1 of the format)
    NAME.scales   fp16 [groups, rows]
    NAME.g_idx    int32 [cols]: the group of every input
config.json names the commonest precision, and `dynamic` the layers that differ, by regular
expressions of which the first to match counts. GPTQModel matches the checkpoint's names and vLLM its
own, where q, k, v are one qkv_proj; a rule therefore spells both.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer import untrusted
from optimizer.errors import PlanError
from optimizer.formats import rules
from optimizer.formats.rules import Demands, Verdict
from optimizer.formats.safetensors import checkpoint
from optimizer.formats.safetensors.checkpoint import FILE, module, unstream, untouched, words
from optimizer.formats.safetensors.joined import architecture, declared
from optimizer.plan import Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor

USUAL = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
WORD = 32  # codes that fill whole words, whatever their bits
IN_VLLM = (4, 8)


def check(plan: Plan, inventory: Inventory, demands: Demands) -> Verdict:
    name, errors = demands.profile.name, demands.errors(plan, inventory)
    used = sorted({plan.choice[layer.name] for layer in rules.quantized(plan, inventory)})
    if not used:
        errors.append("A GPTQ checkpoint holds quantized layers, and this plan quantizes none.")
    if errors:
        return Verdict(name, tuple(errors))
    stored = {p.name: f"gptq, {p.bits} bits" for p in used}
    notes: list[str] = []
    odd = sorted({p.bits for p in used} - set(IN_VLLM))
    if odd:
        notes.append(
            f"vLLM 0.33 loads GPTQ files of 4 and 8 bits only, and this one has "
            f"{', '.join(map(str, odd))}: run it with GPTQModel, or export to=autoround or to=vllm."
        )
    size = checkpoint.size(plan, inventory, sizes)
    return Verdict(name, (), (*demands.notes, *notes), stored=stored, bytes=size)


def shaped(layer: Layer, precision: Precision) -> str | None:
    """Both dimensions are packed into words, so both must fill them."""
    if layer.rows % WORD or layer.cols % WORD:
        return f"its {layer.rows} rows and {layer.cols} columns must be multiples of {WORD}"
    return rules.linear_only(layer, precision)


def commonest(plan: Plan, inventory: Inventory) -> Precision:
    """What most weights have, so that the fewest layers need a rule."""
    found: Counter[Precision] = Counter()
    for layer in rules.quantized(plan, inventory):
        found[plan.choice[layer.name]] += layer.weights
    return max(sorted(found), key=lambda precision: found[precision])


def scheme(precision: Precision) -> dict[str, Any]:
    return {"bits": precision.bits, "group_size": precision.group_size or -1, "sym": True}


def config(plan: Plan, inventory: Inventory, folder: Path | None = None) -> dict[str, Any]:
    """The `quantization_config` of config.json. folder: the model's, for vLLM's names."""
    base = commonest(plan, inventory)
    head = [x for x in rules.quantized(plan, inventory) if x.kind == "head"]
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **scheme(base),
        "desc_act": False,
        "lm_head": bool(head),
        "pack_dtype": "int32",
        "dynamic": dynamic(plan, inventory, base, spellings(folder)),
    }


def dynamic(
    plan: Plan, inventory: Inventory, base: Precision, spelled: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Rules for what differs from `base`: `+:` gives another precision, `-:` leaves 16 bits."""
    rules_of: dict[str, dict[str, Any]] = {}
    for layer in rules.quantized(plan, inventory):
        precision = plan.choice[layer.name]
        if precision != base:
            rules_of["+:" + pattern(module(layer.name), layer, spelled)] = scheme(precision)
    layers = {module(layer.name): layer for layer in inventory.layers}
    for name in untouched(plan, inventory):
        if name != "lm_head":  # `lm_head` of the config says that
            rules_of["-:" + pattern(name, layers.get(name), spelled)] = {}
    return rules_of


def pattern(name: str, layer: Layer | None, spelled: Mapping[str, Sequence[str]]) -> str:
    """An anchored expression that finds a module by the checkpoint's name and by vLLM's. spelled:
    see `spellings`."""
    if layer is not None and layer.kind == "experts":  # one precision for all of a block
        inside = 1 if layer.expert is None else 2  # .gate_up_proj, or .7.gate_proj
        return rf"^{re.escape(name.rsplit('.', inside)[0])}(?:\..*)?$"
    parent, _, role = name.rpartition(".")
    if role not in spelled:
        return f"^{re.escape(name)}$"
    return rf"^{re.escape(parent)}\.(?:{'|'.join(spelled[role])})$"


def spellings(folder: Path | None) -> dict[str, list[str]]:
    """Role -> all names by which vLLM may ask for it: the roles that it is joined with, and the joined
    matrix's own. folder: of a model, whose architecture joins more than the usual."""
    known = {} if folder is None else declared()[1].get(architecture(folder), {})
    return {role: [*parts, whole] for whole, parts in (USUAL | known).items() for role in parts}


def sizes(layer: Layer, precision: Precision) -> dict[str, tuple[str, list[int]]]:
    groups, stem = precision.groups(layer.cols), module(layer.name)
    return {
        f"{stem}.qweight": ("I32", [layer.cols * precision.bits // WORD, layer.rows]),
        f"{stem}.qzeros": ("I32", [groups, layer.rows * precision.bits // WORD]),
        f"{stem}.scales": ("F16", [groups, layer.rows]),
        f"{stem}.g_idx": ("I32", [layer.cols]),
    }


# ---------------------------------------------------------------- write and read back


def write(
    plan: Plan, inventory: Inventory, packed: Mapping[str, Tensor], folder: Path, out: Path
) -> None:
    """packed: the plan's stored tensors. folder: what to copy beside the weights."""

    def make(layer: Layer, precision: Precision) -> dict[str, Tensor]:
        return tensors(layer, precision, packed)

    found = config(plan, inventory, folder)
    checkpoint.write(plan, inventory, packed, make, found, folder, out)
    # GPTQModel looks for its settings here first
    text = json.dumps(found, indent=2) + "\n"
    (out / "quantize_config.json").write_text(text, encoding="utf-8")


def tensors(layer: Layer, precision: Precision, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    from optimizer.quantization.uniform import pack

    groups, stem = precision.groups(layer.cols), module(layer.name)
    codes = packed[f"{layer.name}.codes"]
    middle = 2 ** (precision.bits - 1) - 1
    zeros = torch.full((groups, layer.rows), middle, dtype=torch.uint8, device=codes.device)
    columns = torch.arange(layer.cols, device=codes.device)
    return {
        f"{stem}.qweight": words(codes).T.contiguous(),
        f"{stem}.qzeros": words(pack(zeros, precision)),
        f"{stem}.scales": packed[f"{layer.name}.scales"].half().T.contiguous(),
        f"{stem}.g_idx": (columns // (layer.cols // groups)).int(),
    }


def decode(folder: Path, plan: Plan, inventory: Inventory) -> dict[str, Tensor]:
    """What the file says, by its own config: layer -> W' [rows, cols] fp32. Raises PlanError."""
    settings = untrusted.read(folder / "config.json", "keep")
    given = settings["quantization_config"]

    def bits(name: str) -> int | None:
        for rule, values in given["dynamic"].items():
            if re.match(rule[2:], name):
                return None if rule[0] == "-" else int(values["bits"])
        return int(given["bits"])

    return unpacked(folder, plan, inventory, bits)


def unpacked(
    folder: Path, plan: Plan, inventory: Inventory, bits: Callable[[str], int | None]
) -> dict[str, Tensor]:
    """bits: what the config gives a module, or None. Without g_idx, groups follow one another."""
    import torch
    from safetensors import safe_open

    found = {}
    with safe_open(folder / FILE, framework="pt") as file:
        for layer in rules.quantized(plan, inventory):
            stem = module(layer.name)
            width = bits(stem)
            if width is None:
                raise PlanError(f"{folder} has no precision for {stem}. Export it again.")
            codes = unstream(file.get_tensor(f"{stem}.qweight").T, width, layer.cols)
            zeros = unstream(file.get_tensor(f"{stem}.qzeros"), width, layer.rows) + 1
            scales = file.get_tensor(f"{stem}.scales").float()
            group = torch.arange(layer.cols, device=scales.device) // (layer.cols // len(scales))
            if f"{stem}.g_idx" in file.keys():  # noqa: SIM118  (safe_open has no __iter__)
                group = file.get_tensor(f"{stem}.g_idx").long()
            found[layer.name] = (codes - zeros.T[:, group]) * scales.T[:, group]
    return found
