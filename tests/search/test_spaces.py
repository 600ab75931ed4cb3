"""What a trial's parameters mean: decoded plans against tables changed by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import optuna
import pytest

from optimizer.search import Problem, Third, exact, spaces, starts
from optimizer.search.surrogate import Belief, Slope, cross_terms, scale_at
from tests.search.test_contract import problem

ROLES = ("q", "q", "down", "down", "up", "up")


def trial(**params: Any) -> Any:
    """Optuna's own, with these parameters."""
    return optuna.trial.FixedTrial(params)


def spread_over_blocks(seed: int = 3) -> Problem:
    posed = problem(seed, 6, 4, tightness=0.4)
    return replace(posed, blocks=(None, 0, 2, 4, 7, 9))


# ---------------------------------------------------------------- multipliers


def test_multipliers_of_one_leave_the_table() -> None:
    posed = spread_over_blocks()
    params = spaces.multipliers_of(posed, ROLES, 1.0)
    assert set(params.values()) == {0.0} and len(params) == 3 + 5 + 2
    assert spaces.multipliers(posed, ROLES)(trial(**params)).tolist() == (
        exact.solve(posed).tolist()
    )


@pytest.mark.parametrize("seed", range(6))
def test_multipliers_scale_types_bands_of_depth_and_low_bits(seed: int) -> None:
    """Five bands over ten blocks are two blocks each; what lies in no block is in the first."""
    posed = spread_over_blocks(seed)
    rng = np.random.default_rng(seed)
    names = [*(f"type {r}" for r in sorted(set(ROLES))), *(f"band {i}" for i in range(5))]
    params = {name: float(rng.uniform(-0.4, 0.4)) for name in names}
    lowest = [int(c) for c in posed.order[:2]]
    params |= {f"low {posed.columns[c]}": float(rng.uniform(-0.5, 2)) for c in lowest}
    factors = [
        params[f"type {role}"] + params[f"band {band}"]
        for role, band in zip(ROLES, (0, 0, 1, 2, 3, 4), strict=True)
    ]
    loss = posed.loss * np.exp(factors)[:, None]
    for column in lowest:
        loss[:, column] *= np.exp(params[f"low {posed.columns[column]}"])
    toll = rng.random(posed.loss.shape)
    for more in (0.0, toll):
        found = spaces.multipliers(posed, ROLES, more)(trial(**params))
        assert found.tolist() == exact.solve(replace(posed, loss=loss + more)).tolist()


def test_a_dearer_lowest_precision_is_dearer_by_the_factor() -> None:
    params = spaces.multipliers_of(spread_over_blocks(), ROLES, 3.0)
    assert params.pop("low int2") == pytest.approx(np.log(3.0))
    assert set(params.values()) == {0.0}


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("seed", range(6))
def test_layers_decode_to_the_plan_that_they_come_from(seed: int) -> None:
    """An optimum leaves nothing that could be spent, so that it is repaired to itself."""
    posed = problem(seed, 6, 4, tightness=0.5)
    plan = exact.solve(posed)
    params = spaces.layers_of(posed, plan)
    assert params == {f"group {i}": posed.columns[c] for i, c in enumerate(plan)}
    found = spaces.layers(posed)(trial(**params))
    assert posed.losses(found) <= posed.losses(plan) and posed.fits(found)
    assert (posed.size[np.arange(6), found] >= posed.size[np.arange(6), plan]).all()


def test_a_toll_decides_what_is_stepped_down() -> None:
    """Two groups alike, one of them with a toll on the larger column: that one gives way."""
    posed = replace(
        problem(0, 2, 2),
        loss=np.array([[2.0, 1.0]] * 2),
        size=np.array([[1.0, 2.0]] * 2),
        limit=3.0,
    )
    both = trial(**spaces.layers_of(posed, np.array([1, 1])))
    for row in (0, 1):
        toll = np.zeros((2, 2))
        toll[row, 1] = 0.5
        found = spaces.layers(posed, toll)(both)
        assert found[row] == 0 and found[1 - row] == 1


# ---------------------------------------------------------------- directions


def test_directions_at_zero_are_the_table_and_at_one_the_whole_slope() -> None:
    """With no more directions than the slope has, following all of them adds its cross terms."""
    posed = spread_over_blocks()
    at = exact.solve(posed)
    slope = Slope(at, np.random.default_rng(0).normal(size=(2, 6, 4)))
    none = spaces.directions_of(posed, slope, 1.0, 0.0)
    decode = spaces.directions(posed, slope)
    assert decode(trial(**none)).tolist() == exact.solve(posed).tolist()
    terms = sum(spaces.leading(posed, slope))
    whole = scale_at(posed, at) * cross_terms(posed, slope).mean(0)
    assert terms == pytest.approx(whole, abs=1e-9)  # of rank 4 at most, and 4 are kept
    every = spaces.directions_of(posed, slope, 2.0, 1.0)
    loss = posed.loss.copy()
    loss[:, posed.order[0]] *= 2
    assert (
        decode(trial(**every)).tolist() == exact.solve(replace(posed, loss=loss + whole)).tolist()
    )
    assert every["slope 0"] == 1.0 and none["slope 0"] == 0.0


def test_leading_directions_are_the_largest_and_nothing_of_nothing() -> None:
    posed = replace(problem(0, 8, 6), loss=np.ones((8, 6)))
    at = np.zeros(8, dtype=int)
    rng = np.random.default_rng(1)
    slope = Slope(at, np.stack([rng.normal(size=(8, 6))] * 2))
    found = spaces.leading(posed, slope)
    norms = [float(np.linalg.norm(term)) for term in found]
    assert len(found) == 4 and norms == sorted(norms, reverse=True)
    alike = np.zeros((2, 8, 6))
    alike[:, :, 1:] = -1.0  # every group has the same cross terms: one direction
    assert len(spaces.leading(posed, Slope(at, alike))) == 1
    alike[:, :, 1:] = -2.0  # cross terms of exactly 0, since each group's own share is -2
    assert spaces.leading(posed, Slope(at, alike)) == []


def test_depth_is_a_line_and_a_parabola_from_the_first_block_to_the_last() -> None:
    line, parabola = spaces._depths(spread_over_blocks())
    at = [2 * b / 9 - 1 for b in (0, 2, 4, 7, 9)]
    assert line.tolist() == pytest.approx([0, *at])
    assert parabola.tolist() == pytest.approx([0, *[(3 * x * x - 1) / 2 for x in at]])
    none = replace(spread_over_blocks(), blocks=(None,) * 6)
    assert [shape.tolist() for shape in spaces._depths(none)] == [[0.0] * 6] * 2


# ---------------------------------------------------------------- moves


def test_moves_take_a_belief_and_change_no_more_groups_than_asked() -> None:
    posed = problem(5, 12, 4, tightness=0.5)
    best = exact.solve(posed)
    prior = posed.loss - posed.loss[np.arange(12), best][:, None]
    cross = np.random.default_rng(0).normal(size=prior.shape)
    belief = Belief(prior, cross, np.zeros((48, 48)))
    for count, trust in product((2, 3), (0.3, 1.0)):
        asked = trial(groups=count, trust=trust, spread=0.0)
        found = spaces.moves(posed, best, belief, seed=1)(asked)
        table = replace(posed, loss=prior + trust * cross)
        wanted = exact.solve_near(table, best, count)
        assert table.losses(found) == pytest.approx(table.losses(wanted))
        assert (found != best).sum() <= count and posed.fits(found)
    given = spaces.given(posed, best)
    assert given(trial(groups=2, trust=0.3, spread=0.0)) is best


def test_how_far_a_plan_is() -> None:
    posed = problem(5, 40, 4)
    first = np.zeros(40, dtype=int)
    plan = first.copy()
    for moved, far in [(0, 2), (1, 2), (5, 5), (10, 10), (40, 10)]:
        plan[:moved] = 1
        assert spaces.moves_of(posed, plan, first) == {"groups": far, "trust": 0.3, "spread": 0.0}
    assert spaces._farthest(problem(5, 6, 4)) == 2


# ---------------------------------------------------------------- fronts


def test_a_front_goes_from_three_quarters_of_the_budget_to_four_thirds() -> None:
    posed = problem(2, 8, 4)
    smallest, largest = posed.size.min(1).sum(), posed.size.max(1).sum()
    middle = (smallest + largest) / 2
    for limit in (smallest, middle, largest):
        low, high = starts.span(replace(posed, limit=limit))
        assert low == pytest.approx(max(smallest, limit * 3 / 4))
        assert high == pytest.approx(min(largest, limit * 4 / 3))


def test_plans_of_a_front_lie_inside_it_and_begin_with_the_optimum() -> None:
    posed = problem(2, 8, 4, tightness=0.5)
    first = exact.solve(posed)
    found = starts.of_a_front(posed, first)
    low, high = starts.span(posed)
    assert found[0] is first
    sizes = [posed.sizes(plan) for plan in found[1:]]
    assert max(sizes) <= high * (1 + 1e-12)
    limits = np.geomspace(low, high, 8)
    for limit, plan in zip(limits, found[1:9], strict=True):
        assert posed.losses(plan) == pytest.approx(
            posed.losses(exact.solve(replace(posed, limit=float(limit))))
        )
    uniform = [posed.uniform(c) for c in range(4)]
    inside = [u.tolist() for u in uniform if low <= posed.sizes(u) <= high]
    assert [p.tolist() for p in found[9:]] == inside


def test_sizes_and_pulls_of_a_front_are_decoded() -> None:
    posed = problem(2, 6, 4, tightness=0.5)
    third = Third("read", np.random.default_rng(0).random((6, 4)), 2.0)
    span = starts.span(posed)

    def by_layers(posed: Problem, toll: Any) -> Any:
        return spaces.multipliers(posed, ROLES, toll)

    params = spaces.multipliers_of(posed, ROLES, 1.0)
    plain = spaces.sized_of(posed, span, params, 1e9)
    assert plain == params | {"size": span[1]}
    assert spaces.sized_of(posed, span, params, 0)["size"] == span[0]
    found = spaces.sized(by_layers, posed, span)(trial(**plain))
    assert found.tolist() == exact.solve(replace(posed, limit=span[1])).tolist()
    pulled = replace(posed, third=third)
    asked = spaces.sized_of(pulled, span, params, posed.limit) | {"pull": 3.0}
    assert spaces.sized_of(pulled, span, params, posed.limit)["pull"] == 0.03
    found = spaces.sized(by_layers, pulled, span)(trial(**asked))
    table = replace(pulled, loss=pulled.loss + pulled.toll(3.0))
    assert found.tolist() == exact.solve(table).tolist()


# ---------------------------------------------------------------- a third objective


def test_a_toll_spans_as_much_as_the_largest_uniform_plan_that_fits_loses() -> None:
    each = np.array([[1.0, 3.0], [2.0, 10.0]])  # from the cheapest to the dearest plan: 2 + 8
    posed = replace(
        problem(0, 2, 2),
        loss=np.array([[4.0, 1.0], [5.0, 2.0]]),
        size=np.array([[1.0, 2.0]] * 2),
        limit=4.0,
        third=Third("read", each, 7.0),
    )
    assert posed.toll(0.5) == pytest.approx(0.5 * (1 + 2) / 10 * each)
    small = replace(posed, limit=3.0)  # only the smallest uniform plan fits
    assert small.toll(2.0) == pytest.approx(2.0 * (4 + 5) / 10 * each)
    nothing = replace(posed, limit=0.0)
    assert nothing.toll(1.0) == pytest.approx((4 + 5) / 10 * each)
    assert not posed.toll(0).any() and not replace(posed, third=None).toll(1.0).any()
    assert posed.third is not None and posed.third.of(np.array([1, 0])) == 7 + 3 + 2
    flat = replace(posed, third=Third("read", np.ones((2, 2)), 0.0))
    assert flat.toll(1.0) == pytest.approx(3 * np.ones((2, 2)))


# ---------------------------------------------------------------- starts


def test_a_study_begins_with_the_optimum_and_with_dearer_low_bits() -> None:
    posed = problem(7, 8, 4, tightness=0.3)
    first = exact.solve(posed)
    found = starts.of_a_budget(posed, first)
    assert found[0] is first and len(found) == 6
    for factor, plan in zip((1.5, 2.0, 3.0, 5.0), found[1:5], strict=True):
        loss = posed.loss.copy()
        loss[:, posed.order[0]] *= factor
        dearer = replace(posed, loss=loss)
        assert dearer.losses(plan) == pytest.approx(dearer.losses(exact.solve(dearer)))
    fitting = [u for u in map(posed.uniform, range(4)) if posed.fits(u)]
    assert posed.sizes(found[5]) == max(map(posed.sizes, fitting))


@pytest.mark.parametrize("space", ["multipliers", "layers", "moves", "directions"])
def test_every_space_begins_with_what_it_can_say(space: str) -> None:
    posed = problem(7, 8, 4, tightness=0.3)
    first = exact.solve(posed)
    slope = Slope(first, np.random.default_rng(0).normal(size=(2, 8, 4)))
    found = spaces.starts_of(space, posed, ["q"] * 8, first, False, slope)
    told = [repr(start.told) for start in found]
    assert len(set(told)) == len(told) and len(found) >= 2
    decode: dict[str, Any] = {
        "multipliers": spaces.multipliers(posed, ["q"] * 8),
        "layers": spaces.layers(posed),
        "directions": spaces.directions(posed, slope),
    }
    if space == "moves":
        assert found[0].plan is not None and found[0].plan.tolist() == first.tolist()
        return
    decoded = decode[space](trial(**found[0].params))
    assert posed.losses(decoded) == pytest.approx(posed.losses(first))
    assert all(posed.fits(decode[space](trial(**start.params))) for start in found)


@pytest.mark.parametrize("space", ["multipliers", "layers"])
def test_starts_of_a_front_are_its_plans_with_their_own_sizes(space: str) -> None:
    posed = problem(7, 6, 4, tightness=0.3)
    first = exact.solve(posed)
    found = spaces.starts_of(space, posed, ["q"] * 6, first, True)
    plans = [plan.tolist() for plan in starts.of_a_front(posed, first)]
    low, high = starts.span(posed)
    assert found[0].plan is not None and found[0].plan.tolist() == plans[0]
    for start in found:
        assert start.plan is not None and start.plan.tolist() in plans
        assert start.params["size"] == pytest.approx(np.clip(posed.sizes(start.plan), low, high))
