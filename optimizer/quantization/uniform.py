"""Rounding: a weight matrix and a precision -> codes, scales and zero points, and back.

W [rows, cols] is cut into groups of g columns. For a group with values w (equation numbers are
used below):
    (1) asymmetric  s = (max(w,0) - min(w,0)) / (2^b - 1),  z = round(-min(w,0)/s),
                    q = clamp(round(w/s) + z, 0, 2^b - 1),  w' = (q - z) s
    (2) symmetric   s = 2 max|w| / (2^b - 1),  q = clamp(round(w/s), -2^(b-1), 2^(b-1) - 1)
    (3) 1 bit       s = mean|w|,  w' = s sign(w)                  (XNOR-Net, arXiv:1603.05279)
    (4) ternary     s = mean of |w| above 0.7 mean|w|, zero below (TWN, arXiv:1605.04711)
Scales are fp16 before they are used, so that what is scored is what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from optimizer.errors import ConfigError
from optimizer.plan import BY_ROW, FLOATS, GGML, TRITS_PER_BYTE, Precision, packed_bytes
from optimizer.quantization import floats, ggml, ggml_native

SMALLEST, LARGEST = 2.0**-24, 65504.0  # fp16's subnormal step and maximum
TINY = 1e-30  # as a step: every weight is far from zero, so only its sign counts
PIECE = 2**22  # codes that are unpacked at a time
CACHED = 2**17  # weights that are rounded at a time: what stays in a CPU's cache, twice as fast
SHRINKS = [1 - i / 20 for i in range(1, 11)]


class Independent:
    """Rounds each layer by itself with a function: weight [rows, cols], precision, layer's name ->
    what it becomes, encoded. This is what a model, a table and a packer call."""

    def __init__(self, quantize: Callable[[Tensor, Precision, str], Encoded]) -> None:
        self._quantize = quantize

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        """W' [rows, cols] fp32, exactly what the packed layer unpacks to."""
        if precision.kind == "none":
            return weight.float()
        return self.encode(weight, precision, layer).decode().to(weight.device)

    def encode(self, weight: Tensor, precision: Precision, layer: str = "") -> Encoded:
        """The layer's codes."""
        return self._quantize(weight, precision, layer)

    def changed(self, name: str, value: Tensor) -> Tensor:  # noqa: ARG002
        """What a tensor that isn't quantized, such as a norm, becomes beside these codes."""
        return value

    def rounder(self, choice: Mapping[str, Precision], joint: bool = True) -> Self:  # noqa: ARG002
        """What rounds the layers of `choice`; here always each by itself."""
        return self

    def prepare(self, wanted: Mapping[str, Sequence[Precision]]) -> None:
        """Nothing has to be made before `round`."""

    def ready(self, choices: Sequence[Mapping[str, Precision]]) -> None:
        """Nor for several whole choices."""


@dataclass(kw_only=True)
class Nearest(Independent):
    """Round to nearest; no data needed.

    clip: try group ranges shrunk to half in steps of 1/20 and keep the one with the least squared
    error.
    """

    name: ClassVar[str] = "rtn"
    by_row: ClassVar[bool] = True  # what becomes of a row doesn't depend on the others
    clip: bool = False

    def grids(self, weight: Tensor, kind: str, layer: str) -> Iterable[ggml.Grid]:  # noqa: ARG002
        """Of llama.cpp's blocks, whose scales are searched for."""
        return ggml.fitted(weight, kind)

    def blocks(self, weight: Tensor, precision: Precision, layer: str) -> ggml.Blocks:  # noqa: ARG002
        """Of the kinds that llama.cpp's own functions round."""
        return ggml.encode(weight, precision)

    def scales(self, weight: Tensor, precision: Precision, layer: str) -> floats.Grid:  # noqa: ARG002
        """Of floats, searched for as well."""
        return floats.fit(weight, precision)

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        """W' [rows, cols] fp32, exactly what the packed layer unpacks to."""
        if precision.kind == "none":
            return weight.float()
        if precision.kind in FLOATS:
            return floats.round_to(weight, self.scales(weight, precision, layer))
        if precision.kind in ggml_native.NATIVE:
            return self.blocks(weight, precision, layer).decode()
        if precision.kind in GGML:
            return ggml.round_to(weight, precision, self.grids(weight, precision.kind, layer))
        parts = [self._values(part, precision) for part in weight.split(_some_rows(weight))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _values(self, weight: Tensor, precision: Precision) -> Tensor:
        w = grouped(weight, precision)
        levels = self._levels(w, precision)
        return levels.nearest(w).add_(levels.shift).mul_(levels.value).view(weight.shape)

    def encode(
        self,
        weight: Tensor,
        precision: Precision,
        layer: str = "",
    ) -> Encoded:
        if precision.kind in FLOATS:
            return floats.encode(weight, self.scales(weight, precision, layer))
        if precision.kind in ggml_native.NATIVE:
            return self.blocks(weight, precision, layer)
        if precision.kind in GGML:
            return ggml.encode(weight, precision, self.grids(weight, precision.kind, layer))
        return self.codes(weight, precision)

    def codes(self, weight: Tensor, precision: Precision) -> Codes:
        """As `encode`, for uniform levels, some rows at a time: a vocabulary is long."""
        parts = []
        for part in weight.split(_some_rows(weight)):
            w = grouped(part, precision)
            levels = self._levels(w, precision)
            parts.append(levels.codes(levels.nearest(w).view(part.shape), precision))
        codes, scales, zeros = zip(*((x.codes, x.scales, x.zeros) for x in parts), strict=True)
        whole = None if precision.symmetric else torch.cat(zeros)
        return Codes(precision, torch.cat(codes), torch.cat(scales), whole)

    def _levels(self, w: Tensor, precision: Precision) -> Levels:
        return (
            clipped(w, precision, torch.ones_like(w[:1])) if self.clip else levels_of(w, precision)
        )


def _some_rows(weight: Tensor) -> int:
    """How many rows of W [rows, cols] stay in a CPU's cache; on a GPU all are rounded at once."""
    rows, cols = weight.shape
    return max(1, CACHED // cols) if weight.device.type == "cpu" else max(rows, 1)


class Given:
    """Codes that were made beforehand, by layer. Layers without any are rounded to nearest.
    as_stored: a layer's weight may have the checkpoint's own dtype, of which no copy is then made: a
    head of 230 million weights takes .9 GB in fp32."""

    as_stored: ClassVar[bool] = True

    def __init__(
        self,
        find: Callable[[str, Precision], Encoded | None],
        some: Callable[[str, Precision, slice | Tensor], Encoded | None] | None = None,
    ) -> None:
        """some: the codes of some rows."""
        self._find, self._some, self._other = find, some, Nearest()

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        codes = self._find(layer, precision)
        if codes is None:
            return self._other.round(weight.float(), precision)
        return codes.decode().to(weight.device)

    def some(
        self,
        layer: str,
        precision: Precision,
        rows: slice | Tensor,
        own: Callable[[], Tensor],
    ) -> Tensor | None:
        """Some rows of what `round` gives; None where they can't be had alone. own: gives the
        weight's."""
        if self._some is None:
            return None
        found = self._some(layer, precision, rows)
        if found is not None:
            return found.decode()
        if self._find(layer, precision) is None and precision.kind in BY_ROW:
            return self._other.round(own(), precision)
        return None

    def encode(self, weight: Tensor, precision: Precision, layer: str = "") -> Encoded:
        return self._find(layer, precision) or self._other.encode(weight, precision)

    def changed(self, name: str, value: Tensor) -> Tensor:  # noqa: ARG002
        """What a tensor that isn't quantized, such as a norm, becomes beside these codes."""
        return value


@dataclass(frozen=True)
class Codes:
    """A rounded layer. codes: uint8 [rows, cols]; scales: fp16 [rows, groups]; zeros: uint8
    [rows, groups], or None where the precision is symmetric."""

    precision: Precision
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def to(self, device: str) -> Codes:
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(
            self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros
        )

    def decode(self) -> Tensor:
        """W' [rows, cols] fp32, some rows at a time."""
        rows, cols = self.codes.shape
        found = torch.empty(rows, cols, device=self.codes.device)
        for start in range(0, rows, max(1, PIECE // cols)):
            own = slice(start, start + max(1, PIECE // cols))
            found[own] = self._rows(own).view(-1, cols)
        return found

    def _rows(self, own: slice) -> Tensor:
        """[rows, groups, g]"""
        scales = self.scales[own].float().unsqueeze(-1)
        codes = self.codes[own].view(len(scales), scales.shape[1], -1).float()
        if self.zeros is None:
            return _signed(codes, self.precision) * scales
        return (codes - self.zeros[own].float().unsqueeze(-1)) * scales

    def pack(self) -> dict[str, Tensor]:
        """Stored tensors by suffix, shaped as `Precision.parts` says."""
        parts = {"codes": pack(self.codes, self.precision), "scales": self.scales}
        if self.zeros is not None:
            parts["zeros"] = pack(self.zeros, self.precision)
        return parts

    @classmethod
    def unpack(cls, parts: dict[str, Tensor], precision: Precision, cols: int) -> Encoded:
        if precision.kind in GGML:
            return ggml.Blocks(precision, parts["blocks"], cols)
        if precision.kind in FLOATS:
            return floats.Floats.unpack(parts, precision)
        zeros = parts.get("zeros")
        return cls(
            precision,
            unpack(parts["codes"], precision, cols),
            parts["scales"],
            None if zeros is None else unpack(zeros, precision, precision.groups(cols)),
        )


Encoded = Codes | ggml.Blocks | floats.Floats


def rows_of(parts: Mapping[str, Tensor], precision: Precision, ids: Tensor) -> dict[str, Tensor]:
    """A layer's stored tensors -> those of some of its rows, ids [n]."""
    if precision.kind in FLOATS:
        return floats.some(parts, precision, ids)
    return {suffix: part[ids] for suffix, part in parts.items()}


def grouped(weight: Tensor, precision: Precision) -> Tensor:
    """[rows, cols] -> [rows, groups, group size], fp32."""
    rows, cols = weight.shape
    return weight.float().reshape(rows, precision.groups(cols), -1)


@dataclass(frozen=True)
class Levels:
    """What the weights of a group may become: one form for all kinds of precision,

        q = clamp(round(w / step - shift), low, high),   w' = (q + shift) value

    with step = value = s and shift = 0 for integers, from low = -z to high = 2^b - 1 - z; 1 bit
    has step -> 0, shift = 1/2 and value = 2s; ternary has low, high = -1, 1 and twice the
    threshold as its step. The stored code is q - low. Shapes: all [..., 1] or a number.
    """

    step: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor
    value: Tensor

    def nearest(self, w: Tensor) -> Tensor:
        q = (w / self.step).sub_(self.shift).round_()
        # four times as fast as clamp_ with tensors
        return torch.minimum(torch.maximum(q, self.low, out=q), self.high, out=q)

    def values(self, q: Tensor) -> Tensor:
        return (q + self.shift) * self.value

    def codes(self, q: Tensor, precision: Precision) -> Codes:
        """q [rows, cols] and levels [rows, groups, 1] -> what is stored."""
        stored = q.view(*self.value.shape[:2], -1) - self.low
        scales = self.value * (0.5 if _is_sign(precision) else 1.0)
        return Codes(
            precision,
            stored.to(torch.uint8).view(q.shape),
            scales.squeeze(-1).half(),
            None if precision.symmetric else self.low.neg().squeeze(-1).to(torch.uint8),
        )


def _is_sign(precision: Precision) -> bool:
    return precision.kind == "int" and precision.bits == 1


def levels_of(w: Tensor, precision: Precision, shrink: float = 1.0) -> Levels:
    """Grouped weights [..., g] -> their levels [..., 1]. shrink: of the range of integers."""
    if precision.kind not in ("int", "ternary"):
        raise ConfigError(f"{precision.name} has no uniform levels; see `Nearest.encode`.")
    zero = torch.zeros_like(w[..., :1])
    if precision.kind == "ternary":  # (4)
        size = w.abs()
        cut = 0.7 * size.mean(-1, keepdim=True)
        keep = size > cut
        total = (size * keep).sum(-1, keepdim=True)
        scales = _half(total / keep.sum(-1, keepdim=True).clamp_(1))
        return Levels((2 * cut).clamp_(min=TINY), zero, zero - 1, zero + 1, scales)
    if _is_sign(precision):  # (3)
        scales = _half(w.abs().mean(-1, keepdim=True))
        return Levels(zero + TINY, zero + 0.5, zero - 1, zero, 2 * scales)
    top = 2**precision.bits - 1
    if precision.symmetric:  # (2)
        scales = _half(w.abs().amax(-1, keepdim=True) * (2 * shrink / top))
        half = 2 ** (precision.bits - 1)
        return Levels(scales, zero, zero - half, zero + (half - 1), scales)
    least = w.amin(-1, keepdim=True).clamp_(max=0) * shrink  # (1)
    scales = _half((w.amax(-1, keepdim=True).clamp_(min=0) * shrink - least) / top)
    zeros = (-least / scales).round_().clamp_(0, top)
    return Levels(scales, zero, -zeros, top - zeros, scales)


def clipped(w: Tensor, precision: Precision, importance: Tensor) -> Levels:
    """The levels of the shrunk range with the least sum of importance (w - w')^2 in each group.
    importance: of the inputs, broadcast over w."""
    best = levels_of(w, precision)
    if precision.kind == "ternary" or _is_sign(precision):  # their scale is a mean, not a range
        return best
    least = _loss(best, w, importance)
    for shrink in SHRINKS:
        found = levels_of(w, precision, shrink)
        loss = _loss(found, w, importance)
        better = loss < least
        least = torch.where(better, loss, least)
        pairs = [(getattr(found, f.name), getattr(best, f.name)) for f in fields(Levels)]
        best = Levels(*(torch.where(better, new, old) for new, old in pairs))
    return best


def _loss(levels: Levels, w: Tensor, importance: Tensor) -> Tensor:
    error = levels.values(levels.nearest(w)).sub_(w)
    return error.square_().mul_(importance).sum(-1, keepdim=True)


def _half(scales: Tensor) -> Tensor:
    return scales.clamp_(SMALLEST, LARGEST).half().float()


def _signed(codes: Tensor, precision: Precision) -> Tensor:
    """Stored codes of a symmetric precision -> multiples of the scale."""
    if precision.kind == "ternary":
        return codes - 1
    return codes * 2 - 1 if precision.bits == 1 else codes - 2 ** (precision.bits - 1)


def pack(codes: Tensor, precision: Precision) -> Tensor:
    """uint8 codes [rows, n] -> dense little-endian bit stream, uint8 [rows, bytes].

    Eight b-bit codes fill b bytes; five trits one byte, the first the least significant. Some rows at
    a time, as `unpack`.
    """
    some = max(1, PIECE // max(1, codes.shape[1]))
    parts = [_packed(part, precision) for part in codes.split(some)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _packed(codes: Tensor, precision: Precision) -> Tensor:
    rows, count = codes.shape
    length = packed_bytes(count, precision.code_bits)
    if precision.kind == "ternary":
        trits = _padded(codes, TRITS_PER_BYTE).view(rows, -1, TRITS_PER_BYTE).int()
        return (trits * _powers(3, codes.device)).sum(-1).to(torch.uint8)
    bits = precision.bits
    if bits == 8:
        return codes.clone()
    octets = _padded(codes, 8).view(rows, -1, 8)
    words = octets[..., 0].long()
    for i in range(1, 8):
        words |= octets[..., i].long() << (bits * i)
    packed = words.unsqueeze(-1).view(torch.uint8)[..., :bits]  # little-endian, as machines are
    return packed.reshape(rows, -1)[:, :length].contiguous()


def unpack(packed: Tensor, precision: Precision, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, bytes] -> uint8 codes [rows, count], some rows at a time:
    64-bit words are in between."""
    some = max(1, PIECE // max(1, packed.shape[1]))
    parts = [_unpacked(part, precision, count) for part in packed.split(some)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unpacked(packed: Tensor, precision: Precision, count: int) -> Tensor:
    rows, device = packed.shape[0], packed.device
    if precision.kind == "ternary":
        trits = (packed.int().unsqueeze(-1) // _powers(3, device)) % 3
        return trits.to(torch.uint8).view(rows, -1)[:, :count]
    bits = precision.bits
    if bits == 8:
        return packed[:, :count]
    steps = torch.arange(8, device=device)
    if 8 % bits == 0:  # a byte holds whole codes: one cheap pass instead of 64-bit words
        steps = steps[: 8 // bits].to(torch.uint8)
        codes = (packed.unsqueeze(-1) >> (bits * steps)) & (2**bits - 1)
        return codes.view(rows, -1)[:, :count]
    octets = _padded(packed, bits).view(rows, -1, bits)
    words = torch.nn.functional.pad(octets, (0, 8 - bits)).view(torch.int64)
    wide = torch.cat([(words >> (bits * i)).to(torch.uint8) for i in range(8)], -1)
    return wide.bitwise_and_(2**bits - 1).view(rows, -1)[:, :count]


def _padded(codes: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % multiple))


def _powers(base: int, device: torch.device) -> Tensor:
    return base ** torch.arange(TRITS_PER_BYTE, device=device)
