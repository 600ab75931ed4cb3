"""compressed-tensors, format pack-quantized: what vLLM loads, and transformers too.

A quantized Linear NAME is, in model.safetensors,
    NAME.weight_packed      int32 [rows, ceil(cols bits / 32)]: codes counted from 0, one dense
                            little-endian bit stream per row
    NAME.weight_scale       [rows, groups] in the checkpoint's dtype
    NAME.weight_zero_point  int32 [ceil(rows bits / 32), groups], the stream runs along the rows
    NAME.weight_shape       int64 [2]
and config.json names for every scheme its modules in full: vLLM takes the first shard's scheme
for a fused layer without a word, so a regular expression that matches too little fails late.

transformers is told more (`loader`): its own names of modules; the experts' scheme where it looks for
it, in the first group with an expression about experts; and `dequantize` where a model's class touches
weights while it is loaded. The scales are the plan's own fp16, whatever the model's dtype: an engine
that computes in bfloat16 rounds them itself, to the numbers that would have been written otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer import untrusted
from optimizer.errors import PlanError
from optimizer.formats import rules
from optimizer.formats.rules import Demands, Groups, Verdict
from optimizer.formats.runtime import Runtime
from optimizer.formats.safetensors import checkpoint
from optimizer.formats.safetensors.checkpoint import FILE, module, unstream, untouched, words
from optimizer.formats.safetensors.loader import Loading, pieces
from optimizer.plan import Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor


EXPERTS_IN_HALVES = (
    "transformers keeps the untouched experts in the checkpoint's 16 bits and multiplies them so, "
    "also where the model is loaded in float32; its logits then differ from the plan's by what that "
    "rounds, as they do when it computes in bfloat16."
)


def demands(profile: Runtime, inventory: Inventory, loading: Loading) -> Demands:
    """Of transformers. Where a layer of the scope can only be unpacked at once, all dense layers that
    are quantized have one scheme; else each has its own."""
    bare = loading.bare

    def groups(layers: Sequence[Layer]) -> Groups:
        at_once = any(layer.name in bare for layer in layers)
        found: dict[str, list[str]] = {}
        for layer in layers:
            dense = at_once and layer.name in loading.modules
            key = "merged" if layer.name in loading.merged else "dense" if dense else layer.name
            found.setdefault(key, []).append(layer.name)
        return tuple(tuple(names) for names in found.values())

    def agreed(plan: Plan) -> Groups:
        real = [x.name for x in rules.quantized(plan, inventory) if x.name in loading.modules]
        merged = tuple(x.name for x in inventory.layers if x.name in loading.merged)
        return (merged, tuple(real)) if any(name in bare for name in real) else (merged,)

    beside = frozenset(loading.modules)
    return Demands(profile, groups, lambda x, _p: loading.reason(x), agreed, beside)


def check(
    plan: Plan, inventory: Inventory, demands: Demands, loading: Loading | None = None
) -> Verdict:
    """For vllm, or, with its `loading`, for transformers."""
    engine = demands.profile.name
    errors = demands.errors(plan, inventory)
    if errors:
        return Verdict(engine, tuple(errors))
    used = {plan.choice[layer.name] for layer in rules.quantized(plan, inventory)}
    stored = {p.name: f"pack-quantized, {p.bits} bits" for p in sorted(used)}
    split = {} if loading is None else _taken_apart(inventory, loading)
    size = checkpoint.size(plan, inventory, _parts, split)
    notes = demands.notes + _notes(plan, inventory, engine)
    if loading is not None and used and _experts_in_halves(plan, inventory, loading):
        notes += (EXPERTS_IN_HALVES,)
    return Verdict(engine, (), notes, stored=stored, bytes=size)


def _experts_in_halves(plan: Plan, inventory: Inventory, loading: Loading) -> bool:
    merged = [x for x in inventory.layers if x.name in loading.merged]
    return any(plan.choice[x.name].kind == "none" and x.dtype != "F32" for x in merged)


def _taken_apart(inventory: Inventory, loading: Loading) -> dict[str, checkpoint.Pieces]:
    return {x.name: pieces(x) for x in inventory.layers if x.name in loading.split}


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
            "The model is bfloat16: an engine that computes so keeps 8 of the scales' 11 bits, which "
            "moves weights by up to 0.2 %. For exactly the plan's weights let it compute in float16."
        )
    return tuple(notes)


def config(plan: Plan, inventory: Inventory, loading: Loading | None = None) -> dict[str, Any]:
    """The `quantization_config` of config.json. loading: for transformers."""
    targets: dict[Precision, list[str]] = {}
    merged = frozenset() if loading is None else loading.merged
    for layer in rules.quantized(plan, inventory):
        if layer.name not in merged:
            name = module(layer.name) if loading is None else loading.modules[layer.name]
            targets.setdefault(plan.choice[layer.name], []).append(name)
    groups = [_group(targets[precision], _scheme(precision)) for precision in sorted(targets)]
    found: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "ignore": untouched(plan, inventory),
        "kv_cache_scheme": None,
    }
    if loading is not None:
        groups += _experts(plan, inventory, loading)
        layers = rules.quantized(plan, inventory)
        if any(layer.name in loading.bare for layer in layers):
            found["dequantize"] = True
    found["config_groups"] = {f"group_{i}": group for i, group in enumerate(groups)}
    return found


def _group(
    targets: list[str], scheme: dict[str, Any], form: str = "pack-quantized"
) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": form,
        "input_activations": None,
        "output_activations": None,
        "weights": scheme,
    }


def _experts(plan: Plan, inventory: Inventory, loading: Loading) -> list[dict[str, Any]]:
    """The group of what transformers merges, which it takes to be the first with an expression that
    mentions experts (integrations/compressed_tensors.py). Beside quantized layers its converter for
    packed weights drops merged ones that aren't packed, and only that for 8-bit floats hands them on;
    so untouched experts get a group of that kind, whose expression names no Linear."""
    merged = [x for x in inventory.layers if x.name in loading.merged]
    if not merged:
        return []
    precision = plan.choice[merged[0].name]
    if precision.kind == "none":
        scheme = _scheme(precision) | {"num_bits": 8, "type": "float", "symmetric": True}
        return [_group([r"re:.*\.experts$"], scheme, "float-quantized")]
    names = sorted({_any_number(module(x.name)) for x in merged})
    return [_group([f"re:^(?:experts|{'|'.join(names)})$"], _scheme(precision))]


def _any_number(name: str) -> str:
    """An expression for a name and those that differ from it in the numbers of blocks and experts."""
    return r"\.".join(r"\d+" if x.isdigit() else re.escape(x) for x in name.split("."))


def _named(target: str, names: Sequence[str]) -> bool:
    expression = target.removeprefix("re:")
    if expression == target:
        return target in names
    return any(re.match(expression, name) for name in names)


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


def _parts(layer: Layer, precision: Precision) -> dict[str, tuple[str, list[int]]]:
    groups, stem = precision.groups(layer.cols), module(layer.name)
    parts = {
        f"{stem}.weight_packed": ("I32", [layer.rows, -(-layer.cols * precision.bits // 32)]),
        f"{stem}.weight_scale": ("F16", [layer.rows, groups]),
        f"{stem}.weight_shape": ("I64", [2]),
    }
    if not precision.symmetric:
        packed = [-(-layer.rows * precision.bits // 32), groups]
        parts[f"{stem}.weight_zero_point"] = ("I32", packed)
    return parts


# ---------------------------------------------------------------- write and read back


def write(
    plan: Plan,
    inventory: Inventory,
    packed: Mapping[str, Tensor],
    folder: Path,
    out: Path,
    loading: Loading | None = None,
) -> None:
    """packed: the plan's stored tensors. folder: what to copy beside the weights."""

    def make(layer: Layer, precision: Precision) -> dict[str, Tensor]:
        return _compressed(layer, precision, packed)

    split = {} if loading is None else _taken_apart(inventory, loading)
    settings = config(plan, inventory, loading)
    checkpoint.write(plan, inventory, packed, make, settings, folder, out, split)


def _compressed(
    layer: Layer, precision: Precision, packed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    import torch

    from optimizer.quantization.uniform import pack, unpack

    stem = module(layer.name)
    tensors = {
        f"{stem}.weight_packed": words(packed[f"{layer.name}.codes"]),
        f"{stem}.weight_scale": packed[f"{layer.name}.scales"].half(),
        f"{stem}.weight_shape": torch.tensor([layer.rows, layer.cols], device="cpu"),
    }
    if not precision.symmetric:
        zeros = unpack(packed[f"{layer.name}.zeros"], precision, precision.groups(layer.cols))
        found = words(pack(zeros.T.contiguous(), precision))
        tensors[f"{stem}.weight_zero_point"] = found.T.contiguous()
    return tensors


def decode(
    folder: Path, plan: Plan, inventory: Inventory, loading: Loading | None = None
) -> dict[str, Tensor]:
    """What the file says, by its own config: layer -> W' [rows, cols] fp32. Raises PlanError."""
    from safetensors import safe_open

    settings = untrusted.read(folder / "config.json", "keep")
    groups = settings["quantization_config"]["config_groups"].values()
    schemes = [(target, group["weights"]) for group in groups for target in group["targets"]]
    modules = {} if loading is None else loading.modules
    found = {}
    with safe_open(folder / FILE, framework="pt") as file:
        for layer in rules.quantized(plan, inventory):
            stem = module(layer.name)
            names = (stem, modules.get(layer.name, stem))
            scheme = next((s for target, s in schemes if _named(target, names)), None)
            if scheme is None:
                raise PlanError(f"{folder} has no scheme for {stem}. Export it again.")
            rows, cols = file.get_tensor(f"{stem}.weight_shape").tolist()
            codes = unstream(file.get_tensor(f"{stem}.weight_packed"), scheme["num_bits"], cols)
            scales = file.get_tensor(f"{stem}.weight_scale").float().unsqueeze(-1)
            zeros: Any = 2.0 ** (scheme["num_bits"] - 1)
            if not scheme["symmetric"]:
                packed = file.get_tensor(f"{stem}.weight_zero_point").T.contiguous()
                zeros = unstream(packed, scheme["num_bits"], rows).T.unsqueeze(-1).float()
            levels = codes.float().view(rows, scales.shape[1], -1) - zeros
            found[layer.name] = (levels * scales).view(rows, cols)
    return found
