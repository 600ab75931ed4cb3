"""A model opened with its blocks on disk: a skeleton, filled outside of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.checkpoint import Checkpoint
from optimizer.models.inventory import skeleton, tie
from optimizer.models.layout import holders, scatter
from optimizer.models.offload import (
    OnDisk,
    absent,
    block_list,
    blocks_tensors,
    large_ends,
    places,
)
from optimizer.models.published import lacking
from optimizer.plan import Inventory, Layer, Other


def opened(folder: Any, inventory: Inventory, checkpoint: Checkpoint, device: str) -> Any:
    """The model in fp32 with its blocks on disk. Raises ModelError for numbers that the folder
    lacks."""
    net = skeleton(folder)
    used = inventory.held
    tie(net, frozenset(p.parameter for tensor in used for p in places(tensor)))
    _check_whole(net, used, checkpoint)
    blocks = block_list(net, inventory)
    if not blocks:
        raise ModelError(
            f"Weights are left on disk block by block, and {folder} has no blocks with layers. Take "
            "offload=none."
        )
    large = large_ends(net, blocks, inventory)
    away = [*blocks_tensors(net, blocks, inventory), *large.values()]
    inside = {t.name for own in away for t in own}
    _assign(net, [t for t in used if t.name not in inside], checkpoint, torch.device(device))
    for block in blocks:
        _leave(block.modules(), torch.device(device))
    named = dict(net.named_parameters())
    owners = {id(m): m for name in large for m, _ in holders(net)[id(named[name])]}
    _leave(owners.values(), torch.device(device))
    for name, buffer in net.named_buffers():
        owner, _, leaf = name.rpartition(".")
        net.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    if hasattr(net, "generation_config"):
        _read_generation(net, folder)
    OnDisk(net, inventory, checkpoint)
    return net


def spread(folder: Any, inventory: Inventory, rooms: Mapping[str, int]) -> dict[str, str]:
    """Tensor -> the device that keeps it, whole blocks together, by accelerate. rooms: device -> bytes
    that are free; what fits none of them stays in the host's memory."""
    from accelerate import infer_auto_device_map

    net = skeleton(folder)
    tie(net, frozenset(p.parameter for tensor in inventory.held for p in places(tensor)))
    numbered: dict[Any, int] = dict(enumerate(rooms.values()))
    found = infer_auto_device_map(
        net,
        max_memory={**numbered, "cpu": sys.maxsize},
        no_split_module_classes=sorted({type(x).__name__ for x in block_list(net, inventory)}),
        dtype=torch.float32 if inventory.dtype == "F32" else torch.bfloat16,
        offload_buffers=True,
    )
    names = list(rooms)
    homes = {key: names[at] if isinstance(at, int) else "cpu" for key, at in found.items()}

    def home(parameter: str) -> str:
        owners = [x for x in homes if x in ("", parameter) or parameter.startswith(f"{x}.")]
        return homes[max(owners, key=len)] if owners else "cpu"

    return {tensor.name: home(places(tensor)[0].parameter) for tensor in inventory.held}


def _read_generation(net: Any, folder: Any) -> None:
    from transformers import GenerationConfig

    with suppress(OSError):
        net.generation_config = GenerationConfig.from_pretrained(folder)


def _check_whole(net: Any, used: Sequence[Layer | Other], checkpoint: Checkpoint) -> None:
    """Every parameter, and every buffer that isn't computed, has its numbers."""
    given = {p.parameter for tensor in used for p in places(tensor)}
    missing = [n for n, p in net.named_parameters() if n not in given]
    missing += [n for n, b in net.named_buffers() if b.device.type == "meta" and n not in given]
    if missing:
        raise lacking(checkpoint.folder, checkpoint, min(missing))


def _assign(
    net: Any, tensors: Sequence[Layer | Other], checkpoint: Checkpoint, device: torch.device
) -> None:
    """Fill what stays in memory, in fp32."""
    known = {tensor.name: tensor for tensor in tensors}
    state = net.state_dict(keep_vars=True)
    filled: dict[str, Tensor] = {}
    for tensor in tensors:
        for place in places(tensor):
            like = state[place.parameter]
            filled.setdefault(
                place.parameter, torch.empty(like.shape, dtype=like.dtype, device=device)
            )
    for name, stored in checkpoint.several(list(known)):
        scatter(stored, places(known[name]), filled.__getitem__)
    held = holders(net)
    for parameter, value in filled.items():
        owner, _, leaf = parameter.rpartition(".")
        module = net.get_submodule(owner)
        if leaf in module._buffers:
            module._buffers[leaf] = value
            continue
        live = nn.Parameter(value, requires_grad=False)
        for holder, attribute in held[id(state[parameter])]:
            holder._parameters[attribute] = live


def _leave(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Parameters on the device for those on the meta device: of no memory, filled later. modules: all
    that hold one of them."""
    made: dict[int, nn.Parameter] = {}
    for module in modules:
        for leaf, value in module._parameters.items():
            if value is not None and value.device.type == "meta":
                if id(value) not in made:
                    live = nn.Parameter(absent(value, device), requires_grad=False)
                    made[id(value)] = live
                module._parameters[leaf] = made[id(value)]
