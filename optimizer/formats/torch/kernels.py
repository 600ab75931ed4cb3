"""PyTorch's packed 4-bit matrix products (tinygemm), for integers of 4 and 8 bits.

The operator multiplies bf16 inputs by codes q of 4 bits in groups of G inputs:
    (1)  w' = (q - 8) a + b          a, b bf16, one pair for each group and row
Ours is w' = (c - z) s with codes c and zero points z, a = s in bf16 (as a bf16 model rounds w').
    (2)  4 bits symmetric, z = 8     q = c, b = 0
    (3)  4 bits                      q = c, b = (8 - z) a
    (4)  8 bits, c = 16 h + l: two products are added, of l with a and b = (136 - z) a, of h with
         16 a and what b lost by rounding
    (5)  fewer bits than 4 or 8: c and z are moved up by as much, which leaves c - z
Pairs of bf16 instead of fp16 scales and whole zero points: 4 % more memory than packed (4 bits, groups
of 64) or 7 % (8 bits). Codes of other widths have to be held in 4 or 8 bits for that, up to twice what
the plan promised (3 bits: 1.4 times), so they are unpacked for each use unless `wide` is asked for.

CPUs and GPUs have an operator each, of one equation and two layouts.

PyTorch 2.13's own 8-bit product (_weight_int8pack_mm) has one scale a row and can't hold groups; the
4-bit one in fp32 or fp16 was more than ten times slower than a dense product. So: bf16 only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from optimizer.plan import Precision
from optimizer.quantization.uniform import Codes

GROUPS = (256, 128, 64, 32)  # that the operator knows
WIDTHS = (4, 8)  # bits that are held as they are
ROWS = 16  # a multiple of which it wants
HALF, NIBBLE = 8, 16
TILE = 64  # rows whose codes the CPU operator's layout mixes
AMPERE = (8, 0)  # compute capability from which the GPU operator runs
INNER = (8, 4, 2)  # of 16 inputs, steps that the GPU operator may take at once


def group(precision: Precision, cols: int) -> int | None:
    """The operator's group that divides the precision's, or None if none does."""
    own = precision.group_size or cols
    return next((size for size in GROUPS if own % size == 0), None)


@dataclass(frozen=True)
class Target:
    """What packed products are for. wide: codes of 2 to 7 bits may be held in 4 or 8."""

    dtype: torch.dtype
    device: str
    wide: bool = False


def fits(precision: Precision, rows: int, cols: int, target: Target) -> bool:
    """Whether a layer can be multiplied packed."""
    return (
        precision.kind == "int"
        and (precision.bits in WIDTHS or (target.wide and precision.bits > 1))
        and target.dtype == torch.bfloat16
        and _known(torch.device(target.device), cols)
        and rows % ROWS == 0
        and group(precision, cols) is not None
    )


def _known(device: torch.device, cols: int) -> bool:
    """Whether the device has the operator. AVX-512 and AVX2: on other CPUs nothing was measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE and _inner(cols) is not None
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")


def _inner(cols: int) -> int | None:
    return next((n for n in INNER if cols % (16 * n) == 0), None)


def looks_up(rows: int, cols: int, device: str) -> bool:
    """Whether single rows of a packed matrix can be read: where its layout is found out."""
    return torch.device(device).type == "cpu" and rows % TILE == 0 and places(cols) is not None


@cache
def places(cols: int) -> Tensor | None:
    """Where the operator keeps the codes of TILE rows: numbers of nibbles [TILE, cols], which are the
    same in every tile. Found by packing the numbers of the codes, digit by digit, since PyTorch
    doesn't promise a layout. None if this machine's has no such tiles."""
    count = 2 * TILE * cols
    numbers = torch.arange(count).view(2 * TILE, cols)
    found = torch.zeros(count, dtype=torch.long)
    for shift in range(0, count.bit_length(), 4):
        digits = _packed(numbers >> shift & (NIBBLE - 1)).flatten()
        found |= _nibbles(digits, torch.arange(count)).long() << shift
    place = torch.empty_like(found)
    place[found] = torch.arange(count)
    first, second = place.view(2, TILE, cols)
    return first if torch.equal(second, first + TILE * cols) else None


def _packed(nibbles: Tensor) -> Tensor:
    """Codes [rows, cols] of 4 bits in the operator's layout."""
    if nibbles.device.type == "cuda":
        pairs = nibbles.to(torch.uint8).view(len(nibbles), -1, 2)
        both = pairs[..., 0] << 4 | pairs[..., 1]
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(both, _inner(nibbles.shape[1]))
        return packed
    found: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
    return found


def _nibbles(packed: Tensor, at: Tensor) -> Tensor:
    """The nibbles with these numbers, of the shape of `at`."""
    both = packed.flatten()[at >> 1]
    return torch.where((at & 1).bool(), both >> 4, both & (NIBBLE - 1))


class Product(nn.Module):
    """x [..., cols] -> x W' [..., rows], for one packed layer, on the device that has its codes."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        rows, cols = codes.codes.shape
        size = group(codes.precision, cols)
        assert size is not None
        self.rows, self.cols, self.size = rows, cols, size
        self.split = codes.precision.bits > 4
        middle = 2 ** (codes.precision.bits - 1)
        # few codes lie around the middle of the 16 or 256, so that b stays small
        up = (HALF * NIBBLE if self.split else HALF) - middle
        own = codes.codes + up
        a = codes.scales.bfloat16().float()
        zeros = up + (float(middle) if codes.zeros is None else codes.zeros.float())
        if not self.split:
            self._add("low", own, a, (HALF - zeros) * a)
            return
        b = (HALF * NIBBLE + HALF - zeros) * a
        self._add("low", own & (NIBBLE - 1), a, b)
        self._add("high", own >> 4, NIBBLE * a, b - b.bfloat16().float())

    def _add(self, name: str, nibbles: Tensor, a: Tensor, b: Tensor) -> None:
        """a, b [rows, groups of the precision], spread over the operator's groups."""
        each = self.cols // self.size // a.shape[1]
        pairs = torch.stack([a, b], -1).repeat_interleave(each, 1).transpose(0, 1)
        self.register_buffer(name, _packed(nibbles))
        self.register_buffer(f"{name}_scales", pairs.bfloat16().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.cols)
        if len(flat) > self.cols:  # then unpacking once is cheaper
            return nn.functional.linear(x, self.weight())
        return self._product(flat).view(*x.shape[:-1], self.rows)

    def _product(self, x: Tensor) -> Tensor:
        aten = torch.ops.aten
        multiply = aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu
        found: Tensor = multiply(x, self.low, self.size, self.low_scales)
        if self.split:
            found = found + multiply(x, self.high, self.size, self.high_scales)
        return found

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of W' [..., cols] bf16 for ids [...]: what an embedding asks of a matrix that is the
        head's, too. Needs `places`, and rows that fill tiles."""
        rows, place = ids.flatten(), places(self.cols)
        assert place is not None and self.rows % TILE == 0
        at = (rows // TILE * (TILE * self.cols)).unsqueeze(1) + place[rows % TILE]
        found = torch.zeros(at.shape)
        for name in ("low", "high") if self.split else ("low",):
            pairs = self.get_buffer(f"{name}_scales")[:, rows].float().transpose(0, 1)
            a, b = pairs.repeat_interleave(self.size, 1).unbind(-1)
            found += (_nibbles(self.get_buffer(name), at).float() - HALF) * a + b
        return found.bfloat16().view(*ids.shape, self.cols)

    def weight(self) -> Tensor:
        """W' [rows, cols] bf16: what the product makes of unit vectors."""
        unit = torch.eye(self.cols, dtype=torch.bfloat16, device=self.get_buffer("low").device)
        return self._product(unit).T
