"""GPTQ: round a matrix column by column, and let later columns make up for each error.

Minimises tr((W - W') H (W - W')') over codes, H = sum x x' over a layer's inputs x [cols]
(Frantar et al., arXiv:2210.17323). With U upper triangular, H^-1 = U' U, for columns j in order:
    (1) q_j = nearest level of w_j          e_j = (w_j - w'_j) / U_jj
    (2) w_k -= e_j U_jk  for k > j          the loss grows by e_j^2
Every row is a problem of its own under the same H, so layers that share an input, and all
precisions of a layer, are stacked as rows and solved in one pass.
Legend: W [rows, cols]; H, U [cols, cols]; g group size; matrices of the inner loop are transposed,
[cols, rows], so that a column of W is contiguous.

llama.cpp's blocks get their grid (super-block scales and all) from the unrounded weights, since a
super-block's 256 columns share two numbers; GPTQ then chooses the codes inside of that grid. So do
floats, whose scales are searched for under (1)'s importance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from optimizer.errors import ModelError
from optimizer.models.arithmetic import sized
from optimizer.plan import FLOATS, GGML, Precision
from optimizer.quantization import floats, ggml, ggml_native, gptq_kernel, lattice
from optimizer.quantization.floats import Floats
from optimizer.quantization.ggml import Blocks, Grid
from optimizer.quantization.uniform import Codes, Encoded, Levels, Nearest, clipped, levels_of

BLOCK = 128  # columns whose errors reach the columns behind them as one matrix product
UNIT = 16  # columns that share their scale in every type of ggml
STACKED = 2**26  # weights that are solved together; bounds the memory
MANY_STACKED = 2**27  # on a GPU, where every column is some waits, however many rows it has
Job = tuple[Tensor, Precision]  # a weight [rows, cols] and what it becomes
Solved = tuple[list[Encoded], list[Tensor]]  # of each job; losses [rows]


@dataclass(frozen=True)
class Solver:
    """damping: added to H's diagonal, as a share of its mean; times ten until H factors.

    order: `none`; `columns`, the loudest inputs first, whose group scales then have to be those
    of the unrounded weights, since a stored group is contiguous; `groups`, the loudest group
    first and its loudest column first, with scales of the weights as updated so far.
    clip: shrink a group's range where that lowers the loss; see `quantizer.clipped`.
    Blocks of ggml and floats have their own search for scales; `groups` means `columns` there, and
    clip nothing.
    Never worse than rounding to nearest in the damped loss, row by row.
    """

    damping: float = 0.05
    order: str = "groups"
    clip: bool = False

    def solve(self, jobs: Sequence[Job], hessian: Tensor) -> list[Encoded]:
        """Codes of every job, all under one Hessian [cols, cols]. Cost of a job: rows cols^2
        multiplications, and cols short steps that all jobs of one family share."""
        done: dict[int, Encoded] = {}
        for family in dict.fromkeys(_family(precision) for _, precision in jobs):
            mine = [i for i, (_, precision) in enumerate(jobs) if _family(precision) == family]
            group = family if isinstance(family, int) else None
            order = self._order(hessian.diagonal(), group)
            if family in ggml_native.NATIVE:  # vectors of neighbouring columns
                order = torch.arange(len(hessian), device=hessian.device)
            root, upper = factors(hessian, self.damping, order)
            for part in _portions(mine, jobs):
                own = [jobs[i] for i in part]
                with _one_thread():
                    found, losses = self._stack(own, upper, order)
                better = [
                    self._or_nearest(job, codes, loss, root, order)
                    for job, codes, loss in zip(own, found, losses, strict=True)
                ]
                done |= dict(zip(part, better, strict=True))
        return [done[i] for i in range(len(jobs))]

    def order_of(self, loudness: Tensor) -> Tensor:
        """Columns in the order in which they are rounded [cols], whole groups not counted."""
        return self._order(loudness, None)

    def _order(self, loudness: Tensor, group: int | None) -> Tensor:
        """Columns in the order in which they are rounded [cols]."""
        cols = len(loudness)
        if self.order == "none":
            return torch.arange(cols, device=loudness.device)
        by_column = loudness.argsort(descending=True, stable=True)
        if self.order == "columns" or group is None:
            return by_column
        by_group = loudness.view(-1, group).sum(1).argsort(descending=True, stable=True)
        rank = torch.empty_like(by_group)
        rank[by_group] = torch.arange(len(by_group), device=rank.device)
        return by_column[rank[by_column // group].argsort(stable=True)]

    def _or_nearest(
        self, job: Job, codes: Encoded, losses: Tensor, root: Tensor, order: Tensor
    ) -> Encoded:
        """Rows that are better off rounded to nearest get that: below 2 bits a few are, where the
        corrections leave the range of the levels."""
        weight, precision = job
        nearest = Nearest(clip=self.clip).encode(weight, precision)
        if isinstance(codes, Floats) and isinstance(nearest, Floats):
            for own in _some_rows(weight):  # a vocabulary is long
                error = (nearest.take(own).decode() - weight[own].float())[:, order]
                better = losses[own] > (error @ root).square_().sum(1)
                codes.put(own, better, nearest)
            return codes
        error = (nearest.decode() - weight.float())[:, order]
        keep = (losses <= (error @ root).square_().sum(1)).unsqueeze(1)
        if isinstance(codes, Blocks) or isinstance(nearest, Blocks):
            return _rows_of(keep, codes, nearest)
        assert isinstance(codes, Codes)
        assert isinstance(nearest, Codes)
        return Codes(
            precision,
            torch.where(keep, codes.codes, nearest.codes),
            torch.where(keep, codes.scales, nearest.scales),
            None
            if codes.zeros is None or nearest.zeros is None
            else torch.where(keep, codes.zeros, nearest.zeros),
        )

    def _stack(self, jobs: Sequence[Job], upper: Tensor, order: Tensor) -> Solved:
        """Jobs of one family -> their codes, and the loss of each row [rows]."""
        if jobs[0][1].kind in FLOATS:
            return _floats(jobs, upper, order)
        w = torch.cat([weight.float() for weight, _ in jobs]).T.contiguous()
        cols = len(w)
        importance = upper.diagonal().pow(-2)  # (1): what an error in a column costs
        if jobs[0][1].kind in ggml_native.NATIVE:
            return _vectors(jobs, upper)
        if jobs[0][1].kind in GGML:
            return self._blocks(jobs, w, upper, order)
        size = jobs[0][1].group_size or cols
        found: dict[int, Levels] = {}
        if self.order == "columns" and size < cols:
            by_column = torch.empty_like(importance).index_copy_(0, order, importance)
            for group in range(cols // size):
                own = slice(group * size, (group + 1) * size)
                found[group] = self._fit(w[own], jobs, by_column[own])

        def levels(group: int, j: int, w: Tensor) -> Levels:
            if group not in found:
                own = slice(j, j + size)
                found[group] = self._fit(w[own], jobs, importance[own])
            return found[group]

        q, loss = _sweep(w, upper, order, size, levels)
        codes = _taken_apart(q, [found[group] for group in range(cols // size)], jobs)
        return list(codes), list(loss.split([len(weight) for weight, _ in jobs]))

    def _blocks(self, jobs: Sequence[Job], w: Tensor, upper: Tensor, order: Tensor) -> Solved:
        """As `_stack`, for blocks of ggml. w [cols, all rows]."""
        grids = [ggml.fit(weight, precision.kind) for weight, precision in jobs]
        units = lines(grids)
        q, loss = _sweep(w, upper, order, UNIT, lambda unit, _j, _w: units[unit])
        counts = [len(weight) for weight, _ in jobs]
        parts = zip(grids, q.split(counts, 1), strict=True)
        return [grid.pack(grid.codes(own.T)) for grid, own in parts], list(loss.split(counts))

    def _fit(self, w: Tensor, jobs: Sequence[Job], importance: Tensor) -> Levels:
        """A group's columns [g, rows] of all jobs -> levels, each field [rows]."""
        found, first = [], 0
        for weight, precision in jobs:
            own = w[:, first : first + len(weight)].T
            first += len(weight)
            levels = (
                clipped(own, precision, importance) if self.clip else levels_of(own, precision)
            )
            found.append(levels)
        return _each(lambda *parts: torch.cat(parts).squeeze(-1), found)


@dataclass(frozen=True)
class Steps:
    """What a group's columns of some rows may become. step: s g of each row [rows]."""

    step: Tensor
    bits: int

    def nearest(self, w: Tensor) -> Tensor:
        """w [rows] -> values of codes [rows]."""
        return floats.nearest(w * torch.where(self.step == 0, 0.0, 1 / self.step), self.bits)

    def values(self, level: Tensor) -> Tensor:
        return level * self.step


def _floats(jobs: Sequence[Job], upper: Tensor, order: Tensor) -> Solved:
    """As `Solver._stack`, for floats of one kind, whose scales are those of the unrounded weights."""
    importance = torch.empty_like(upper[0]).index_copy_(0, order, upper.diagonal().pow(-2))
    solved: Solved = ([], [])
    for weight, precision in jobs:
        grid = floats.fit(weight, precision, importance)
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        losses = []
        for own in _some_rows(weight):
            w = weight[own].float().T.contiguous()
            found = [Steps(s, precision.bits) for s in grid.step(own).T.contiguous()]

            def steps(group: int, _j: int, _w: Tensor, found: list[Steps] = found) -> Steps:
                return found[group]

            q, loss = _sweep(w, upper, order, precision.group_size or len(w), steps)
            codes[own] = grid.codes(q.T)
            losses.append(loss)
        solved[0].append(grid.pack(codes))
        solved[1].append(torch.cat(losses))
    return solved


def _some_rows(weight: Tensor) -> Iterator[slice]:
    """Runs of at most about STACKED / 4 weights."""
    size = max(1, STACKED // (4 * weight.shape[1]))
    yield from (slice(i, i + size) for i in range(0, len(weight), size))


def _vectors(jobs: Sequence[Job], upper: Tensor) -> Solved:
    """As `_stack`, for kinds that code several columns at once: scales of ggml's search under (1)'s
    importance, then errors fed on from vector to vector where the kind is one of `lattice`."""
    importance = upper.diagonal().pow(-2)
    solved: Solved = ([], [])
    for weight, precision in jobs:
        data = ggml_native.encode(weight, precision.kind, importance)
        if precision.kind in lattice.LAYOUTS:
            found = lattice.Vectors.of(data, precision.kind, weight.shape[1])
            data, loss = lattice.sweep(found, weight, upper)
        else:
            error = ggml_native.decode(data, precision.kind, weight.shape[1]) - weight.float()
            loss = torch.linalg.solve_triangular(upper, error, upper=True, left=False)
            loss = loss.square().sum(1)
        solved[0].append(Blocks(precision, data, weight.shape[1]))
        solved[1].append(loss)
    return solved


@dataclass(frozen=True)
class Lines:
    """What UNIT columns of some rows may become, equation (1) with its sub-scale multiplied out:
    w' = step t - minimum, with t a whole number from low to high, or one of `kind`'s table. Fields:
    [rows]."""

    step: Tensor
    minimum: Tensor
    low: Tensor
    high: Tensor
    kind: str

    def nearest(self, w: Tensor) -> Tensor:
        """w [rows] -> t [rows]."""
        x = (w + self.minimum).mul_(torch.where(self.step == 0, 0.0, 1 / self.step))
        if self.kind in ggml.CURVED:
            levels = ggml.table(self.kind, w.device)
            return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
        return x.round_().clamp_(self.low, self.high)

    def values(self, t: Tensor) -> Tensor:
        return self.step * t - self.minimum


def lines(grids: Sequence[Grid]) -> list[Lines]:
    """The lines of every UNIT columns, the rows of all grids behind each other. Grids of iq4_nl
    stand alone."""

    def spread(x: Tensor, grid: Grid) -> Tensor:  # [n, sub-blocks] -> [rows, units]
        own = x.expand(grid.a.shape).reshape(grid.shape[0], -1)
        return own.repeat_interleave(ggml.LAYOUTS[grid.kind].length // UNIT, 1)

    step = torch.cat([spread(g.step, g) for g in grids])
    minimum = torch.cat([spread(g.minimum, g) for g in grids])
    ends = [ggml.table(g.kind, g.d.device)[[0, -1]].expand(g.shape[0], 2) for g in grids]
    low, high = torch.cat(ends).unbind(1)
    units = zip(step.unbind(1), minimum.unbind(1), strict=True)
    return [Lines(s, m, low, high, grids[0].kind) for s, m in units]


def _family(precision: Precision) -> int | str | None:
    """What is solved in one stack: one group size, one kind of floats, or all blocks with evenly
    spaced levels."""
    if precision.kind in FLOATS:
        return precision.kind
    if precision.kind in GGML:
        alone = (*ggml.CURVED, *ggml_native.NATIVE)
        return precision.kind if precision.kind in alone else "even"
    return precision.group_size


def _sweep(
    w: Tensor,
    upper: Tensor,
    order: Tensor,
    size: int,
    levels: Callable[[int, int, Tensor], Levels | Lines | Steps],
) -> tuple[Tensor, Tensor]:
    """(1) and (2) on w [cols, rows]. levels: a run of `size` columns, the place of its first one to
    come, and the weights as updated so far -> what that run may become. Returns the levels' numbers
    [cols, rows] and each row's loss."""
    cols, divisors = len(w), upper.diagonal().tolist()
    run_of = (order // size).tolist()
    w, q, loss = w[order], torch.empty_like(w), torch.zeros_like(w[0])
    for start, stop in _spans(cols, size):
        errors = torch.empty_like(w[start:stop])
        j = start
        while j < stop:
            own = levels(run_of[j], j, w)
            # (2) within the span now, behind it once for all of the span's columns
            if gptq_kernel.serves(own, w):
                end = next((k for k in range(j + 1, stop) if run_of[k] != run_of[j]), stop)
                e = errors[j - start : end - start]
                gptq_kernel.run(w[j:end], upper[j:end, j:end], own, q[j:end], e)
                w[end:stop].addmm_(upper[j:end, end:stop].T, e, alpha=-1)
                j = end
                continue
            q[j] = own.nearest(w[j])
            errors[j - start] = (w[j] - own.values(q[j])).div_(divisors[j])
            w[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
            j += 1
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        loss += errors.square_().sum(0)
    return torch.empty_like(q).index_copy_(0, order, q), loss


def factors(hessian: Tensor, damping: float, order: Tensor) -> tuple[Tensor, Tensor]:
    """R, U [cols, cols], upper triangular, of the damped Hessian in that order, over its mean
    diagonal: H = R R', H^-1 = U' U, U = R^-1: half the work of inverting first, and no squared
    condition number."""
    root = root_of(hessian, damping, order)
    identity = torch.eye(len(root), device=root.device).T  # in LAPACK's order: solved in its place
    return root, torch.linalg.solve_triangular(root, identity, upper=True, out=identity)


def root_of(hessian: Tensor, damping: float, order: Tensor) -> Tensor:
    """R alone, from one Cholesky factor of the reversed matrix. An input that was never seen has a
    zero row in H; damping makes it an ordinary one that nobody depends on. Memory: two matrices of
    its size."""
    scale = float(hessian.diagonal().mean())
    if not math.isfinite(scale):
        raise ModelError(
            "Inputs of the layers must be finite for quantizer=gptq, and some became NaN or "
            "infinite on the calibration text. Take quantizer=rtn, or other text."
        )
    back = order.flip(0)
    h = hessian[back[:, None], back].div_(scale or 1.0)
    diagonal = h.diagonal().clone()
    while True:
        h.diagonal().copy_(diagonal + damping)
        lower, failed = torch.linalg.cholesky_ex(h)
        if not int(failed):
            break
        damping *= 10
    del h
    return lower.flip(0, 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of some microseconds can't be shared out: two threads took 5 to 37 times as long as
    one on a machine with other work to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _spans(cols: int, size: int) -> list[tuple[int, int]]:
    """Runs of at most about BLOCK columns. None straddles the start of a group, so that a group's
    scale is fitted to weights that have seen every error before it."""
    if size <= BLOCK:
        step = size * (BLOCK // size)
        return [(i, min(i + step, cols)) for i in range(0, cols, step)]
    return [
        (i, min(i + BLOCK, first + size))
        for first in range(0, cols, size)
        for i in range(first, first + size, BLOCK)
    ]


def _portions(indices: Sequence[int], jobs: Sequence[Job]) -> Iterator[list[int]]:
    """Jobs in runs of at most STACKED weights; a job is never cut."""
    most = sized(jobs[0][0].device, STACKED, MANY_STACKED)
    part: list[int] = []
    total = 0
    for i in indices:
        size = jobs[i][0].numel()
        if part and total + size > most:
            yield part
            part, total = [], 0
        part.append(i)
        total += size
    yield part


def _taken_apart(q: Tensor, found: Sequence[Levels], jobs: Sequence[Job]) -> list[Codes]:
    """q [cols, all rows] and every group's levels -> each job's codes."""
    levels = _each(lambda *parts: torch.stack(parts, 1).unsqueeze(-1), found)
    codes, first = [], 0
    for weight, precision in jobs:
        own = slice(first, first + len(weight))
        first += len(weight)
        mine = _each(lambda part, own=own: part[own], [levels])
        codes.append(mine.codes(q[:, own].T.contiguous(), precision))
    return codes


def _each(change: Callable[..., Tensor], levels: Sequence[Levels]) -> Levels:
    """Apply a function to each field of several levels at once."""
    return Levels(*(change(*(getattr(x, f.name) for x in levels)) for f in fields(Levels)))


def _rows_of(keep: Tensor, codes: Encoded, nearest: Encoded) -> Blocks:
    """Row by row the one or the other. keep [rows, 1]."""
    assert isinstance(codes, Blocks)
    assert isinstance(nearest, Blocks)
    return Blocks(codes.precision, torch.where(keep, codes.data, nearest.data), codes.cols)
