"""What the safetensors formats of other engines share: names, the file's size, and writing it.

A format is two functions of a quantized layer: `sizes` says which tensors stand for it, `tensors`
makes them. All else is written as the reference has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer import untrusted
from optimizer.errors import ModelError
from optimizer.plan import WIDTH, Inventory, Layer, Plan, Precision, container_bytes

if TYPE_CHECKING:
    from torch import Tensor

FILE = "model.safetensors"
SPELLED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}  # in config.json
SLICE = 2**22  # bits read back at a time
ROUTER = ("gate", "router", "shared_expert_gate")
Pieces = Mapping[str, Any]  # names of the tensors that stand for a layer -> loader.Piece
Sizes = Callable[[Layer, Precision], dict[str, tuple[str, list[int]]]]
Tensors = Callable[[Layer, Precision], "dict[str, Tensor]"]


def module(name: str) -> str:
    return name.removesuffix(".weight")


def untouched(plan: Plan, inventory: Inventory) -> list[str]:
    """Every module with a matrix that stays as it is: untouched Linears, the head, routers."""
    names = [
        module(layer.name)
        for layer in inventory.layers
        if plan.choice[layer.name].kind == "none" and layer.kind in ("linear", "head", "experts")
    ]
    names += [
        module(x.name)
        for x in inventory.others
        if len(x.shape) == 2 and module(x.name).split(".")[-1] in ROUTER
    ]
    if any(layer.tied for layer in inventory.layers):
        names.append("lm_head")
    return names


def size(
    plan: Plan, inventory: Inventory, sizes: Sizes, split: Mapping[str, Pieces] | None = None
) -> int:
    """Exact bytes of the weight file. sizes: tensor -> (safetensors' dtype, shape). split: untouched
    layers that are written in pieces."""
    split = split or {}
    entries: list[tuple[str, str, list[int], int]] = []
    for layer in inventory.layers:
        precision = plan.choice[layer.name]
        parts = {layer.name: (layer.dtype, list(layer.shape))}
        if layer.name in split:
            width = layer.shape[1]
            parts = {
                name: (layer.dtype, [piece.last - piece.first, width])
                for name, piece in split[layer.name].items()
            }
        if precision.kind != "none":
            parts = sizes(layer, precision)
        entries += [(k, d, s, math.prod(s) * WIDTH[d]) for k, (d, s) in parts.items()]
    for x in inventory.others:
        entries.append((x.name, x.dtype, list(x.shape), math.prod(x.shape) * WIDTH[x.dtype]))
    return sum(entry[3] for entry in entries) + container_bytes(entries)


def write(
    plan: Plan,
    inventory: Inventory,
    packed: Mapping[str, Tensor],
    make: Tensors,
    quantization: Mapping[str, Any],
    folder: Path,
    out: Path,
    split: Mapping[str, Pieces] | None = None,
    dtype: str | None = None,
) -> None:
    """packed: the plan's stored tensors. quantization: the `quantization_config` of config.json.
    folder: what to copy beside the weights. split: untouched layers that are written in pieces.
    dtype: that the engine must compute in; else the checkpoint's."""
    from optimizer.formats.folder import copy_beside, save_tensors

    tensors: dict[str, Tensor] = {}
    for layer in inventory.layers:
        precision = plan.choice[layer.name]
        if precision.kind == "none" and layer.name in (split or {}):
            value = packed[layer.name]
            found = (split or {})[layer.name]
            tensors |= {name: piece.take(value) for name, piece in found.items()}
        elif precision.kind == "none":
            tensors[layer.name] = packed[layer.name]
        else:
            tensors |= make(layer, precision)
    tensors |= {x.name: packed[x.name] for x in inventory.others}
    save_tensors(tensors, out / FILE)
    copy_beside(folder, out)
    settings = untrusted.read(out / "config.json", "keep")
    settings["dtype"] = dtype or SPELLED[inventory.dtype]
    settings["quantization_config"] = quantization
    _untie(settings, inventory)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _untie(settings: dict[str, Any], inventory: Inventory) -> None:
    """A head of its own is called one: engines drop it where config.json says that it is the
    embedding, which transformers says by default of many classes."""
    if any(x.kind == "head" and not x.tied for x in inventory.layers):
        for part in (settings, settings.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False


def head_alone(inventory: Inventory, engine: str) -> None:
    """Raises ModelError where a tied matrix is stored as the head's: engines skip that name."""
    for layer in inventory.layers:
        stored, own = (name.split(".")[-2:] for name in (layer.name, layer.parameter))
        if layer.tied and stored != own and "head" in stored[0]:
            raise ModelError(
                f"{engine} reads a head that is tied to the embedding as {layer.parameter}, and the "
                f"checkpoint stores it as {layer.name} alone. Load it with transformers and save it "
                "again with save_pretrained, which stores the embedding; or take runtime=torch or "
                "transformers."
            )


def words(stream: Tensor) -> Tensor:
    """A byte stream per row -> 32-bit words, padded with zeros."""
    import torch

    padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4))
    return padded.contiguous().view(torch.int32)


def unstream(found: Tensor, bits: int, count: int) -> Tensor:
    """int32 [n, words] -> codes int64 [n, count], bit by bit: slow, and independent of `pack`."""
    import torch

    where = torch.arange(count * bits, device=found.device)
    rows = max(1, SLICE // (count * bits))
    parts = []
    for some in found.split(rows):
        single = (some.long()[:, where // 32] >> (where % 32)) & 1
        parts.append((single.view(len(some), count, bits) << where[:bits]).sum(-1))
    return torch.cat(parts)
