"""Whether a model's blocks, run one by one, show what the whole model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from optimizer.models.arithmetic import guides_in_bf16, guiding
from optimizer.models.blockwise import Stream
from optimizer.models.model import Model
from optimizer.models.watching import begin_gradients

AGREE = 1e-3  # how far two ways to one gradient may lie apart, as a share of it
AGREE_BF16 = 0.05  # the same where both are products of bf16 numbers


def shared(blocks: Sequence[nn.Module]) -> bool:
    """Whether a parameter belongs to several blocks."""
    owners = [id(p) for block in blocks for p in block.parameters()]
    return len(owners) > len(set(owners))


def agrees(model: Model, stream: Stream, scalar: Callable[[], Tensor], arrived: Tensor) -> bool:
    """Whether the whole model's gradient of a scalar of one window, at the first block's input, is
    the one that arrived there block by block [length, width]."""
    caught: list[Tensor] = []
    hook = stream.blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    begin = begin_gradients(model.net)
    try:
        with guiding(model.net):
            value = scalar()
        wanted = torch.autograd.grad(value, caught[0])[0]
    finally:
        hook.remove()
        begin.remove()
    near = AGREE_BF16 if guides_in_bf16(model.net) else AGREE
    return float((wanted[0] - arrived).norm()) <= near * float(wanted.norm())
