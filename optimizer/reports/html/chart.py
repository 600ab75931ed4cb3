"""What charts show, and where: the front (bytes, loss), a third objective against loss, predicted
against measured loss. Loss axes are logarithmic; a loss of zero is drawn on the lower edge.

The template drawing.html makes SVG of it. Text sizes come from the style sheet, so that a phone can
enlarge them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from optimizer.reports.run import Point, Run

WIDTH, HEIGHT = 720, 430
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 36, 58

Place = tuple[float, float]  # x, y in pixels
# Marks by role: corners around (0, 0), or a circle's radius. Uniform plans are squares.
OUTLINES: dict[str, tuple[Place, ...]] = {
    "baseline": ((0, -7), (6, 5), (-6, 5)),
    "searched": ((0, -6), (6, 0), (0, 6), (-6, 0)),
    "chosen": tuple(
        (radius * math.cos(angle), radius * math.sin(angle))
        for radius, angle in ((11 - 6.4 * (i % 2), math.pi * (i / 5 - 0.5)) for i in range(10))
    ),
}
RADIUS = {"front": 3, "random": 4}


@dataclass(frozen=True)
class Axis:
    """Values -> pixels; `ticks` in values."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(max(value, self.low)) - low) / ((high - low) or 1)
        return self.start + share * (self.stop - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


@dataclass(frozen=True)
class Mark:
    """A plan in a chart. index: of shown(), for the script; -1 where that knows none. x, y: pixels."""

    index: int
    role: str
    x: float
    y: float


@dataclass(frozen=True)
class Chart:
    """note: for who can't see it. across, up: what the axes say; unit: how a tick across is written.
    lines: (class, points in pixels)."""

    name: str
    note: str
    x: Axis
    y: Axis
    across: str
    up: str
    unit: Callable[[float], str]
    lines: tuple[tuple[str, list[Place]], ...]
    marks: tuple[Mark, ...]


def linear(values: Sequence[float], start: float, stop: float) -> Axis:
    low, high = min(values), max(values)
    pad = 0.03 * (high - low) or 0.5 * high or 1.0
    low, high = low - pad, high + pad
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(s for s in (step, 2 * step, 5 * step, 10 * step) if (high - low) / s <= 6)
    ticks = tuple(i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1))
    return Axis(low, high, start, stop, False, ticks)


def logarithmic(values: Sequence[float], start: float, stop: float) -> Axis:
    """Zero and below count as a little less than the smallest positive value."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.6, max(positive) * 1.6
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [1] if last - first > 2 else [1, 2, 5]
    ticks = [m * 10.0**e for e in range(first, last + 1) for m in every]
    return Axis(low, high, start, stop, True, tuple(t for t in ticks if low <= t <= high))


def shown(run: Run) -> list[tuple[Point, str]]:
    """Every plan that the page knows, with its role; the script uses the same order."""
    roles = [(point, role_of(point, run)) for point in run.measured if point.name != "plan"]
    return [*((point, "front") for point in run.front), *roles, (run.chosen, "chosen")]


def role_of(point: Point, run: Run) -> str:
    if point.name in run.columns:
        return "uniform"
    first = point.name.split(" ")[0]
    return first if first in ("random", "searched") else "baseline"


ROLES = {
    "front": "on the predicted front",
    "uniform": "the same precision everywhere",
    "random": "a random plan",
    "searched": "on the searched front",
    "baseline": "a baseline",
    "chosen": "the chosen plan",
}


def size(count: float) -> str:
    """Bytes for a person, in powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return (
                f"{count / scale:.3g} {unit}"
                if count < 1000 * scale
                else f"{count / scale:.0f} {unit}"
            )
    return f"{count:.0f} B"


def loss(value: float) -> str:
    """`0.0123`, `1.2e-5`."""
    if value >= 1e-3 or value == 0:
        return f"{value:.3g}"
    number, _, exponent = f"{value:.1e}".partition("e")
    return f"{number.removesuffix('.0')}e{int(exponent)}"


def summary(point: Point, role: str) -> str:
    name = "" if role in ("front", "chosen") else f"{point.name}, "
    text = f"{name}{ROLES[role]}: {size(point.bytes)}, {point.bits:.3f} bits per weight, "
    text += f"predicted KL {loss(point.predicted)}"
    if point.seconds:
        text += f", {milliseconds(1000 * point.seconds)} per token"
    return text + ("" if point.measured is None else f", measured {loss(point.measured)}")


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms"


def value(point: Point) -> float:
    return point.predicted if point.measured is None else point.measured


def points(places: Iterable[Place], x: float = 0, y: float = 0) -> str:
    """Places, moved by (x, y), as SVG's attribute of that name."""
    return " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in places)


def axes(across: Sequence[float], up: Sequence[float]) -> tuple[Axis, Axis]:
    """A linear axis for the first values, a logarithmic one for the losses."""
    return linear(across, LEFT, WIDTH - RIGHT), logarithmic(up, HEIGHT - BOTTOM, TOP)


def line(x: Axis, y: Axis, values: Iterable[tuple[float, float]]) -> list[Place]:
    return [(x.at(a), y.at(b)) for a, b in values]


def third(run: Run) -> Chart:
    """The third objective of a searched front against loss."""
    across, scale, unit = {
        "read": ("bytes read per new token", 1.0, size),
        "time": ("milliseconds per new token", 1000.0, milliseconds),
        "price": ("price of a million tokens", 1.0, loss),
    }[str(run.third)]
    plans = shown(run)
    costs = [scale * run.cost(p) for p, _ in plans]
    x, y = axes(costs, [value(p) for p, _ in plans])
    marks = (
        Mark(i, role, x.at(cost), y.at(value(p)))
        for i, ((p, role), cost) in enumerate(zip(plans, costs, strict=True))
    )
    note = f"Chart of {across} against loss for {len(plans)} plans."
    return Chart("third", note, x, y, across, f"KL, nats per {run.unit}", unit, (), tuple(marks))


def front(run: Run) -> Chart:
    """Size against loss: the front's prediction as a line, measured plans as marks."""
    plans = shown(run)
    x, y = axes([p.bytes for p, _ in plans], [value(p) for p, _ in plans])
    uniform = sorted((p for p, role in plans if role == "uniform"), key=lambda p: p.bytes)
    return Chart(
        "front",
        f"Chart of size against loss for {len(plans)} plans. The chosen plan takes "
        f"{size(run.chosen.bytes)} at a KL of {loss(value(run.chosen))}. The table below the "
        "chart holds the measured plans.",
        x,
        y,
        "bytes of the model's tensors",
        f"KL, nats per {run.unit}",
        size,
        (
            ("line-front", line(x, y, ((p.bytes, p.predicted) for p in run.front))),
            ("line-uniform", line(x, y, ((p.bytes, value(p)) for p in uniform))),
        ),
        tuple(Mark(i, r, x.at(p.bytes), y.at(value(p))) for i, (p, r) in enumerate(plans)),
    )


def prediction(run: Run) -> Chart:
    """Predicted loss across, measured loss up; a perfect prediction lies on the diagonal."""
    plans = [
        (i, role, p.predicted, p.measured)
        for i, (p, role) in enumerate(shown(run))
        if p.measured is not None
    ]
    values = [value for _, _, *pair in plans for value in pair]
    x = logarithmic(values, LEFT, WIDTH - RIGHT)
    y = logarithmic(values, HEIGHT - BOTTOM, TOP)
    return Chart(
        "prediction",
        f"Chart of predicted against measured loss for {len(plans)} plans.",
        x,
        y,
        f"predicted KL, nats per {run.unit}",
        "measured KL",
        loss,
        (("line-uniform", line(x, y, [(x.low, x.low), (x.high, x.high)])),),
        tuple(Mark(i, role, x.at(a), y.at(b)) for i, role, a, b in plans),
    )
