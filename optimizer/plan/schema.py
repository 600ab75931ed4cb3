"""What plan.json may hold, as types: read by `Plan.load` before anything is made of it.

Whatever shows or uses a plan may rely on these types. Fields that aren't named here may be there, and
nobody reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from optimizer.untrusted import Count, Fields, LineOfText, Name, Number, Share, Words

Size = Annotated[int, Field(ge=1, le=2**40)]  # rows or columns of a matrix
Shape = Annotated[list[Size], Field(min_length=2, max_length=2)]
Unit = Literal["token", "text"]
MEASURES = {
    "token": ("kl", "kl_p99", "flips", "ear", "perplexity", "perplexity_reference"),
    "text": ("kl", "kl_p99", "flips", "overlap", "cosine", "cosine_p99"),
}


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


# ---------------------------------------------------------------- certificate


class Empty(Fields):
    """A certificate or an answer that isn't there."""

    @model_validator(mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        if value != {}:
            raise ValueError("it is neither whole nor empty")
        return value


class Interval(Fields):
    value: Number
    low: Number
    high: Number


class Row(Fields):
    """One plan or text; a measure that it has is an interval."""

    name: LineOfText
    kl: Interval
    kl_p99: Interval | None = None
    kl_p999: Interval | None = None
    kl_cvar99: Interval | None = None
    flips: Interval | None = None
    ear: Interval | None = None
    drift: Interval | None = None
    perplexity: Interval | None = None
    perplexity_reference: Interval | None = None
    overlap: Interval | None = None
    cosine: Interval | None = None
    cosine_p99: Interval | None = None


class PlanRow(Row):
    bytes: Count


class TextRow(Row):
    documents: Count
    tokens: Count


class Rival(Fields):
    name: LineOfText
    bytes: Count
    difference: Interval
    ratio: Interval


class Line(Fields):
    name: LineOfText
    kl: Number
    ratio: Interval


class Versus(Fields):
    uniform: Rival | None = None
    fitting: Rival | None = None
    line: Line | None = None


class Finding(Fields):
    text: LineOfText
    measure: Literal["kl", "flips", "accuracy"]
    value: Number
    low: Number
    high: Number
    least: Number
    tolerated: Number
    state: Literal["within", "over", "open"]
    needed: Count | None = None


class McNemar(Fields):
    lost: Count
    won: Count
    p: Number


class Moved(Fields):
    text: LineOfText
    document: Count
    window: Count = 0
    kl: Number
    begins: LineOfText | None = None


class Median(Fields):
    value: Number | None = None


class Greedy(Fields):
    mean: Interval
    median: Median
    limit: Count
    never: Count
    prompts: Count
    repeated: dict[Name, Interval]

    @model_validator(mode="after")
    def _both(self) -> Greedy:
        if not {"plan", "reference"} <= self.repeated.keys():
            raise ValueError("repeated needs plan and reference")
        return self


class Tolerance(Fields):
    kl: Share
    flips: Share
    accuracy: Share


class Meaning(Fields):
    state: Literal["within", "over", "open", "lossy", "lossless"]
    tolerance: Tolerance
    findings: list[Finding]
    texts: Annotated[list[TextRow], Field(min_length=1)]
    noise: list[TextRow]
    documents: list[Moved]
    half_of_loss: Count
    unit: Unit = "token"
    verdict: Words
    mcnemar: McNemar | None = None
    worst_domain: LineOfText | None = None
    weighted_kl: Number | None = None
    greedy: Greedy | None = None

    @model_validator(mode="after")
    def _whole(self) -> Meaning:
        _measured([*self.texts, *self.noise], self.unit)
        if self.worst_domain is not None:
            if self.worst_domain not in {row.name for row in self.texts}:
                raise ValueError("worst_domain is none of the texts")
            if self.weighted_kl is None:
                raise ValueError("weighted_kl is missing beside worst_domain")
        return self


class Certificate(Fields):
    documents: Count
    tokens: Count
    interval: Words
    rows: Annotated[list[PlanRow], Field(min_length=1)]
    versus: Versus
    unit: Unit = "token"
    verdict: Words
    meaning: Meaning | Empty = Empty()

    @model_validator(mode="after")
    def _whole(self) -> Certificate:
        if self.rows[0].name != "plan":
            raise ValueError("the first row isn't the plan's own")
        _measured(self.rows, self.unit)
        return self


def _measured(rows: Sequence[Row], unit: str) -> None:
    """Every row has what its unit has, and what the first one has."""
    known = set(rows[0].model_fields_set)
    for row in rows:
        for name in MEASURES[unit]:
            if getattr(row, name) is None:
                raise ValueError(f"the row {row.name[:40]} lacks {name}")
        if not known <= row.model_fields_set:
            raise ValueError(f"the row {row.name[:40]} lacks what the first one has")


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
    certificate: Certificate | Empty = Empty()
    provenance: Provenance = Provenance()
    refinement: Refined | None = None

    @model_validator(mode="after")
    def _cache(self) -> PlanFile:
        tried = [(cache.kv, cache.keep) for cache in self.provenance.caches]
        if tried and (self.kv, self.keep) not in tried:
            raise ValueError("kv and keep are none of the caches that were tried")
        return self
