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

from optimizer.errors import ConfigError, ModelError
from optimizer.hardware.memory import block_of
from optimizer.plan.cache import CacheKind

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
    """As transformers' own, with what it keeps in `kind.bits` bits. Of tokens that are kept whole, the
    first never leave; the last leave as others come, and are rounded then. Several new tokens see each
    other as they came.
    """

    def __init__(self, config: Any, kind: CacheKind) -> None:
        super().__init__(config=config)
        self.kind = kind
        if kind.keep:
            check_sees_all(config)
        # layer -> (first, last), each of keys and values [batch, heads, tokens, n]
        self.exact: dict[int, tuple[Pair, Pair]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """The new tokens' [batch, heads, tokens, n] -> those of all tokens that are kept."""
        new = (key_states, value_states)
        if torch.is_grad_enabled() and any(value.requires_grad for value in new):
            return _Through.apply(key_states, self), _Through.apply(value_states, self)
        if self.kind.keep:
            return self._updated(new, layer_idx, rest, named)
        kept = super().update(*(self._in(x) for x in new), layer_idx, *rest, **named)
        keys, values = (self._out(k, x) for k, x in zip(kept, new, strict=True))
        return keys, values

    def _updated(self, new: Pair, layer: int, rest: Any, named: Any) -> Pair:
        """Everything in order: the first tokens, those that were rounded, the last."""
        first, last = self.exact.get(layer) or ((_none(new), _none(new)))
        room = self.kind.first - first[0].shape[-2]
        middle = self._middle(layer, new)
        found = tuple(torch.cat(x, -2) for x in zip(first, middle, last, new, strict=True))
        if room > 0:  # nothing has been rounded yet
            first = _cat(first, tuple(x[..., :room, :] for x in new))
            new = (new[0][..., room:, :], new[1][..., room:, :])
        last = _cat(last, new)
        leaving = last[0].shape[-2] - self.kind.last
        if leaving > 0:
            out = tuple(self._in(x[..., :leaving, :]) for x in last)
            super().update(*out, layer, *rest, **named)
            last = (last[0][..., leaving:, :], last[1][..., leaving:, :])
        self.exact[layer] = (first, last)
        return found[0], found[1]

    def _middle(self, layer: int, like: Pair) -> Pair:
        """The tokens that were rounded."""
        if layer >= len(self.layers) or not self._rounded(layer):
            return _none(like)
        kept = self.layers[layer]
        return self._out(kept.keys, like[0]), self._out(kept.values, like[1])

    def _rounded(self, layer: int) -> int:
        return int(super().get_seq_length(layer)) if layer < len(self.layers) else 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        exact = self.exact.get(layer_idx)
        whole = 0 if exact is None else sum(x[0].shape[-2] for x in exact)
        return self._rounded(layer_idx) + whole

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not self.kind.keep:
            found: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
            return found
        return self.get_seq_length(layer_idx) + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -`tokens_to_remove` tokens. What was rounded stays so."""
        if not self.kind.keep:
            super().crop(tokens_to_remove)
            return
        for layer, (first, last) in list(self.exact.items()):
            over, newest, older = -tokens_to_remove, last[0].shape[-2], self._rounded(layer)
            if over > newest and older:
                self.layers[layer].crop(-min(older, over - newest))
            self.exact[layer] = (_less(first, over - newest - older), _less(last, over))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for layer, pairs in self.exact.items():
            first, last = (tuple(x.index_select(0, beam_idx) for x in pair) for pair in pairs)
            self.exact[layer] = ((first[0], first[1]), (last[0], last[1]))

    def _in(self, value: Tensor) -> Tensor:
        if self.kind.floating:
            return value.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        return encode(value, self.kind.bits)

    def _out(self, stored: Tensor, like: Tensor) -> Tensor:
        if self.kind.floating:
            return stored.view(torch.float8_e4m3fn).to(like.dtype)
        return decode(stored, self.kind.bits, like.shape[-1], like.dtype)


class _Twice(Cache):
    """Whole sequences at once, as if they had been written word by word: returns every token's
    keys and values twice, as they came and rounded; a mask says who sees which."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        del layer_idx
        keys, values = (
            torch.cat([x, _Through.apply(x, self)], -2) for x in (key_states, value_states)
        )
        return keys, values

    def seen(self, windows: int, tokens: int, like: Tensor) -> Tensor:
        """[windows, 1, tokens, 2 tokens] to add to attention's scores: which of its keys a token sees
        whole, and which rounded."""
        at = torch.arange(tokens, device=like.device)
        before = at <= at[:, None]
        near = (at >= at[:, None] - self.kind.last) | (at < self.kind.first)
        mask = torch.cat([before & near, before & ~near], 1)
        blank = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
        filled = blank.masked_fill_(~mask, torch.finfo(like.dtype).min)
        return filled[None, None].expand(windows, -1, -1, -1)


Pair = tuple[Tensor, Tensor]


def _none(like: Pair) -> Pair:
    return like[0][..., :0, :], like[1][..., :0, :]


def _less(pair: Pair, tokens: int) -> Pair:
    """Without the newest."""
    left = max(0, pair[0].shape[-2] - max(0, tokens))
    return pair[0][..., :left, :], pair[1][..., :left, :]


def _cat(a: Pair, b: Any) -> Pair:
    return torch.cat([a[0], b[0]], -2), torch.cat([a[1], b[1]], -2)


def check_sees_all(config: Any) -> None:
    """Raises ConfigError unless every layer sees all tokens before, and keeps them."""
    own = config.get_text_config()
    kinds = set(getattr(own, "layer_types", None) or ["full_attention"])
    others = kinds - {"full_attention"}
    sliding = getattr(own, "sliding_window", None) and getattr(own, "use_sliding_window", True)
    if others or sliding:
        what = ", ".join(sorted(others)) or "sliding windows"
        raise ConfigError(
            f"budget.keep is for models whose every layer sees all tokens before, and this one has "
            f"{what}. Leave it out."
        )


@contextmanager
def rounded(net: Any, kind: CacheKind, when: Callable[[], bool] | None = None) -> Iterator[None]:
    """Inside, the model attends to keys and values that went through such a cache, whatever its
    caller says about caches; only where `when` says so. Gradients go straight through the rounding.
    More than 8 bits: nothing changes. Where some tokens are kept whole, for whole sequences, each read
    as if it had been written word by word."""
    if kind.bits not in BITS:
        yield
        return

    def inject(_net: Any, args: Any, named: dict[str, Any]) -> Any:
        if not (when is None or when()):
            return None
        if not kind.keep:
            return args, named | {"past_key_values": Cache(net.config, kind), "use_cache": True}
        own = _Twice(net.config, kind)
        ids = args[0] if args else named["input_ids"]
        at = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        mask = own.seen(len(ids), ids.shape[1], next(net.parameters()))
        mine = {"past_key_values": own, "use_cache": True, "attention_mask": mask}
        return args, {"position_ids": at} | named | mine

    if not getattr(net, "_supports_default_dynamic_cache", lambda: True)():
        raise ModelError(
            f"A cache of {kind.bits} bits needs a model that keeps keys and values; "
            f"{type(net).__name__} has a cache of its own kind. Take budget.kv=16."
        )
    if kind.keep:
        check_sees_all(net.config)
    handle = net.register_forward_pre_hook(inject, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
