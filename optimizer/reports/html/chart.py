"""Charts as SVG: the front (bytes, loss), a third objective against loss, predicted against measured
loss. Loss axes are logarithmic; a loss of zero is drawn on the lower edge.

Text sizes come from the style sheet, so that a phone can enlarge them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from optimizer.reports.run import Point, Run

WIDTH, HEIGHT = 720, 430
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 36, 58


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


def third(run: Run) -> str:
    """The third objective of a searched front against loss; empty where the run has none."""
    if run.third is None:
        return ""
    across, scale, text = {
        "read": ("bytes read per new token", 1.0, size),
        "time": ("milliseconds per new token", 1000.0, milliseconds),
        "price": ("price of a million tokens", 1.0, loss),
    }[run.third]
    points = [(i, p, r) for i, (p, r) in enumerate(shown(run))]
    xs = [scale * run.cost(p) for _, p, _ in points]
    x = linear(xs, LEFT, WIDTH - RIGHT)
    y = logarithmic([value(p) for _, p, _ in points], HEIGHT - BOTTOM, TOP)
    body = [axes(x, y, across, f"KL, nats per {run.unit}", text)]
    for (index, point, role), at in zip(points, xs, strict=True):
        body.append(shape(index, role, x.at(at), y.at(value(point))))
    return svg("third", f"Chart of {across} against loss for {len(points)} plans.", body)


def value(point: Point) -> float:
    return point.predicted if point.measured is None else point.measured


def front(run: Run) -> str:
    """Size against loss: the front's prediction as a line, measured plans as marks."""
    points = shown(run)
    x = linear([p.bytes for p, _ in points], LEFT, WIDTH - RIGHT)
    y = logarithmic([value(p) for p, _ in points], HEIGHT - BOTTOM, TOP)
    uniform = sorted((p for p, role in points if role == "uniform"), key=lambda p: p.bytes)
    body = [
        axes(x, y, "bytes of the model's tensors", f"KL, nats per {run.unit}", size),
        path(x, y, [(p.bytes, p.predicted) for p in run.front], "line-front"),
        path(x, y, [(p.bytes, value(p)) for p in uniform], "line-uniform"),
    ]
    for index, (point, role) in enumerate(points):
        body.append(shape(index, role, x.at(point.bytes), y.at(value(point))))
    note = (
        f"Chart of size against loss for {len(points)} plans. The chosen plan takes "
        f"{size(run.chosen.bytes)} at a KL of {loss(value(run.chosen))}. The table below the "
        "chart holds the measured plans."
    )
    return svg("front", note, body)


def prediction(run: Run) -> str:
    """Predicted loss across, measured loss up; a perfect prediction lies on the diagonal."""
    points = [(i, p, r) for i, (p, r) in enumerate(shown(run)) if p.measured is not None]
    values = [v for _, p, _ in points for v in (p.predicted, p.measured or 0.0)]
    x = logarithmic(values, LEFT, WIDTH - RIGHT)
    y = logarithmic(values, HEIGHT - BOTTOM, TOP)
    ends = [(x.low, x.low), (x.high, x.high)]
    body = [
        axes(x, y, f"predicted KL, nats per {run.unit}", "measured KL", loss),
        path(x, y, ends, "line-uniform"),
    ]
    for index, point, role in points:
        body.append(shape(index, role, x.at(point.predicted), y.at(point.measured or 0.0)))
    note = f"Chart of predicted against measured loss for {len(points)} plans."
    return svg("prediction", note, body)


def svg(name: str, note: str, body: list[str]) -> str:
    return (
        f'<svg class="chart" id="{name}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(note)}">{"".join(body)}</svg>'
    )


def axes(x: Axis, y: Axis, across: str, up: str, text: Callable[[float], str]) -> str:
    parts = []
    for tick in x.ticks:
        at = x.at(tick)
        parts.append(f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{y.start}"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 22}" class="mid">{text(tick)}</text>')
    for tick in y.ticks:
        at = y.at(tick)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{x.stop}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{at + 5:.1f}" class="end">{loss(tick)}</text>'
        )
    middle = (x.start + x.stop) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" class="mid name">{across}</text>')
    parts.append(f'<text x="{LEFT}" y="22" class="name">{up} (lower is better)</text>')
    return "".join(parts)


def path(x: Axis, y: Axis, values: Sequence[tuple[float, float]], kind: str) -> str:
    steps = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in values)
    return f'<polyline class="{kind}" points="{steps}"/>'


def shape(index: int, role: str, x: float, y: float) -> str:
    """One shape per role, so that colour is never the only difference."""
    own = f'class="mark {role}" data-i="{index}" data-x="{x:.1f}" data-y="{y:.1f}"'
    if role == "uniform":
        return f'<rect {own} x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
    if role == "baseline":
        up, down = f"{x:.1f},{y - 7:.1f}", f"{x + 6:.1f},{y + 5:.1f} {x - 6:.1f},{y + 5:.1f}"
        return f'<polygon {own} points="{up} {down}"/>'
    if role == "searched":
        steps = ((0, -6), (6, 0), (0, 6), (-6, 0))
        diamond = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in steps)
        return f'<polygon {own} points="{diamond}"/>'
    if role == "chosen":
        corners = []
        for i in range(10):
            radius, angle = (11 if i % 2 == 0 else 4.6), math.pi * (i / 5 - 0.5)
            corners.append(
                f"{x + radius * math.cos(angle):.1f},{y + radius * math.sin(angle):.1f}"
            )
        return f'<polygon {own} points="{" ".join(corners)}"/>'
    return f'<circle {own} cx="{x:.1f}" cy="{y:.1f}" r="{3 if role == "front" else 4}"/>'


def mark(role: str) -> str:
    """A mark for a legend, around (0, 0)."""
    return shape(-1, role, 0, 0)
