"""Policies and pins: what they leave, what they refuse, and that every search keeps to them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from optimizer.errors import BudgetError, ConfigError
from optimizer.plan import Budget, Choices, Inventory, Layer, Policy, Precision, allowed
from optimizer.search import exact, pose

ROLES = ("q_proj", "down_proj")
LAYERS = [
    Layer(f"m.layers.{b}.{r}.weight", 64, 64, "linear", r, b, f"{b}.{r}", (64, 64))
    for b in range(4)
    for r in ROLES
]
PALETTE = [Precision("int", bits, 32) for bits in (2, 3, 4, 8)] + [Precision()]
COLUMNS = tuple(p.name for p in PALETTE)
FITTED = {(layer.name, p.name): p for layer in LAYERS for p in PALETTE}
GROUPS = tuple((layer.name,) for layer in LAYERS)
ANY = (2, 3, 4, 8, 16)


def left(*pins, groups=GROUPS, columns=COLUMNS, **rest):
    """Bits left per group."""
    found = allowed(Policy(pins=list(pins), **rest), Choices(LAYERS, groups, columns, FITTED))
    return [tuple(p.bits for p, ok in zip(PALETTE, row, strict=True) if ok) for row in found]


def test_free_leaves_everything():
    assert left() == [ANY] * 8


def test_hybrid_leaves_the_ends_untouched():
    assert left(name="hybrid") == [(16,)] * 2 + [ANY] * 4 + [(16,)] * 2
    assert left(name="hybrid", ends=0) == [ANY] * 8


def test_hybrid_leaves_embeddings_untouched():
    embedding = Layer("embed.weight", 64, 64, "embedding", "embed", None, "embed", (64, 64))
    scope = [embedding, *LAYERS]
    fitted = FITTED | {("embed.weight", p.name): p for p in PALETTE}
    groups = tuple((layer.name,) for layer in scope)
    found = allowed(Policy(name="hybrid"), Choices(scope, groups, COLUMNS, fitted))
    assert found[0].tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("pin", "bits"),
    [
        ("*q_proj = 4", (4,)), ("*q_proj=int4_g32", (4,)), ("*q_proj >= 4", (4, 8, 16)),
        ("*q_proj<=3", (2, 3)), ("*q_proj = 16", (16,)), ("*q_proj = none", (16,)),
    ],
)  # fmt: skip
def test_pins(pin, bits):
    assert left(pin) == [bits, ANY] * 4


def test_a_floor_and_a_ceiling():
    assert left("* >= 3", "m.layers.1.* <= 4")[2:4] == [(3, 4)] * 2


def test_a_pin_to_a_kind_and_one_by_bits_that_ternary_isnt():
    """`= 2` is two bits of uniform codes; ternary has a name of its own, and 1.6 bits."""
    palette = [Precision("ternary", 2, 32, True), Precision("int", 2, 32), Precision()]
    columns = tuple(p.name for p in palette)
    fitted = {(layer.name, p.name): p for layer in LAYERS for p in palette}

    def kept(pin):
        found = allowed(Policy(pins=[pin]), Choices(LAYERS, GROUPS, columns, fitted))
        return found[0].tolist()

    assert kept("* = 2") == [False, True, False]
    assert kept("* = ternary") == [True, False, False]
    assert kept("* <= 1.6") == [True, False, False]
    assert kept("* >= 2") == [False, True, True]


def test_a_policy_is_checked_before_a_model_is_known():
    Policy(name="hybrid", ends=0, pins=["*.v_proj = 8", "@types.txt"]).check()
    Policy(pins="@types.txt").check()
    for wrong, words in [
        (Policy(name="strict"), "free or hybrid, not 'strict'"),
        (Policy(ends=-1), "not -1"),
        (Policy(pins=["v_proj 8"]), "not 'v_proj 8'"),
        (Policy(pins=["@types.txt", "= 8"]), "not '= 8'"),
        (Policy(pins=[5]), "list of texts"),
        (Policy(pins={"a": 1}), "list of texts"),
    ]:
        with pytest.raises(ConfigError, match=words):
            wrong.check()


def test_contradictions_name_both():
    with pytest.raises(ConfigError) as caught:
        left("*layers.2* >= 8", "* <= 8", "*q_proj <= 3")
    said = str(caught.value)
    assert "'*layers.2* >= 8' and '*q_proj <= 3'" in said and "'* <= 8'" not in said
    with pytest.raises(ConfigError, match=r"policy=hybrid.* and 'm.layers.0\* = 4'"):
        left("m.layers.0* = 4", name="hybrid")


def test_contradictions_of_layers_that_go_together():
    pairs = tuple((LAYERS[i].name, LAYERS[i + 1].name) for i in range(0, 8, 2))
    with pytest.raises(ConfigError, match="2 layers together"):
        left("*q_proj = 4", "*down_proj = 8", groups=pairs)


@pytest.mark.parametrize(
    "pin", ["", "q_proj", "*q_proj > 4", "nothing = 4", "*q_proj = 7", "* >= x"]
)
def test_wrong_pins(pin):
    with pytest.raises(ConfigError):
        left(pin)


def test_hybrid_needs_the_reference_in_the_palette_and_something_inside():
    with pytest.raises(ConfigError, match=r"palette\.bits"):
        left(name="hybrid", columns=COLUMNS[:4])
    with pytest.raises(ConfigError, match="nothing to quantize"):
        left(name="hybrid", ends=2)


def problem(policy, bits=5.5, seed=0):
    rng = np.random.default_rng(seed)
    loss = np.sort(rng.random((8, 5)), axis=1)[:, ::-1] * [1, 0.4, 0.1, 0.01, 0]
    every = Choices(LAYERS, GROUPS, COLUMNS, FITTED)
    left = replace(every, allowed=allowed(policy, every))
    return pose(Inventory(tuple(LAYERS), (), "F16"), left, loss, Budget(bits=bits))


POLICIES = [
    Policy(),
    Policy(pins=["*down_proj >= 4"]),
    Policy(pins=["m.layers.1.* = 8", "*q_proj <= 8"]),
    Policy(name="hybrid"),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_search_keeps_to_the_policy(policy):
    task = problem(policy, bits=10.5 if policy.name == "hybrid" else 5.5)
    rng = np.random.default_rng(1)
    plans = [exact.solve(task), *(exact.random_plan(task, rng) for _ in range(20))]
    for plan in plans:
        assert task.allows(plan) and task.fits(plan)
    sizes, losses, front = exact.front(task)
    assert all(task.allows(plan) for plan in front)
    assert (np.diff(sizes) > 0).all() and (np.diff(losses) < 0).all()


def test_the_optimum_is_that_of_all_allowed_plans():
    task = problem(Policy(pins=["*down_proj >= 4"]), bits=6)
    choices = [np.flatnonzero(row) for row in task.free]
    best = min(
        task.losses(np.array(plan))
        for plan in itertools.product(*choices)
        if task.fits(np.array(plan))
    )
    assert task.losses(exact.solve(task)) == pytest.approx(best, rel=1e-6)


def test_a_policy_over_the_budget_says_so():
    with pytest.raises(BudgetError, match="policy and its pins"):
        problem(Policy(name="hybrid"), bits=4)
