"""In how many bits a model's blocks multiply, and how much a device should get at a time.

On GPUs products of bf16 numbers, summed up in fp32, are many times as fast as those of fp32. Hidden
states between the layers stay in fp32 (`torch.autocast`), and so does everything outside the blocks.
Passes that guide, for tables and Hessians, may therefore differ from those that measure.

GPUs without bf16 are as fast with fp16, which has three more digits and far fewer exponents. It serves
where gradients flow through one block: they are multiplied by a power of two before it and divided
after it. Where a number is too large all the same, the model multiplies in fp32 from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}
FAST_FP16 = (7, 0)  # CUDA's compute capability from which products of fp16 have units of their own
SCALED = 4  # 2 to which power the largest gradient is that enters a block; fp16 ends at 2^16


def sized(device: torch.device | str, cpu: int, gpu: int) -> int:
    """How much to take at a time: what a processor's cache holds, or enough for a GPU, where many
    small kernels wait for each other."""
    return cpu if torch.device(device).type == "cpu" else gpu


def settled(name: str, device: str) -> tuple[str | None, str | None]:
    """In what passes that guide, and those that measure, multiply: bf16, fp16, or None for fp32. name:
    `auto`, only what guides, on GPUs whose products in bf16 or else in fp16 are fast (in bf16 this
    project's CPUs took three to five times as long, experiments/14-scale); `bf16`, both; `fp16`, what
    guides; `fp32`, none."""
    if name != "auto":
        return name if name in KINDS else None, name if name == "bf16" else None
    if torch.device(device).type != "cuda":
        return None, None
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", None
    return "fp16" if torch.cuda.get_device_capability(device) >= FAST_FP16 else None, None


class _Mode:
    """Of one model: in what its blocks multiply now. guide: in passes that guide. scale: what the
    gradients in a block are multiplied with now; None outside of one."""

    scale: float | None = None

    def __init__(
        self, guide: str | None, measure: str | None, tell: Callable[[str], None]
    ) -> None:
        self.guide, self.now, self.tell = guide, measure, tell

    def check(self, gradient: Tensor) -> None:
        """Raises TooLargeError, after which the model multiplies in fp32."""
        if not bool(gradient.isfinite().all()):
            self.give_up()
            raise TooLargeError

    def give_up(self) -> None:
        self.guide = self.scale = None
        self.tell(
            "A number of this model is too large for fp16; passes that guide go on in fp32, which "
            "takes longer."
        )


_MODES: WeakKeyDictionary[nn.Module, _Mode] = WeakKeyDictionary()


def apply(
    net: nn.Module,
    blocks: Sequence[nn.Module],
    guide: str | None,
    measure: str | None,
    tell: Callable[[str], None] = lambda _text: None,
) -> None:
    """Have the model's blocks multiply so from now on. A model without blocks computes in fp32. tell:
    hears if that can't be kept up."""
    if not blocks or not (guide or measure):
        return
    mode = _MODES[net] = _Mode(guide, measure, tell)
    kind = next(net.parameters()).device.type
    if kind == "cuda":  # sums of parts of a product, too
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    for block in blocks:
        enter, leave = _hooks(mode, kind)
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)


def _hooks(mode: _Mode, kind: str) -> tuple[Callable[..., None], Callable[..., None]]:
    entered: list[Any] = []

    def enter(_module: nn.Module, _args: Any) -> None:
        entered.append(None if mode.now is None else torch.autocast(kind, KINDS[mode.now]))
        if entered[-1] is not None:
            entered[-1].__enter__()

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if entered and (own := entered.pop()) is not None:
            own.__exit__(None, None, None)

    return enter, leave


def guiding(net: nn.Module) -> AbstractContextManager[None]:
    """Inside, the model's passes guide: their results are means over much text."""
    return _changed(net, "bf16" if guides_in_bf16(net) else None)


def exactly(net: nn.Module) -> AbstractContextManager[None]:
    """Inside, the model multiplies in fp32."""
    return _changed(net, None)


def guided(net: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """What a block makes of hidden states in a pass that guides, with gradients where they are
    enabled."""
    mode = _MODES.get(net)
    if mode is None or mode.guide != "fp16" or not torch.is_grad_enabled():
        with guiding(net):
            return run(hidden)
    mode.scale = None  # of a pass that was broken off
    with _changed(net, "fp16"):
        found = run(_Entered.apply(hidden, mode))
    if bool(found.isfinite().all()):
        left: Tensor = _Left.apply(found, mode)
        return left
    mode.give_up()
    with exactly(net):
        return run(hidden)


def unscaled(net: nn.Module, gradient: Tensor) -> Tensor:
    """A gradient that comes by while a block runs back, as it is. Raises TooLargeError."""
    mode = _MODES.get(net)
    if mode is None or mode.scale is None:
        return gradient
    mode.check(gradient)
    return gradient.float() / mode.scale


class TooLargeError(Exception):
    """A gradient was too large for fp16. The model multiplies in fp32 from now on; what the pass added
    up doesn't count."""


class _Border(torch.autograd.Function):
    """What passes a block's border forward as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mode: _Mode) -> Tensor:
        ctx.mode = mode
        return x.view_as(x)


class _Left(_Border):
    """What a block returned; gradients enter it."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _, exponent = math.frexp(float(gradient.abs().max()))
        ctx.mode.scale = 2.0 ** (SCALED - exponent)
        return gradient * ctx.mode.scale, None


class _Entered(_Border):
    """What a block gets; gradients leave it."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.mode.check(gradient)
        gradient = gradient / ctx.mode.scale
        ctx.mode.scale = None
        return gradient, None


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
def _changed(net: nn.Module, now: str | None) -> Iterator[None]:
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
    return mode is not None and mode.guide == "bf16"
