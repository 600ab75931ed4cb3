"""In how many bits a model's blocks multiply, and how much a device should get at a time.

On GPUs products of bf16 numbers, summed up in fp32, are many times as fast as those of fp32. Hidden
states between the layers stay in fp32 (`torch.autocast`), and so does everything outside the blocks.
Passes that guide, for tables and Hessians, may therefore differ from those that measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn


def sized(device: torch.device | str, cpu: int, gpu: int) -> int:
    """How much to take at a time: what a processor's cache holds, or enough for a GPU, where many
    small kernels wait for each other."""
    return cpu if torch.device(device).type == "cpu" else gpu


def settled(name: str, device: str) -> tuple[bool, bool]:
    """Whether passes that guide, and those that measure, multiply in bf16. name: `auto`, only what
    guides, on GPUs whose products in bf16 are fast (this project's CPUs took three to five times as
    long, experiments/14-scale); `bf16`, both; `fp32`, none."""
    if name == "auto":
        kind = torch.device(device).type
        return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False), False
    return name == "bf16", name == "bf16"


class _Mode:
    """Of one model: whether its blocks multiply in bf16 now. guide: in passes that guide."""

    def __init__(self, guide: bool, measure: bool) -> None:
        self.guide, self.now = guide, measure


_MODES: WeakKeyDictionary[nn.Module, _Mode] = WeakKeyDictionary()


def apply(net: nn.Module, blocks: Sequence[nn.Module], guide: bool, measure: bool) -> None:
    """Have the model's blocks multiply so from now on. A model without blocks computes in fp32."""
    if not blocks or not (guide or measure):
        return
    mode = _MODES[net] = _Mode(guide, measure)
    kind = next(net.parameters()).device.type
    if kind == "cuda":  # sums of parts of a product, too
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    for block in blocks:
        enter, leave = _hooks(mode, kind)
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)


def _hooks(mode: _Mode, kind: str) -> tuple[Callable[..., None], Callable[..., None]]:
    entered: list[Any] = []

    def enter(_module: nn.Module, _args: Any) -> None:
        entered.append(torch.autocast(kind, torch.bfloat16) if mode.now else None)
        if entered[-1] is not None:
            entered[-1].__enter__()

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if entered and (own := entered.pop()) is not None:
            own.__exit__(None, None, None)

    return enter, leave


def guiding(net: nn.Module) -> AbstractContextManager[None]:
    """Inside, the model's passes guide: their results are means over much text."""
    return _changed(net, guides_in_bf16(net))


def exactly(net: nn.Module) -> AbstractContextManager[None]:
    """Inside, the model multiplies in fp32."""
    return _changed(net, False)


@contextmanager
def otherwise(net: nn.Module) -> Iterator[str]:
    """Inside, the model multiplies in another way than it measures; what that is: bf16, or fp32."""
    mode = _MODES.get(net)
    if mode is not None and mode.now:
        with exactly(net):
            yield "fp32"
        return
    with torch.autocast(next(net.parameters()).device.type, dtype=torch.bfloat16):
        yield "bf16"


@contextmanager
def _changed(net: nn.Module, now: bool) -> Iterator[None]:
    mode = _MODES.get(net)
    if mode is None:
        yield
        return
    before, mode.now = mode.now, now
    try:
        yield
    finally:
        mode.now = before


def guides_in_bf16(net: nn.Module) -> bool:
    """Whether passes that guide multiply in bf16."""
    mode = _MODES.get(net)
    return mode is not None and mode.guide
