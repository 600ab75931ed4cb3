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

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optimizer import ggml
from optimizer.layer import GGML, TRITS_PER_BYTE, Precision, packed_bytes

SMALLEST, LARGEST = 2.0**-24, 65504.0  # fp16's subnormal step and maximum


@dataclass(kw_only=True)
class Rtn:
    """Round to nearest; no data needed. `quantizer=rtn`."""

    name: ClassVar[str] = "rtn"

    def round(self, weight: Tensor, precision: Precision) -> Tensor:
        """W' [rows, cols] fp32, exactly what the packed layer unpacks to."""
        if precision.kind == "none":
            return weight.float()
        if precision.kind in GGML:
            return ggml.round_to(weight, precision)
        codes, scales, zeros = _levels(_grouped(weight, precision), precision)
        return _values(codes, scales, zeros).view(weight.shape)

    def encode(self, weight: Tensor, precision: Precision) -> Codes | ggml.Blocks:
        if precision.kind in GGML:
            return ggml.encode(weight, precision)
        codes, scales, zeros = _levels(_grouped(weight, precision), precision)
        if zeros is None:
            codes = _unsigned(codes, precision)
        return Codes(
            precision,
            codes.to(torch.uint8).view(weight.shape),
            scales.squeeze(-1).half(),
            None if zeros is None else zeros.squeeze(-1).to(torch.uint8),
        )


@dataclass(frozen=True)
class Codes:
    """A rounded layer. codes: uint8 [rows, cols]; scales: fp16 [rows, groups]; zeros: uint8
    [rows, groups], or None where the precision is symmetric."""

    precision: Precision
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def decode(self) -> Tensor:
        """W' [rows, cols] fp32."""
        rows, cols = self.codes.shape
        codes = self.codes.view(rows, self.scales.shape[1], -1).float()
        if self.zeros is None:
            codes = _signed(codes, self.precision)
        zeros = None if self.zeros is None else self.zeros.float().unsqueeze(-1)
        return _values(codes, self.scales.float().unsqueeze(-1), zeros).view(rows, cols)

    def pack(self) -> dict[str, Tensor]:
        """Stored tensors by suffix, shaped as `Precision.parts` says."""
        parts = {"codes": pack(self.codes, self.precision), "scales": self.scales}
        if self.zeros is not None:
            parts["zeros"] = pack(self.zeros, self.precision)
        return parts

    @classmethod
    def unpack(
        cls, parts: dict[str, Tensor], precision: Precision, cols: int
    ) -> Codes | ggml.Blocks:
        if precision.kind in GGML:
            return ggml.Blocks(precision, parts["blocks"], cols)
        zeros = parts.get("zeros")
        return cls(
            precision,
            unpack(parts["codes"], precision, cols),
            parts["scales"],
            None if zeros is None else unpack(zeros, precision, precision.groups(cols)),
        )


def _grouped(weight: Tensor, precision: Precision) -> Tensor:
    rows, cols = weight.shape
    return weight.float().reshape(rows, precision.groups(cols), -1)


def _levels(w: Tensor, precision: Precision) -> tuple[Tensor, Tensor, Tensor | None]:
    """Grouped weights [r, k, g] -> codes [r, k, g], scales [r, k, 1], zeros, all fp32.

    Codes of symmetric precisions are signed here; 1 bit has the codes -1 and 1.
    """
    if precision.kind == "ternary":  # (4)
        size = w.abs()
        keep = size > 0.7 * size.mean(-1, keepdim=True)
        scales = _half((size * keep).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp_(1))
        return w.sign() * keep, scales, None
    if precision.bits == 1:  # (3)
        return torch.where(w < 0, -1.0, 1.0), _half(w.abs().mean(-1, keepdim=True)), None
    top = 2**precision.bits - 1
    if precision.symmetric:  # (2)
        scales = _half(w.abs().amax(-1, keepdim=True) * (2 / top))
        half = 2 ** (precision.bits - 1)
        return (w / scales).round_().clamp_(-half, half - 1), scales, None
    low = w.amin(-1, keepdim=True).clamp_(max=0)  # (1)
    scales = _half((w.amax(-1, keepdim=True).clamp_(min=0) - low) / top)
    zeros = (-low / scales).round_().clamp_(0, top)
    return (w / scales).round_().add_(zeros).clamp_(0, top), scales, zeros


def _half(scales: Tensor) -> Tensor:
    return scales.clamp_(SMALLEST, LARGEST).half().float()


def _values(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    return (codes if zeros is None else codes - zeros) * scales


def _unsigned(codes: Tensor, precision: Precision) -> Tensor:
    """Signed codes of a symmetric precision -> what is stored, counted from 0."""
    if precision.kind == "ternary":
        return codes + 1
    return (codes + 1) / 2 if precision.bits == 1 else codes + 2 ** (precision.bits - 1)


def _signed(codes: Tensor, precision: Precision) -> Tensor:
    if precision.kind == "ternary":
        return codes - 1
    return codes * 2 - 1 if precision.bits == 1 else codes - 2 ** (precision.bits - 1)


def pack(codes: Tensor, precision: Precision) -> Tensor:
    """uint8 codes [rows, n] -> dense little-endian bit stream, uint8 [rows, bytes].

    Eight b-bit codes fill b bytes; five trits one byte, the first the least significant.
    """
    rows, count = codes.shape
    length = packed_bytes(count, precision.code_bits)
    if precision.kind == "ternary":
        trits = _padded(codes, TRITS_PER_BYTE).view(rows, -1, TRITS_PER_BYTE).int()
        return (trits * _powers(3)).sum(-1).to(torch.uint8)
    bits = precision.bits
    if bits == 8:
        return codes.clone()
    words = _padded(codes, 8).view(rows, -1, 8).long()
    word = (words << (bits * torch.arange(8))).sum(-1, keepdim=True)
    packed = (word >> (8 * torch.arange(bits))) & 255
    return packed.to(torch.uint8).view(rows, -1)[:, :length].contiguous()


def unpack(packed: Tensor, precision: Precision, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, bytes] -> uint8 codes [rows, count]."""
    rows, device = packed.shape[0], packed.device
    if precision.kind == "ternary":
        trits = (packed.int().unsqueeze(-1) // _powers(3).to(device)) % 3
        return trits.to(torch.uint8).view(rows, -1)[:, :count]
    bits = precision.bits
    if bits == 8:
        return packed[:, :count]
    steps = torch.arange(8, device=device)
    if 8 % bits == 0:  # a byte holds whole codes: one cheap pass instead of 64-bit words
        steps = steps[: 8 // bits].to(torch.uint8)
        codes = (packed.unsqueeze(-1) >> (bits * steps)) & (2**bits - 1)
        return codes.view(rows, -1)[:, :count]
    octets = _padded(packed, bits).view(rows, -1, bits).long()
    word = (octets << (8 * steps[:bits])).sum(-1, keepdim=True)
    codes = (word >> (bits * steps)) & (2**bits - 1)
    return codes.to(torch.uint8).view(rows, -1)[:, :count]


def _padded(codes: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % multiple))


def _powers(base: int) -> Tensor:
    return base ** torch.arange(TRITS_PER_BYTE)
