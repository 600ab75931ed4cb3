"""What was measured of a plan on text that nothing was tuned on, as plan.json holds it: a certificate,
which compares plans, and an evaluation, which says whether the plan is the reference.

The types are also what a file is checked against; see `schema`. A field that isn't there is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from optimizer import untrusted
from optimizer.plan.measures import MEASURES, Unit, unit_measures
from optimizer.untrusted import Count, LineOfText, Name, Number, Share, Words

FILE = ConfigDict(extra="ignore")  # what a later version may add isn't read
State = Literal["within", "over", "open"]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    __pydantic_config__ = FILE

    value: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class Row:
    """What was measured of one plan or text, by the names of `measures`."""

    __pydantic_config__ = FILE

    name: LineOfText
    kl: Interval | None = None
    kl_p99: Interval | None = None
    kl_p999: Interval | None = None
    kl_cvar99: Interval | None = None
    flips: Interval | None = None
    ear: Interval | None = None
    drift: Interval | None = None
    perplexity: Interval | None = None
    perplexity_reference: Interval | None = None
    cosine: Interval | None = None
    cosine_p99: Interval | None = None
    overlap: Interval | None = None

    def __getitem__(self, measure: str) -> Interval:
        """Raises KeyError for a measure that the row doesn't have."""
        return self.measures[measure]

    @property
    def measures(self) -> dict[str, Interval]:
        """Those that it has."""
        found = {name: getattr(self, name, None) for name in MEASURES}
        return {name: interval for name, interval in found.items() if interval is not None}


@dataclass(frozen=True)
class PlanRow(Row):
    bytes: Count = field(kw_only=True)


@dataclass(frozen=True)
class TextRow(Row):
    documents: Count = field(kw_only=True)
    tokens: Count = field(kw_only=True)


@dataclass(frozen=True)
class Rival:
    """A uniform plan that the plan was compared with: the plan's KL minus its own, and their ratio."""

    __pydantic_config__ = FILE

    name: LineOfText
    bytes: Count
    difference: Interval
    ratio: Interval


@dataclass(frozen=True)
class Line:
    """The straight line between two uniform plans, at the plan's own size."""

    __pydantic_config__ = FILE

    name: LineOfText
    kl: Number
    ratio: Interval


@dataclass(frozen=True)
class Versus:
    """uniform: the smallest uniform plan of at least the plan's size; fitting: where there is none,
    the largest that fits; line: between two of them."""

    __pydantic_config__ = FILE

    uniform: Rival | None = None
    fitting: Rival | None = None
    line: Line | None = None

    @property
    def rival(self) -> Rival | None:
        return self.uniform or self.fitting


@dataclass(frozen=True)
class Finding:
    """One measure on one text.

    low, high: 95 % interval. least: the lower bound that "lossy" needs. needed: documents that would
    probably (80 %) be enough, if further ones are like these; None if it is decided, or if there
    are too many.
    """

    __pydantic_config__ = FILE

    text: LineOfText
    measure: Literal["kl", "flips", "accuracy"]
    value: Number
    low: Number
    high: Number
    least: Number
    tolerated: Number
    state: State
    needed: Count | None


@dataclass(frozen=True)
class McNemar:
    """lost, won: tokens that only the reference, or only the plan, ranks first. p: of no change."""

    __pydantic_config__ = FILE

    lost: Count
    won: Count
    p: Number


@dataclass(frozen=True)
class Moved:
    """A document of high KL; window: its first one; begins: its first words."""

    __pydantic_config__ = FILE

    text: LineOfText
    document: Count
    window: Count = 0
    kl: Number = 0.0
    begins: LineOfText | None = None


@dataclass(frozen=True)
class Median:
    """None where it is the limit or beyond."""

    __pydantic_config__ = FILE

    value: Number | None
    low: Number | None = field(default=None, metadata={"kept": True})
    high: Number | None = field(default=None, metadata={"kept": True})


@dataclass(frozen=True)
class Greedy:
    """Greedy texts of both models: prompts of them, limit tokens each. never: how many don't part.
    mean, median: tokens that are the same. repeated: shares of 4-grams, by model."""

    __pydantic_config__ = FILE

    prompts: Count
    limit: Count
    never: Count
    mean: Interval
    median: Median
    repeated: Mapping[Name, Interval]
    repeated_more: Interval | None = None

    @model_validator(mode="after")
    def _both(self) -> Greedy:
        if not {"plan", "reference"} <= self.repeated.keys():
            raise ValueError("repeated needs plan and reference")
        return self


@dataclass(frozen=True)
class Tolerated:
    """Up to where a plan counted as the reference."""

    __pydantic_config__ = FILE

    kl: Share
    flips: Share
    accuracy: Share


@dataclass(frozen=True)
class Evaluation:
    """Whether the plan is the reference within a tolerance. texts: the held-out text first; noise: the
    reference against itself; documents: the most moved; half_of_loss: how many documents hold half of
    the KL; verdict: in words."""

    __pydantic_config__ = FILE

    state: Literal["lossy", "lossless", "open"]
    tolerance: Tolerated
    findings: Sequence[Finding]
    texts: Annotated[Sequence[TextRow], Field(min_length=1)]
    noise: Sequence[TextRow]
    documents: Sequence[Moved]
    half_of_loss: Count
    unit: Unit = "token"
    mcnemar: McNemar | None = None
    worst_domain: LineOfText | None = None
    weighted_kl: Number | None = None
    verdict: Words = ""
    greedy: Greedy | None = None

    @model_validator(mode="after")
    def _whole(self) -> Evaluation:
        _measured([*self.texts, *self.noise], self.unit)
        if not self.verdict:
            raise ValueError("verdict is missing")
        over = [finding for finding in self.findings if finding.state == "over"]
        if (self.state == "lossy") != bool(over):
            raise ValueError(f"the state is {self.state}, with {len(over)} findings over")
        if any(finding.tolerated <= 0 for finding in over):
            raise ValueError("what is tolerated is above 0")
        if self.worst_domain is not None:
            if self.worst_domain not in {row.name for row in self.texts}:
                raise ValueError("worst_domain is none of the texts")
            if self.weighted_kl is None:
                raise ValueError("weighted_kl is missing beside worst_domain")
        return self

    @property
    def worst(self) -> TextRow | None:
        """The kind of text on which the plan moved most."""
        return next((row for row in self.texts if row.name == self.worst_domain), None)

    def of(self, text: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.text == text]


@dataclass(frozen=True)
class Prediction:
    """What the table foretells of a plan: KL in nats per token (or text), and its standard error."""

    kl: float
    stderr: float
    estimator: str = ""
    unit: Unit = "token"


def nothing(value: Any) -> Any:
    """{} in a file is what wasn't measured."""
    return None if value == {} else value


@dataclass(frozen=True)
class Certificate:
    """The plan beside uniform plans on the same documents. rows: the plan's own first; interval: what
    the intervals are; verdict: of the comparison, in words; meaning: None in old plans."""

    __pydantic_config__ = FILE

    documents: Count
    tokens: Count
    interval: Words
    rows: Annotated[Sequence[PlanRow], Field(min_length=1)]
    versus: Versus
    unit: Unit = "token"
    verdict: Words = ""
    meaning: Annotated[Evaluation | None, BeforeValidator(nothing)] = None

    @model_validator(mode="after")
    def _whole(self) -> Certificate:
        if self.rows[0].name != "plan":
            raise ValueError("the first row isn't the plan's own")
        if not self.verdict:
            raise ValueError("verdict is missing")
        _measured(self.rows, self.unit)
        return self

    @property
    def own(self) -> PlanRow:
        """Of the plan."""
        return self.rows[0]

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Certificate | None:
        """From plan.json, or {}. Raises ValueError."""
        return untrusted.checked(cls, data) if data else None


def _measured(rows: Sequence[Row], unit: Unit) -> None:
    """Every row has what its unit has, and what the first one has."""
    known = rows[0].measures.keys()
    for row in rows:
        for name in unit_measures(unit):
            if name not in row.measures:
                raise ValueError(f"the row {row.name[:40]} lacks {name}")
        if not known <= row.measures.keys():
            raise ValueError(f"the row {row.name[:40]} lacks what the first one has")


def to_json(value: Any) -> Any:
    """As plan.json holds it: without what wasn't measured, a row's measures last."""
    if is_dataclass(value):
        own = sorted(fields(value), key=lambda f: f.name in MEASURES and isinstance(value, Row))
        found = [(f, getattr(value, f.name)) for f in own]
        return {
            f.name: to_json(v)
            for f, v in found
            if v is not None or f.default is not None or "kept" in f.metadata
        }
    if isinstance(value, Mapping):
        return {key: to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    return value
