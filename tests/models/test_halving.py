"""A device that runs out of memory: a stand-in on the CPU, one of whose blocks takes few windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.data.text import Windows
from optimizer.errors import ModelError
from optimizer.metrics.divergence import Teacher
from optimizer.models import halving
from optimizer.models.blockwise import Stream, blocks_of
from optimizer.models.halving import fitting, halved, in_parts
from optimizer.models.model import Model
from optimizer.sensitivity import Desk, by_block
from tests.conftest import Small
from tests.sensitivity.test_by_block import task_of, text


@contextmanager
def room_for(model: Model, most: int, block: int = 1, back: bool = False) -> Iterator[list[str]]:
    """The block raises what CUDA raises, for more than so many windows. back: only with gradients."""
    told: list[str] = []

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if len(hidden) > most and (torch.is_grad_enabled() or not back):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    halving.tells(model.net, told.append)
    handle = blocks_of(model)[block].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield told
    finally:
        handle.remove()
        halving._ROOMS.pop(model.net)


def windows(count: int) -> Windows:
    ids = np.random.default_rng(2).integers(5, 90, (count, 24))
    return Windows(ids, np.arange(count))


def test_scores_go_on_with_half_the_windows(llama: Small) -> None:
    model = llama.model
    wanted = Teacher(model.net, windows(7), model.own_head).score(model.net)
    with room_for(model, 2) as told:
        found = Teacher(model.net, windows(7), model.own_head).score(model.net)
        assert fitting(model.net, 7) == 1  # 7, 3, 1
        assert [len(x.ids) for x in Stream(model, windows(3).ids).batches] == [1, 1, 1]
    np.testing.assert_allclose(found.mean_kl, wanted.mean_kl, atol=1e-6)
    assert [line.split(" with ")[1] for line in told] == [
        "7 windows at a time; the work goes on",
        "3 windows at a time; the work goes on",
    ]


def test_a_table_goes_on_with_half_the_windows_from_its_last_block(llama: Small) -> None:
    """The first block is too large on the way back, when the last one is done."""
    model, read = llama.model, text(weighted=False)
    task, states, done = task_of(model), list[dict[str, np.ndarray]](), list[int]()

    class Keeping(Desk):
        def leave(self, state: dict[str, np.ndarray]) -> None:
            states.append({name: value.copy() for name, value in state.items()})
            done.append(int(state["block"][0]))

        def left(self) -> dict[str, np.ndarray] | None:
            return states[-1] if states else None

    wanted = by_block.samples(model, task, read, Desk())
    with room_for(model, 3, block=0, back=True) as told:
        found = by_block.samples(model, task, read, Keeping())
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-9 * wanted.max())
    assert done == [1, 0]
    assert told == [
        "The device ran out of memory with 7 windows at a time; the work goes on with 3."
    ]


def test_a_single_window_that_is_too_large_is_refused(llama: Small) -> None:
    with room_for(llama.model, 0), pytest.raises(ModelError, match="for a single window"):
        by_block.samples(llama.model, task_of(llama.model), text(weighted=False), Desk())
    with room_for(llama.model, 0), pytest.raises(ModelError, match="shorter ones"):
        Teacher(llama.model.net, windows(2), llama.model.own_head)


def test_parts_cover_all_windows_once() -> None:
    net = torch.nn.Identity()
    seen = list[slice]()

    def run(part: slice) -> int:
        if part.stop - part.start > 2:
            raise torch.OutOfMemoryError("no")
        seen.append(part)
        return part.stop - part.start

    assert in_parts(net, 5, run) == [2, 2, 1]
    assert [(s.start, s.stop) for s in seen] == [(0, 2), (2, 4), (4, 5)]
    assert in_parts(net, 5, run) == [2, 2, 1] and fitting(net, 9) == 2
    assert halved(net, 9) == 4 and fitting(net, 3) == 3
