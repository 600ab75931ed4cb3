"""Optuna's samplers as a study uses them, and CMA-ES without a pickle.

Optuna samples jointly over the parameters that all finished trials have, so every trial of a study has
all of them, also the plans that it starts from (see `spaces`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

STARTUP = (
    8  # finished trials before tpe and gp sample jointly; those that a study starts from count
)
POPULATION = 16  # of nsgaii
STEP, AGAIN = 0.15, 0.3  # of cmaes at first and after a restart, in shares of each range
GENERATION = "generation"  # the attribute of a trial that cmaes sampled
RECENT = 16  # trials of which half repeat plans before the next one is drawn at random
SETTINGS = ("joint 3", STARTUP, POPULATION, STEP, AGAIN, RECENT)  # of a study's name


def sampler(name: str, seed: int, shared: bool) -> BaseSampler:
    """A fresh one for each trial: everything that it knows is in the study."""
    kinds: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=shared, n_startup_trials=STARTUP
        ),
        "nsgaii": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION),
        "cmaes": lambda: CmaEs(seed),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP),
        "random": lambda: RandomSampler(seed=seed),
    }
    return kinds[name]()


class CmaEs(BaseSampler):
    """Covariance matrix adaptation (Hansen, arXiv:1604.00772) around the best of the trials that it
    didn't sample itself. A generation that only repeats losses has nothing left to tell: plans are
    discrete, and it has closed in on known ones. Then it starts again elsewhere, with twice the
    population (Auger and Hansen, 2005, doi:10.1109/CEC.2005.1554902).

    Optuna's own keeps its state as a pickle in the study, and whoever writes there would run code in
    every worker. Here the state is computed anew for each trial from the parameters and losses of
    those before it, generation by generation.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._space = IntersectionSearchSpace()
        self._independent = RandomSampler(seed=seed)

    def infer_relative_search_space(
        self, study: optuna.Study, _trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._space.calculate(study)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        axes = {name: Axis(kind) for name, kind in sorted(search_space.items())}
        if len(axes) < 2:  # the method has no covariance there
            return {}
        done = [
            t
            for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if axes.keys() <= t.params.keys()
        ]
        own = [t for t in done if GENERATION in t.system_attrs]
        first = min(
            (t.number for t in own), default=trial.number
        )  # drawn at random later: see RECENT
        others = [t for t in done if GENERATION not in t.system_attrs and t.number < first]
        seen = {_value(t) for t in others}
        optimizer = self._begun(_centre(axes, others), STEP)
        generation = 0
        while len(told := _of(own, generation)) >= optimizer.population_size:
            told = told[: optimizer.population_size]
            generation += 1
            losses = {_value(t) for t in told}
            if losses <= seen:
                elsewhere = np.random.default_rng(generation).random(len(axes))
                optimizer = self._begun(elsewhere, AGAIN, 2 * optimizer.population_size)
                continue
            seen |= losses
            optimizer.tell([(_point(axes, t.params), _value(t)) for t in told])
        study._storage.set_trial_system_attr(trial._trial_id, GENERATION, generation)
        point = optimizer.ask()
        return {name: axis.value(x) for (name, axis), x in zip(axes.items(), point, strict=True)}

    def _begun(self, centre: np.ndarray, step: float, population: int | None = None) -> Any:
        import cmaes

        bounds = np.tile([0.0, 1.0], (len(centre), 1))
        return cmaes.CMA(centre, step, bounds, seed=self._seed % 2**32, population_size=population)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


class Axis:
    """A numerical parameter as a number from 0 to 1."""

    def __init__(self, kind: BaseDistribution) -> None:
        if not isinstance(kind, FloatDistribution | IntDistribution):
            raise TypeError(f"cmaes samples numbers, not {kind}")
        self._kind = kind
        ends = np.array([kind.low, kind.high], dtype=float)
        self._low, self._high = np.log(ends) if kind.log else ends

    def share(self, value: float) -> float:
        found = np.log(value) if self._kind.log else value
        return float((found - self._low) / (self._high - self._low))

    def value(self, share: float) -> float | int:
        found = self._low + share * (self._high - self._low)
        found = float(np.exp(found) if self._kind.log else found)
        inside = min(max(found, self._kind.low), self._kind.high)
        return round(inside) if isinstance(self._kind, IntDistribution) else inside


def _point(axes: Mapping[str, Axis], params: Mapping[str, Any]) -> np.ndarray:
    return np.array([axis.share(params[name]) for name, axis in axes.items()])


def _centre(axes: Mapping[str, Axis], trials: Sequence[FrozenTrial]) -> np.ndarray:
    """Where the best of the trials lies; the middle if there is none."""
    if not trials:
        return np.full(len(axes), 0.5)
    return _point(axes, min(trials, key=_value).params)


def _of(trials: Sequence[FrozenTrial], generation: int) -> list[FrozenTrial]:
    return [t for t in trials if t.system_attrs[GENERATION] == generation]


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None  # of a finished trial
    return trial.value
