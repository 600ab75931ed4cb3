"""Which numbers of the loaded model are which numbers of the checkpoint.

transformers renames tensors when it loads, stacks experts, joins or splits projections and permutes
rows. All of that only moves numbers, so it is found out with its own operations: they are run on
tensors whose values are their own positions, and the positions that come out are written down as
strides (`plan.Place`). Nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.checkpoint import Stored
from optimizer.plan import Place


@dataclass(frozen=True)
class Layout:
    """places: checkpoint name -> where the model holds its numbers. unused: names -> why no part of
    the model holds them."""

    places: dict[str, tuple[Place, ...]] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)


@dataclass
class _Group:
    """Tensors that one operation of the loader turns into one or more of the model's."""

    names: list[str]
    converter: Any = None  # transformers' WeightConverter, or None: a renaming
    patterns: list[str] = field(default_factory=list)


def lay_out(net: Any, stored: Mapping[str, Stored]) -> Layout:
    """net: a model on the meta device. Raises ModelError where the loader's operations fail."""
    layout = Layout()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    for target, group in _groups(net, stored, shapes, layout).items():
        if group.converter is not None:
            _converted(net, target, group, stored, layout)
            continue
        name = group.names[0]
        if stored[name].shape != shapes[target]:
            raise ModelError(
                f"The checkpoint's {name} has shape {list(stored[name].shape)}, and config.json "
                f"asks for {list(shapes[target])}. The two don't belong together; get both again."
            )
        layout.places[name] = (whole(target, stored[name].shape),)
        for other in group.names[1:]:
            layout.unused[other] = f"the model reads {name} in its place"
    return layout


def whole(parameter: str, shape: Sequence[int]) -> Place:
    """All of a parameter, in its own order."""
    return Place(parameter, (prod(shape),), (1,), (1,))


def _groups(
    net: Any, stored: Mapping[str, Stored], shapes: Mapping[str, Any], layout: Layout
) -> dict[str, _Group]:
    """The loader's own grouping (core_model_loading.convert_and_load_state_dict_in_model), by the
    first name in the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(net)
    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    by_pattern = {pattern: x for x in converters for pattern in x.source_patterns}
    prefix, meta = net.base_model_prefix, net.state_dict()
    groups: dict[str, _Group] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target not in shapes and name in shapes:
            target, pattern = rename_source_key(name, [], [], prefix, meta)
        if target not in shapes:
            layout.unused[name] = f"{type(net).__name__} has no place for it"
            continue
        converter = None if pattern is None else by_pattern[pattern]
        group = groups.setdefault(target, _Group([], converter and deepcopy(converter)))
        if (group.converter is None) != (converter is None):
            layout.unused[name] = f"the model reads {group.names[0]} in its place"
            continue
        group.names.append(name)
        group.patterns.append(pattern or name)
    return groups


def _converted(
    net: Any, target: str, group: _Group, stored: Mapping[str, Stored], layout: Layout
) -> None:
    """Run the group's operations on positions, and write down where they went."""
    shapes = [stored[name].shape for name in group.names]
    inner = _inner(group.converter, shapes)
    starts, total = {}, 0
    for name, pattern, shape in zip(group.names, group.patterns, shapes, strict=True):
        short = (*shape[:-1], 1) if inner > 1 else shape
        count = prod(short)
        marker = torch.arange(total, total + count, dtype=torch.int64).view(short)
        group.converter.add_tensor(target, name, pattern, lambda marker=marker: marker)
        starts[name], total = (total, count), total + count
    try:
        found = group.converter.convert(target, model=net, config=net.config)
    except Exception as error:  # noqa: BLE001  what each operation raises
        raise ModelError(
            f"transformers can't put {group.names[0]} where {type(net).__name__} wants it "
            f"({type(error).__name__}: {error}). The checkpoint has another layout than this "
            "version of transformers knows; save it again with save_pretrained."
        ) from None
    places: dict[str, list[Place]] = {name: [] for name in group.names}
    for parameter, parts in found.items():
        value = parts[0] if isinstance(parts, list) else parts
        _check_shape(net, parameter, value, inner)
        flat = value.reshape(-1).numpy()
        order = np.argsort(flat, kind="stable")
        ranked = flat[order]
        for name, (start, count) in starts.items():
            first, last = np.searchsorted(ranked, [start, start + count])
            if last > first:
                at = np.stack([ranked[first:last] - start, order[first:last]])
                places[name].append(_strided(parameter, at, inner))
    for name, own in places.items():
        if own:
            layout.places[name] = tuple(own)
        else:
            layout.unused[name] = f"{type(net).__name__} has no place for it"


def _inner(converter: Any, shapes: Sequence[tuple[int, ...]]) -> int:
    """The length of the last axis, if no operation touches it: positions of rows are enough then,
    which take a thousandth of the memory. Else 1."""
    known = {"MergeModulelist", "Concatenate", "Chunk", "Interleave", "SplitModulelist"}
    axes = len(shapes[0])
    if len({shape[-1:] for shape in shapes}) != 1 or axes < 2:
        return 1
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind not in known or operation.dim < 0:
            return 1
        axes += kind == "MergeModulelist"
        axes -= kind == "SplitModulelist"
        if operation.dim >= axes - 1:
            return 1
    return shapes[0][-1]


def _check_shape(net: Any, parameter: str, value: Tensor, inner: int) -> None:
    wanted = tuple(net.state_dict()[parameter].shape)
    found = (*value.shape[:-1], value.shape[-1] * inner)
    if found != wanted:
        raise ModelError(
            f"The checkpoint gives {parameter} the shape {list(found)}, and config.json asks for "
            f"{list(wanted)}. The two don't belong together; get both again."
        )


def _strided(parameter: str, at: np.ndarray, inner: int) -> Place:
    """Pairs of positions [2, n] (stored, live), in the stored order -> both as strides."""
    extents: list[int] = []
    strides: list[np.ndarray] = []
    origin, starts = at[:, 0] * inner, at
    if inner > 1:
        extents, strides = [inner], [np.ones(2, np.int64)]
    while starts.shape[1] > 1:
        steps = np.diff(starts)
        same = (steps == steps[:, :1]).all(0)
        run = len(same) + 1 if same.all() else int(np.argmin(same)) + 1
        extents.insert(0, run)
        strides.insert(0, steps[:, 0] * inner)
        if starts.shape[1] % run:
            raise ModelError(f"The numbers of {parameter} lie in no regular order on disk.")
        blocks = starts.reshape(2, -1, run)
        if (np.diff(blocks) != steps[:, :1, None]).any():
            raise ModelError(f"The numbers of {parameter} lie in no regular order on disk.")
        starts = blocks[:, :, 0]
    return _merged(
        Place(
            parameter,
            tuple(extents),
            tuple(int(s[0]) for s in strides),
            tuple(int(s[1]) for s in strides),
            int(origin[0]),
            int(origin[1]),
        )
    )


def _merged(place: Place) -> Place:
    """Neighbouring axes as one where both sides allow it."""
    axes = list(zip(place.extents, place.stored, place.live, strict=True))
    kept = axes[-1:]
    for outer, _ in reversed(list(pairwise(axes))):
        extent, stored, live = kept[0]
        if outer[1] == stored * extent and outer[2] == live * extent:
            kept[0] = (outer[0] * extent, stored, live)
        else:
            kept.insert(0, outer)
    extents, on_disk, in_model = (tuple(axis[i] for axis in kept) for i in range(3))
    return Place(place.parameter, extents, on_disk, in_model, place.at_stored, place.at_live)


# ---------------------------------------------------------------- read and write by places


def stored_part(value: Tensor, place: Place) -> Tensor:
    """The numbers of a stored tensor (contiguous) that `place` is about: a view [extents]."""
    return value.as_strided(place.extents, place.stored, value.storage_offset() + place.at_stored)


def live_part(value: Tensor, place: Place) -> Tensor:
    """The same numbers in the live parameter (contiguous): a view [extents]."""
    return value.as_strided(place.extents, place.live, value.storage_offset() + place.at_live)


def gather(shape: Sequence[int], places: Sequence[Place], get: Callable[[str], Tensor]) -> Tensor:
    """The stored tensor [shape] from the live ones; a view where it lies there as one piece. get:
    parameter -> its tensor, or another of its shape, such as a gradient."""
    if len(places) == 1 and places[0].stored == (1,) and places[0].live == (1,):
        value = get(places[0].parameter).contiguous().view(-1)
        return value[places[0].at_live :][: prod(shape)].view(tuple(shape))
    first = get(places[0].parameter)
    whole = torch.empty(tuple(shape), dtype=first.dtype, device=first.device)
    for place in places:
        stored_part(whole, place).copy_(live_part(get(place.parameter).contiguous(), place))
    return whole


def scatter(value: Tensor, places: Sequence[Place], get: Callable[[str], Tensor]) -> None:
    """Write a stored tensor to the live ones, which must be contiguous."""
    value = value.contiguous()
    for place in places:
        live_part(get(place.parameter), place).copy_(stored_part(value, place))


def holders(net: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of each parameter -> all modules and attributes that hold it: tied ones have several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in net.modules():
        for leaf, value in module._parameters.items():
            if value is not None:
                found.setdefault(id(value), []).append((module, leaf))
    return found
