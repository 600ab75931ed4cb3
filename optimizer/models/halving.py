"""A device that runs out of memory in the middle of the work: half as many windows at a time go on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from optimizer.errors import ModelError

T = TypeVar("T")


def _silent(_text: str) -> None:
    """Where nobody asked to hear of it."""


@dataclass
class _Room:
    """As many of a model's windows as to try, if more didn't fit, and who hears of it."""

    most: int | None = None
    tell: Callable[[str], None] = _silent


_ROOMS: WeakKeyDictionary[nn.Module, _Room] = WeakKeyDictionary()


def tells(net: nn.Module, tell: Callable[[str], None]) -> None:
    """`tell` hears when windows of the model are run in smaller parts."""
    _room(net).tell = tell


def fitting(net: nn.Module, windows: int) -> int:
    """How many of so many windows to try together."""
    most = _room(net).most
    return windows if most is None else min(windows, most)


def halved(net: nn.Module, windows: int) -> int:
    """After torch.OutOfMemoryError with so many windows: how many to try next. Call it when the error
    is handled, so that what its frames hold is free. Raises ModelError if it was one."""
    if windows <= 1:
        raise ModelError(
            "The device has too little memory for a single window. Take shorter ones "
            "(data.calibration.length, data.search.length, data.heldout.length), leave weights "
            "elsewhere (offload=cpu or disk), or device=cpu. What is finished is kept."
        )
    room = _room(net)
    room.most = windows // 2
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    room.tell(
        f"The device ran out of memory with {windows} windows at a time; the work goes on with "
        f"{room.most}."
    )
    return room.most


def in_parts(net: nn.Module, windows: int, run: Callable[[slice], T]) -> list[T]:
    """What `run` returns for parts of so many windows, one after the other: all at once, or as many
    as fit."""
    found: list[T] = []
    start, some = 0, fitting(net, windows)
    while start < windows:
        part = slice(start, min(start + some, windows))
        try:
            found.append(run(part))
            start = part.stop
            continue
        except torch.OutOfMemoryError:
            pass  # what its frames hold is freed first
        some = halved(net, part.stop - part.start)
    return found


def _room(net: nn.Module) -> _Room:
    return _ROOMS.setdefault(net, _Room())
