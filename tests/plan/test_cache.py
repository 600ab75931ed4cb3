"""Which tokens of a cache stay at 16 bits."""

from __future__ import annotations

import pytest

from optimizer.plan.cache import CacheKind


@pytest.mark.parametrize(
    ("bits", "tokens", "whole"),
    [(8, 100, 68), (8, 68, 68), (8, 67, 67), (4, 0, 0), (16, 100, 100)],
)
def test_the_first_and_the_last_tokens_are_whole(bits: int, tokens: int, whole: int) -> None:
    assert CacheKind(bits, first=4, last=64).exact(tokens) == whole
    assert CacheKind(bits).exact(tokens) == (tokens if bits == 16 else 0)
