"""compressed-tensors, format pack-quantized: what vLLM loads, and transformers too.

A quantized Linear NAME is, in model.safetensors,
    NAME.weight_packed      int32 [rows, ceil(cols bits / 32)]: codes counted from 0, one dense
                            little-endian bit stream per row
    NAME.weight_scale       [rows, groups] in the checkpoint's dtype
    NAME.weight_zero_point  int32 [ceil(rows bits / 32), groups], the stream runs along the rows
    NAME.weight_shape       int64 [2]
and config.json names for every scheme its modules in full: vLLM takes the first shard's scheme
for a fused layer without a word, so a regular expression that matches too little fails late.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import PlanError
from optimizer.formats import rules
from optimizer.formats.rules import Verdict
from optimizer.formats.runtime import Runtime
from optimizer.formats.safetensors import checkpoint
from optimizer.formats.safetensors.checkpoint import FILE, module, unstream, untouched, words
from optimizer.plan import Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor


def check(plan: Plan, inventory: Inventory, profile: Runtime) -> Verdict:
    """profile: vllm or transformers."""
    engine = profile.name
    errors = rules.executed(plan, profile) + rules.agreed(plan, inventory, profile)
    errors += rules.kinds(plan, inventory, engine, rules.linear_only)
    if errors:
        return Verdict(engine, tuple(errors))
    used = {plan.choice[layer.name] for layer in rules.quantized(plan, inventory)}
    stored = {p.name: f"pack-quantized, {p.bits} bits" for p in sorted(used)}
    size = checkpoint.size(plan, inventory, lambda x, p: _parts(x, p, inventory.dtype))
    return Verdict(engine, (), _notes(plan, inventory, engine), stored, size)


def _notes(plan: Plan, inventory: Inventory, engine: str) -> tuple[str, ...]:
    notes = []
    bits = {plan.choice[layer.name].bits for layer in rules.quantized(plan, inventory)}
    if engine == "vllm" and bits - {4, 8}:
        notes.append(
            f"{', '.join(map(str, sorted(bits - {4, 8})))} bits need an NVIDIA GPU (Humming kernels) "
            "and compressed-tensors 0.17 or newer; 4 and 8 run everywhere."
        )
    if inventory.dtype == "BF16":
        notes.append(
            "The model is bfloat16: the scales keep 8 of their 11 bits, which moves weights by "
            "up to 0.2 %. For exactly the plan's weights let the engine compute in float16."
        )
    return tuple(notes)


def config(plan: Plan, inventory: Inventory) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    targets: dict[Precision, list[str]] = {}
    for layer in rules.quantized(plan, inventory):
        targets.setdefault(plan.choice[layer.name], []).append(module(layer.name))
    groups = {
        f"group_{i}": {
            "targets": targets[precision],
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "weights": _scheme(precision),
        }
        for i, precision in enumerate(sorted(targets))
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": untouched(plan, inventory),
        "kv_cache_scheme": None,
    }


def _scheme(precision: Precision) -> dict[str, Any]:
    return {
        "num_bits": precision.bits,
        "type": "int",
        "symmetric": precision.symmetric,
        "strategy": "channel" if precision.group_size is None else "group",
        "group_size": precision.group_size,
        "dynamic": False,
        "actorder": None,
    }


def _parts(layer: Layer, precision: Precision, dtype: str) -> dict[str, tuple[str, list[int]]]:
    groups, stem = precision.groups(layer.cols), module(layer.name)
    parts = {
        f"{stem}.weight_packed": ("I32", [layer.rows, -(-layer.cols * precision.bits // 32)]),
        f"{stem}.weight_scale": (dtype, [layer.rows, groups]),
        f"{stem}.weight_shape": ("I64", [2]),
    }
    if not precision.symmetric:
        packed = [-(-layer.rows * precision.bits // 32), groups]
        parts[f"{stem}.weight_zero_point"] = ("I32", packed)
    return parts


# ---------------------------------------------------------------- write and read back


def write(
    plan: Plan, inventory: Inventory, packed: Mapping[str, Tensor], folder: Path, out: Path
) -> None:
    """packed: the plan's stored tensors. folder: what to copy beside the weights."""
    from optimizer.models.model import DTYPES

    def make(layer: Layer, precision: Precision) -> dict[str, Tensor]:
        return _compressed(layer, precision, packed, DTYPES[inventory.dtype])

    checkpoint.write(plan, inventory, packed, make, config(plan, inventory), folder, out)


def _compressed(
    layer: Layer, precision: Precision, packed: Mapping[str, Tensor], dtype: Any
) -> dict[str, Tensor]:
    import torch

    from optimizer.quantization.uniform import pack, unpack

    stem = module(layer.name)
    tensors = {
        f"{stem}.weight_packed": words(packed[f"{layer.name}.codes"]),
        f"{stem}.weight_scale": packed[f"{layer.name}.scales"].to(dtype),
        f"{stem}.weight_shape": torch.tensor([layer.rows, layer.cols]),
    }
    if not precision.symmetric:
        zeros = unpack(packed[f"{layer.name}.zeros"], precision, precision.groups(layer.cols))
        found = words(pack(zeros.T.contiguous(), precision))
        tensors[f"{stem}.weight_zero_point"] = found.T.contiguous()
    return tensors


def decode(folder: Path, plan: Plan, inventory: Inventory) -> dict[str, Tensor]:
    """What the file says, by its own config: layer -> W' [rows, cols] fp32. Raises PlanError."""
    import torch
    from safetensors import safe_open

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    schemes = {
        target: group["weights"]
        for group in settings["quantization_config"]["config_groups"].values()
        for target in group["targets"]
    }
    found = {}
    with safe_open(folder / FILE, framework="pt") as file:
        for layer in rules.quantized(plan, inventory):
            stem = module(layer.name)
            if stem not in schemes:
                raise PlanError(f"{folder} has no scheme for {stem}. Export it again.")
            scheme = schemes[stem]
            rows, cols = file.get_tensor(f"{stem}.weight_shape").tolist()
            codes = unstream(file.get_tensor(f"{stem}.weight_packed"), scheme["num_bits"], cols)
            scales = file.get_tensor(f"{stem}.weight_scale").float().unsqueeze(-1)
            zeros = torch.tensor(2.0 ** (scheme["num_bits"] - 1))
            if not scheme["symmetric"]:
                packed = file.get_tensor(f"{stem}.weight_zero_point").T.contiguous()
                zeros = unstream(packed, scheme["num_bits"], rows).T.unsqueeze(-1).float()
            levels = codes.float().view(rows, scales.shape[1], -1) - zeros
            found[layer.name] = (levels * scales).view(rows, cols)
    return found
