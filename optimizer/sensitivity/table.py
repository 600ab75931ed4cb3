"""What each choice would cost: table[group, precision] in nats per token, with standard errors.

Every estimator fills the same table. Nothing here loads torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.errors import ConfigError
from optimizer.plan import FLOATS, GGML, UNTOUCHED, Precision

EXPERT = re.compile(r"experts?\.\d+\.")
OUTLIER, FEW = 20.0, 4  # medians above which a chunk doesn't count, of that many chunks

if TYPE_CHECKING:
    from optimizer.models.model import Rounder


@dataclass(frozen=True)
class Task:
    """What is to be scored: groups of layers x a palette, rounded by a quantizer.

    groups: lists of layer names. palette: column names -> precision; `fitted` gives the
    precision that a column means for one layer (its group size may have been adapted).
    """

    groups: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    fitted: Mapping[tuple[str, str], Precision]  # (layer, column) -> precision
    quantizer: Rounder

    @property
    def layers(self) -> list[str]:
        return [name for group in self.groups for name in group]

    def collect(self, losses: dict[str, np.ndarray]) -> np.ndarray:
        """Layer -> losses [precisions] to [groups, precisions]: layers of a group add up."""
        return np.array([np.sum([losses[name] for name in group], 0) for group in self.groups])


@dataclass(frozen=True)
class Text:
    """What is read: ids [windows, length]; runs, the windows of each chunk; seed, of the labels;
    weights [windows, length], how much each token counts. starts: of each chunk, its first window's
    number among all that there are; () where these are all. apart: a window's gradients are multiplied
    with errors as they are, and each window has a sum of its own; else squares of gradients are, and a
    chunk's windows share one."""

    ids: np.ndarray
    runs: Sequence[slice]
    seed: int
    weights: np.ndarray | None = None
    starts: tuple[int, ...] = ()
    apart: bool = False

    @property
    def power(self) -> int:
        """Of gradients and errors."""
        return 1 if self.apart else 2

    @property
    def sums(self) -> int:
        """How many a layer has."""
        return len(self.ids) if self.apart else len(self.runs)

    def sum_of(self, window: int) -> int:
        """The number of the sum that a window belongs to."""
        return window if self.apart else self.chunk(window)

    def chunk(self, window: int) -> int:
        return next(i for i, run in enumerate(self.runs) if run.start <= window < run.stop)

    def labels(self, window: int) -> list[int]:
        """The seed of a window's labels."""
        chunk = self.chunk(window)
        return [*self.seed_of(chunk), window - self.runs[chunk].start]

    def seed_of(self, chunk: int) -> list[int]:
        """What a chunk's labels depend on; the same whatever other chunks are read with it."""
        return [self.seed, (self.starts or [run.start for run in self.runs])[chunk]]

    def part(self, some: Sequence[int]) -> Text:
        """These chunks alone, which tell the same as among the others."""
        rows = np.concatenate([np.r_[self.runs[i]] for i in some])
        ends = np.cumsum([0, *(self.runs[i].stop - self.runs[i].start for i in some)]).tolist()
        return Text(
            self.ids[rows],
            [slice(a, b) for a, b in pairwise(ends)],
            self.seed,
            None if self.weights is None else self.weights[rows],
            tuple(self.seed_of(i)[1] for i in some),
            self.apart,
        )


class Desk:
    """Where a long measurement shows how far it is, and leaves what it has; this one forgets."""

    def meter(
        self,
        text: str,  # noqa: ARG002
        total: int,  # noqa: ARG002
    ) -> AbstractContextManager[Callable[[int, str], None]]:
        """Call what it yields with (how much of `total` is done, news)."""
        return nullcontext(lambda _done, _news: None)

    def note(self, text: str) -> None:
        """What a person should know of the measurement."""

    def show(self, layers: int, of: int, tokens: int) -> None:
        """So many of the layers have their losses on so many tokens."""

    def leave(self, state: dict[str, np.ndarray]) -> None:
        """In the place of what was left before."""

    def left(self) -> dict[str, np.ndarray] | None:
        """What a killed run left here last."""
        return None


@dataclass(frozen=True)
class Table:
    """loss, stderr: [groups, precisions], nats per token. samples [chunks, groups, precisions]
    are the chunks' own estimates; they share their weights with all groups, so a plan's standard
    error counts the correlation between groups."""

    groups: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    loss: np.ndarray
    stderr: np.ndarray
    samples: np.ndarray

    @staticmethod
    def typical(samples: np.ndarray) -> np.ndarray:
        """Which chunks [n] count. samples [n, groups, precisions]: of FEW chunks or more, one whose
        losses have a sum of more than OUTLIER medians doesn't. A window that begins within a word may
        have gradients a hundred times as large as any other's; its true loss isn't: there the second
        order ends."""
        totals = samples.sum((1, 2))
        middle = float(np.median(totals))
        if len(samples) < FEW or middle <= 0:
            return np.ones(len(samples), dtype=bool)
        return np.asarray(totals <= OUTLIER * middle)

    @classmethod
    def from_samples(cls, task: Task, samples: np.ndarray) -> Table:
        spread = samples.std(0, ddof=1) / np.sqrt(len(samples))
        return cls(task.groups, task.columns, samples.mean(0), spread, samples)

    def with_rows(self, rows: dict[int, tuple[np.ndarray, np.ndarray]]) -> Table:
        """Replace groups' (loss, stderr) by measured ones."""
        loss, stderr, samples = self.loss.copy(), self.stderr.copy(), self.samples.copy()
        for group, (mean, error) in rows.items():
            samples[:, group] += mean - loss[group]
            loss[group], stderr[group] = mean, error
        return Table(self.groups, self.columns, loss, stderr, samples)

    def scaled(self, rows: np.ndarray) -> Table:
        """Each group's losses times a factor [groups]."""
        wide = rows[:, None]
        return Table(
            self.groups, self.columns, self.loss * wide, self.stderr * wide, self.samples * wide
        )

    def predict(self, columns: np.ndarray) -> tuple[float, float]:
        """One column index per group -> predicted loss and its standard error."""
        rows = np.arange(len(self.groups))
        per_chunk = self.samples[:, rows, columns].sum(1)
        error = per_chunk.std(ddof=1) / np.sqrt(len(per_chunk))
        return float(self.loss[rows, columns].sum()), float(error)


def rarely_met(losses: Mapping[str, np.ndarray]) -> str | None:
    """A word on layers of experts that some parts of the text, or all, didn't visit. losses: layer ->
    [chunks, precisions]. An engine's groups hold all experts of a block, whose losses add up to what
    they are on average; shrinking single ones made them worse (experiments/LOG.md)."""
    parts = [(x.any(1).sum(), len(x)) for name, x in losses.items() if EXPERT.search(name)]
    never = sum(1 for met, _ in parts if met == 0)
    rarely = sum(1 for met, of in parts if 0 < met < of)
    if not never + rarely:
        return None
    return (
        f"Of {len(parts)} layers of experts, {never} met no token of the table's text and {rarely} "
        "met some in a part of it only. What they lose counts as often as they were met; more windows "
        "(sensitivity.windows) meet more of them."
    )


def chunks(windows: int, count: int) -> list[slice]:
    """`windows` cut into `count` runs of almost equal length."""
    edges = np.linspace(0, windows, count + 1).round().astype(int)
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def palette_columns(
    layers: Sequence[Any], palette: Sequence[Precision], fit: str
) -> dict[tuple[str, str], Precision]:
    """(layer, column) -> precision. fit: see `Palette`. Raises ConfigError where a group divides no
    layer at all, or with `strict` where it doesn't divide one."""
    fitted = {}
    for precision in palette:
        odd = [layer for layer in layers if not precision.fits(layer.cols)]
        if odd and (fit == "strict" or (fit == "untouched" and len(odd) == len(layers))):
            raise ConfigError(
                f"A group must divide a layer's columns: groups of {precision.group_size} don't "
                f"divide the {odd[0].cols} columns of {odd[0].name}. {_remedy(layers, precision)}"
            )
        for layer in layers:
            fits = fit == "nearest" or precision.fits(layer.cols)
            fitted[layer.name, precision.name] = (
                precision.nearest(layer.cols) if fits else UNTOUCHED
            )
    return fitted


def agreeing(
    groups: Sequence[Sequence[str]],
    columns: Sequence[str],
    fitted: dict[tuple[str, str], Precision],
    beside: Collection[str] = (),
) -> dict[tuple[str, str], Precision]:
    """With a whole group untouched where one of its layers is: an engine loads them alike. beside:
    layers that it also loads untouched beside quantized ones."""
    bare = {
        (name, column)
        for group in groups
        for column in columns
        if any(fitted[x, column].kind == "none" for x in group if x not in beside)
        for name in group
    }
    return {key: UNTOUCHED if key in bare else p for key, p in fitted.items()}


def unfitting(layers: Sequence[Any], palette: Sequence[Precision], fit: str) -> tuple[str, ...]:
    """A word on the layers that stay untouched since no group divides them, for each length."""
    grouped = [p for p in palette if p.group_size is not None]
    if fit != "untouched":  # strict raised; the groups of floats have no other size
        grouped = [p for p in grouped if p.kind in FLOATS]
    notes = []
    for size in sorted({p.group_size for p in grouped if p.group_size is not None}):
        odd = [layer for layer in layers if layer.cols % size]
        names = [p.name for p in grouped if p.group_size == size]
        flexible = any(p.group_size == size and p.kind not in FLOATS for p in grouped)
        if odd:
            more = f" and {len(odd) - 1} more" * (len(odd) > 1)
            what = "every precision with such groups" if flexible else " and ".join(names)
            notes.append(
                f"Groups of {size} don't divide the {odd[0].cols} columns of {odd[0].name}{more}: "
                f"untouched in {what}."
                + " palette.fit=nearest rounds them in other groups."
                * flexible
            )
    return tuple(notes)


def _remedy(layers: Sequence[Any], precision: Precision) -> str:
    """What would divide every layer; the blocks of llama.cpp have the length that they have."""
    if precision.kind in FLOATS:
        return f"Leave {precision.name}, whose groups have that size, out of palette.bits."
    if precision.kind in GGML:
        return (
            f"Leave {precision.name} out of palette.bits, or set palette.fit=nearest to take what "
            "llama.cpp falls back to."
        )
    common = precision.nearest(math.gcd(*(layer.cols for layer in layers)))
    return (
        f"Set palette.group_size to a divisor of all ({common.group_size} is the nearest), or "
        "palette.fit=nearest to take the nearest divisor for each layer."
    )
