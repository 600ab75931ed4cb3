"""Planes of further bits: prefix codes beside rounding to nearest, GPTQ's own beside GPTQ."""

from __future__ import annotations

import pytest
import torch

from optimizer.plan import Precision
from optimizer.quantization.gptq import Solver
from optimizer.quantization.residual import NEAR, PlaneCodes, nearest, solved
from optimizer.quantization.uniform import Nearest

torch.manual_seed(0)
WEIGHT = torch.randn(24, 128)
BASE = Precision("int", 4, 32)


def plane(bits: int) -> Precision:
    return Precision("int", bits, None, True)


@pytest.mark.parametrize("bits", range(1, 7))
def test_a_bit_more_leaves_about_a_quarter_of_the_squared_error(bits: int) -> None:
    base = Nearest().codes(WEIGHT, BASE)
    rest = WEIGHT - base.decode()
    left = rest - nearest(rest, base.scales, plane(bits), NEAR).decode(base.scales)
    ratio = float(left.square().sum() / rest.square().sum())
    assert ratio == pytest.approx(4.0**-bits, rel=0.1), "a bit is spent twice"


def test_packed_planes_come_back() -> None:
    base = Nearest().codes(WEIGHT, BASE)
    made = nearest(WEIGHT - base.decode(), base.scales, plane(3), NEAR)
    parts = made.pack()
    stored = {k: v.numel() * v.element_size() for k, v in parts.items()}
    assert sum(stored.values()) == plane(3).bytes(*WEIGHT.shape)
    again = PlaneCodes.unpack(parts, plane(3), WEIGHT.shape[1])
    assert torch.equal(again.decode(base.scales), made.decode(base.scales))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gptq_refines_its_own_base_better_than_rounding_to_nearest(bits: int) -> None:
    mixed = torch.randn(128, 128) * torch.logspace(0, -2, 128)
    hessian = mixed.T @ mixed @ torch.eye(128) + 1e-3 * torch.eye(128)
    method = Solver(order="columns")
    base = method.solve([(WEIGHT, BASE)], hessian)[0]
    rest = WEIGHT - base.decode()

    def loss(error: torch.Tensor) -> float:
        return float(((error @ hessian) * error).sum())

    by_gptq = loss(
        rest - solved(rest, base.scales, plane(bits), hessian, method).decode(base.scales)
    )
    rounded = loss(rest - nearest(rest, base.scales, plane(bits), NEAR).decode(base.scales))
    assert by_gptq < 0.8 * rounded and by_gptq < loss(rest)
