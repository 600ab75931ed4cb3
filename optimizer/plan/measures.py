"""What is measured of a plan against its reference: the one table of names, units and directions, from
which every page, table and card is labelled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Unit = Literal["token", "text"]  # of language models, and of encoders


@dataclass(frozen=True)
class Measure:
    """name: in files and code. title: in a report; short: as a column of the terminal; word: in a
    sentence. digits: shown after the point; percent: a share, shown in hundredths. reference: what
    the reference has, None where it has a value of its own. higher: whether more is better. of: the
    unit of the models that have it; always: whether each certificate of theirs does."""

    name: str
    title: str
    short: str
    word: str = ""
    digits: int = 4
    percent: bool = False
    reference: float | None = 0.0
    higher: bool = False
    of: tuple[Unit, ...] = ("token", "text")
    always: bool = True

    def number(self, value: float) -> str:
        """For a column, whose title says the unit."""
        return f"{(100 if self.percent else 1) * value:.{self.digits}f}"

    def amount(self, value: float) -> str:
        """For a sentence."""
        return f"{self.number(value)} %" if self.percent else self.number(value)


TOKEN: tuple[Unit, ...] = ("token",)
TEXT: tuple[Unit, ...] = ("text",)
MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("kl", "mean KL (nats/{unit})", "KL (nats/{unit})", "KL"),
        Measure("kl_p99", "KL, worst 1 %", "KL p99", digits=3),
        Measure("kl_p999", "KL, worst 0.1 %", "KL p99.9", digits=3, always=False),
        Measure("kl_cvar99", "KL, mean of the worst 1 %", "KL CVaR", digits=3, always=False),
        Measure("flips", "other top token, %", "flips %", "flips", 1, percent=True),
        Measure(
            "accuracy",
            "change of accuracy, %",
            "accuracy %",
            "change of accuracy",
            1,
            percent=True,
            of=TOKEN,
            always=False,
        ),
        Measure("ear", "EAR (1 - total variation)", "EAR", reference=1.0, higher=True, of=TOKEN),
        Measure("drift", "drift of the true token", "drift", of=TOKEN, always=False),
        Measure("perplexity", "perplexity", "perplexity", digits=2, reference=None, of=TOKEN),
        Measure(
            "perplexity_reference",
            "perplexity, reference",
            "reference",
            digits=2,
            reference=None,
            of=TOKEN,
        ),
        Measure(
            "overlap",
            "10 nearest that stay, %",
            "10 nearest stay %",
            digits=1,
            percent=True,
            reference=1.0,
            higher=True,
            of=TEXT,
        ),
        Measure("cosine", "cosines change by", "cosines change by", of=TEXT),
        Measure("cosine_p99", "cosines, worst 1 %", "cosines p99", of=TEXT),
    )
}
# what flips are where nothing is predicted: each text's nearest other one
FLIPS_OF_TEXTS = replace(MEASURES["flips"], title="other nearest text, %", short="other nearest %")


def measure(name: str, unit: Unit = "token") -> Measure:
    """As it reads for a model of that unit."""
    found = FLIPS_OF_TEXTS if (name, unit) == ("flips", "text") else MEASURES[name]
    return replace(found, title=found.title.format(unit=unit), short=found.short.format(unit=unit))


def unit_measures(unit: Unit) -> tuple[str, ...]:
    """Those that every certificate of the unit has."""
    return tuple(m.name for m in MEASURES.values() if m.always and unit in m.of)


def shown(unit: Unit) -> list[Measure]:
    """The columns of a table: all but what the reference has by itself."""
    names = (name for name in unit_measures(unit) if name != "perplexity_reference")
    return [measure(name, unit) for name in names]
