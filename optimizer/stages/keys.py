"""Under what the stages keep their results; see `plan.keys.Key`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from optimizer.plan.keys import Key


@dataclass(frozen=True)
class InventoryKey(Key):
    VERSION: ClassVar[int] = 5
    fingerprint: str


@dataclass(frozen=True)
class TokensKey(Key):
    """cut: the version of what cuts texts. name: which tokens."""

    cut: int
    fingerprint: str
    name: str


@dataclass(frozen=True)
class BundledKey(Key):
    """domains: the version of what cuts them. content: of the bundled files."""

    domains: int
    content: str
    tokens: str


@dataclass(frozen=True)
class ScoresKey(Key):
    """Of a choice on a part of the tokens. Version 5 says which model found the true token."""

    VERSION: ClassVar[int] = 5
    part: str
    quantizer: Any
    choice: dict[str, str]


@dataclass(frozen=True)
class ChainKey(Key):
    """Whether a model's blocks are a chain."""

    VERSION: ClassVar[int] = 4
    fingerprint: str


@dataclass(frozen=True)
class CertifiedKey(Key):
    """The held-out scores of a plan's joint rounding. scores: version of those."""

    plan: str
    heldout: str
    kv: int
    keep: str | None
    scores: int = ScoresKey.VERSION


@dataclass(frozen=True)
class NoiseKey(Key):
    """The reference against itself."""

    windows: int
    heldout: str
    device: str


@dataclass(frozen=True)
class CutKey(Key):
    """A domain's windows. domains: version of what cuts them. own: of a text of the user's."""

    domains: int
    fingerprint: str
    domain: Sequence[Any]
    longest: int
    own: Any


@dataclass(frozen=True)
class LongKey(Key):
    """Long text that the reference says. sampled: version of what samples it."""

    sampled: int
    fingerprint: str
    length: int
    seed: int


@dataclass(frozen=True)
class ReadKey(Key):
    """A plan's scores on other windows than its own."""

    fingerprint: str
    windows: Sequence[Any]
    weights: Any


@dataclass(frozen=True)
class BeginningKey(Key):
    """The first words of a document."""

    fingerprint: str
    ids: Sequence[int]


@dataclass(frozen=True)
class GreedyKey(Key):
    """Greedy text; weights: of a plan, None for the reference."""

    fingerprint: str
    prompts: Sequence[Any]
    tokens: int
    weights: Any = None


@dataclass(frozen=True)
class TableKey(Key):
    """A sensitivity table. reading: another text than the calibration windows, or weighted tokens."""

    VERSION: ClassVar[int] = 4
    windows: str
    estimator: Any
    groups: Sequence[Sequence[str]]
    columns: Sequence[str]
    fitted: Sequence[Sequence[str]]
    quantizer: Any
    seed: int
    reading: Any = None
