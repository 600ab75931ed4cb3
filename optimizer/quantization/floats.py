"""Floating-point codes with shared scales, as GPUs multiply them: a weight matrix <-> codes.

    (1) w' = c s g
c: the value of a code, E2M1 (0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives) or E4M3 (up to 448);
s: the scale of a group, E4M3 in NVFP4, a power of two (E8M0) in MXFP4, fp32 in FP8; g: one fp32 scale
of the tensor, in NVFP4 only.

g is a power of two. Any g would do; with this one (1) is exact in bfloat16, which packages unpack to,
and layers that an engine joins under one g can be given it by moving exponents (`shifted`).

Sources: OCP Microscaling Formats 1.0 (E2M1, E8M0); OCP 8-bit floating point 1.0 (E4M3); NVIDIA's NVFP4
as in compressed-tensors 0.20 (compressors/nvfp4). Their scale, amax / 6, isn't the best one: of a few
beside it the one of least error is taken, as in "four over six" (arXiv:2512.02010). On normal numbers
that leaves .0067 of their variance for .0092, and of MXFP4 .0127.

Legend: W [rows, cols]; a group is `weights` columns of `rows` rows, see `plan.Float`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optimizer.plan import FLOATS, Precision

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TOP = {4: 6.0, 8: 448.0}  # largest value of a code, by its bits
LARGEST = 0x7E  # E4M3's code of 448
BIAS = 127  # of E8M0's exponents
LOWEST = -126  # exponent below which fp32 has no normal numbers
EXPONENTS = (0, 1)  # that are tried above the largest power of two that keeps amax below 8
NEAR = range(-2, 6)  # E4M3's numbers around amax / 6 that are tried: up to almost amax / 4
CHUNK = 2**17  # weights at a time: the search stays in a CPU's cache


@dataclass(frozen=True)
class Grid:
    """The levels that each weight may take. stored: the scales as they are stored, uint8 or fp32
    [ceil(rows / n), groups] for scales of n rows; whole: g, fp32 [1, 1]."""

    precision: Precision
    shape: tuple[int, int]
    stored: Tensor
    whole: Tensor

    def step(self, rows: slice = slice(None)) -> Tensor:
        """s g of some rows' groups, fp32 [rows, groups]."""
        found = _per_row(_decoded(self.stored, self.precision), self.precision, self.shape[0])
        return found[rows] * self.whole

    def codes(self, level: Tensor) -> Tensor:
        """Values of codes c -> codes, uint8."""
        return encoded(level, self.precision.bits)

    def pack(self, codes: Tensor) -> Floats:
        """codes: uint8 [rows, cols]."""
        return Floats(self.precision, codes, self.stored, self.whole)


@dataclass(frozen=True)
class Floats:
    """A rounded layer. codes: uint8 [rows, cols], E2M1 or E4M3; scales, whole: as `Grid`'s, where
    scales of a block of rows may already be each row's own."""

    precision: Precision
    codes: Tensor
    scales: Tensor
    whole: Tensor

    def decode(self) -> Tensor:
        """W' [rows, cols] fp32."""
        rows, cols = self.codes.shape
        scales = _per_row(_decoded(self.scales, self.precision), self.precision, rows)
        step = (scales * self.whole).unsqueeze(-1)
        found = torch.empty(rows, cols, device=self.codes.device)
        for own in _runs(rows, cols):
            value = values(self.codes[own], self.precision.bits)
            found[own] = (value.view(len(value), step.shape[1], -1) * step[own]).view(-1, cols)
        return found

    def pack(self) -> dict[str, Tensor]:
        """Stored tensors by suffix, shaped as `Precision.parts` says."""
        codes = self.codes
        if self.precision.bits == 4:
            codes = codes[:, ::2] | (codes[:, 1::2] << 4)
        parts = {"codes": codes, "scales": self.scales}
        return parts | ({"scale": self.whole} if FLOATS[self.precision.kind].whole else {})

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], precision: Precision) -> Floats:
        codes = parts["codes"]
        if precision.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
        one = torch.ones(1, 1, device=codes.device)
        return cls(precision, codes, parts["scales"], parts.get("scale", one))

    def take(self, own: slice) -> Floats:
        """Some of its rows."""
        scales = _per_row(self.scales, self.precision, len(self.codes))
        return replace(self, codes=self.codes[own], scales=scales[own])

    def put(self, own: slice, where: Tensor, other: Floats) -> None:
        """Take rows of `other`, a rounding under the same scales of blocks and tensor, instead. where:
        bool [rows of own]."""
        mask = where.unsqueeze(1)
        self.codes[own] = torch.where(mask, other.codes[own], self.codes[own])
        if FLOATS[self.precision.kind].rows == 1:
            self.scales[own] = torch.where(mask, other.scales[own], self.scales[own])

    def shifted(self, whole: float) -> Floats | None:
        """The same weights under another g, a power of two; None where a scale would leave E4M3."""
        moved = _decoded(self.scales, self.precision) * (self.whole / whole)
        scales = encoded(moved.clamp(max=TOP[8]), 8)
        if not torch.equal(values(scales, 8), moved):
            return None
        return replace(self, scales=scales, whole=torch.full_like(self.whole, whole))


def some(parts: Mapping[str, Tensor], precision: Precision, ids: Tensor) -> dict[str, Tensor]:
    """The parts of a few rows, ids [n]."""
    shared = {"scale": None, "scales": FLOATS[precision.kind].rows}
    found = {}
    for name, part in parts.items():
        each = shared.get(name, 1)
        found[name] = part if each is None else part[ids // each]
    return found


def fit(weight: Tensor, precision: Precision, importance: Tensor | None = None) -> Grid:
    """The scales of least squared error for W [rows, cols]. importance: of the columns [cols]."""
    rows, cols = weight.shape
    own = FLOATS[precision.kind]
    groups = precision.groups(cols)
    whole = torch.ones(1, 1, device=weight.device)
    if precision.bits == 8:
        padded = torch.nn.functional.pad(weight.float().abs(), (0, 0, 0, -rows % own.rows))
        largest = padded.view(-1, own.rows, groups, cols // groups).amax((1, 3))
        return Grid(precision, (rows, cols), largest / TOP[8], whole)
    if own.whole:
        whole = _power(weight.abs().amax().float() / (4 * TOP[8])).view(1, 1)
    stored = torch.empty(rows, groups, dtype=torch.uint8, device=weight.device)
    v = None if importance is None else importance.view(groups, -1)
    for some_rows in _runs(rows, cols):
        w = weight[some_rows].float().reshape(-1, groups, cols // groups)
        stored[some_rows] = _searched(w, v, precision, whole)
    return Grid(precision, (rows, cols), stored, whole)


def encode(weight: Tensor, grid: Grid) -> Floats:
    """Round to nearest."""
    rows, cols = grid.shape
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    for own in _runs(rows, cols):
        level = _levels(weight[own], grid.step(own), grid.precision.bits)
        codes[own] = grid.codes(level).view(-1, cols)
    return grid.pack(codes)


def round_to(weight: Tensor, grid: Grid) -> Tensor:
    """W' [rows, cols] fp32, exactly what `encode` decodes to."""
    found = torch.empty(weight.shape, device=weight.device)
    for own in _runs(*grid.shape):
        step = grid.step(own)
        level = _levels(weight[own], step, grid.precision.bits)
        found[own] = level.mul_(step.unsqueeze(-1)).view(-1, grid.shape[1])
    return found


def nearest(x: Tensor, bits: int) -> Tensor:
    """The nearest values of codes, fp32; ties go to the even one, as in IEEE 754."""
    x = x.clamp(-TOP[bits], TOP[bits])
    if bits == 8:
        return x.to(torch.float8_e4m3fn).float()
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (x / step).round_().mul_(step)


def encoded(level: Tensor, bits: int) -> Tensor:
    """Values of codes -> codes, uint8 of the same shape. Zero has no sign."""
    if bits == 8:
        return (level + 0.0).to(torch.float8_e4m3fn).view(torch.uint8)
    table = torch.tensor(E2M1, device=level.device)
    code = torch.searchsorted(table, level.abs().contiguous()).to(torch.uint8)
    return code | ((level < 0).to(torch.uint8) << 3)


def values(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `encoded`, fp32."""
    if bits == 8:
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    table = torch.tensor([*E2M1, *(-x for x in E2M1)], device=codes.device)
    return table[codes.long()]


def _levels(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """W [n, cols], step [n, groups] -> values of codes [n, groups, weights of a group]."""
    w = weight.float().reshape(*step.shape, -1)
    return nearest(w * _inverse(step).unsqueeze(-1), bits)


def _searched(w: Tensor, v: Tensor | None, precision: Precision, whole: Tensor) -> Tensor:
    """Of every group [n, groups, weights] the stored scale, uint8, with the least error."""
    largest = w.abs().amax(-1)
    if precision.kind == "mxfp4":
        first = (torch.frexp(largest).exponent - 3).clamp(LOWEST, BIAS - 1)
        tried = [torch.where(largest == 0, 0, first + i) + BIAS for i in EXPONENTS]
    else:
        first = encoded((largest / (TOP[4] * whole)).clamp(max=TOP[8]), 8).long()
        tried = [torch.where(largest == 0, 0, (first + i).clamp(1, LARGEST)) for i in NEAR]
    best, least = tried[0].to(torch.uint8), torch.full_like(largest, torch.inf)
    for candidate in tried:
        code = candidate.to(torch.uint8)
        step = _decoded(code, precision) * whole
        x = w * _inverse(step).unsqueeze(-1)
        error = nearest(x, 4).sub_(x).square_()
        # over the largest: squares of small weights would underflow
        loss = (error if v is None else error * v).sum(-1) * (step * _inverse(largest)).square()
        best = torch.where(loss < least, code, best)
        least = torch.minimum(least, loss)
    return best


def _decoded(stored: Tensor, precision: Precision) -> Tensor:
    """Stored scales -> fp32."""
    if precision.kind == "mxfp4":
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - BIAS)
    return values(stored, 8) if precision.kind == "nvfp4" else stored


def _per_row(scales: Tensor, precision: Precision, rows: int) -> Tensor:
    if len(scales) == rows:
        return scales
    return scales.repeat_interleave(FLOATS[precision.kind].rows, 0)[:rows]


def _power(x: Tensor) -> Tensor:
    """The least power of two that isn't below x; 1 for 0."""
    exponent = torch.frexp(x).exponent - (torch.frexp(x).mantissa == 0.5).int()
    return torch.where(x > 0, torch.ldexp(torch.ones_like(x), exponent.clamp(LOWEST, BIAS)), 1.0)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step == 0, 0.0, 1 / step)


def _runs(rows: int, cols: int) -> list[slice]:
    size = max(1, CHUNK // cols)
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]
