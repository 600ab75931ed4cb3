"""What plan.json may hold, as types: read by `Plan.load` before anything is made of it.

Whatever shows or uses a plan may rely on these types. Fields that aren't named here may be there, and
nobody reads them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from optimizer.plan.certificate import Certificate, Interval, nothing
from optimizer.plan.measures import Unit
from optimizer.untrusted import Count, Fields, LineOfText, Name, Number, Share, Words

Size = Annotated[int, Field(ge=1, le=2**40)]  # rows or columns of a matrix
Shape = Annotated[list[Size], Field(min_length=2, max_length=2)]


class Model(Fields):
    name: LineOfText
    revision: LineOfText | None = None
    fingerprint: LineOfText | None = None


class Quantizer(Fields):
    name: LineOfText
    tokens: LineOfText | None = None


class Precision(Fields):
    kind: Name
    bits: Annotated[int, Field(ge=1, le=16)]
    group_size: Annotated[int, Field(ge=1, le=2**40)] | None = None
    symmetric: bool = False


class Bytes(Fields):
    quantized: Count
    total: Count
    untouched: Count = 0
    container: Count = 0


class Promise(Fields):
    kl: Number
    stderr: Number
    estimator: LineOfText = ""
    unit: Unit = "token"


class Empty(Fields):
    """What isn't there."""

    @model_validator(mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        if value != {}:
            raise ValueError("it is neither whole nor empty")
        return value


# ---------------------------------------------------------------- provenance


class Tuned(Fields):
    domains: list[Any] = Field(default_factory=list)
    pairs: LineOfText | None = None


class Block(Fields):
    count: Annotated[int, Field(ge=0, le=100_000)]
    values: Count
    window: Count = 0
    state: Count = 0


class Geometry(Fields):
    blocks: Annotated[list[Block], Field(max_length=100_000)]
    hidden: Count
    intermediate: Count
    heads: Count
    vocabulary: Count
    longest: Count
    head: Count = 32


Keep = Annotated[str, Field(pattern=r"^\d{1,7}\+\d{1,7}$")]


class Cache(Fields):
    kv: Count
    keep: Keep | None = None
    kl: Number
    bits: Number


class Provenance(Fields):
    command: Words = ""
    seed: int | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    tuned: Tuned = Tuned()
    geometry: Geometry | Empty = Empty()
    caches: list[Cache] = Field(default_factory=list)
    read: Annotated[float, Field(ge=0, le=1e30)] | None = None
    versions: dict[Name, LineOfText] = Field(default_factory=dict)


Weight = Annotated[float, Field(ge=-1e9, le=1e9)]


class Point(Fields):
    """unpack=hard at one threshold: the share of tokens that are unpacked, and the loss."""

    share: Annotated[float, Field(ge=0, le=1)]
    threshold: Annotated[float, Field(ge=-1e6, le=1e6)]
    kl: Number


class Heldout(Fields):
    share: Annotated[float, Field(ge=0, le=1)]
    kl: Interval


class Hard(Fields):
    """points: on search text, by share. heldout: one of them, measured on held-out text. weights,
    bias: of the probe, see `optimizer.models.planes.Signal`."""

    signal: Literal["probe", "entropy", "margin"]
    weights: Annotated[list[Weight], Field(max_length=100_000)] = Field(default_factory=list)
    bias: Weight = 0.0
    points: Annotated[list[Point], Field(min_length=1, max_length=100)]
    share: Annotated[float, Field(ge=0, le=1)]
    heldout: Heldout


class Both(Fields):
    base: Interval
    refined: Interval


class Nested(Fields):
    """What was measured of a nested plan on held-out text."""

    kl: Both
    acceptance: Interval
    base_beside: Annotated[Interval | None, Field(alias="base over separate")] = None
    refined_beside: Annotated[Interval | None, Field(alias="refined over separate")] = None

    @model_validator(mode="after")
    def _separate(self) -> Nested:
        if (self.base_beside is None) != (self.refined_beside is None):
            raise ValueError("base and refined over separate are given together, or not at all")
        return self


class Refined(Fields):
    palette: dict[Name, Precision]
    layers: dict[Name, Name]
    bytes: dict[Literal["quantized", "container", "total"], Count]
    size: Count
    predicted: Promise
    certificate: Nested | Empty = Empty()
    hard: Hard | Empty = Empty()


class PlanFile(Fields):
    """All of plan.json."""

    model: Model
    runtime: LineOfText
    quantizer: Quantizer
    palette: dict[Name, Precision]
    layers: dict[Name, Name]
    shapes: dict[Name, Annotated[list[Size], Field(min_length=2, max_length=2)]] = Field(
        default_factory=dict
    )
    scope: list[Name] | None = None
    bytes: Bytes
    effective_bits: Share
    code_bits: Share = 0.0
    predicted: Promise
    kv: Annotated[int, Field(ge=1, le=32)] = 16
    keep: Keep | None = None
    budget: dict[str, Any] = Field(default_factory=dict)
    certificate: Annotated[Certificate | None, BeforeValidator(nothing)] = None
    provenance: Provenance = Provenance()
    refinement: Refined | None = None

    @model_validator(mode="after")
    def _cache(self) -> PlanFile:
        tried = [(cache.kv, cache.keep) for cache in self.provenance.caches]
        if tried and (self.kv, self.keep) not in tried:
            raise ValueError("kv and keep are none of the caches that were tried")
        return self
