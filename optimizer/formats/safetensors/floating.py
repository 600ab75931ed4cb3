"""Floats in compressed-tensors: nvfp4-pack-quantized, mxfp4-pack-quantized and float-quantized.

A quantized Linear NAME is, in model.safetensors,
    nvfp4  NAME.weight_packed        uint8 [rows, cols / 2], the first of two codes low
           NAME.weight_scale         E4M3 [rows, cols / 16]
           NAME.weight_global_scale  fp32 [1], the inverse of our scale of the tensor
    mxfp4  NAME.weight_packed        as above
           NAME.weight_scale         uint8 [rows, cols / 32], E8M0
    fp8    NAME.weight               E4M3 [rows, cols]
           NAME.weight_scale         fp32 [rows, 1], or one for every 128 x 128

(compressed-tensors 0.20, compressors/nvfp4, mxfp4, naive_quantized.) Activations stay in 16 bits, so
that an engine computes what was measured; unless it is told to round them as well (`inputs`).

vLLM gives all parts of a joined matrix the largest of their global scales, without a word
(compressed_tensors_w4a16_nvfp4.py); so they are written with one, see `together`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from optimizer.errors import PlanError
from optimizer.formats import rules
from optimizer.formats.rules import Groups, Verdict
from optimizer.formats.runtime import Runtime
from optimizer.formats.safetensors.checkpoint import module
from optimizer.plan import Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor

FORMS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "fp8": "float-quantized",
    "fp8_block": "float-quantized",
}
STRATEGIES = {"nvfp4": "tensor_group", "mxfp4": "group", "fp8": "channel", "fp8_block": "block"}
SCALES = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}
BLOCK = 128
VLLM = Runtime(
    name="vllm",
    fused=[["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]],  # in every model
    experts="block",
)
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INPUTS: dict[str, dict[str, Any]] = {
    "fp8": {"strategy": "token"},
    "fp8_block": {"strategy": "group", "group_size": BLOCK},
    "mxfp4": {
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    },
}
_BEFORE = "and with activations in 16 bits, vLLM unpacks as it multiplies (Marlin, 7.5 and newer)."
PLATFORMS = {  # kind -> what a person should know of GPUs
    "nvfp4": f"Blackwell (compute capability 10) multiplies NVFP4; before it, {_BEFORE}",
    "mxfp4": f"Blackwell (compute capability 10) multiplies MXFP4; before it, {_BEFORE}",
    "fp8": f"Ada and Hopper (compute capability 8.9 and 9) multiply FP8; before them, {_BEFORE}",
}


def holds(layer: Layer, precision: Precision) -> str | None:
    """None, or why vLLM can't hold the layer."""
    if precision.kind == "fp8_block" and layer.rows % BLOCK and layer.role != "down_proj":
        return f"it joins layers of whole blocks of {BLOCK} rows, and this has {layer.rows}"
    return rules.linear_only(layer, precision)


def scheme(precision: Precision) -> dict[str, Any]:
    """The `weights` of a config group."""
    found: dict[str, Any] = {
        "num_bits": precision.bits,
        "type": "float",
        "symmetric": True,
        "strategy": STRATEGIES[precision.kind],
        "group_size": precision.group_size if precision.bits == 4 else None,
        "dynamic": False,
        "actorder": None,
    }
    if precision.kind == "fp8_block":
        found["block_structure"] = [BLOCK, BLOCK]
    if precision.kind in SCALES:
        found["scale_dtype"] = found["zp_dtype"] = SCALES[precision.kind]
    return found


def inputs(precision: Precision) -> dict[str, Any] | None:
    """The `input_activations` of a config group, rounded as the model runs; None where they stay in 16
    bits: NVFP4's need a scale of the tensor from calibration."""
    if precision.kind not in INPUTS:
        return None
    return {
        "num_bits": precision.bits,
        "type": "float",
        "symmetric": True,
        "dynamic": True,
        **INPUTS[precision.kind],
    }


def multiplied(plan: Plan, verdict: Verdict) -> Verdict:
    """The verdict on a plan whose layers' inputs are rounded, too."""
    kinds = sorted({p.kind for p in plan.choice.values()} & INPUTS.keys())
    if verdict.errors:
        return verdict
    if not kinds:
        why = f"activations=true rounds the inputs of {', '.join(INPUTS)}; the plan has none of them."
        return Verdict(verdict.engine, (f"{why} Leave it out.",))
    note = (
        f"The inputs of {', '.join(kinds)} are rounded as the model runs, which the plan's loss "
        "doesn't count: measure the result."
    )
    return rules.noted(verdict, (note,))


def parts(layer: Layer, precision: Precision) -> dict[str, tuple[str, list[int]]]:
    """The tensors that stand for a layer: name -> safetensors' dtype, shape."""
    stem = module(layer.name)
    scale = {"nvfp4": "F8_E4M3", "mxfp4": "U8"}.get(precision.kind, "F32")
    _, shape = precision.parts(layer.rows, layer.cols)["scales"]
    found = {f"{stem}.weight_scale": (scale, list(shape))}
    if precision.bits == 8:
        return found | {layer.name: ("F8_E4M3", [layer.rows, layer.cols])}
    found[f"{stem}.weight_packed"] = ("U8", [layer.rows, layer.cols // 2])
    if precision.kind == "nvfp4":
        found[f"{stem}.weight_global_scale"] = ("F32", [1])
    return found


def tensors(layer: Layer, precision: Precision, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """packed: the plan's stored tensors, named LAYER.PART."""
    import torch

    stem, codes, scales = (
        module(layer.name),
        packed[f"{layer.name}.codes"],
        packed[f"{layer.name}.scales"],
    )
    if precision.bits == 8:
        own = codes.contiguous().view(torch.float8_e4m3fn)
        return {layer.name: own, f"{stem}.weight_scale": scales}
    found = {f"{stem}.weight_packed": codes, f"{stem}.weight_scale": scales}
    if precision.kind == "nvfp4":
        found[f"{stem}.weight_scale"] = scales.contiguous().view(torch.float8_e4m3fn)
        found[f"{stem}.weight_global_scale"] = 1 / packed[f"{layer.name}.scale"].view(1)
    return found


def together(
    plan: Plan, inventory: Inventory, packed: Mapping[str, Tensor], joined: Groups
) -> dict[str, Tensor]:
    """`packed` with one scale of the tensor for layers that an engine joins; the weights stay.
    Raises PlanError where no scale holds all of them."""
    from optimizer.quantization.floats import Floats

    found = dict(packed)
    layers = {x.name: x for x in inventory.layers}
    for group in (part for whole in joined for part in _matrices(whole, layers)):
        own = [name for name in group if plan.choice[name].kind == "nvfp4"]
        scales = {name: float(packed[f"{name}.scale"]) for name in own}
        largest = max(scales.values(), default=0.0)
        for name in (name for name in own if scales[name] != largest):
            stored = {
                suffix: packed[f"{name}.{suffix}"] for suffix in ("codes", "scales", "scale")
            }
            moved = Floats.unpack(stored, plan.choice[name]).shifted(largest)
            if moved is None:
                raise PlanError(
                    f"vLLM loads {', '.join(group)} with one NVFP4 scale of the tensor, and theirs "
                    f"are too far apart ({scales[name]:g} and {largest:g}). Pin them to another "
                    f"precision, such as policy.pins=['{name} = fp8']."
                )
            found |= {f"{name}.{suffix}": part for suffix, part in moved.pack().items()}
    return found


def _matrices(group: tuple[str, ...], layers: Mapping[str, Layer]) -> list[list[str]]:
    """Of layers with one precision together, those that are one matrix: an expert's gate and up."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name in group:
        layer = layers[name]
        key: tuple[object, ...] = ()
        if layer.kind == "experts":
            key = (name.rpartition(f".{layer.role}")[0], layer.role == "down_proj")
        found.setdefault(key, []).append(name)
    return list(found.values())


def decoded(get: Callable[[str], Tensor], stem: str, weights: Mapping[str, Any]) -> Tensor:
    """What the file says by its own config, W' [rows, cols] fp32. weights: of the config group."""
    import torch

    scale = get(f"{stem}.weight_scale")
    if weights["num_bits"] == 8:
        value = get(f"{stem}.weight").float()
        if weights["strategy"] == "block":
            high, wide = weights["block_structure"]
            spread = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)
            return value * spread[: value.shape[0], : value.shape[1]]
        return value * scale
    packed = get(f"{stem}.weight_packed")
    table = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)], device=packed.device)
    codes = torch.stack([packed % 16, packed // 16], -1).flatten(1)
    if weights["strategy"] == "group":
        step = torch.exp2(scale.float() - 127)
    else:
        step = scale.float() / get(f"{stem}.weight_global_scale")
    return table[codes.long()] * step.repeat_interleave(weights["group_size"], 1)
