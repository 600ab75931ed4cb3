"""Blocks of ggml, llama.cpp's tensor library: a weight matrix -> the bytes of a GGUF tensor, and
back. Packed from the format's definition (ggml-common.h, block_q4_0 ... block_q6_K).

A row is cut into super-blocks of `Block.weights` columns, those into sub-blocks of `length`
columns. With integer code q, table t, sub-scale a, sub-minimum b and fp16 d, dmin per super-block
    (1) w' = d a t[q] - dmin b
where the types without sub-blocks have a = 1, and those without a minimum b = 0. Scales are not
taken from the extremes but searched: for some stretches of the range the codes are rounded and
    (2) min over (s, m) of sum_i v_i (w_i - s t[q_i] + m)^2
is solved in closed form; the stretch with the least error wins. v: importance of the columns.

`fit` finds the grid, `Grid.round` the codes, `Grid.pack` the bytes: a quantizer that moves the
error of one column to the next (GPTQ) takes the grid and chooses other codes inside of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from optimizer.plan import GGML, Precision
from optimizer.quantization import ggml_bytes, ggml_native
from optimizer.quantization.ggml_bytes import PACK, UNPACK

LAYOUTS = ggml_bytes.LAYOUTS
NATIVE = ggml_native.NATIVE  # kinds that llama.cpp's own functions round
STRETCHES = 7  # tried ranges per sub-block
CHUNK = 2**20  # weights at a time: the search stays in the cache
CURVED = ("iq4_nl", "iq4_xs")  # kinds whose levels aren't evenly spaced
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # iq4_nl
FURTHEST = 256  # in halves: beyond all of NONLINEAR


def table(kind: str, device: torch.device) -> Tensor:
    """Code -> level, fp32, ascending."""
    if kind in CURVED:
        return torch.tensor(NONLINEAR, dtype=torch.float32, device=device)
    return torch.arange(2.0 ** GGML[kind].bits, device=device) - LAYOUTS[kind].zero


@dataclass(frozen=True)
class Grid:
    """The levels that each weight may take. Super-blocks are flattened: n = rows * super-blocks.

    d, dmin: fp32 [n, 1] that hold fp16 values; a, b: int64 [n, sub-blocks], see (1).
    """

    kind: str
    shape: tuple[int, int]
    d: Tensor
    dmin: Tensor
    a: Tensor
    b: Tensor

    @property
    def step(self) -> Tensor:
        """[n, sub-blocks]"""
        return self.d * self.a

    @property
    def minimum(self) -> Tensor:
        """[n, sub-blocks], subtracted"""
        return self.dmin * self.b

    def round(self, weight: Tensor) -> Tensor:
        """W [rows, cols] -> nearest codes uint8 [rows, cols]."""
        w = weight.float().reshape(*self.a.shape, -1)
        level = _nearest(w, self.step[..., None], self.minimum[..., None], self.kind)
        return _codes(level, self.kind).view(self.shape)

    def codes(self, level: Tensor) -> Tensor:
        """Levels t[q] [rows, cols] -> codes uint8 [rows, cols]."""
        return _codes(level, self.kind)

    def values(self, codes: Tensor) -> Tensor:
        """Codes [rows, cols] -> W' fp32 [rows, cols], equation (1)."""
        q = codes.view(*self.a.shape, -1).long()
        level = table(self.kind, self.d.device)[q]
        return (self.step[..., None] * level - self.minimum[..., None]).view(self.shape)

    def parts(self) -> dict[str, Tensor]:
        """All of it but the shape, as small as it is exact."""
        small = {"a": self.a.to(torch.int8), "b": self.b.to(torch.int8)}
        return small | {"d": self.d.half(), "dmin": self.dmin.half()}

    @classmethod
    def of(cls, kind: str, shape: tuple[int, int], parts: Mapping[str, Tensor]) -> Grid:
        d, dmin = parts["d"].float(), parts["dmin"].float()
        return cls(kind, shape, d, dmin, parts["a"].long(), parts["b"].long())

    def pack(self, codes: Tensor) -> Blocks:
        q = codes.reshape(len(self.a), -1)
        data = PACK[self.kind](self, q)
        return Blocks(Precision.ggml(self.kind), data.view(self.shape[0], -1), self.shape[1])


@dataclass(frozen=True)
class Blocks:
    """A rounded layer as it lies in the file. data: uint8 [rows, bytes of a row]."""

    precision: Precision
    data: Tensor
    cols: int

    def decode(self) -> Tensor:
        """W' [rows, cols] fp32."""
        if self.precision.kind in NATIVE:
            return ggml_native.decode(self.data, self.precision.kind, self.cols)
        grid, codes = self.open()
        return grid.values(codes)

    def open(self) -> tuple[Grid, Tensor]:
        """The grid and the codes uint8 [rows, cols] inside of it; not for kinds in NATIVE."""
        kind = self.precision.kind
        shape = (self.data.shape[0], self.cols)
        raw = self.data.reshape(-1, GGML[kind].size)
        d, dmin, a, b, codes = UNPACK[kind](raw, kind)
        return Grid(kind, shape, d, dmin, a, b), codes.to(torch.uint8).view(shape)

    def pack(self) -> dict[str, Tensor]:
        return {"blocks": self.data}


def fitted(weight: Tensor, kind: str, importance: Tensor | None = None) -> Iterator[Grid]:
    """The searched grids of W [rows, cols], a few rows each, one at a time; none for kinds in NATIVE.
    All of them together take more memory than the layer's blocks."""
    if kind not in NATIVE:
        for rows in slices(weight):
            yield fit(rows, kind, importance)


def encode(weight: Tensor, precision: Precision, grids: Iterable[Grid] = ()) -> Blocks:
    """W [rows, cols] -> blocks, round to nearest. grids: what `fitted` gave."""
    if precision.kind in NATIVE:
        data = ggml_native.encode(weight, precision.kind)
        return Blocks(precision, data, weight.shape[1])
    grids = grids or fitted(weight, precision.kind)
    rows, cols = weight.shape
    block = GGML[precision.kind]
    shape = (rows, cols // block.weights * block.size)
    data = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    some = max(1, CHUNK // cols)
    for grid, own, target in zip(grids, slices(weight), data.split(some), strict=True):
        target.copy_(grid.pack(grid.round(own)).data)
    return Blocks(precision, data, cols)


def round_to(weight: Tensor, precision: Precision, grids: Iterable[Grid] = ()) -> Tensor:
    """W' [rows, cols] fp32, exactly what `encode` decodes to."""
    if precision.kind in NATIVE:
        return encode(weight, precision).decode()
    parts = []
    for grid, rows in zip(grids or fitted(weight, precision.kind), slices(weight), strict=True):
        w, step, lower = (
            rows.reshape(*grid.a.shape, -1),
            grid.step[..., None],
            grid.minimum[..., None],
        )
        parts.append(_nearest(w, step, lower, grid.kind).mul_(step).sub_(lower).view(rows.shape))
    return torch.cat(parts)


def _codes(level: Tensor, kind: str) -> Tensor:
    """Levels that are in the table -> codes uint8."""
    if kind in CURVED:
        return torch.searchsorted(table(kind, level.device), level.contiguous()).to(torch.uint8)
    return (level + LAYOUTS[kind].zero).to(torch.uint8)


def slices(weight: Tensor) -> Iterator[Tensor]:
    """A few rows at a time, fp32; of 16-bit weights no whole copy is made."""
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        yield rows.float()


# ---------------------------------------------------------------- the grid


def fit(weight: Tensor, kind: str, importance: Tensor | None = None) -> Grid:
    """The grid for W [rows, cols]. importance: of the columns, [cols]."""
    layout, block = LAYOUTS[kind], GGML[kind]
    shape = (weight.shape[0], weight.shape[1])
    subs = block.weights // layout.length
    w = weight.float().reshape(-1, subs, layout.length)
    v = None if importance is None else importance.expand(shape).reshape(w.shape)
    s, m = _search(w, v, kind)
    if layout.top == 0:
        one = torch.ones_like(s, dtype=torch.long)
        return Grid(kind, shape, _half(s), _half(m), one, one * layout.minimum)
    d, a = _share(s, layout.top, layout.signed)
    dmin, b = _share(m, layout.top, False)
    d, dmin = _refine(w, v, kind, d, dmin, a, b)
    return Grid(kind, shape, d, dmin, a, b)


def _search(w: Tensor, v: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Equation (2) for every sub-block [n, k, l] -> (s, m) [n, k]."""
    levels, layout = table(kind, w.device), LAYOUTS[kind]
    low, high = float(levels[0]), float(levels[-1])
    if layout.minimum:
        bottom = w.amin(-1, keepdim=True).clamp_(max=0)
        starts = [(w.amax(-1, keepdim=True) - bottom) / high]
    else:  # the extreme takes the table's longer end: q4_0 has -8, but only 7
        bottom = torch.zeros_like(w[..., :1])
        extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True))
        starts = [extreme / low, extreme / high]
    stretches = torch.linspace(0.75, 1.05, STRETCHES, device="cpu").tolist()
    if kind == "q8_0":  # 256 levels leave nothing to search for
        starts, stretches = [extreme / -high], [1.0]
    most = torch.full_like(bottom, -torch.inf)
    s, m = torch.zeros_like(bottom), torch.zeros_like(bottom)
    for start in starts:
        for stretch in stretches:
            q = _nearest(w, start * stretch, -bottom, kind)
            step, offset, gain = _least_squares(w, v, q, layout.minimum, layout.top > 0)
            better = gain > most
            most = torch.where(better, gain, most)
            s, m = torch.where(better, step, s), torch.where(better, offset, m)
    return s.squeeze(-1), m.squeeze(-1)


def _nearest(w: Tensor, step: Tensor, minimum: Tensor, kind: str) -> Tensor:
    """The nearest levels t[q], fp32; a step of 0 gives level 0."""
    x = (w + minimum).mul_(torch.where(step == 0, 0.0, 1 / step))
    if kind in CURVED:
        place = x.mul_(2).ceil_().nan_to_num_(FURTHEST).clamp_(-FURTHEST, FURTHEST).add_(FURTHEST)
        return _by_halves(w.device).index_select(0, place.int().flatten()).view(place.shape)
    levels = table(kind, w.device)
    return x.round_().clamp_(float(levels[0]), float(levels[-1]))


@cache
def _by_halves(device: torch.device) -> Tensor:
    """ceil(2 x) + FURTHEST -> the nearest level of NONLINEAR, the lower one halfway. Borders between
    levels are halves of whole numbers, so all x between two halves have the same."""
    levels = torch.tensor(NONLINEAR, dtype=torch.float32, device=device)
    halves = torch.arange(-FURTHEST, FURTHEST + 1, device=device) / 2
    return levels[torch.bucketize(halves, (levels[1:] + levels[:-1]) / 2)]


def _least_squares(
    w: Tensor, v: Tensor | None, q: Tensor, minimum: bool, unsigned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(s, m) that minimise sum v (w - s q + m)^2, and by how much they lower it from s = m = 0.

    unsigned: m >= 0, as K-quants store it.
    """
    vq = q if v is None else v * q
    wq, qq = (w * vq).sum(-1, keepdim=True), (q * vq).sum(-1, keepdim=True)
    alone = wq / qq.clamp(min=1e-30)
    if not minimum:
        return alone, torch.zeros_like(alone), alone * wq
    sq = vq.sum(-1, keepdim=True)
    sw = (w if v is None else v * w).sum(-1, keepdim=True)
    one = torch.full_like(sw, w.shape[-1]) if v is None else v.sum(-1, keepdim=True)
    bottom = one * qq - sq * sq
    usable = bottom > 1e-6 * one * qq
    s = torch.where(usable, (one * wq - sw * sq) / bottom.clamp(min=1e-30), alone)
    m = torch.where(usable, (s * sq - sw) / one, 0.0)
    if unsigned:
        s, m = torch.where(m < 0, alone, s), m.clamp_(min=0)
    gain = 2 * (s * wq - m * sw) - s * s * qq + 2 * s * m * sq - m * m * one
    return s, m, gain


def _share(s: Tensor, top: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Sub-block scales [n, k] -> one fp16 d [n, 1] and integers a [n, k] with s ~ d a."""
    if signed:  # the largest takes the longer, negative end
        extreme = s.gather(-1, s.abs().argmax(-1, keepdim=True))
        d = _half(extreme / -(top + 1))
    else:
        d = _half(s.amax(-1, keepdim=True) / top)
    a = torch.where(d == 0, 0.0, s / d).round().clamp(-(top + 1) if signed else 0, top)
    return d, a.long()


def _refine(
    w: Tensor, v: Tensor | None, kind: str, d: Tensor, dmin: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Round with the shared scales, then solve (2) once more for (d, dmin) of the super-block."""
    lower = (dmin * b)[..., None]
    q = (_nearest(w, (d * a)[..., None], lower, kind) * a[..., None]).flatten(1)
    weights = None if v is None else v.flatten(1)
    better, _, _ = _least_squares((w + lower).flatten(1), weights, q, False, True)
    better = torch.where(better == 0, d, better)
    if not LAYOUTS[kind].minimum:
        return _half(better), dmin
    ones = b[..., None].expand(w.shape).float().flatten(1)
    below, _, _ = _least_squares(better * q - w.flatten(1), weights, ones, False, True)
    return _half(better), _half(below.clamp_(min=0))


def _half(x: Tensor) -> Tensor:
    return x.clamp(-65504, 65504).half().float()
