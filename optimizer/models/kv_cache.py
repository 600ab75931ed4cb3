"""A cache of keys and values in 8 or 4 bits: stored so, not only rounded. It works with every model
of transformers that takes a cache; generate(past_key_values=Cache(...)) uses it, too.

Keys come as attention stores them, after the rotation. Each token's vector of a head is cut into
blocks of g = gcd(32, its length) values, and a block keeps a scale d in fp16 beside its codes:

    8 bits   d = max|x| / 127             code = round(x / d)            x' = code d
    4 bits   d = (x of largest |x|) / -8  code = clamp(round(x / d + 8), 0, 15)   x' = (code - 8) d

With g = 32 these are the values of llama.cpp's q8_0 and q4_0 (8.5 and 4.5 bits per value). vLLM's
8 bits are floating point, e4m3, without a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from optimizer.errors import ModelError
from optimizer.hardware.memory import block_of

BITS = (8, 4)
LARGEST = 448.0  # of e4m3


def encode(value: Tensor, bits: int) -> Tensor:
    """[..., n] -> uint8 [..., bytes]: per block its scale, then its codes."""
    size = block_of(value.shape[-1])
    x = value.float().unflatten(-1, (-1, size))
    if bits == 8:
        scale = x.abs().amax(-1, keepdim=True) / 127
        codes = (x / _safe(scale)).round_().to(torch.int8).view(torch.uint8)
    else:
        top = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        scale = top / -8
        codes = (x / _safe(scale)).add_(8.5).floor_().clamp_(0, 15).to(torch.uint8)
        low, high = codes.chunk(2, -1)
        codes = low | high << 4
    return torch.cat([scale.half().view(torch.uint8), codes], -1).flatten(-2)


def decode(stored: Tensor, bits: int, length: int, dtype: torch.dtype) -> Tensor:
    """The inverse: [..., bytes] -> [..., length]."""
    size = block_of(length)
    blocks = stored.unflatten(-1, (length // size, -1))
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    codes = blocks[..., 2:]
    if bits == 8:
        return (codes.view(torch.int8) * scale).flatten(-2).to(dtype)
    nibbles = torch.cat([codes & 15, codes >> 4], -1).to(torch.int8) - 8
    return (nibbles * scale).flatten(-2).to(dtype)


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


class _Through(torch.autograd.Function):
    """What a cache returns of tensors, with the gradient of what it was given: rounding has none of
    its own (the straight-through estimator, arXiv:1308.3432). For whole sequences: nothing is kept."""

    @staticmethod
    def forward(_context: Any, value: Tensor, cache: Cache) -> Tensor:
        return cache._out(cache._in(value), value)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Cache(DynamicCache):  # type: ignore[misc]  # transformers isn't typed here
    """As transformers' own, with what it keeps in `bits` bits; `floating`: as vLLM stores them."""

    def __init__(self, config: Any, bits: int, floating: bool = False) -> None:
        super().__init__(config=config)
        self.bits, self.floating = bits, floating

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """The new tokens' [batch, heads, tokens, n] -> those of all tokens that are kept."""
        new = (key_states, value_states)
        if torch.is_grad_enabled() and any(value.requires_grad for value in new):
            return _Through.apply(key_states, self), _Through.apply(value_states, self)
        kept = super().update(*(self._in(x) for x in new), layer_idx, *rest, **named)
        keys, values = (self._out(k, x) for k, x in zip(kept, new, strict=True))
        return keys, values

    def _in(self, value: Tensor) -> Tensor:
        if self.floating:
            return value.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return encode(value, self.bits)

    def _out(self, stored: Tensor, like: Tensor) -> Tensor:
        if self.floating:
            return stored.view(torch.float8_e4m3fn).to(like.dtype)
        return decode(stored, self.bits, like.shape[-1], like.dtype)


@contextmanager
def rounded(
    net: Any, bits: int, floating: bool = False, when: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Inside, the model attends to keys and values that went through such a cache, whatever its
    caller says about caches; only where `when` says so. Gradients go straight through the rounding.
    More than 8 bits: nothing changes."""
    if bits not in BITS:
        yield
        return

    def inject(_net: Any, args: Any, named: dict[str, Any]) -> Any:
        if not (when is None or when()):
            return None
        own = Cache(net.config, bits, floating)
        return args, named | {"past_key_values": own, "use_cache": True}

    if not getattr(net, "_supports_default_dynamic_cache", lambda: True)():
        raise ModelError(
            f"A cache of {bits} bits needs a model that keeps keys and values; "
            f"{type(net).__name__} has a cache of its own kind. Take budget.kv=16."
        )
    handle = net.register_forward_pre_hook(inject, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
