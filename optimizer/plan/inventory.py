"""Layers: what a model is made of, and what of it can be quantized. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optimizer.errors import ConfigError
from optimizer.plan.precision import WIDTH, Precision


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
    def start(self) -> tuple[str, int] | None:
        """The parameter that holds its matrix row by row, and at which number it starts."""
        if self.transposed or self.kind == "conv1d" or len(self.shape) != 2:
            return None
        if not self.places:
            return self.parameter, 0
        place, *more = self.places
        plain = place.stored == place.live == (1,) and place.at_stored == 0 and not more
        return (place.parameter, place.at_live) if plain else None

    @property
    def fused(self) -> bool:
        """Whether it is one of a block's experts that lie in one tensor, each row by row."""
        one = self.block is not None and self.kind == "experts" and self.expert is not None
        return one and self.start is not None

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
