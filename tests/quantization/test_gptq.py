"""GPTQ's numerics: on problems small enough to see what it should do."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from optimizer.errors import ModelError
from optimizer.plan import GGML, Precision
from optimizer.quantization.ggml import Blocks
from optimizer.quantization.ggml_native import NATIVE
from optimizer.quantization.gptq import Solver, factors
from optimizer.quantization.uniform import Nearest
from tests.conftest import slow_beside

torch.set_num_threads(1)

COLS = 96
INTS = [
    Precision("int", b, g, s) for b in (2, 3, 4, 8) for g in (16, 48, None) for s in (False, True)
]
SIGNS = [Precision("int", 1, g, True) for g in (16, None)]
TERNARY = [Precision("ternary", 2, g, True) for g in (16, None)]
ALL = INTS + SIGNS + TERNARY
ORDERS = ["none", "columns", "groups"]


def weight(seed: int = 0, rows: int = 24) -> Tensor:
    return torch.randn(rows, COLS, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated(seed: int, tokens: int = 400) -> Tensor:
    """sum x x' of inputs that depend on each other and differ in size, as a model's do."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLS, COLS, generator=rng) / math.sqrt(COLS)
    x = torch.randn(tokens, COLS, generator=rng) @ mix
    x *= (1.5 * torch.rand(COLS, generator=rng)).exp()
    return x.T @ x


def loss(rounded: Tensor, own: Tensor, hessian: Tensor) -> float:
    error = (rounded - own).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize(
    ("order", "seed"), slow_beside([(o, 0) for o in ORDERS], product(ORDERS, range(3)))
)
def test_correlated_inputs_lose_less_than_nearest(order: str, seed: int) -> None:
    w, hessian = weight(seed), correlated(seed)
    found = Solver(order=order, clip=True).solve([(w, p) for p in ALL], hessian)
    for precision, codes in zip(ALL, found, strict=True):
        nearest = loss(Nearest().round(w, precision), w, hessian)
        share = 0.8 if precision.bits > 1 and precision.kind == "int" else 1.0
        assert loss(codes.decode(), w, hessian) < share * nearest, precision.name


@pytest.mark.parametrize("order", ORDERS)
def test_independent_equal_inputs_round_to_nearest(order: str) -> None:
    w = weight()
    found = Solver(order=order).solve([(w, p) for p in ALL], 7.5 * torch.eye(COLS))
    for precision, codes in zip(ALL, found, strict=True):
        expected = Nearest().encode(w, precision)
        assert torch.equal(codes.codes, expected.codes), precision.name
        assert torch.equal(codes.scales, expected.scales)
        if expected.zeros is not None:
            assert torch.equal(codes.zeros, expected.zeros)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("precision", ALL, ids=lambda p: p.name)
def test_many_jobs_are_solved_as_each_alone(order: str, precision: Precision) -> None:
    hessian, method = correlated(1), Solver(order=order)
    own, other = weight(1), weight(2, rows=5)
    together = method.solve([(other, INTS[0]), (own, precision), (other, precision)], hessian)
    alone = method.solve([(own, precision)], hessian)[0]
    # products of other widths may differ in their last bit, and a code at a tie with them
    assert (together[1].codes != alone.codes).float().mean() < 0.01
    losses = [loss(x.decode(), own, hessian) for x in (together[1], alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("order", ORDERS)
def test_codes_are_what_packing_stores(order: str) -> None:
    w, hessian = weight(), correlated(3)
    for precision, codes in zip(
        ALL, Solver(order=order).solve([(w, p) for p in ALL], hessian), strict=True
    ):
        back = type(codes).unpack(codes.pack(), precision, COLS)
        assert torch.equal(back.decode(), codes.decode()), precision.name
        expected = precision.parts(*w.shape)
        assert {k: tuple(v.shape) for k, v in codes.pack().items()} == {
            k: shape for k, (_, shape) in expected.items()
        }


def test_an_input_that_was_never_seen_is_rounded_to_nearest_and_disturbs_nobody() -> None:
    w, hessian = weight(), correlated(4)
    hessian[7], hessian[:, 7] = 0, 0
    precision = Precision("int", 4, 16)
    codes = Solver(order="columns").solve([(w, precision)], hessian)[0]
    assert torch.equal(codes.decode()[:, 7], Nearest().round(w, precision)[:, 7])
    moved = w.clone()
    moved[:, 7] *= 0.5  # stays within its group's range, so scales don't change
    again = Solver(order="columns").solve([(moved, precision)], hessian)[0]
    others = [i for i in range(COLS) if i != 7]
    rows = [i for i in range(len(w)) if torch.equal(codes.scales[i], again.scales[i])]
    assert len(rows) > len(w) // 2
    assert torch.equal(codes.codes[rows][:, others], again.codes[rows][:, others])


@pytest.mark.parametrize(
    "hessian",
    [torch.zeros(COLS, COLS), torch.ones(COLS, COLS), 1e12 * torch.ones(COLS, COLS)],
    ids=["nothing seen", "rank one", "rank one, huge"],
)
def test_singular_hessians_end_in_finite_codes(hessian: Tensor) -> None:
    w = weight()
    for codes in Solver(damping=1e-7).solve([(w, p) for p in ALL], hessian):
        assert bool(torch.isfinite(codes.decode()).all())


@pytest.mark.parametrize("order", ORDERS)
def test_no_row_loses_more_than_rounded_to_nearest(order: str) -> None:
    w, hessian = weight(8), correlated(8)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLS)
    for precision, codes in zip(
        ALL, Solver(order=order).solve([(w, p) for p in ALL], hessian), strict=True
    ):
        mine, nearest = codes.decode() - w, Nearest().round(w, precision) - w
        worst = [((e @ damped) * e).sum(1) for e in (mine, nearest)]
        assert bool((worst[0] <= worst[1] * 1.001).all()), precision.name


def test_few_tokens_still_lose_less_than_nearest() -> None:
    w, hessian = weight(), correlated(5, tokens=12)  # rank 12 of 96
    precision = Precision("int", 3, 16)
    codes = Solver().solve([(w, precision)], hessian)[0]
    assert loss(codes.decode(), w, hessian) < 0.5 * loss(Nearest().round(w, precision), w, hessian)


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = correlated(6)
    order = torch.randperm(COLS, generator=torch.Generator().manual_seed(0))
    root, upper = (f.double() for f in factors(hessian, 0.01, order))
    mean = hessian.diagonal().mean()
    damped = (hessian / mean + 0.01 * torch.eye(COLS))[order][:, order].double()
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(root @ root.T, damped, atol=1e-3)
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(COLS).double(), atol=1e-3)


def test_damping_grows_until_the_factor_exists() -> None:
    hessian = torch.eye(COLS)
    hessian[0, 1] = hessian[1, 0] = 1.5  # no sum of squares: an eigenvalue is -0.5
    root, _ = factors(hessian, 0.001, torch.arange(COLS))
    assert torch.allclose(root @ root.T, hessian + 1.0 * torch.eye(COLS), atol=1e-3)


def test_inputs_that_are_not_finite_are_refused() -> None:
    hessian = correlated(7)
    hessian[3, 3] = float("nan")
    with pytest.raises(ModelError, match="finite"):
        Solver().solve([(weight(), Precision("int", 4, 16))], hessian)


def test_clipping_never_loses_more_on_the_range_it_is_given() -> None:
    w = weight()
    w[:, ::16] *= 12  # one outlier a group
    for precision in INTS:
        plain = (Nearest().round(w, precision) - w).square().sum()
        clipped = (Nearest(clip=True).round(w, precision) - w).square().sum()
        assert clipped <= plain * 1.00001
    low, w = Precision("int", 2, 48), weight()
    losses = [float((Nearest(clip=c).round(w, low) - w).square().sum()) for c in (True, False)]
    assert losses[0] < 0.8 * losses[1]


def wide(seed: int, cols: int = 512) -> tuple[Tensor, Tensor]:
    """A weight and a Hessian whose columns 256 divides, as K-quants need."""
    rng = torch.Generator().manual_seed(seed)
    w = torch.randn(16, cols, generator=rng) * 0.05
    x = torch.randn(900, cols, generator=rng) @ torch.randn(cols, cols, generator=rng)
    x *= (1.5 * torch.rand(cols, generator=rng)).exp()
    return w, x.T @ x / cols


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_ggml_lose_less_than_nearest_inside_their_own_grid(order: str) -> None:
    w, hessian = wide(9)
    kinds = [Precision.ggml(kind) for kind in GGML if kind not in NATIVE]
    mixed = [*kinds, Precision("int", 4, 32)]
    found = Solver(order=order).solve([(w, p) for p in mixed], hessian)
    for precision, blocks in zip(kinds, found, strict=False):
        assert isinstance(blocks, Blocks)
        assert blocks.precision == precision
        nearest = loss(Nearest().round(w, precision), w, hessian)
        assert loss(blocks.decode(), w, hessian) < 0.8 * nearest, precision.name
        assert torch.equal(blocks.open()[0].step, Nearest().encode(w, precision).open()[0].step)
    alone = Solver(order=order).solve([(w, kinds[-1])], hessian)[0]
    assert torch.equal(alone.decode(), found[len(kinds) - 1].decode())
