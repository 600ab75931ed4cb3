from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from optimizer.errors import BudgetError
from optimizer.plan import Budget, Inventory, Layer, Precision, stored_bytes
from optimizer.search import Problem, exact, pose
from optimizer.search.exact import _shrunk, first_last_high, front, random_plan, solve
from tests.conftest import choices_of
from tests.search.test_contract import SHAPES, brute, problem

# ---------------------------------------------------------------- the optimum


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(15))
def test_the_exact_solution_is_the_best_of_all(seed: int, shape: str) -> None:
    posed = problem(seed, 6, 4, shape=shape)
    least, _ = brute(posed)
    assert posed.losses(solve(posed)) == pytest.approx(least, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_the_scale_of_the_losses_does_not_count(scale: float) -> None:
    posed = problem(3, 6, 4)
    scaled = replace(posed, loss=posed.loss * scale)
    assert scaled.losses(solve(scaled)) == pytest.approx(brute(posed)[0] * scale, rel=1e-6)


def test_a_table_of_zeros_is_no_trouble() -> None:
    posed = problem(1, tightness=0.5)
    assert posed.fits(solve(replace(posed, loss=np.zeros_like(posed.loss))))


def test_an_infeasible_problem_is_a_clear_error() -> None:
    posed = problem(1)
    impossible = replace(posed, limit=float(posed.size.min(1).sum()) - 1)
    with pytest.raises(BudgetError, match="no plan that fits"):
        solve(impossible)


@pytest.mark.parametrize("seed", range(20))
def test_shrinking_fits_and_steps_down_only(seed: int) -> None:
    posed = problem(seed, 8, 4)
    largest = posed.size.argmax(1)
    found = _shrunk(posed, largest)
    assert posed.fits(found)
    assert (posed.size[np.arange(8), found] <= posed.size[np.arange(8), largest]).all()


def test_what_the_solver_prints_from_c_is_not_in_our_output(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS prints on rare problems only, so here the C library prints before each solution."""
    own = exact.milp

    def talks(*given: Any, **named: Any) -> Any:
        ctypes.CDLL(None).puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution")
        return own(*given, **named)

    monkeypatch.setattr(exact, "milp", talks)
    print("before", flush=True)
    solve(problem(1))
    print("after", flush=True)
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


# ---------------------------------------------------------------- the whole front


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(15))
def test_every_point_of_the_front_is_the_optimum_of_its_size(seed: int, shape: str) -> None:
    posed = problem(seed, 5, 4, shape=shape)
    sizes, losses, assignments = front(posed)
    for size, loss, assignment in zip(sizes, losses, assignments, strict=True):
        assert posed.sizes(assignment) == size
        assert posed.losses(assignment) == pytest.approx(loss)
        least, _ = brute(replace(posed, limit=float(size)))
        assert loss == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_the_front_goes_from_the_smallest_plan_to_the_best(seed: int) -> None:
    posed = problem(seed, 30, 6)
    sizes, losses, _ = front(posed)
    assert sizes[0] == posed.size.min(1).sum()
    assert losses[-1] == pytest.approx(posed.loss.min(1).sum())
    assert (np.diff(sizes) > 0).all() and (np.diff(losses) < 0).all()
    slopes = np.diff(losses) / np.diff(sizes)
    assert (np.diff(slopes) >= -1e-9).all(), "the front is convex"


@pytest.mark.parametrize("seed", range(10))
def test_no_exact_solution_lies_below_the_front(seed: int) -> None:
    posed = problem(seed, 6, 4)
    sizes, losses, _ = front(posed)
    least, best = brute(posed)
    assert least >= np.interp(posed.sizes(best), sizes, losses) - 1e-9


# ---------------------------------------------------------------- baselines


@pytest.mark.parametrize("seed", range(30))
def test_random_plans_fit_and_use_their_budget(seed: int) -> None:
    posed = problem(seed, 12, 5)
    found = random_plan(posed, np.random.default_rng(seed))
    assert posed.fits(found)
    order = posed.order
    for group in range(12):
        rank = int(np.flatnonzero(order == found[group])[0])
        if rank + 1 < len(order):
            larger = found.copy()
            larger[group] = order[rank + 1]
            assert not posed.fits(larger), "room was left"


def test_random_plans_differ_and_repeat() -> None:
    posed = problem(1, 12, 5, tightness=0.5)
    plans = [random_plan(posed, np.random.default_rng(s)).tolist() for s in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("tightness", [0.05, 0.5, 0.9, 1.0])
def test_first_and_last_are_high_and_the_rest_as_high_as_fits(tightness: float) -> None:
    posed = problem(4, 6, 4, tightness=tightness)
    posed = replace(posed, blocks=(0, 0, 1, 2, 3, 3), columns=("int2", "int3", "int4", "none"))
    found = first_last_high(posed)
    high = int(posed.order[-2])
    fits = {}
    for column in posed.order[:-1]:
        plan = np.array([high, high, column, column, high, high])
        fits[int(column)] = posed.fits(plan)
    if not any(fits.values()):
        assert found is None
        return
    best = max((c for c, ok in fits.items() if ok), key=lambda c: posed.size[:, c].sum())
    assert found is not None and posed.fits(found)
    assert found.tolist() == [high, high, best, best, high, high]


# ---------------------------------------------------------------- posing a problem

PALETTE = [Precision("int", 2, 32), Precision("int", 4, 32), Precision()]


def inventory() -> Inventory:
    def one(i: int, cols: int) -> Layer:
        name = f"m.{i}.p.weight"
        return Layer(name, 8, cols, "linear", "p", i, name, (8, cols))

    embedding = Layer("e.weight", 50, 32, "embedding", "e", None, "e.weight", (50, 32))
    return Inventory((embedding, one(0, 32), one(1, 64), one(2, 96)), (), "F16")


def posed(budget: Budget) -> Problem:
    found = inventory()
    scope = found.scoped(["blocks"])
    groups = (tuple(x.name for x in scope[:2]), (scope[2].name,))
    return pose(found, choices_of(scope, PALETTE, groups), np.zeros((2, 3)), budget)


def test_sizes_of_a_group_are_its_layers_bytes() -> None:
    found = posed(Budget(bits=8))
    expected = [p.bytes(8, 32) + p.bytes(8, 64) for p in PALETTE]
    assert found.size[0].tolist() == expected
    assert found.weights.tolist() == [8 * 96, 8 * 96]
    assert found.limit == 8 * 2 * 8 * 96 / 8
    assert found.blocks == (0, 2)


def test_code_bits_leave_scales_out() -> None:
    found = posed(Budget(code_bits=3))
    assert found.unit == "code bits"
    assert found.size[0].tolist() == [2 * 768, 4 * 768, 16 * 768]
    assert found.limit == 3 * 2 * 768


def test_a_size_is_of_the_whole_file() -> None:
    """Tensors out of scope and the header are taken off; what is left holds the plan."""
    total = stored_bytes(inventory(), {x.name: PALETTE[1] for x in inventory().layers[1:]})[
        "total"
    ]
    found = posed(Budget(size=str(total + 100)))
    assert found.fits(found.uniform(1))
    assert not posed(Budget(size=str(total - 1))).fits(found.uniform(1))


def test_a_size_is_the_files_less_what_no_choice_changes() -> None:
    """By hand: what is outside at 16 bits, the largest header of the three uniform plans, four bytes a
    layer for longer offsets, and what an engine's file has beyond."""
    own, scope = inventory(), inventory().scoped(["blocks"])
    headers = [
        stored_bytes(own, dict.fromkeys((x.name for x in scope), p))["container"] for p in PALETTE
    ]
    assert len(set(headers)) > 1
    outside = 50 * 32 * 2
    found = posed(Budget(size="9000"))
    assert found.limit == 9000 - max(headers) - 4 * 3 - outside
    more = pose(own, choices_of(scope, PALETTE), np.zeros((3, 3)), Budget(size="9000"), 123)
    assert more.limit == found.limit - 123


@pytest.mark.parametrize(
    "budget", [Budget(bits=2.2), Budget(code_bits=1.9), Budget(size="3500"), Budget(size="10")]
)
def test_too_small_a_budget_names_one_that_works(budget: Budget) -> None:
    with pytest.raises(BudgetError, match="smallest plan") as error:
        posed(budget)
    text = str(error.value)
    assert "int2_g32" in text
    found = re.search(r"Set budget\.(\w+)=([\d.]+) or more", text)
    assert found is not None
    key, value = found.groups()
    works = Budget(**{key: value if key == "size" else float(value)})
    assert posed(works).size.min(1).sum() <= posed(works).limit
    least = float(value)
    tight = Budget(**{key: str(int(least) - 60) if key == "size" else least - 2e-4})
    with pytest.raises(BudgetError):
        posed(tight)


def test_fitting_is_exact_for_files_of_many_gigabytes() -> None:
    """One byte too many is too many, also of 10^12."""
    found = replace(posed(Budget(bits=8)), size=np.full((2, 3), 5e11), limit=1e12 - 1)
    assert not found.fits(found.uniform(0))
    assert replace(found, limit=1e12).fits(found.uniform(0))


def test_a_budget_of_exactly_the_smallest_plan_is_enough() -> None:
    """1.6 bits are no round number in binary; a sum of them must not be called too much."""
    layers = inventory().scoped(["blocks"])
    trit = Precision("ternary", 2, 32, True)
    every, blank = choices_of(layers, [trit]), np.zeros((3, 1))
    found = pose(inventory(), every, blank, Budget(code_bits=1.6))
    assert found.fits(found.uniform(0))


@pytest.mark.parametrize("seed", range(12))
def test_a_byte_less_than_an_optimum_costs_no_more_than_it_must(seed: int) -> None:
    """Sizes of tens of megabytes, where the solver's tolerance is many bytes."""
    tall = problem(seed, 6, 4, scale=30_000_000, shape="any", tightness=0.4)
    tight = replace(tall, limit=tall.sizes(brute(tall)[1]) - 1)
    found, least = solve(tight), brute(replace(tight, limit=tight.limit * (1 - 3e-6)))[0]
    assert tight.fits(found)
    assert tight.losses(found) <= least * (1 + 1e-6)
