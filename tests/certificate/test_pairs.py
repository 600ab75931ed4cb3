"""What is said about margins: which pairs count, what was lost, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.certificate import pairs as damage
from optimizer.data.pairs import Pair
from optimizer.plan.certificate import Interval


def test_holm_by_hand() -> None:
    assert damage.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert damage.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_each_column_of_a_table_is_one_family() -> None:
    """Holm by hand for .01, .04, .03, .005; the plan's losses and the gaps apart; a cell without
    informative pairs counts in neither."""
    whole = Interval(0.0, 0.0, 0.0)

    def cell(loss: float, gap: float | None) -> damage.Cell:
        own = {"plan": damage.Damage(whole, whole, whole, loss)}
        return damage.Cell("one", "en", COUNT, 1.0, own, gap if gap is None else whole, gap)

    bare = damage.Cell("two", "en", COUNT, None, {})
    given = [(0.6, 0.01), (0.9, 0.04), (0.02, 0.03), (0.8, 0.005)]
    found = damage._corrected([bare, *(cell(*both) for both in given)])
    assert found[0] == bare
    assert [x.gap_p for x in found[1:]] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    losses = [x.damage["plan"].p for x in found[1:]]
    assert losses == pytest.approx([1.0, 1.0, 0.08, 1.0])
    (alone,) = damage._corrected([cell(0.02, None)])
    assert (alone.damage["plan"].p, alone.gap_p) == (0.02, None)


COUNT = damage.Count(pairs=4, used=4, wrong=0, weak=0, skipped=0)


def suite(count: int = 40) -> list[Pair]:
    return [
        Pair(f"{name}{i}", name, "en", f"{name} {i}", f" {i} yes", f" {i} no")
        for name in ("one", "two")
        for i in range(count)
    ]


def test_damage_is_found_where_it_is() -> None:
    pairs, rng = suite(), np.random.default_rng(5)
    reference = rng.uniform(1, 3, len(pairs))
    plan = reference + rng.normal(0, 0.3, len(pairs))
    plan[:40] -= 1.5
    uniform = reference + rng.normal(0, 0.3, len(pairs))
    (one, two), (total,) = damage.judge(pairs, reference, {"plan": plan, "u": uniform}, 0.5)
    assert one.damage["plan"].p is not None and one.damage["plan"].p < 0.01
    assert two.damage["plan"].p is not None and two.damage["plan"].p > 0.05
    loss = one.damage["plan"].loss
    assert loss.value == pytest.approx((reference - plan)[:40].mean())
    assert loss.low < 1.5 < loss.high
    assert one.damage["plan"].flips.value == np.mean(plan[:40] <= 0) > 0
    assert one.damage["plan"].tail.value > loss.value
    assert one.gap is not None and one.gap.low > 1
    assert one.gap_p is not None and one.gap_p < 0.01
    assert total.damage["plan"].p is None
    said = damage.verdict([one, two], "plan", "u")
    assert "shown in 1 of 2" in said and "one en" in said and "more in 1" in said


def test_no_change_is_no_damage_and_no_proof() -> None:
    pairs = suite()
    reference = np.linspace(1, 3, len(pairs))
    cells, _ = damage.judge(pairs, reference, {"plan": reference.copy()}, 0.5)
    for cell in cells:
        assert cell.damage["plan"].loss.value == 0
        assert cell.damage["plan"].p == 1
        assert cell.damage["plan"].flips.value == 0
    assert "doesn't prove" in damage.verdict(cells, "plan", None)


def test_uninformative_pairs_are_reported_and_not_counted() -> None:
    pairs = suite(6)[:6]
    reference = np.array([2.0, 0.4, -1.0, np.nan, 1.0, 0.5])
    plan = np.array([-1.0, -9.0, 9.0, np.nan, 0.5, -9.0])
    (cell,), _ = damage.judge(pairs, reference, {"plan": plan}, 0.5)
    assert cell.count == damage.Count(pairs=6, used=2, wrong=1, weak=2, skipped=1)
    assert (
        cell.damage["plan"].flips.value == 0.5
    )  # the pair put right (third) makes up for nothing
    assert cell.damage["plan"].loss.value == pytest.approx((3.0 + 0.5) / 2)
    (none,), _ = damage.judge(pairs, np.full(6, -1.0), {"plan": plan}, 0.5)
    assert none.damage == {}
    assert "Nothing is said" in damage.verdict([none], "plan", None)
