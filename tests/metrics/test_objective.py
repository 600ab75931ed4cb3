"""The tail objective against its definition, in the table and in the search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizer.commands import optimize
from optimizer.config import Optimize
from optimizer.data.text import Part
from optimizer.errors import ConfigError
from optimizer.metrics.bootstrap import cvar
from optimizer.metrics.objective import Meaning, Objective
from optimizer.models.source import Source
from optimizer.plan import Budget
from optimizer.quantization.methods import bind
from optimizer.search import Search
from optimizer.sensitivity import Task, fisher
from optimizer.sensitivity import estimator as estimator_of
from optimizer.stages.session import Session
from optimizer.stages.space import search_space
from tests.commands.test_optimize import settings


@given(st.integers(0, 1000), st.floats(0, 3), st.sampled_from([0.5, 0.9, 0.98]))
def test_it_touches_the_tail_at_the_quantile_and_bounds_it_elsewhere(
    seed: int, weight: float, level: float
) -> None:
    kl = np.random.default_rng(seed).exponential(size=(10, 20))
    tail = cvar(kl, np.ones((3, 10), dtype=int), level).value
    wanted = kl.mean() + weight * tail
    # the quantile whose exact share of the mass lies above it
    at = np.sort(kl.ravel())[int(level * kl.size)]
    assert Objective(weight, level, float(at)).of(kl).mean() == pytest.approx(wanted)
    for threshold in (0.0, 0.5 * at, 1.5 * at):
        assert Objective(weight, level, threshold).of(kl).mean() >= wanted - 1e-9


def test_weights_are_its_derivative() -> None:
    kl = torch.rand(50, dtype=torch.float64, requires_grad=True)
    objective = Objective(0.3, 0.9, 0.5)
    (slope,) = torch.autograd.grad(objective.of(kl).sum(), kl)
    assert np.allclose(slope, objective.weights(kl.detach().numpy()))


def test_without_a_weight_it_is_the_mean() -> None:
    kl = np.random.default_rng(0).random(7)
    assert np.array_equal(Objective(threshold=9.0).of(kl), kl)
    assert (Objective(threshold=0.0).weights(kl) == 1).all()


def test_fisher_counts_tokens_by_their_weights(source: Source, tmp_path: Path) -> None:
    config = settings(source, tmp_path / "s", budget=Budget(bits=4))
    made = Session.open(config.model, config.data, config.store)
    space = search_space(config, made.inventory)
    quantizer = bind(config.quantizer, made)
    task = Task(space.groups, space.columns, space.fitted, quantizer)
    ids = made.calibration()[:4]
    first, second = np.ones(ids.shape), np.ones(ids.shape)
    first[:, ids.shape[1] // 2 :] = 0
    second[:, : ids.shape[1] // 2] = 0
    plain = fisher.diagonal(made.model, task, ids, [0])
    assert fisher.diagonal(made.model, task, ids, [0], 3 * np.ones(ids.shape)) == pytest.approx(
        3 * plain, rel=1e-4
    )
    halves = [fisher.diagonal(made.model, task, ids, [0], w).sum() for w in (first, second)]
    assert sum(halves) == pytest.approx(plain.sum(), rel=0.4)  # cross terms are noise
    assert min(halves) > 0


@pytest.mark.slow
def test_table_and_search_follow_the_objective(source: Source, tmp_path: Path) -> None:
    search = Search(tokens=3000)
    config = settings(source, tmp_path / "s", budget=Budget(bits=3.6), search=search)
    config.data.search = Part(sequences=12, length=32)
    found = {}
    for weight in (0.0, 0.5):
        own = replace(config, meaning=Meaning(cvar=weight))
        found[weight] = optimize.optimize(own, tmp_path / f"{weight}")
    assert any("KL + 0.5 CVaR99 went from" in note for note in found[0.5].notes)
    assert found[0.5].plan.layers != found[0.0].plan.layers
    predicted = [found[w].plan.predicted["kl"] for w in (0.0, 0.5)]
    assert predicted[1] < 3 * predicted[0]  # a promise in KL, not in the objective


@pytest.mark.parametrize(
    ("meaning", "estimator", "said"),
    [
        (Meaning(cvar=-1), "fisher", "0 or more"),
        (Meaning(cvar=0.1, level=1.0), "fisher", "between 0 and 1"),
        (Meaning(cvar=0.1), "hessian", "Only Fisher information"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    meaning: Meaning, estimator: str, said: str
) -> None:
    config = Optimize(
        model="x", budget=Budget(bits=4), meaning=meaning, sensitivity=estimator_of(estimator)()
    )
    with pytest.raises(ConfigError, match=said):
        config.check()
