"""Products with a parameter: each is seen, or the use is called odd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from optimizer.models.watching import Products

Use = Callable[[Tensor, Tensor], Tensor]


def met(weight: Tensor, use: Use) -> tuple[Products, list[tuple[int, Tensor, Tensor]]]:
    """What is handed out when `use` multiplies random inputs, and the output's sum goes backward."""
    found: list[tuple[int, Tensor, Tensor]] = []
    watch = Products({"w": weight}, lambda _, first, x, d: found.append((first, x, d)))
    x = torch.randn(5, 4, requires_grad=True)
    with watch:
        output = use(x, weight)
    output.sum().backward()
    return watch, found


@pytest.mark.parametrize(
    ("use", "first"),
    [
        (lambda x, w: linear(x, w[2]), 2 * 3 * 4),
        (lambda x, w: linear(x, w[torch.tensor(1)]), 3 * 4),
        (lambda x, w: linear(weight=w[0], input=x), 0),
        (lambda x, w: linear(x, w[1][:2]), 3 * 4),
    ],
)
def test_one_experts_product_is_seen_with_where_its_weight_starts(use: Use, first: int) -> None:
    watch, [(start, x, d)] = met(torch.randn(3, 3, 4), use)
    assert watch.odd is None and start == first
    assert x.shape == (5, 4) and bool((d == 1).all())


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x @ w[0].T,
        lambda x, w: x @ w[0].t(),
        lambda x, w: x @ w.mT[0],
        lambda x, w: linear(x, w[[0, 1]][0]),
        lambda x, w: linear(x, w.detach()[0]),
        lambda x, w: torch.einsum("tc,erc->ter", x, w),
        lambda x, w: linear(x, w[0] * 2),
    ],
)
def test_any_other_use_is_called_odd(use: Use) -> None:
    watch, found = met(torch.randn(3, 3, 4), use)
    assert watch.odd is not None and not found


def test_what_only_looks_at_a_weight_is_no_use() -> None:
    watch, found = met(torch.randn(3, 3, 4), lambda x, w: linear(x, w[0]) * w.shape[0] * w.size(1))
    assert watch.odd is None and len(found) == 1
