"""What every estimator promises; one that is registered is in these tests by itself."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from optimizer.models.model import Model
from optimizer.plan import Palette, Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Measured, Task, estimators, palette_columns
from tests.conftest import Small

NAMES = sorted(estimators().keys() - {"auto"})  # auto stands for one of the others
every = pytest.mark.parametrize("name", NAMES)
IDS = np.random.default_rng(2).integers(96, size=(4, 16))


def work(model: Model) -> Task:
    """Each layer of the blocks by itself, in 2, 4, 8 and 16 bits."""
    layers = model.inventory.scoped(["blocks"])
    palette = Palette(bits=[2, 4, 8, 16], group_size=32).precisions()
    fitted = palette_columns(layers, palette, "strict")
    groups = tuple((layer.name,) for layer in layers)
    return Task(groups, tuple(p.name for p in palette), fitted, Nearest())


def scored(name: str, model: Model, task: Task, seed: int = 0) -> np.ndarray:
    return estimators()[name]().score(model, task, IDS, [seed])


@every
def test_untouched_costs_nothing_and_bits_cost_less_on_average(llama: Small, name: str) -> None:
    found = scored(name, llama.model, work(llama.model))
    assert found.shape == (len(work(llama.model).groups), 4) and found.dtype == np.float64
    assert np.isfinite(found).all()
    assert (found[:, 3] == 0).all()
    two, four, eight, _ = found.sum(0)
    assert two > four > eight > 0


@every
def test_the_same_seed_gives_the_same_numbers(llama: Small, name: str) -> None:
    task = work(llama.model)
    assert np.array_equal(
        scored(name, llama.model, task, seed=3), scored(name, llama.model, task, seed=3)
    )


@every
@pytest.mark.parametrize("planted", [0, 6, 13])
def test_planted_damage_ranks_first(llama: Small, name: str, planted: int) -> None:
    """One group in one bit where all others keep eight."""
    plain = work(llama.model)
    column, rough = plain.columns[2], Precision("int", 1, 32, True)
    damaged = {(plain.groups[planted][0], column): rough}
    found = scored(name, llama.model, replace(plain, fitted=plain.fitted | damaged))
    assert found[:, 2].argmax() == planted


@every
def test_the_model_is_as_before(llama: Small, name: str) -> None:
    before = {key: value.clone() for key, value in llama.model.net.state_dict().items()}
    scored(name, llama.model, work(llama.model))
    after = llama.model.net.state_dict()
    assert all(value.equal(after[key]) for key, value in before.items())
    assert not any(p.requires_grad for p in llama.model.net.parameters())


@every
def test_a_key_names_the_estimator_its_version_and_each_field(name: str) -> None:
    made = estimators()[name]
    plain = made()
    assert plain.estimator == name
    assert plain.key[:2] == [made.__name__, made.VERSION]
    for item in fields(made):
        value = getattr(plain, item.name)
        if item.init and type(value) in (int, float):
            assert made(**{item.name: value + 1}).key != plain.key, item.name
    assert made(measured=Measured(groups=["*"])).key == plain.key  # rows beside the table
