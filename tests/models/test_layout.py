"""Where a checkpoint's numbers lie in the model: strides found from positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optimizer.errors import ModelError
from optimizer.models.layout import _strided, gather, live_part, scatter, stored_part, whole
from optimizer.plan import Place


def place_of(stored: Tensor, live: Tensor) -> Place:
    """live: holds stored's own positions, moved about, and -1 elsewhere."""
    flat = live.reshape(-1).numpy()
    order = np.argsort(flat, kind="stable")
    order = order[flat[order] >= 0]
    return _strided("p", np.stack([flat[order], order]), 1)


def positions(*shape: int) -> Tensor:
    return torch.arange(int(np.prod(shape))).view(shape)


def interleaved(x: Tensor) -> Tensor:
    return torch.cat([x[0::2], x[1::2]])


def roped(x: Tensor) -> Tensor:
    rows, cols = x.shape
    return x.view(2, rows // 4, 2, cols).transpose(1, 2).reshape(rows, cols)


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x,
        lambda x: x.T.contiguous(),
        lambda x: torch.stack([x - x - 1, x, x - x - 1]),
        lambda x: torch.cat([x - x - 1, x]),
        lambda x: torch.cat([x - x - 1, x], 1),
        lambda x: x[:4],
        lambda x: x[:, 3:].contiguous(),
        interleaved,
        roped,
        lambda x: torch.stack([x - x - 1, x]).transpose(1, 2).contiguous(),
    ],
)
def test_what_is_moved_is_found(move: Callable[[Tensor], Tensor]) -> None:
    stored = positions(8, 6)
    live = move(stored)
    place = place_of(stored, live)
    own, there = stored_part(stored, place), live_part(live, place)
    assert torch.equal(own, there)
    assert own.numel() == int((live >= 0).sum())
    assert place.fits(stored.numel(), live.numel())
    assert not place.fits(stored.numel(), int(place.at_live))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.randoms())
def test_any_order_of_axes_is_found_and_undone(shape: list[int], random: Any) -> None:
    axes = list(range(len(shape)))
    random.shuffle(axes)
    stored = positions(*shape)
    live = stored.permute(axes).contiguous()
    place = place_of(stored, live)
    values = torch.randn(shape)
    written = torch.full(live.shape, torch.nan)
    scatter(values, [place], lambda _: written)
    assert torch.equal(written, values.permute(axes))
    assert torch.equal(gather(shape, [place], lambda _: written), values)


def test_numbers_without_order_are_refused() -> None:
    stored = positions(16)
    live = stored[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    with pytest.raises(ModelError, match="no regular order"):
        place_of(stored, live)


def test_what_lies_in_one_piece_is_a_view() -> None:
    value = torch.randn(4, 6)
    place = Place("p", (12,), (1,), (1,), 0, 6)
    assert gather((2, 6), [place], lambda _: value).data_ptr() == value[1].data_ptr()
    assert gather((4, 6), [whole("p", (4, 6))], lambda _: value).data_ptr() == value.data_ptr()
