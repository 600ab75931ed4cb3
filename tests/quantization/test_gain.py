"""What GPTQ gains, foretold from the Hessian, against what it does."""

from __future__ import annotations

import pytest
import torch

from optimizer.plan import Precision
from optimizer.quantization.gain import gain
from optimizer.quantization.gptq import Solver
from optimizer.quantization.uniform import Nearest

COLS, ROWS, TOKENS = 96, 64, 4000
METHOD = Solver(damping=0.01, order="columns")


def hessian(shared: float) -> torch.Tensor:
    """Of inputs that have a share of their variance in common with eight directions."""
    torch.manual_seed(5)
    mixed = torch.randn(TOKENS, 8) @ torch.randn(8, COLS) / 8**0.5
    x = shared**0.5 * mixed + (1 - shared) ** 0.5 * torch.randn(TOKENS, COLS)
    return x.T @ x


def foretold(h: torch.Tensor) -> float:
    return gain(h, METHOD.damping, METHOD.order_of(h.diagonal()))


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("bits", [3, 5])
def test_the_gain_is_what_gptq_leaves_of_the_loss(shared: float, bits: int) -> None:
    h, weight = hessian(shared), torch.randn(ROWS, COLS)
    precision = Precision("int", bits, 32)

    def loss(codes: object) -> float:
        error = codes.decode() - weight  # type: ignore[attr-defined]
        return float(((error @ h) * error).sum())

    left = loss(METHOD.solve([(weight, precision)], h)[0]) / loss(
        Nearest().encode(weight, precision)
    )
    assert foretold(h) == pytest.approx(left, rel=0.2)


def test_inputs_that_know_nothing_of_each_other_gain_nothing() -> None:
    assert foretold(torch.eye(COLS)) == pytest.approx(1.0)
    gains = [foretold(hessian(shared)) for shared in (0.0, 0.5, 0.8, 0.95)]
    assert gains == sorted(gains, reverse=True) and 0 < gains[-1] < 0.2


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_two_inputs_by_hand(order: list[int], damping: float) -> None:
    """The first input to be rounded pays what the second can't tell of it, the second pays all."""
    h = torch.tensor([[4.0, 1.5], [1.5, 1.0]])
    first, last = (float(h[i, i]) / 2.5 + damping for i in order)
    left = first - (1.5 / 2.5) ** 2 / last
    found = gain(h, damping, torch.tensor(order))
    assert found == pytest.approx((left + last) / (first + last), rel=1e-5)


def test_inputs_that_were_never_seen_gain_nothing() -> None:
    assert gain(torch.zeros(4, 4), 0.05, torch.arange(4)) == pytest.approx(1.0)
