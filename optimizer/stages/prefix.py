"""Blocks that a change of weights doesn't reach are not run again.

Two plans that differ from block k on send the same hidden states into block k. A prefix keeps, for
one plan, the inputs of some blocks ("doors"), window by window; a window of the other plan starts
at the last door before the first difference. Exact, since the same numbers go through the same
operations. Memory: DOORS hidden states [length, width] a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.metrics.divergence import AnyTeacher
from optimizer.models.blockwise import blocks_of
from optimizer.models.model import Model
from optimizer.models.offload import offloaded
from optimizer.plan import Precision

DOORS = 6


@dataclass(frozen=True)
class Prefix:
    """hidden: (door, window) -> the block's input [1, length, width] under `choice`."""

    choice: Mapping[str, Precision]
    hidden: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class Shortcut:
    """Mean KL of single windows, starting where a known prefix ends. Falls back to whole passes
    for models whose blocks are not a plain chain; that is tried out once."""

    def __init__(self, model: Model, teacher: AnyTeacher) -> None:
        self._model, self._teacher = model, teacher
        self._blocks: list[nn.Module] = []
        try:
            self._blocks = blocks_of(model)
        except ModelError:
            return
        step = max(1, -(-len(self._blocks) // DOORS))
        self.doors = range(step, len(self._blocks), step)
        if not self._works():
            self._blocks = []

    def first(self, a: Mapping[str, Precision], b: Mapping[str, Precision]) -> int:
        """The first block in which two choices differ; 0 also if they do before or after all
        blocks; the number of blocks if they are equal."""
        layers = self._model.layers
        differing = [layers[n].block for n in {**a, **b} if a.get(n) != b.get(n)]
        return min((0 if k is None else k for k in differing), default=len(self._blocks))

    def windows(
        self,
        some: Sequence[int],
        known: Prefix | None,
        own: Prefix,
        more: Callable[[int], float] = lambda _window: 0.0,
    ) -> list[float]:
        """Each window's mean KL for `own`, the plan that the model holds now, and `more` of it;
        fills own.hidden. Blocks that lie on disk are read once for all of them."""

        def loss(window: int) -> float:
            with self._from(start, window, own):
                found = self._teacher.window(self._model.net, window)
            return found + more(window)

        start = 0
        if known is not None and self._blocks:
            reached = self.first(known.choice, own.choice)
            doors = (d for d in self.doors if d <= reached)
            start = max((d for d in doors if all((d, w) in known.hidden for w in some)), default=0)
            shared = {(d, w) for d in self.doors if d <= start for w in some} & known.hidden.keys()
            own.hidden.update({key: known.hidden[key] for key in shared})
        jobs = [partial(loss, window) for window in some]
        disk = offloaded(self._model.net)
        with self._skipping(start), torch.inference_mode():  # torch's mode is not a greenlet's own
            return [job() for job in jobs] if disk is None else disk.in_turns(jobs)

    def window(self, window: int, known: Prefix | None, own: Prefix) -> float:
        """The same of one window."""
        return self.windows([window], known, own)[0]

    @contextmanager
    def _skipping(self, start: int) -> Iterator[None]:
        """Inside, blocks before `start` pass their input on."""
        skipped = self._blocks[:start]
        for block in skipped:
            block.forward = _pass_on
        try:
            yield
        finally:
            for block in skipped:
                del block.forward

    @contextmanager
    def _from(self, start: int, window: int, own: Prefix) -> Iterator[None]:
        """Inside, block `start` gets the hidden state in own.hidden, and what later doors receive is
        written there; not what windows that take turns with this one send."""
        here = getcurrent()

        def enter(door: int) -> Any:
            def hook(_block: nn.Module, args: tuple[Any, ...], *given: dict[str, Any]) -> Any:
                # a window that ended meanwhile gets no kwargs, either
                if getcurrent() is not here:
                    return None
                [kwargs] = given
                if door == start:
                    hidden = own.hidden[door, window]
                    if args:
                        return (hidden, *args[1:]), kwargs
                    return args, {**kwargs, "hidden_states": hidden}
                own.hidden[door, window] = args[0] if args else kwargs["hidden_states"]
                return None

            return hook

        handles = [
            self._blocks[door].register_forward_pre_hook(enter(door), with_kwargs=True)
            for door in (self.doors if self._blocks else ())
            if door >= start
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _works(self) -> bool:
        """Whether a window started at every door gives what a whole pass gives."""
        whole = Prefix({})
        try:
            expected = self.window(0, None, whole)
            for door in self.doors:
                part = Prefix({}, {(door, 0): whole.hidden[door, 0].clone()})
                same = abs(self._entered(door, part) - expected) <= 1e-6
                if not (same and self._leads(door, whole)):
                    return False
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
            return False  # a block that is called, or answers, in another way
        return True

    def _leads(self, door: int, whole: Prefix) -> bool:
        """Whether what is put in at the door decides what comes out: a KL of 0 at the reference
        would hide a door that leads nowhere."""
        part = Prefix({}, {(door, 0): torch.zeros_like(whole.hidden[door, 0])})
        return self._entered(door, part) > 1e-3

    def _entered(self, door: int, part: Prefix) -> float:
        """The first window's mean KL from this door on."""
        with self._skipping(door), self._from(door, 0, part):
            return self._teacher.window(self._model.net, 0)


def _pass_on(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]
