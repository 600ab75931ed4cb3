"""compressed-tensors: what vLLM loads, and transformers too. For floats see `floating`.

A Linear NAME that is quantized to integers is, in model.safetensors (format pack-quantized),
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
from optimizer.formats.safetensors import checkpoint, floating
from optimizer.formats.safetensors.checkpoint import FILE, module, unstream, untouched, words
from optimizer.formats.safetensors.joined import joined
from optimizer.formats.safetensors.loader import Loading, pieces
from optimizer.plan import FLOATS, UNTOUCHED, Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor


EXPERTS_IN_HALVES = (
    "transformers keeps the untouched experts in the checkpoint's 16 bits and multiplies them so, "
    "also where the model is loaded in float32; its logits then differ from the plan's by what that "
    "rounds, as they do when it computes in bfloat16."
)

IN_BFLOAT16 = (
    "compressed-tensors 0.20 unpacks 4-bit floats beside other precisions to bfloat16, so config.json "
    "says dtype=bfloat16 and transformers computes in that; another dtype fails there."
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

    def holds(layer: Layer, precision: Precision) -> str | None:
        if layer.name in loading.merged and precision.kind in FLOATS.keys() - {"fp8"}:
            return (
                f"transformers merges experts of integers and of fp8 only, not of {precision.name}"
            )
        return loading.reason(layer)

    return Demands(profile, groups, holds, agreed, frozenset(loading.modules))


def check(
    plan: Plan, inventory: Inventory, demands: Demands, loading: Loading | None = None
) -> Verdict:
    """For vllm, or, with its `loading`, for transformers."""
    engine = demands.profile.name
    errors = demands.errors(plan, inventory)
    if errors:
        return Verdict(engine, tuple(errors))
    used = {plan.choice[layer.name] for layer in rules.quantized(plan, inventory)}
    stored = {p.name: f"{form(p)}, {p.bits} bits" for p in sorted(used)}
    split = {} if loading is None else _taken_apart(inventory, loading)
    size = checkpoint.size(plan, inventory, _parts, split)
    notes = demands.notes + _notes(plan, inventory, engine)
    if _bfloat16(plan, loading):
        notes += (IN_BFLOAT16,)
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
    used = {plan.choice[layer.name] for layer in rules.quantized(plan, inventory)}
    bits = {p.bits for p in used if p.kind == "int"}
    kinds = {p.kind.removesuffix("_block") for p in used}
    if engine == "vllm":
        notes += [text for kind, text in floating.PLATFORMS.items() if kind in kinds]
    if engine == "vllm" and bits - {4, 8}:
        notes.append(
            f"{', '.join(map(str, sorted(bits - {4, 8})))} bits need an NVIDIA GPU (Humming kernels) "
            "and compressed-tensors 0.17 or newer; 4 and 8 run everywhere."
        )
    if inventory.dtype == "BF16" and (bits or not used):
        notes.append(
            "The model is bfloat16: an engine that computes so keeps 8 of the scales' 11 bits, which "
            "moves weights by up to 0.2 %. For exactly the plan's weights let it compute in float16."
        )
    return tuple(notes)


def config(
    plan: Plan, inventory: Inventory, loading: Loading | None = None, activations: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of config.json. loading: for transformers. activations: see
    `formats.format.Subject`."""
    targets: dict[Precision, list[str]] = {}
    merged = frozenset() if loading is None else loading.merged
    for layer in rules.quantized(plan, inventory):
        if layer.name not in merged:
            name = module(layer.name) if loading is None else loading.modules[layer.name]
            targets.setdefault(plan.choice[layer.name], []).append(name)
    groups = [
        _group(targets[p], _scheme(p), form(p), floating.inputs(p) if activations else None)
        for p in sorted(targets)
    ]
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
        if any(layer.name in loading.bare for layer in layers) or _one_of_four(plan, loading):
            found["dequantize"] = True
    forms = {form(plan.choice[x.name]) for x in rules.quantized(plan, inventory)}
    if forms:
        found["format"] = min(forms) if len(forms) == 1 else "mixed-precision"
    found["config_groups"] = {f"group_{i}": group for i, group in enumerate(groups)}
    return found


def _small(plan: Plan, loading: Loading) -> set[Precision]:
    """All precisions of dense layers, if one of them is a float of four bits: the package unpacks it
    to bfloat16 when the model first runs, whatever the model's dtype."""
    found = {plan.choice[name] for name in loading.modules} - {UNTOUCHED}
    return found if any(p.kind in FLOATS and p.bits == 4 for p in found) else set()


def _one_of_four(plan: Plan, loading: Loading) -> bool:
    """Whether all dense layers can be unpacked as they are loaded, to the model's dtype."""
    return len(_small(plan, loading)) == 1


def _bfloat16(plan: Plan, loading: Loading | None) -> bool:
    """Whether transformers must compute in bfloat16."""
    return loading is not None and len(_small(plan, loading)) > 1


def form(precision: Precision) -> str:
    """compressed-tensors' word for how a layer lies in the file."""
    return floating.FORMS.get(precision.kind, "pack-quantized")


def _group(
    targets: list[str], scheme: dict[str, Any], how: str, inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "targets": targets,
        "format": how,
        "input_activations": inputs,
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
        scheme = _scheme(Precision.floating("fp8"))
        return [_group([r"re:.*\.experts$"], scheme, "float-quantized")]
    names = sorted({_any_number(module(x.name)) for x in merged})
    own = [f"re:^(?:experts|{'|'.join(names)})$"]
    return [_group(own, _scheme(precision), form(precision))]


def _any_number(name: str) -> str:
    """An expression for a name and those that differ from it in the numbers of blocks and experts."""
    return r"\.".join(r"\d+" if x.isdigit() else re.escape(x) for x in name.split("."))


def _named(target: str, names: Sequence[str]) -> bool:
    expression = target.removeprefix("re:")
    if expression == target:
        return target in names
    return any(re.match(expression, name) for name in names)


def _scheme(precision: Precision) -> dict[str, Any]:
    if precision.kind in FLOATS:
        return floating.scheme(precision)
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
    if precision.kind in FLOATS:
        return floating.parts(layer, precision)
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
    activations: bool = False,
) -> None:
    """packed: the plan's stored tensors. folder: what to copy beside the weights."""
    if loading is None:
        groups = joined(floating.VLLM, folder).groups(inventory.layers)
        packed = floating.together(plan, inventory, packed, groups)

    def make(layer: Layer, precision: Precision) -> dict[str, Tensor]:
        return _compressed(layer, precision, packed)

    split = {} if loading is None else _taken_apart(inventory, loading)
    settings = config(plan, inventory, loading, activations)
    dtype = "bfloat16" if _bfloat16(plan, loading) else None
    checkpoint.write(plan, inventory, packed, make, settings, folder, out, split, dtype)


def _compressed(
    layer: Layer, precision: Precision, packed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    import torch

    from optimizer.quantization.uniform import pack, unpack

    if precision.kind in FLOATS:
        return floating.tensors(layer, precision, packed)
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
            if scheme["type"] == "float":
                found[layer.name] = floating.decoded(file.get_tensor, stem, scheme)
                continue
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
