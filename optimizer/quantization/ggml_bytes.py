"""Blocks of ggml as bytes: grids and codes -> what lies in the file, and back. From the format's
definition (ggml-common.h, block_q4_0 ... block_iq4_xs)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from optimizer.plan import GGML


@dataclass(frozen=True)
class Layout:
    """length: columns of a sub-block. zero: the code of weight 0 (without minimum).
    top: largest sub-scale, 0 = no sub-scales. signed: sub-scales may be negative."""

    length: int
    zero: int = 0
    minimum: bool = False
    top: int = 0
    signed: bool = False


LAYOUTS = {
    "q4_0": Layout(32, 8),
    "q4_1": Layout(32, minimum=True),
    "q5_0": Layout(32, 16),
    "q5_1": Layout(32, minimum=True),
    "q8_0": Layout(32, 128),
    "iq4_nl": Layout(32),
    "q2_k": Layout(16, minimum=True, top=15),
    "q3_k": Layout(16, 4, top=31, signed=True),
    "q4_k": Layout(32, minimum=True, top=63),
    "q5_k": Layout(32, minimum=True, top=63),
    "q6_k": Layout(16, 32, top=127, signed=True),
    "iq4_xs": Layout(32, top=31, signed=True),
}


class Scales(Protocol):
    """Of a `ggml.Grid`, equation (1) there."""

    @property
    def kind(self) -> str: ...
    @property
    def d(self) -> Tensor: ...
    @property
    def dmin(self) -> Tensor: ...
    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...


def _bytes_of(x: Tensor) -> Tensor:
    """fp32 [n, 1] that holds fp16 values -> uint8 [n, 2]."""
    return x.half().contiguous().view(torch.uint8)


def _number(raw: Tensor) -> Tensor:
    """uint8 [n, 2] -> fp32 [n, 1]."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(q: Tensor) -> Tensor:
    """Codes [n, 32] -> [n, 16]: column i in the low half, i + 16 in the high one."""
    return (q[:, :16] & 15) | ((q[:, 16:] & 15) << 4)


def _bits(q: Tensor, bit: int) -> Tensor:
    """One bit of codes [n, 32] -> uint8 [n, 4], little-endian."""
    ones = ((q.long() >> bit) & 1).view(-1, 4, 8)
    return (ones << torch.arange(8, device=q.device)).sum(-1).to(torch.uint8)


def _pack_plain(grid: Scales, q: Tensor) -> Tensor:
    head = [_bytes_of(grid.d)]
    if LAYOUTS[grid.kind].minimum:
        head.append(_bytes_of(-grid.dmin))  # q4_1 and q5_1 add their m
    if grid.kind == "q8_0":
        return torch.cat([*head, q ^ 128], 1)  # two's complement
    if GGML[grid.kind].bits == 5:
        head.append(_bits(q, 4))
    return torch.cat([*head, _nibbles(q)], 1)


Opened = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _unpack_plain(raw: Tensor, kind: str) -> Opened:
    d, rest = _number(raw[:, :2]), raw[:, 2:]
    dmin, has_minimum = torch.zeros_like(d), LAYOUTS[kind].minimum
    if has_minimum:
        dmin, rest = -_number(rest[:, :2]), rest[:, 2:]
    one = torch.ones_like(d, dtype=torch.long)
    if kind == "q8_0":
        return d, dmin, one, one * 0, rest ^ 128
    high = torch.zeros(1, dtype=torch.long, device=raw.device)
    if GGML[kind].bits == 5:
        steps = torch.arange(8, device=raw.device)
        high = ((rest[:, :4].long().unsqueeze(-1) >> steps) & 1).flatten(1)
        rest = rest[:, 4:]
    low = torch.cat([rest & 15, rest >> 4], 1).long()
    return d, dmin, one, one * has_minimum, low | (high << 4)


def _planes(x: Tensor, width: int, run: int) -> Tensor:
    """Small numbers [n, 256] -> bytes: runs of `run` columns share bytes, `width` bits each; the
    first run in the lowest bits."""
    per = 8 // width
    x = x.long().view(len(x), -1, per, run)
    steps = width * torch.arange(per, device=x.device)
    return (x << steps[:, None]).sum(2).flatten(1).to(torch.uint8)


def _unplanes(raw: Tensor, width: int, run: int) -> Tensor:
    """The inverse of `_planes`: bytes -> int64 [n, 256]."""
    shifts = (width * torch.arange(8 // width, device=raw.device))[:, None]
    x = raw.long().view(len(raw), -1, 1, run)
    return ((x >> shifts) & (2**width - 1)).flatten(1)


def _pack_q2_k(grid: Scales, q: Tensor) -> Tensor:
    scales = (grid.a | (grid.b << 4)).to(torch.uint8)
    return torch.cat([scales, _planes(q, 2, 32), _bytes_of(grid.d), _bytes_of(grid.dmin)], 1)


def _unpack_q2_k(raw: Tensor, kind: str) -> Opened:  # noqa: ARG001
    scales = raw[:, :16].long()
    d, dmin = _number(raw[:, 80:82]), _number(raw[:, 82:84])
    return d, dmin, scales & 15, scales >> 4, _unplanes(raw[:, 16:80], 2, 32)


def _pack_q3_k(grid: Scales, q: Tensor) -> Tensor:
    a = grid.a + 32
    low = (a[:, :8] & 15) | ((a[:, 8:] & 15) << 4)
    steps = 2 * torch.arange(4, device=a.device)
    high = ((a >> 4).view(-1, 4, 4) << steps[:, None]).sum(1)
    scales = torch.cat([low, high], 1).to(torch.uint8)
    return torch.cat([_planes(q >> 2, 1, 32), _planes(q & 3, 2, 32), scales, _bytes_of(grid.d)], 1)


def _unpack_q3_k(raw: Tensor, kind: str) -> Opened:  # noqa: ARG001
    scales, d = raw[:, 96:108].long(), _number(raw[:, 108:110])
    low = torch.cat([scales[:, :8] & 15, scales[:, :8] >> 4], 1)
    steps = 2 * torch.arange(4, device=raw.device)
    high = ((scales[:, None, 8:] >> steps[:, None]) & 3).flatten(1)
    q = _unplanes(raw[:, 32:96], 2, 32) | (_unplanes(raw[:, :32], 1, 32) << 2)
    a = (low | (high << 4)) - 32
    return d, torch.zeros_like(d), a, a * 0, q


def _six_bits(a: Tensor, b: Tensor) -> Tensor:
    """Eight sub-scales and eight sub-minima of 6 bits -> 12 bytes."""
    first = (a[:, :4] & 63) | ((a[:, 4:] >> 4) << 6)
    second = (b[:, :4] & 63) | ((b[:, 4:] >> 4) << 6)
    third = (a[:, 4:] & 15) | ((b[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], 1).to(torch.uint8)


def _pack_q45_k(grid: Scales, q: Tensor) -> Tensor:
    parts = [_bytes_of(grid.d), _bytes_of(grid.dmin), _six_bits(grid.a, grid.b)]
    if grid.kind == "q5_k":
        parts.append(_planes(q >> 4, 1, 32))
    return torch.cat([*parts, _planes(q & 15, 4, 32)], 1)


def _unpack_q45_k(raw: Tensor, kind: str) -> Opened:
    first, second, third = raw[:, 4:16].long().split(4, 1)
    a = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    b = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    rest = raw[:, 16:]
    high = torch.zeros(1, dtype=torch.long, device=raw.device)
    if kind == "q5_k":
        high, rest = _unplanes(rest[:, :32], 1, 32), rest[:, 32:]
    return _number(raw[:, :2]), _number(raw[:, 2:4]), a, b, _unplanes(rest, 4, 32) | (high << 4)


def _pack_q6_k(grid: Scales, q: Tensor) -> Tensor:
    scales = (grid.a & 255).to(torch.uint8)
    low, high = _planes(q & 15, 4, 64), _planes(q >> 4, 2, 32)
    return torch.cat([low, high, scales, _bytes_of(grid.d)], 1)


def _unpack_q6_k(raw: Tensor, kind: str) -> Opened:  # noqa: ARG001
    q = _unplanes(raw[:, :128], 4, 64) | (_unplanes(raw[:, 128:192], 2, 32) << 4)
    a = raw[:, 192:208].contiguous().view(torch.int8).long()
    d = _number(raw[:, 208:210])
    return d, torch.zeros_like(d), a, a * 0, q


def _pack_iq4_xs(grid: Scales, q: Tensor) -> Tensor:
    a = grid.a + 32  # six bits each: the upper two in a word of their own
    high = ((a >> 4) << (2 * torch.arange(8, device=a.device))).sum(1, keepdim=True)
    high = torch.cat([high & 255, high >> 8], 1).to(torch.uint8)
    low = ((a[:, ::2] & 15) | ((a[:, 1::2] & 15) << 4)).to(torch.uint8)
    codes = _nibbles(q.view(-1, 32)).view(len(q), -1)
    return torch.cat([_bytes_of(grid.d), high, low, codes], 1)


def _unpack_iq4_xs(raw: Tensor, kind: str) -> Opened:  # noqa: ARG001
    d, high, scales = _number(raw[:, :2]), raw[:, 2:4].long(), raw[:, 4:8].long()
    high = high[:, :1] | (high[:, 1:] << 8)
    upper = (high >> (2 * torch.arange(8, device=raw.device))) & 3
    a = (torch.stack([scales & 15, scales >> 4], 2).flatten(1) | (upper << 4)) - 32
    codes = raw[:, 8:].reshape(-1, 16)
    q = torch.cat([codes & 15, codes >> 4], 1).view(len(raw), -1).long()
    return d, torch.zeros_like(d), a, a * 0, q


_K = {"q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"}
_PLAIN = LAYOUTS.keys() - _K
PACK: Mapping[str, Callable[[Scales, Tensor], Tensor]] = dict.fromkeys(_PLAIN, _pack_plain) | {
    "q2_k": _pack_q2_k,
    "q3_k": _pack_q3_k,
    "q4_k": _pack_q45_k,
    "q5_k": _pack_q45_k,
    "q6_k": _pack_q6_k,
    "iq4_xs": _pack_iq4_xs,
}
UNPACK: Mapping[str, Callable[[Tensor, str], Opened]] = dict.fromkeys(_PLAIN, _unpack_plain) | {
    "q2_k": _unpack_q2_k,
    "q3_k": _unpack_q3_k,
    "q4_k": _unpack_q45_k,
    "q5_k": _unpack_q45_k,
    "q6_k": _unpack_q6_k,
    "iq4_xs": _unpack_iq4_xs,
}
