"""Small pieces of the rounding methods, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizer.errors import ConfigError
from optimizer.plan import FLOATS, GGML, Palette, Precision
from optimizer.quantization import (
    awq,
    floats,
    ggml,
    ggml_native,
    gptq,
    gptq_kernel,
    lattice,
    uniform,
)
from optimizer.quantization.keeping import Keeping
from optimizer.quantization.methods import (
    Awq,
    Gptq,
    Quantizer,
    Rtn,
    bind,
    method,
    methods,
    of_plan,
)
from optimizer.quantization.uniform import (
    Given,
    Independent,
    Levels,
    Nearest,
    clipped,
    levels_of,
)
from optimizer.store import Store
from tests.quantization.test_ggml import finite_blocks

torch.set_num_threads(1)
INT3, INT4 = Precision("int", 3, 16), Precision("int", 4, 32, True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def hessian(cols: int, seed: int = 1) -> Tensor:
    x = draw(4 * cols, cols, seed=seed) @ draw(cols, cols, seed=seed + 1)
    return x.T @ x


# ---------------------------------------------------------------- GPTQ


def test_columns_are_ordered_by_loudness_alone_or_within_ordered_groups() -> None:
    loud = torch.tensor([1.0, 9, 2, 3, 8, 8, 1, 1])
    plain, columns, groups = (gptq.Solver(order=x) for x in ("none", "columns", "groups"))
    assert plain._order(loud, 4).tolist() == list(range(8))
    assert columns._order(loud, 4).tolist() == [1, 4, 5, 3, 2, 0, 6, 7]
    assert groups._order(loud, 4).tolist() == [4, 5, 6, 7, 1, 3, 2, 0]
    assert groups._order(loud, 2).tolist() == [4, 5, 1, 0, 3, 2, 6, 7]  # 10, 5, 16, 2
    assert groups.order_of(loud).tolist() == [1, 4, 5, 3, 2, 0, 6, 7]


@pytest.mark.parametrize(
    ("cols", "size", "wanted"),
    [
        (300, 48, [(0, 96), (96, 192), (192, 288), (288, 300)]),
        (400, 200, [(0, 128), (128, 200), (200, 328), (328, 400)]),
        (256, 128, [(0, 128), (128, 256)]),
        (129, 129, [(0, 128), (128, 129)]),
        (96, 16, [(0, 96)]),
    ],
)
def test_spans_end_before_a_group_that_would_straddle_them(
    cols: int, size: int, wanted: list[tuple[int, int]]
) -> None:
    assert gptq._spans(cols, size) == wanted


def test_jobs_are_solved_in_portions_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "STACKED", 100)
    sizes = (60, 40, 1, 100, 101, 50, 50)
    jobs = [(torch.zeros(1, n), INT4) for n in sizes]
    found = list(gptq._portions(range(len(sizes)), jobs))
    assert found == [[0, 1], [2], [3], [4], [5, 6]]
    assert list(gptq._portions([5, 2, 0], jobs)) == [[5, 2], [0]]


def test_results_come_in_the_order_of_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families and portions are solved apart."""
    h, kinds = hessian(32), [INT3, Precision.ggml("q4_0"), INT4, Precision.floating("mxfp4"), INT3]
    jobs = [(draw(3 + i, 32, seed=i), p) for i, p in enumerate(kinds)]
    together = gptq.Solver().solve(jobs, h)
    monkeypatch.setattr(gptq, "STACKED", 1)
    apart = gptq.Solver().solve(jobs, h)
    for (weight, precision), a, b in zip(jobs, together, apart, strict=True):
        assert a.precision == b.precision == precision
        assert a.decode().shape == weight.shape
        assert torch.allclose(a.decode(), b.decode(), atol=1e-5)


FAMILIES = [
    INT3, Precision("int", 2, None), Precision("ternary", 2, 32, True), Precision("int", 1, 32, True),
    Precision.ggml("q4_0"), Precision.ggml("iq4_nl"), Precision.ggml("q4_k"), Precision.ggml("q3_k"),
    Precision.ggml("iq3_xxs"), Precision.ggml("tq2_0"), *map(Precision.floating, FLOATS),
]  # fmt: skip


@pytest.mark.parametrize("order", ["none", "columns", "groups"])
@pytest.mark.parametrize("precision", FAMILIES, ids=lambda p: p.name)
def test_a_rows_loss_is_that_of_what_it_became(precision: Precision, order: str) -> None:
    """The sum of e_j^2 on the way is tr(D H D') at the end, H the damped Hessian over its mean."""
    cols = 256
    w, h = draw(6, cols), hessian(cols)
    solver = gptq.Solver(order=order)
    group = precision.group_size if precision.kind in ("int", "ternary") else None
    places = solver._order(h.diagonal(), group)
    if precision.kind in ggml_native.NATIVE:
        places = torch.arange(cols)
    root, upper = gptq.factors(h, 0.05, places)
    ([codes], [loss]) = solver._stack([(w, precision)], upper, places)
    damped = h / h.diagonal().mean() + 0.05 * torch.eye(cols)
    error = codes.decode() - w
    assert torch.allclose(loss, ((error @ damped) * error).sum(1), rtol=5e-3)
    assert torch.allclose((error[:, places] @ root).square().sum(1), loss, rtol=5e-3)


def test_the_number_of_threads_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(ZeroDivisionError), gptq._one_thread():
        assert now == [1]
        raise ZeroDivisionError
    assert now == [1, 7]


# ---------------------------------------------------------------- integers


def test_a_group_is_clipped_to_the_range_that_loses_least() -> None:
    """By hand: every share from 1 to a half is tried, and the one with the least error taken."""
    w = torch.tensor([[[1.0, 1, 1, 1, 1, 1, 1, 4.0]]])
    precision = Precision("int", 2, 8, True)
    losses = {}
    for i in range(11):
        levels = levels_of(w, precision, 1 - i / 20)
        losses[i] = float((levels.values(levels.nearest(w)) - w).square().sum())
    best = min(losses, key=lambda i: (losses[i], i))
    found = clipped(w, precision, torch.ones_like(w))
    assert best > 0 and float(found.step) == float(levels_of(w, precision, 1 - best / 20).step)
    heavy = torch.ones_like(w)
    heavy[..., -1] = 1e6  # the outlier counts for all: the range stays
    assert float(clipped(w, precision, heavy).step) >= float(found.step)
    codes = Nearest(clip=True).encode(w[0], precision)
    assert float((codes.decode() - w[0]).square().sum()) == pytest.approx(losses[best])


def test_a_symmetric_group_by_hand() -> None:
    """Three bits, the largest 7: s = 2 * 7 / 7 = 2, codes -4 to 3, and 7 / 2 rounds to 4, cut to 3."""
    codes = Nearest().encode(torch.tensor([[7.0, -7, 2.9, -0.9]]), Precision("int", 3, None, True))
    assert codes.scales.tolist() == [[2.0]] and codes.zeros is None
    assert codes.codes.tolist() == [[7, 0, 5, 4]]
    assert codes.decode().tolist() == [[6.0, -8.0, 2.0, 0.0]]


def test_rows_longer_than_a_piece_are_decoded_and_packed_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = draw(5, 32)
    for precision in (INT3, INT4, Precision("ternary", 2, 32, True)):
        codes = Nearest().codes(w, precision)
        whole, parts = codes.decode(), codes.pack()
        monkeypatch.setattr(uniform, "PIECE", 1)
        assert torch.equal(codes.decode(), whole)
        assert all(torch.equal(part, parts[name]) for name, part in codes.pack().items())
        assert torch.equal(type(codes).unpack(parts, precision, 32).decode(), whole)
        monkeypatch.undo()


def test_what_has_no_uniform_levels_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="q4_k has no uniform levels"):
        levels_of(torch.ones(1, 1, 256), Precision.ggml("q4_k"))


def test_a_method_of_one_function_rounds_what_it_encodes() -> None:
    asked: list[tuple[str, str]] = []

    def quantize(weight: Tensor, precision: Precision, layer: str) -> Any:
        asked.append((precision.name, layer))
        return Nearest().encode(weight, precision)

    made, w = Independent(quantize), draw(4, 32)
    assert torch.equal(made.round(w.half(), Precision(), "a"), w.half().float()) and not asked
    assert torch.equal(made.round(w, INT3, "a"), Nearest().round(w, INT3))
    assert made.encode(w, INT4, "b").precision == INT4
    assert asked == [(INT3.name, "a"), (INT4.name, "b")]
    assert made.changed("norm", w) is w and made.rounder({}) is made


def test_codes_that_were_made_beforehand_are_taken_and_all_others_rounded() -> None:
    w, other = draw(4, 32), draw(4, 32, seed=5)
    kept = Nearest().encode(other, INT3)
    made = Given(lambda layer, _precision: kept if layer == "known" else None)
    assert torch.equal(made.round(w, INT3, "known"), kept.decode())
    assert made.encode(w, INT3, "known") is kept
    assert torch.equal(made.round(w, INT3, "new"), Nearest().round(w, INT3))
    assert torch.equal(made.encode(w, INT3, "new").decode(), Nearest().round(w, INT3))
    assert made.changed("norm", w) is w


# ---------------------------------------------------------------- blocks of llama.cpp


@pytest.mark.parametrize("kind", [k for k in GGML if k in ggml.LAYOUTS])
def test_a_matrix_on_a_grid_is_found_again(kind: str) -> None:
    """Decoded from random bytes, it can be had with no error, and the search comes near."""
    w = finite_blocks(kind).decode()
    if kind in ("q4_1", "q5_1"):  # they add a minimum of any sign, we take one below zero
        w = w - w.amax(1, keepdim=True).clamp(min=0) * 0.5
    error = (ggml.round_to(w, Precision.ggml(kind)) - w).square().sum() / w.square().sum()
    assert float(error) < LEFT[kind]


LEFT = {  # of the squares: nothing where a scale is a block's own, else what sharing scales costs
    "q4_0": 1e-9, "q4_1": 1.6e-4, "q5_0": 1e-9, "q5_1": 8e-5, "q8_0": 1.1e-5, "iq4_nl": 1e-9,
    "q2_k": .0215, "q3_k": 1.7e-4, "q4_k": 5.8e-4, "q5_k": 1.2e-4, "q6_k": 4.6e-5, "iq4_xs": 1.8e-4,
}  # fmt: skip


def test_the_straight_line_through_codes_by_hand() -> None:
    """w = 2 q - 3 without noise; then with importance, and with a minimum that mustn't be negative."""
    q = torch.tensor([[0.0, 1, 2, 3]])
    for v in (None, torch.tensor([[1.0, 5, 2, 1]])):
        s, m, gain = ggml._least_squares(2 * q - 3, v, q, True, True)
        assert (s.item(), m.item()) == pytest.approx((2, 3), rel=1e-5)
        whole = (1 if v is None else v) * (2 * q - 3) ** 2
        assert gain.item() == pytest.approx(whole.sum().item(), rel=1e-5)
    w = torch.tensor([[1.0, 1, 3, 3]])
    s, m, gain = ggml._least_squares(w, None, q, True, False)
    assert (s.item(), m.item()) == pytest.approx((0.8, -0.8), rel=1e-5)
    assert gain.item() == pytest.approx(20 - ((0.8 * q + 0.8 - w) ** 2).sum().item(), rel=1e-5)
    s, m, gain = ggml._least_squares(w, None, q, True, True)  # s alone: (1 + 6 + 9) / 14
    assert (s.item(), m.item()) == pytest.approx((16 / 14, 0), rel=1e-5)
    assert gain.item() == pytest.approx(16 * 16 / 14, rel=1e-5)
    s, m, gain = ggml._least_squares(w, None, q, False, False)
    assert (s.item(), m.item(), gain.item()) == pytest.approx((16 / 14, 0, 16 * 16 / 14), rel=1e-5)
    flat = torch.tensor([[2.0, 2, 2, 2]])  # codes that say nothing about a line
    s, m, gain = ggml._least_squares(flat, None, flat, True, True)
    assert (s.item(), m.item(), gain.item()) == pytest.approx((1, 0, 16))


def test_sub_scales_share_one_number_by_hand() -> None:
    d, a = ggml._share(torch.tensor([[1.0, 15.0, 7.4, 0.0]]), 15, False)
    assert d.item() == 1.0 and a.tolist() == [[1, 15, 7, 0]]
    d, a = ggml._share(torch.tensor([[-16.0, 8.0, 15.4, 3.0]]), 15, True)
    assert d.item() == 1.0 and a.tolist() == [[-16, 8, 15, 3]]  # the largest takes the longer end
    d, a = ggml._share(torch.tensor([[32.0, 31.0, -1.0, 0.0]]), 15, True)
    assert d.item() == -2.0 and a.tolist() == [[-16, -16, 0, 0]]
    d, a = ggml._share(torch.zeros(1, 3), 15, False)
    assert d.item() == 0 and a.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "iq4_nl", "q4_k", "q3_k", "iq4_xs"])
@pytest.mark.parametrize("guided", [False, True])
def test_no_other_scale_of_a_super_block_loses_less(kind: str, guided: bool) -> None:
    """With the same codes, d a little larger or smaller loses more, but for its 11 bits."""
    w = draw(8, 256, seed=3)
    v = torch.rand(256, generator=torch.Generator().manual_seed(1)) + 0.1 if guided else None
    grid = ggml.fit(w, kind, v)
    codes = grid.round(w)
    importance = 1 if v is None else v

    def loss(d: Tensor) -> Tensor:
        moved = ggml.Grid(kind, grid.shape, d, grid.dmin, grid.a, grid.b)
        error = (moved.values(codes) - w).square() * importance
        return error.reshape(len(grid.d), -1).sum(1)

    best = loss(grid.d)
    sure = 0.98 if kind == "q4_k" else 1.0  # d was solved with an older dmin
    for factor in (0.97, 1.03):
        assert (loss(grid.d * factor) > sure * best).float().mean() > 0.95


def test_a_grid_is_kept_as_small_numbers() -> None:
    grid = ggml.fit(draw(4, 512), "q6_k")
    parts = grid.parts()
    assert {k: v.dtype for k, v in parts.items()} == {
        "a": torch.int8, "b": torch.int8, "d": torch.float16, "dmin": torch.float16
    }  # fmt: skip
    again = ggml.Grid.of("q6_k", grid.shape, parts)
    for name in ("d", "dmin", "a", "b"):
        assert torch.equal(getattr(again, name), getattr(grid, name))


# ---------------------------------------------------------------- llama.cpp's own functions


@pytest.mark.parametrize("kind", ["iq3_s", "tq1_0"])
def test_portions_scale_and_dead_columns_leave_the_bytes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, v = draw(7, 256), torch.linspace(0.2, 3, 256)
    whole = ggml_native.encode(w, kind, v)
    assert torch.equal(ggml_native.encode(w, kind, 1000 * v), whole)
    monkeypatch.setattr(ggml_native, "PORTION", 2 * 256)  # two rows at a time, the last alone
    assert torch.equal(ggml_native.encode(w, kind, v), whole)
    assert torch.equal(ggml_native.encode(w, kind, torch.zeros(256)).sum(), ggml_native.encode(
        w, kind, torch.full((256,), 1e-8)).sum())  # fmt: skip


def test_types_that_need_importance_are_refused_without() -> None:
    w = draw(2, 256)
    for kind in ("iq1_s", "iq2_xxs", "iq3_s"):
        with pytest.raises(ConfigError, match=f"{kind} isn't rounded without"):
            ggml_native.encode_plainly(w, kind)
    for kind in ("tq1_0", "tq2_0", "q4_0", "q4_k"):
        found = ggml_native.encode_plainly(w, kind)
        assert found.shape == (2, 256 // GGML[kind].weights * GGML[kind].size)
        error = ggml_native.decode(found, kind, 256) - w
        lost = float(error.square().sum() / w.square().sum())
        assert lost < (0.9 if kind.startswith("tq") else 0.02)  # three levels, sixteen


def test_empty_runs_get_faint_numbers_beside_others_only() -> None:
    source = np.ones((2, 512), np.float32)
    source[0, 32:64] = 0
    source[1, :256] = 0  # a whole block: that is fine
    source[1, 300] = 0
    found = ggml_native._without_empty_runs(source)
    assert (found[0, 32:64] == np.float32(1e-12)).all() and (found[0, 64:] == 1).all()
    assert (found[1] == source[1]).all() and source[0, 32] == 0


def test_signs_are_even_where_seven_are_stored() -> None:
    """One minus: the column with the least v y^2 changes its sign, too."""
    found = lattice.encode(draw(3, 256), "iq3_xxs")
    unit = found.scale[:, 0]
    y = torch.tensor([1.0, -2, 3, 1, 1, 1, 1, 0.5]).expand(3, 8)
    _, signs, values = found.nearest(y * unit[:, None], 0, torch.ones(8))
    assert signs.tolist() == [0b10000010] * 3  # columns 1 and 7
    _, signs, _ = found.nearest(y * unit[:, None], 0, torch.tensor([1.0, 1, 1, 1, 0.1, 1, 1, 1]))
    assert signs.tolist() == [0b00010010] * 3
    assert (values[:, [1, 7]] <= 0).all() and (values[:, [0, 2, 3, 4, 5, 6]] >= 0).all()
    two = torch.tensor([-1.0, -2, 3, 1, 1, 1, 1, 0.5]).expand(3, 8)
    assert found.nearest(two * unit[:, None], 0, torch.ones(8))[1].tolist() == [0b11] * 3
    free = lattice.encode(draw(3, 256), "iq3_s")
    assert free.nearest(y * free.scale[:, :1], 0, torch.ones(8))[1].tolist() == [0b10] * 3


@pytest.mark.parametrize("kind", ["iq2_xxs", "iq3_xxs", "iq3_s"])
def test_the_nearest_vector_counts_columns_by_their_importance(kind: str) -> None:
    length = lattice.LAYOUTS[kind].length
    listed, target = lattice.grid(kind), draw(50, length, seed=2).abs() * 100
    v = torch.linspace(0.1, 4, length)
    wanted = ((target[:, None] - listed).square() * v).sum(2).argmin(1)
    found = lattice._nearest(target, listed, v)
    assert (found == wanted).float().mean() > 0.97  # ties
    plain = (target[:, None] - listed).square().sum(2).argmin(1)
    assert torch.equal(lattice._nearest(target, listed, torch.ones(length)), plain)


# ---------------------------------------------------------------- floats


def test_the_power_of_two_that_is_not_below() -> None:
    x = torch.tensor([1.0, 1.5, 2.0, 0.75, 0.0, 2.0**-140, 2.0**127, 2.0**100 * 1.5])
    assert floats._power(x).tolist() == [1, 2, 2, 1, 1, 2.0**-126, 2.0**127, 2.0**101]
    assert floats._power(torch.tensor([1.5 * 2.0**127])).tolist() == [2.0**127]  # none is larger


def test_one_scale_of_fp8_serves_a_row_or_a_square() -> None:
    w = torch.zeros(130, 256)
    w[0, 0], w[129, 255], w[5, 130] = 448.0, 224.0, -896.0
    square = floats.fit(w, Precision.floating("fp8_block"))
    assert square.stored.tolist() == [[1.0, 2.0], [0.0, 0.5]]
    assert square.step().shape == (130, 2) and square.step()[128].tolist() == [0.0, 0.5]
    assert square.step(slice(127, 129)).tolist() == [[1.0, 2.0], [0.0, 0.5]]
    rows = floats.fit(w, Precision.floating("fp8"))
    assert rows.stored.shape == (130, 1)
    assert rows.stored[[0, 1, 5, 129]].flatten().tolist() == [1.0, 0.0, 2.0, 0.5]


def test_rows_of_another_rounding_can_be_put_in() -> None:
    for kind in FLOATS:
        precision = Precision.floating(kind)
        w = draw(256, 256)
        grid = floats.fit(w, precision)
        one, other = floats.encode(w, grid), floats.encode(w * 0.5, grid)
        mine, theirs = one.decode(), other.decode()
        where = torch.arange(10) % 3 == 0
        one.put(slice(100, 110), where, other)
        found = one.decode()
        rows = 100 + torch.arange(10)
        assert torch.equal(found[rows[where]], theirs[rows[where]])
        assert torch.equal(found[rows[~where]], mine[rows[~where]])
        assert torch.equal(found[:100], mine[:100]) and torch.equal(found[110:], mine[110:])


# ---------------------------------------------------------------- AWQ


def test_loudness_and_its_powers_by_hand() -> None:
    r = awq.loudness(torch.diag(torch.tensor([4.0, 0.0, 9.0, -1.0])))
    assert r.tolist() == pytest.approx([2.0, 3e-6, 3.0, 3e-6], rel=1e-5)
    assert awq.powered(torch.tensor([1.0, 4.0, 16.0]), 0.5).tolist() == pytest.approx([0.5, 1, 2])
    assert awq.powered(torch.tensor([1.0, 4.0, 16.0]), 0.0).tolist() == [1, 1, 1]
    far = awq.powered(torch.tensor([1e-6, 1.0, 1e6]), 1.0)
    assert far.tolist() == pytest.approx([1 / 16, 1, 16])


def test_of_all_powers_the_one_of_least_loss_is_taken() -> None:
    x = draw(300, 32) * torch.linspace(0.1, 9, 32) ** 2
    h, w = x.T @ x, draw(24, 32, seed=3)
    jobs = [(w, INT3), (w * 0.3, INT4)]
    r = awq.loudness(h)

    def loss(s: Tensor) -> float:
        errors = [(w, Nearest().round(w * s, p) / s - w) for w, p in jobs]
        return sum(float(((e @ h) * e).sum()) for _, e in errors)

    losses = [loss(awq.powered(r, i / 20)) for i in range(21)]
    found = awq.search(jobs, h, r)
    best = int(np.argmin(losses))
    assert 0 < best < 20 and torch.equal(found, awq.powered(r, best / 20))
    assert loss(found) == pytest.approx(min(losses))


@pytest.mark.parametrize("kind", ["int", "nvfp4"])
def test_scaled_codes_come_back_and_are_divided(kind: str) -> None:
    precision = INT4 if kind == "int" else Precision.floating(kind)
    w, s = draw(8, 32), torch.linspace(0.5, 2, 32)
    scaled = awq.scale(w, precision, s)
    assert torch.equal(scaled.outputs, torch.ones(8)) and torch.equal(scaled.inputs, s)
    assert torch.equal(scaled.decode(), Nearest().round(w * s, precision) / s)
    t = torch.linspace(0.5, 4, 8)
    moved = scaled.divided(t, w)
    assert torch.equal(moved.outputs, t) and torch.equal(moved.inputs, s)
    wanted = Nearest().round(w / t[:, None] * s, precision) / s * t[:, None]
    assert torch.allclose(moved.decode(), wanted, rtol=2e-3)
    again = awq.Scaled.unpack(moved.pack(), precision, 32)
    assert torch.equal(again.decode(), moved.decode()) and torch.equal(again.outputs, t)


# ---------------------------------------------------------------- methods


def test_what_a_plan_says_of_its_method_makes_the_method_again() -> None:
    for made in (Rtn(), Rtn(clip=True), Gptq(damping=0.1, weighting="fisher"), Gptq(), Awq()):
        assert of_plan(made.described("tokens")) == made
    assert Rtn().described("t") == {"name": "rtn"}
    assert Rtn(clip=True).described("t") == {"name": "rtn", "clip": True}
    assert Awq().described("t") == {"name": "awq", "tokens": "t"}
    plain = Gptq().described("t")
    assert "weighting" not in plain and plain["tokens"] == "t" and plain["head"] is True
    old = of_plan({"name": "gptq", "damping": 0.01, "unknown": 1, "tokens": "t"})
    assert old == Gptq(damping=0.01, weighting="alike", head=False)
    assert old.reads_head is False and Gptq().reads_head and not Rtn().reads_head


def test_a_key_holds_tokens_only_of_what_is_calibrated(tmp_path: Path) -> None:
    class Material:
        calibration_key, store = "these", Store(tmp_path)

    assert bind(Rtn(), Material()).key == ["Rtn", 1, {"name": "rtn"}]
    assert bind(Gptq(), Material()).key[2]["tokens"] == "these"
    with pytest.raises(ConfigError, match="damping"):
        bind(Gptq(damping=2.0), Material())


@pytest.mark.parametrize("damping", [0.0, 1.0, -0.1])
def test_damping_is_a_share_between_zero_and_one(damping: float) -> None:
    with pytest.raises(ConfigError, match=rf"not {damping}"):
        Gptq(damping=damping).check()
    Gptq(damping=0.999).check()
    Gptq(damping=1e-9).check()


def test_a_method_that_nobody_knows_is_told_with_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"one of auto, rtn, gptq, awq, importance, not 'gtpq'"):
        method("gtpq")
    assert method("awq") is Awq and methods()["rtn"] is Rtn
    monkeypatch.setattr(
        "optimizer.quantization.methods.extensions", lambda *_: pytest.fail("asked")
    )
    assert method("gptq") is Gptq  # who can't be imported stands in nobody's way
    with pytest.raises(ConfigError, match=r"blocks \(q4_k\) are rounded by rtn or gptq"):
        Awq().check_palette([INT4, Precision.ggml("q4_k"), Precision.ggml("q6_k")])
    Awq().check_palette(Palette(bits=[4, 16], group_size=32).precisions())

    class Empty(Quantizer):
        pass

    with pytest.raises(NotImplementedError, match="Empty has neither quantize nor build"):
        Empty().build(None).encode(draw(2, 4), INT4)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what the store keeps


@pytest.mark.parametrize("kind", [*FLOATS, "iq3_s", "tq2_0"])
def test_searched_scales_are_kept_by_what_the_weights_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    w = draw(6, 256)
    precision = Precision.floating(kind) if kind in FLOATS else Precision.ggml(kind)
    plain, searched = Nearest().round(w, precision), list[int]()
    for module, name in ((floats, "fit"), (ggml, "encode")):
        own = getattr(module, name)

        def count(*given: Any, own: Any = own) -> Any:
            searched.append(1)
            return own(*given)

        monkeypatch.setattr(module, name, count)

    def kept() -> int:
        return len(list(Store(tmp_path).root.glob("grids/*.safetensors")))

    first = Keeping(store=Store(tmp_path))
    assert torch.equal(first.round(w, precision, "layer"), plain) and kept() == 1
    searched.clear()
    again = Keeping(store=Store(tmp_path))
    assert torch.equal(again.round(w.half().float() * 0 + w, precision, "another"), plain)
    assert torch.equal(again.encode(w, precision, "another").decode(), plain)
    assert not searched and kept() == 1
    again.round(w.flip(0), precision, "layer")
    assert searched and kept() == 2
    searched.clear()
    assert torch.equal(again.round(w, precision), plain)  # no name: nothing of a model
    assert searched and kept() == 2
    assert torch.equal(Keeping().round(w, precision, "layer"), plain)
    same = w.reshape(3, 512)  # the same numbers as another matrix
    assert torch.equal(again.round(same, precision, "layer"), Nearest().round(same, precision))
    assert math.isfinite(float(plain.sum()))


@pytest.mark.parametrize(("order", "group"), [("groups", 32), ("columns", 32), ("none", None)])
def test_runs_of_columns_may_be_solved_by_themselves(
    order: str, group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one GPU kernel does; here by equations (1) and (2) alone."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(500, 192, generator=rng) @ torch.randn(192, 192, generator=rng)
    weight = torch.randn(40, 192, generator=rng)
    jobs = [(weight, Precision("int", 4, group)), (2 * weight, Precision("int", 3, group, True))]
    solver = gptq.Solver(order=order)
    by_column = [codes.decode() for codes in solver.solve(jobs, x.T @ x)]
    lengths = set()

    def run(
        w: torch.Tensor,
        upper: torch.Tensor,
        levels: Levels,
        q: torch.Tensor,
        errors: torch.Tensor,
    ) -> None:
        lengths.add(len(w))
        assert len(w) <= gptq.BLOCK and w.stride(1) == q.stride(1) == errors.stride(1) == 1
        w = w.clone()
        for j in range(len(w)):
            q[j] = levels.nearest(w[j])
            errors[j] = (w[j] - levels.values(q[j])) / upper[j, j]
            w -= torch.outer(upper[j], errors[j])

    monkeypatch.setattr(gptq_kernel, "serves", lambda _levels, _w: True)
    monkeypatch.setattr(gptq_kernel, "run", run)
    by_run = [codes.decode() for codes in solver.solve(jobs, x.T @ x)]
    assert max(lengths) == {"groups": 32, "columns": max(lengths), "none": gptq.BLOCK}[order]
    for one, other in zip(by_column, by_run, strict=True):
        assert float((one == other).float().mean()) > 0.99
