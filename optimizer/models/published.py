"""What a checkpoint is stored as, told before any work: numbers, codes of a quantizer, or FP8 with
scales, from which the numbers are made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer import untrusted
from optimizer.errors import ModelError
from optimizer.models.checkpoint import INDEX, Checkpoint, open_checkpoint, weight_files

if TYPE_CHECKING:
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("F32", "BF16", "F16", "F8_E8M0")
# endings of the names that quantizers give to codes: GPTQ and AWQ, compressed-tensors, bitsandbytes,
# MXFP4, torchao, HQQ, quanto, AQLM, exllama, VPTQ, QuIP#, SpQR
CODES = (
    *(".qweight", ".weight_packed", ".absmax", ".SCB", "_blocks", ".qdata", "_weight_qdata"),
    *(".W_q", ".weight._data", ".codebooks", ".q_weight", ".trellis", ".centroids.weight"),
    *(".Qidxs", ".dense_weights"),
)
# what codes are stored as, one or several in a number
CODED = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F4", "F8_E8M0")
PARTS = ("quantization", "quantization_config", "compression_config")
MODELOPT = "hf_quant_config.json"
ACTIVATIONS = ("input_scale", "activation_scale", "act_scale")
BESIDE = ("*.json", "*.txt", "*.model", "*.jinja")


def check(name: str, folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the weights are FP8 with scales. Raises ModelError for any other quantized checkpoint:
    names how, and what to give instead."""
    settings = _settings(config) or _beside(folder)
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "")
    if settings and method.lower() != "fp8":
        raise quantized(name, method or "by a method that config.json doesn't name", settings)
    checkpoint = open_checkpoint(folder)
    codes = sorted(n for n, tensor in checkpoint.tensors.items() if is_code(n, tensor.dtype))
    if codes:
        raise quantized(name, f"{codes[0]} holds codes", settings)
    stored = [n for n, tensor in checkpoint.tensors.items() if tensor.dtype in FP8]
    bare = sorted(n for n in stored if _scale(n, checkpoint) is None)
    if bare:
        raise ModelError(
            f"A checkpoint in FP8 has a scale for each of its weights; {name} has none for "
            f"{bare[0]}. Give the model in 16 bits."
        )
    return bool(settings or stored)


def is_code(name: str, dtype: str) -> bool:
    """Whether a tensor holds a quantizer's codes: its name says so, or it is a weight of integers."""
    return name.endswith(CODES) or (name.endswith(".weight") and dtype in CODED)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json, or one of its parts, says of a quantizer; empty if it says nothing."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in PARTS:
            found = part.get(key)
            if isinstance(found, dict) and key == "quantization":
                return {"quant_method": "MLX", **found}
            if found is not None:
                return (
                    dict(found) if isinstance(found, dict) and found else {"quant_method": found}
                )
    return {}


def _beside(folder: Path) -> dict[str, Any]:
    """What NVIDIA ModelOpt says in a file of its own."""
    try:
        found = untrusted.read(folder / MODELOPT)["quantization"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(found) if isinstance(found, dict) and found.get("quant_algo") else {}


def quantized(name: str, how: str, settings: Mapping[str, Any] | None = None) -> ModelError:
    """Why a quantized checkpoint is no reference."""
    settings = settings or {}
    bits = settings.get("bits") or settings.get("w_bit") or settings.get("num_bits")
    with_bits = f", {bits} bits" if isinstance(bits, int) else ""
    remedy = "Give the 16-bit model that it was made from"
    if how == "mxfp4":
        remedy += (
            "; of one that was published in MXFP4 only, transformers makes it: from_pretrained("
            "..., quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(...)"
        )
    return ModelError(
        f"{name} is quantized already ({how}{with_bits}). A plan compares with the unrounded model, "
        f"and rounding twice loses twice. {remedy}."
    )


def lacking(folder: Path, checkpoint: Checkpoint, parameter: str) -> ModelError:
    """Why a checkpoint without numbers for one of its model's parameters is no reference."""
    owner, _, leaf = parameter.rpartition(".")
    rest = sorted(n for n in checkpoint.tensors if n.rpartition(".")[2] != "bias")
    instead = [
        n for n in rest if f".{owner}." in f".{n}" and not f".{n}".endswith(f".{parameter}")
    ]
    renamed = [n for n in rest if n.endswith(f".{parameter}")]
    text = f"A checkpoint must hold all of its model's weights; {folder} lacks {parameter}"
    if renamed:
        return ModelError(
            f"{text}, and holds {renamed[0]}: its names have something before them that transformers "
            "doesn't take away. Save it again with save_pretrained of the model itself."
        )
    if any("lora_" in n or ".base_layer." in n for n in instead):
        return ModelError(
            f"{text}, and holds {instead[0]}, which belongs to an adapter (LoRA). Merge it into the "
            "model, with peft: merge_and_unload().save_pretrained(...)."
        )
    if leaf == "weight" and instead:
        return quantized(str(folder), f"it holds {instead[0]} in place of {parameter}")
    tied = ""
    if parameter.endswith("head.weight"):
        tied = " If its head is the embedding, config.json says so: tie_word_embeddings: true."
    return ModelError(f"{text}. Copy or download it again.{tied}")


def _scale(name: str, checkpoint: Checkpoint) -> str | None:
    """The tensor that an FP8 weight is multiplied by, as DeepSeek and its followers name it. Raises
    ModelError where there are several, or it holds no floats."""
    names = (f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}scale")
    found = [n for n in names if n in checkpoint.tensors]
    if len(found) > 1 or any(checkpoint.tensors[n].dtype not in SCALES for n in found):
        said = ", ".join(f"{n} ({checkpoint.tensors[n].dtype})" for n in found)
        raise ModelError(
            f"A weight in FP8 has one scale, of floats; {name} has {said}. Give the model in 16 bits."
        )
    return found[0] if found else None


def dequantize(folder: Path, out: Path) -> None:
    """Fill `out` with the model in bfloat16: w = code * scale of its block. Memory: one weight file
    in bfloat16."""
    from safetensors.torch import save_file

    checkpoint, blocks = open_checkpoint(folder), _blocks(folder)
    scales = {n for x in checkpoint.tensors if (n := _used_scale(x, checkpoint)) is not None}
    left = {n for n in checkpoint.tensors if n.rpartition(".")[2].endswith(ACTIVATIONS)}
    for file in weight_files(folder):
        names = [n for n, x in checkpoint.tensors.items() if x.file == file]
        parts = dict(_parts(checkpoint, [n for n in names if n not in scales | left], blocks))
        save_file(parts, out / file.name, metadata={"format": "pt"})
    for pattern in BESIDE:
        for file in folder.glob(pattern):
            if file.name != MODELOPT:
                shutil.copyfile(file, out / file.name)
    _correct(out, scales | left)


def _used_scale(name: str, checkpoint: Checkpoint) -> str | None:
    return _scale(name, checkpoint) if checkpoint.tensors[name].dtype in FP8 else None


def _blocks(folder: Path) -> tuple[int, int] | None:
    """Rows and columns of a block, as config.json says."""
    config = untrusted.read(folder / "config.json", "keep")
    found = _settings(config).get("weight_block_size")
    if isinstance(found, list) and len(found) == 2 and all(isinstance(n, int) for n in found):
        return found[0], found[1]
    return None


def _parts(
    checkpoint: Checkpoint, names: list[str], blocks: tuple[int, int] | None
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        value, scale = checkpoint.read(name), _used_scale(name, checkpoint)
        if scale is not None:
            value = unscaled(name, value, checkpoint.read(scale), blocks)
        yield name, value


def unscaled(name: str, codes: Tensor, scale: Tensor, blocks: tuple[int, int] | None) -> Tensor:
    """FP8 codes [..., rows, cols] times their scales [..., row blocks, column blocks], or one scale
    a row, or one for all -> bfloat16. blocks: rows and columns of one, the last ones may be shorter;
    None: not known, and refused where several are possible."""
    import torch

    w, s = codes.float(), scale.float()
    if s.numel() == 1:
        return (w * s.reshape(())).bfloat16()
    while s.ndim < w.ndim:
        s = s.unsqueeze(-1)
    for axis in (-1, -2):
        if s.shape[axis] in (1, w.shape[axis]) and s.ndim == w.ndim:
            continue
        block = _block(w.shape[axis], s.shape[axis], blocks and blocks[axis])
        if block is None or s.ndim > w.ndim:
            raise ModelError(
                f"The scales of {name} are {list(scale.shape)}, and with the weight_block_size of "
                f"config.json ({blocks}) they are no grid over {list(codes.shape)}. Correct it, or "
                "give the model in 16 bits."
            )
        at = torch.arange(w.shape[axis]) // block
        s = s.index_select(axis % s.ndim, at)
    return (w * s).bfloat16()


def _block(size: int, count: int, told: int | None) -> int | None:
    """The length of blocks of which `count` cover `size`: as told, or the only possible one."""
    if count < 1:
        return None
    fitting = [b for b in range(-(-size // count), size + 1) if -(-size // b) == count]
    if told is not None:
        return told if told in fitting else None
    return fitting[0] if len(fitting) == 1 else None


def _correct(out: Path, dropped: set[str]) -> None:
    """config.json and the index as they are of the model that was written."""
    config = untrusted.read(out / "config.json", "keep")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in PARTS:
            part.pop(key, None)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("torch_dtype", None)
            part["dtype"] = "bfloat16"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (out / INDEX).is_file():
        index = untrusted.read(out / INDEX)
        weights = {k: v for k, v in index["weight_map"].items() if k not in dropped}
        text = json.dumps({**index, "weight_map": weights}, indent=2) + "\n"
        (out / INDEX).write_text(text, encoding="utf-8")
