"""Precisions: how a weight matrix can be stored, in exact bytes.

Notation: a layer's weight has shape [rows, cols] = [outputs, inputs]; groups of `group_size`
weights run along the inputs and share one fp16 scale (and one integer zero point if asymmetric).
Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from optimizer.errors import ConfigError

REFERENCE_BITS = 16
# bytes of one number, by safetensors' name of its dtype
WIDTH = {
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
    "F32": 4,
    "U32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "U16": 2,
    "I16": 2,
    "F8_E8M0": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
TRITS_PER_BYTE = 5  # 3**5 = 243 <= 256


@dataclass(frozen=True)
class Block:
    """A block type of ggml, llama.cpp's tensor library: `weights` consecutive weights of a row
    take `size` bytes. fallback: what llama.cpp stores instead where no block fits the row."""

    bits: int
    weights: int
    size: int
    fallback: str | None = None


GGML = {
    "q4_0": Block(4, 32, 18),
    "q4_1": Block(4, 32, 20),
    "q5_0": Block(5, 32, 22),
    "q5_1": Block(5, 32, 24),
    "q8_0": Block(8, 32, 34),
    "iq4_nl": Block(4, 32, 18),
    "q2_k": Block(2, 256, 84, "q4_0"),
    "q3_k": Block(3, 256, 110, "q4_0"),
    "q4_k": Block(4, 256, 144, "q5_0"),
    "q5_k": Block(5, 256, 176, "q5_1"),
    "q6_k": Block(6, 256, 210, "q8_0"),
    "iq1_s": Block(1, 256, 50, "iq4_nl"),
    "iq1_m": Block(1, 256, 56, "iq4_nl"),
    "iq2_xxs": Block(2, 256, 66, "iq4_nl"),
    "iq2_xs": Block(2, 256, 74, "iq4_nl"),
    "iq2_s": Block(2, 256, 82, "iq4_nl"),
    "iq3_xxs": Block(3, 256, 98, "iq4_nl"),
    "iq3_s": Block(3, 256, 110, "iq4_nl"),
    "iq4_xs": Block(4, 256, 136, "iq4_nl"),
    "tq1_0": Block(2, 256, 54, "q4_0"),
    "tq2_0": Block(2, 256, 66, "q4_0"),
}


@dataclass(frozen=True)
class Float:
    """Floating-point codes that share scales. weights: columns that share one, None all of them; rows:
    rows that share it; scale: its dtype; whole: whether the tensor has one more scale, in fp32."""

    bits: int
    weights: int | None
    rows: int = 1
    scale: str = "U8"
    whole: bool = False


BY_ROW = ("int", "ternary", *GGML)  # kinds whose rows can be rounded to nearest by themselves
FLOATS = {
    "nvfp4": Float(4, 16, whole=True),  # E2M1, scales E4M3 (NVIDIA)
    "mxfp4": Float(4, 32),  # E2M1, scales E8M0 (OCP Microscaling Formats 1.0)
    "fp8": Float(8, None, scale="F32"),  # E4M3, a scale a channel
    "fp8_block": Float(8, 128, rows=128, scale="F32"),  # E4M3, a scale for 128 x 128 weights
}


@dataclass(frozen=True)
class Precision:
    """How one layer is stored.

    kind: `int` (uniform levels), `ternary` (-s, 0, s), `none` (the reference's own 16 bits), a key of
    GGML (that type's blocks; group_size is the block's length) or of FLOATS.
    group_size: weights per scale along the inputs; None = one scale per row ("per channel").
    symmetric: no zero point. 1 bit (-s, s) and ternary are always symmetric.
    """

    kind: str = "none"
    bits: int = REFERENCE_BITS
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.kind in GGML:
            block = GGML[self.kind]
            if (self.bits, self.group_size) != (block.bits, block.weights):
                raise ConfigError(
                    f"{self.kind} has {block.bits} bits in blocks of {block.weights}, not "
                    f"{self.bits} in blocks of {self.group_size}. Correct or leave out both."
                )
            return
        if self.kind in FLOATS:
            own = FLOATS[self.kind]
            if (self.bits, self.group_size, self.symmetric) != (own.bits, own.weights, True):
                raise ConfigError(
                    f"{self.kind} has {own.bits} bits in groups of {own.weights or 'a row'} and is "
                    f"symmetric, not {self.bits} in groups of {self.group_size or 'a row'}. Correct "
                    "all three."
                )
            return
        legal = {"int": range(1, 9), "ternary": (2,), "none": (REFERENCE_BITS,)}
        if self.kind not in legal or self.bits not in legal[self.kind]:
            raise ConfigError(
                "A precision is 1, 2, 3, 4, 5, 6, 7 or 8 bits, ternary, 16 (untouched), a float of "
                f"GPUs ({', '.join(FLOATS)}), or a type of llama.cpp ({', '.join(GGML)}), not "
                f"{self.kind} with {self.bits} bits. Change palette.bits."
            )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(
                f"A group holds at least one weight, not {self.group_size}. Change "
                "palette.group_size; 0 there means one scale per channel."
            )

    def __lt__(self, other: Precision) -> bool:
        """By kind, bits and group, a channel last."""
        return self._rank < other._rank

    @property
    def _rank(self) -> tuple[str, int, float, bool]:
        return (self.kind, self.bits, self.group_size or math.inf, self.symmetric)

    @classmethod
    def ggml(cls, kind: str) -> Precision:
        return cls(kind, GGML[kind].bits, GGML[kind].weights)

    @classmethod
    def floating(cls, kind: str) -> Precision:
        """Of FLOATS."""
        return cls(kind, FLOATS[kind].bits, FLOATS[kind].weights, True)

    @property
    def name(self) -> str:
        if self.kind == "none" or self.kind in GGML or self.kind in FLOATS:
            return self.kind
        stem = f"int{self.bits}" if self.kind == "int" else "ternary"
        tail = "channel" if self.group_size is None else f"g{self.group_size}"
        marked = self.symmetric and self.kind == "int" and self.bits > 1
        return f"{stem}_{tail}" + ("_sym" if marked else "")

    @property
    def code_bits(self) -> Fraction:
        """Bits per weight of the codes alone, without scales and zero points."""
        return Fraction(8, TRITS_PER_BYTE) if self.kind == "ternary" else Fraction(self.bits)

    def groups(self, cols: int) -> int:
        """Scales per row."""
        return cols // (self.group_size or cols)

    def parts(self, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, int]]]:
        """The stored tensors: suffix -> (safetensors dtype, shape). Rows are padded to bytes."""
        if self.kind == "none":
            return {}
        groups = self.groups(cols)
        if self.kind in GGML:
            return {"blocks": ("U8", (rows, groups * GGML[self.kind].size))}
        codes = ("U8", (rows, packed_bytes(cols, self.code_bits)))
        if self.kind in FLOATS:
            own = FLOATS[self.kind]
            found = {"codes": codes, "scales": (own.scale, (-(-rows // own.rows), groups))}
            return found | ({"scale": ("F32", (1, 1))} if own.whole else {})
        parts = {"codes": codes, "scales": ("F16", (rows, groups))}
        if not self.symmetric:
            parts["zeros"] = ("U8", (rows, packed_bytes(groups, self.code_bits)))
        return parts

    def bytes(self, rows: int, cols: int) -> int:
        """Exact bytes on disk of a [rows, cols] layer: codes, scales, zero points, padding."""
        if self.kind == "none":
            return rows * cols * REFERENCE_BITS // 8
        return sum(
            math.prod(shape) * WIDTH[dtype] for dtype, shape in self.parts(rows, cols).values()
        )

    def fits(self, cols: int) -> bool:
        return self.group_size is None or cols % self.group_size == 0

    def nearest(self, cols: int) -> Precision:
        """The same precision with the divisor of `cols` that is nearest to the group size; for a
        type of ggml, what llama.cpp falls back to (llama-quant.cpp), at last 16 bits; for floats,
        whose groups are what GPUs multiply, 16 bits."""
        if self.group_size is None or self.fits(cols):
            return self
        if self.kind in FLOATS:
            return UNTOUCHED
        if self.kind in GGML:
            fallback = GGML[self.kind].fallback
            return UNTOUCHED if fallback is None else Precision.ggml(fallback).nearest(cols)
        wanted = self.group_size
        divisors = [d for d in range(1, cols + 1) if cols % d == 0]
        best = min(divisors, key=lambda d: (abs(math.log(d / wanted)), d))
        return replace(self, group_size=best)


UNTOUCHED = Precision()


def packed_bytes(count: int, bits: Fraction) -> int:
    """Bytes of `count` codes in a dense stream, padded to a whole byte."""
    if bits.denominator == TRITS_PER_BYTE:
        return -(-count // TRITS_PER_BYTE)
    return -(-count * int(bits) // 8)
