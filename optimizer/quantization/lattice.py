"""llama.cpp's lattice types, iq2_xxs to iq3_s, with other vectors than its own search took.

Eight columns are one vector: signs, and magnitudes from a fixed list (iq2) or two of four columns
from one (iq3), times a scale that 16 or 32 columns share. The scales are those of ggml's weighted
search (`ggml_native`); here the vectors inside of them are chosen again, for weights that carry the
errors of earlier columns (GPTQ). Legend: x [rows, 8] a unit of columns; s [rows] its scale;
y = |x| / s; g [n, l] the list, l = 8 or 4. The nearest vector under column weights v is
    (1) argmin_g sum_j v_j (y_j - g_j)^2
Types with `even` store seven of a unit's eight signs: their number of minuses is even, and where it
isn't, the column with the least v_j y_j^2 changes its sign.

Layouts: ggml-common.h, block_iq2_xxs to block_iq3_s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from optimizer.plan import GGML
from optimizer.quantization import ggml_native

UNIT, SUPER = 8, 256
ROWS = 2**13  # whose distances to a whole list are held at a time


@dataclass(frozen=True)
class Layout:
    """length: of a vector of the list. scaled: columns that share a scale. even: see the module."""

    length: int
    scaled: int
    even: bool


LAYOUTS = {
    "iq2_xxs": Layout(8, 32, True),
    "iq2_xs": Layout(8, 16, True),
    "iq2_s": Layout(8, 16, False),
    "iq3_xxs": Layout(4, 32, True),
    "iq3_s": Layout(4, 32, False),
}


@cache
def grid(kind: str) -> Tensor:
    """The list [n, length], fp32, as the package gguf has it."""
    from gguf import quants

    own = getattr(quants, kind.upper())
    own.init_grid()
    return torch.from_numpy(np.array(own.grid, np.float32).reshape(-1, LAYOUTS[kind].length))


@dataclass(frozen=True)
class Vectors:
    """The scales of a rounded matrix, in which new vectors may be put. raw: uint8 [super-blocks,
    bytes]; scale: fp32 [rows, units]."""

    kind: str
    rows: int
    cols: int
    raw: Tensor
    scale: Tensor

    @classmethod
    def of(cls, data: Tensor, kind: str, cols: int) -> Vectors:
        """data: blocks as they lie in the file, uint8 [rows, bytes of a row]."""
        raw = data.reshape(-1, GGML[kind].size)
        return cls(kind, len(data), cols, raw, _scales(raw, kind).view(len(data), -1))

    def nearest(self, x: Tensor, unit: int, importance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [rows, 8] -> (indices [rows, 8 / length], signs uint8 [rows], values [rows, 8]).
        importance: of the columns [8]."""
        layout, scale = LAYOUTS[self.kind], self.scale[:, unit, None]
        y = x * torch.where(scale == 0, 0.0, 1 / scale)
        minus = y < 0
        if layout.even:
            odd = minus.sum(1) % 2 == 1
            least = (importance * y * y).argmin(1)
            minus[odd, least[odd]] ^= True
        target = torch.where(minus, -y, y)
        listed = grid(self.kind).to(x.device)
        found, values = [], []
        for first in range(0, UNIT, layout.length):
            own = slice(first, first + layout.length)
            index = _nearest(target[:, own], listed, importance[own])
            found.append(index)
            values.append(listed[index])
        value = torch.cat(values, 1)
        value = torch.where(minus, -value, value) * scale
        bits = (minus.long() << torch.arange(UNIT, device=x.device)).sum(1)
        return torch.stack(found, 1), bits.to(torch.uint8), value

    def pack(self, index: Tensor, signs: Tensor) -> Tensor:
        """index [rows, units, 8 / length], signs uint8 [rows, units] -> blocks [rows, bytes]."""
        units = SUPER // UNIT
        own = index.reshape(len(self.raw), units, -1)
        raw = self.raw.clone()
        _PACK[self.kind](raw, own, signs.reshape(len(self.raw), units).long())
        return raw.view(self.rows, -1)


def encode(weight: Tensor, kind: str, importance: Tensor | None = None) -> Vectors:
    """The scales of ggml's search for W [rows, cols]."""
    return Vectors.of(ggml_native.encode(weight, kind, importance), kind, weight.shape[1])


def _nearest(target: Tensor, listed: Tensor, importance: Tensor) -> Tensor:
    """(1) for target [rows, l] -> indices [rows]."""
    offset = (listed * listed) @ importance
    weighted = target * (2 * importance)
    return torch.cat([(offset - part @ listed.T).argmin(1) for part in weighted.split(ROWS)])


def _number(raw: Tensor) -> Tensor:
    return raw[:, :2].contiguous().view(torch.float16).float()


def _scales(raw: Tensor, kind: str) -> Tensor:
    """[super-blocks, 32]: of each unit."""
    d = _number(raw)
    if kind in ("iq2_xxs", "iq3_xxs"):  # the upper four bits of each sub-block's second word
        words = raw[:, 2:].reshape(len(raw), 8, 8) if kind == "iq2_xxs" else raw[:, 66:]
        last = words[:, :, 7] if kind == "iq2_xxs" else words.reshape(len(raw), 8, 4)[:, :, 3]
        step = d * (0.5 + (last >> 4).float()) * (0.25 if kind == "iq2_xxs" else 0.5)
    else:
        nibbles = raw[:, -4:] if kind == "iq3_s" else raw[:, -8:]
        own = torch.stack([nibbles & 15, nibbles >> 4], 2).flatten(1).float()
        step = d * (1 + 2 * own) if kind == "iq3_s" else d * (0.5 + own) * 0.25
    return step.repeat_interleave(LAYOUTS[kind].scaled // UNIT, 1)


def _bytes(words: Tensor, count: int) -> Tensor:
    """int64 [..., k] -> little-endian bytes uint8 [..., k * count]."""
    shifts = 8 * torch.arange(count, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 255).flatten(-2).to(torch.uint8)


def _seven(signs: Tensor, last: Tensor) -> Tensor:
    """Four units' seven signs each and the old scale -> one 32-bit word for each sub-block, as bytes.
    signs [n, 32], last [n, 8]: the byte that holds the scale in its upper half."""
    own = (signs & 127).view(len(signs), 8, 4)
    word = (own << (7 * torch.arange(4, device=signs.device))).sum(2)
    return _bytes(word | ((last.long() >> 4) << 28), 4)


def _pack_iq2_xxs(raw: Tensor, index: Tensor, signs: Tensor) -> None:
    words = raw[:, 2:].reshape(len(raw), 8, 8)
    second = _seven(signs, words[:, :, 7]).view(len(raw), 8, 4)
    first = index.view(len(raw), 8, 4).to(torch.uint8)
    raw[:, 2:] = torch.cat([first, second], 2).flatten(1)


def _pack_iq2_xs(raw: Tensor, index: Tensor, signs: Tensor) -> None:
    raw[:, 2:66] = _bytes(index[:, :, 0] | ((signs & 127) << 9), 2)


def _pack_iq2_s(raw: Tensor, index: Tensor, signs: Tensor) -> None:
    own = index[:, :, 0]
    raw[:, 2:34] = (own & 255).to(torch.uint8)
    raw[:, 34:66] = signs.to(torch.uint8)
    high = (own >> 8).view(len(raw), 8, 4) << (2 * torch.arange(4, device=raw.device))
    raw[:, 66:74] = high.sum(2).to(torch.uint8)


def _pack_iq3_xxs(raw: Tensor, index: Tensor, signs: Tensor) -> None:
    last = raw[:, 66:].reshape(len(raw), 8, 4)[:, :, 3]
    raw[:, 66:] = _seven(signs, last)
    raw[:, 2:66] = index.flatten(1).to(torch.uint8)


def _pack_iq3_s(raw: Tensor, index: Tensor, signs: Tensor) -> None:
    own = index.flatten(1)
    raw[:, 2:66] = (own & 255).to(torch.uint8)
    high = (own >> 8).view(len(raw), 8, 8) << torch.arange(8, device=raw.device)
    raw[:, 66:74] = high.sum(2).to(torch.uint8)
    raw[:, 74:106] = signs.to(torch.uint8)


_PACK = {
    "iq2_xxs": _pack_iq2_xxs,
    "iq2_xs": _pack_iq2_xs,
    "iq2_s": _pack_iq2_s,
    "iq3_xxs": _pack_iq3_xxs,
    "iq3_s": _pack_iq3_s,
}


def sweep(found: Vectors, weight: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """GPTQ over units of eight columns, in their own order. With U of `quantization.gptq`, B a unit,
        (2) E = W_B - W'_B,   F U_BB = E,   W_k -= F U_Bk for the columns behind,
    and the loss grows by |F|^2. Returns blocks [rows, bytes] and each row's loss."""
    w, units = weight.float().clone(), found.cols // UNIT
    loss = torch.zeros(len(w), device=w.device)
    indices, signs = [], []
    for unit in range(units):
        own = slice(unit * UNIT, (unit + 1) * UNIT)
        inverse = torch.linalg.inv(upper[own, own])
        index, sign, value = found.nearest(w[:, own], unit, inverse.square().sum(1))
        indices.append(index)
        signs.append(sign)
        error = (w[:, own] - value) @ inverse
        w[:, own.stop :] -= error @ upper[own, own.stop :]
        loss += error.square().sum(1)
    return found.pack(torch.stack(indices, 1), torch.stack(signs, 1)), loss
