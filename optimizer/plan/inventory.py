"""Precisions and layers: how a weight matrix can be stored, in exact bytes, and what a model is
made of.

Notation: a layer's weight has shape [rows, cols] = [outputs, inputs]; groups of `group_size`
weights run along the inputs and share one fp16 scale (and one integer zero point if asymmetric).
Standard library only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

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
SCALE_BYTES = 2  # fp16
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


@dataclass(frozen=True, order=True)
class Precision:
    """How one layer is stored.

    kind: `int` (uniform levels), `ternary` (-s, 0, s), `none` (the reference's own 16 bits) or a
    key of GGML (that type's blocks; group_size is the block's length).
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
        legal = {"int": range(1, 9), "ternary": (2,), "none": (REFERENCE_BITS,)}
        if self.kind not in legal or self.bits not in legal[self.kind]:
            raise ConfigError(
                "A precision is 1, 2, 3, 4, 5, 6, 7 or 8 bits, ternary, 16 (untouched), or a type of "
                f"llama.cpp ({', '.join(GGML)}), not {self.kind} with {self.bits} bits. Change "
                "palette.bits."
            )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(
                f"A group holds at least one weight, not {self.group_size}. Change "
                "palette.group_size; 0 there means one scale per channel."
            )

    @classmethod
    def ggml(cls, kind: str) -> Precision:
        return cls(kind, GGML[kind].bits, GGML[kind].weights)

    @property
    def name(self) -> str:
        if self.kind == "none" or self.kind in GGML:
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
        parts = {
            "codes": ("U8", (rows, packed_bytes(cols, self.code_bits))),
            "scales": ("F16", (rows, groups)),
        }
        if not self.symmetric:
            parts["zeros"] = ("U8", (rows, packed_bytes(groups, self.code_bits)))
        return parts

    def bytes(self, rows: int, cols: int) -> int:
        """Exact bytes on disk of a [rows, cols] layer: codes, scales, zero points, padding."""
        if self.kind == "none":
            return rows * cols * REFERENCE_BITS // 8
        return sum(
            math.prod(shape) * (SCALE_BYTES if dtype == "F16" else 1)
            for dtype, shape in self.parts(rows, cols).values()
        )

    def fits(self, cols: int) -> bool:
        return self.group_size is None or cols % self.group_size == 0

    def nearest(self, cols: int) -> Precision:
        """The same precision with the divisor of `cols` that is nearest to the group size; for a
        type of ggml, what llama.cpp falls back to (llama-quant.cpp), at last 16 bits."""
        if self.group_size is None or self.fits(cols):
            return self
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


@dataclass(frozen=True)
class Place:
    """The same numbers in a checkpoint's tensor and in a live parameter, both contiguous: number
    [i, j, ...] < extents lies at at_stored + i stored[0] + j stored[1] + ... of the one, and at
    at_live + i live[0] + ... of the other."""

    parameter: str
    extents: tuple[int, ...]
    stored: tuple[int, ...]
    live: tuple[int, ...]
    at_stored: int = 0
    at_live: int = 0

    def fits(self, stored: int, live: int) -> bool:
        """Whether all numbers lie inside tensors of so many."""
        counted = len(self.extents) == len(self.stored) == len(self.live)
        return (
            counted
            and all(
                start >= 0
                and all(s >= 0 for s in strides)
                and start + sum((n - 1) * s for n, s in zip(self.extents, strides, strict=True))
                < size
                for start, strides, size in (
                    (self.at_stored, self.stored, stored),
                    (self.at_live, self.live, live),
                )
            )
            and all(n >= 1 for n in self.extents)
        )


@dataclass(frozen=True)
class Layer:
    """One weight tensor that can be quantized, named as in the checkpoint on disk.

    `parameter` is the live parameter that holds it, whole and in its own order where `places` is
    empty; else `places` says which numbers are where, perhaps in several parameters. `expert`: whose
    weights they are, None for all of them stacked in one 3-D tensor. `transposed`: the checkpoint
    stores [inputs, outputs]. `dtype`: as stored, in safetensors' spelling.
    """

    name: str
    rows: int
    cols: int
    kind: str  # linear, conv1d, embedding, head, experts
    role: str  # the last part of the module's name: q_proj, down_proj, ...
    block: int | None  # index of the transformer block, None outside the blocks
    parameter: str
    shape: tuple[int, ...]  # of the layer's tensor in the checkpoint
    expert: int | None = None
    transposed: bool = False
    tied: bool = False
    dtype: str = "F16"
    places: tuple[Place, ...] = ()

    @property
    def weights(self) -> int:
        return self.rows * self.cols

    @property
    def parameters(self) -> tuple[str, ...]:
        """All live parameters that hold some of it."""
        return tuple(dict.fromkeys(x.parameter for x in self.places)) or (self.parameter,)

    def bytes(self, precision: Precision) -> int:
        """Exact bytes on disk; untouched it keeps the dtype that it has."""
        if precision.kind == "none":
            return self.weights * WIDTH[self.dtype]
        return precision.bytes(self.rows, self.cols)

    @property
    def watchable(self) -> bool:
        """Whether it is a module of a block, so that its inputs can be watched. Fused experts,
        embeddings and the head are not."""
        return self.block is not None and self.kind in ("linear", "conv1d")

    @property
    def predicts(self) -> bool:
        """Whether the output head multiplies with it, perhaps as the tied embedding."""
        return self.kind == "head" or self.tied


@dataclass(frozen=True)
class Other:
    """A tensor that is never quantized (norms, biases, routers) and stays as the checkpoint has it.

    parameter: what holds it in the model; empty if nothing does. reason: why a matrix is among
    these; empty for what is no matrix.
    """

    name: str
    parameter: str
    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]
    reason: str = ""
    places: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Inventory:
    """What a checkpoint holds. Every tensor of it is a layer, or one of the others, or left out;
    left_out: (name, reason). dtype: F16, BF16 or F32, that of most weights."""

    layers: tuple[Layer, ...]
    others: tuple[Other, ...]
    dtype: str
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def held(self) -> tuple[Layer | Other, ...]:
        """All tensors that the model has a place for."""
        every: tuple[Layer | Other, ...] = (*self.layers, *self.others)
        return tuple(x for x in every if x.parameter)

    def scoped(self, scope: Sequence[str]) -> tuple[Layer, ...]:
        """Layers in scope. Words: blocks, embeddings, head, all; anything else is a glob.

        Raises ConfigError for a pattern that matches nothing.
        """
        chosen: set[str] = set()
        for pattern in scope:
            hits = {layer.name for layer in self.layers if _in_scope(layer, pattern)}
            if not hits:
                names = [layer.name for layer in self.layers]
                examples = ", ".join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))
                raise ConfigError(
                    f"Every scope pattern must match a layer; {pattern!r} matches none of the "
                    f"{len(names)} layers (for example {examples}). Use blocks, embeddings, "
                    "head, all, or a glob over such names."
                )
            chosen |= hits
        return tuple(layer for layer in self.layers if layer.name in chosen)

    @property
    def notes(self) -> tuple[str, ...]:
        """For a person: what isn't offered or isn't carried, and why; a sentence a reason."""
        reasons: dict[str, list[str]] = {}
        for tensor in self.others:
            if tensor.reason:
                reasons.setdefault(f"kept as they are: {tensor.reason}", []).append(tensor.name)
        for name, reason in self.left_out:
            reasons.setdefault(f"left out: {reason}", []).append(name)
        return tuple(_told(names, reason) for reason, names in reasons.items())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Inventory:
        layers = tuple(Layer(**_typed(row)) for row in data["layers"])
        others = tuple(Other(**_typed(row)) for row in data["others"])
        left_out = tuple((str(name), str(reason)) for name, reason in data.get("left_out", ()))
        return cls(layers, others, data["dtype"], left_out)


def _told(names: Sequence[str], reason: str) -> str:
    first = names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"
    return f"{first} {reason}."


def _typed(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples of numbers."""
    places = tuple(
        Place(
            str(x["parameter"]),
            _numbers(x["extents"]),
            _numbers(x["stored"]),
            _numbers(x["live"]),
            int(x["at_stored"]),
            int(x["at_live"]),
        )
        for x in row.get("places", ())
    )
    return {**row, "shape": _numbers(row["shape"]), "places": places}


def _numbers(row: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(x) for x in row)


def _in_scope(layer: Layer, pattern: str) -> bool:
    if pattern == "all":
        return True
    if pattern == "blocks":
        return layer.block is not None and layer.kind not in ("embedding", "head")
    if pattern == "embeddings":
        return layer.kind == "embedding"
    if pattern == "head":
        return layer.predicts
    return glob(pattern).fullmatch(layer.name) is not None


def glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` as in a shell, over a layer's whole name; a `.weight` may be left out."""
    stem = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(rf"{stem}(\.weight)?")
