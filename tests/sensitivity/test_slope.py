"""Slopes at a plan against differences of the measured loss, on the model of five tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizer.data.text import Windows
from optimizer.metrics.divergence import Teacher
from optimizer.metrics.objective import Objective
from optimizer.models import arithmetic
from optimizer.models.head import OwnHead
from optimizer.models.model import Model
from optimizer.models.offload import block_list
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Task, slope
from optimizer.sensitivity.slope import Beside, slopes
from tests.conftest import Small, mixed
from tests.sensitivity.conftest import NAMES
from tests.sensitivity.test_fisher import LARGE, Nudge, task

PARTS = (np.array([0, 2]), np.array([1]))
STEP = 1e-3


def loss(model: Model, teacher: Teacher, windows: np.ndarray, beside: Beside | None) -> float:
    total = np.mean([teacher.window(model.net, int(w)) for w in windows])
    rest = [] if beside is None else [float(beside(int(w)).detach()) for w in windows]
    return float(total + (np.mean(rest) if rest else 0.0))


@pytest.mark.parametrize("tail", [0.0, 0.7])
@pytest.mark.parametrize("more", [False, True])
def test_a_slope_is_the_derivative_along_the_rounded_weights(
    tiny: Model, tail: float, more: bool
) -> None:
    ids = np.random.default_rng(2).integers(5, size=(3, 9))
    teacher, nudge = Teacher(tiny.net, Windows(ids, np.arange(3))), Nudge(0.05)
    teacher.objective = Objective(tail, 0.5, 0.01)
    work = task(quantizer=nudge)

    def beside(window: int) -> Tensor:
        """Of window 2 nothing counts, and it has no gradient."""
        if window == 2:
            return torch.zeros(())
        value = tiny.net.get_parameter(NAMES[window]).sum()
        return (1 + window) * value

    extra = beside if more else None
    with tiny.rounded(nudge, dict.fromkeys(NAMES, LARGE)):
        found = slopes(tiny, work, teacher, PARTS, extra)
        assert found.shape == (2, 2, 3)
        for g, name in enumerate(NAMES):
            live = tiny.net.get_parameter(name)
            before = live.detach().clone()
            for c, column in enumerate(work.columns):
                way = nudge.round(tiny.reference(name), work.fitted[name, column], name)
                for part, windows in enumerate(PARTS):
                    values = []
                    for sign in (1, -1):
                        with torch.no_grad():
                            live.copy_(before + sign * STEP * way)
                        values.append(loss(tiny, teacher, windows, extra))
                    with torch.no_grad():
                        live.copy_(before)
                    wanted = (values[0] - values[1]) / (2 * STEP)
                    assert found[part, g, c] == pytest.approx(wanted, rel=0.02, abs=2e-4)
    assert not any(p.requires_grad for p in tiny.net.parameters())


@pytest.mark.parametrize("place", ["none", "disk"])
def test_block_after_block_is_the_whole_models_gradient(
    small: Small, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything in scope; with experts, whose tokens are some, all gradients come at once."""
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    model = Model.load(small.folder, small.inventory, offload=place)
    ids = np.random.default_rng(4).integers(5, 90, size=(5, 12))
    teacher = Teacher(model.net, Windows(ids, np.arange(5)), OwnHead(model.net))
    choice = mixed(model.inventory.layers)
    columns = {"int3": Precision("int", 3), "int6": Precision("int", 6)}
    fitted = {(name, key): p for name in choice for key, p in columns.items()}
    work = Task(tuple((name,) for name in choice), tuple(columns), fitted, Nearest())
    parts = (np.array([3, 0, 4]), np.array([1, 2]))
    own: list[bool] = []
    by_block = slope._by_block

    def seen(*given: Any) -> np.ndarray | None:
        found = by_block(*given)
        own.append(found is not None)
        return found

    monkeypatch.setattr(slope, "_by_block", seen)
    monkeypatch.setattr(slope, "TOGETHER", 24)  # two windows
    with model.rounded(Nearest(), choice):
        found = slopes(model, work, teacher, parts)
        monkeypatch.setattr(slope, "_by_block", lambda *_: None)
        wanted = slopes(model, work, teacher, parts)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5 * np.abs(wanted).max())
    assert own == [small.name not in ("mixtral", "qwen3_moe", "gpt_oss")] * 2
    assert not any(p.requires_grad for p in model.net.parameters())


@pytest.mark.parametrize(("scaled", "near"), [(4, 0.05), (17, 1e-5)])
def test_a_slope_in_fp16_is_that_of_fp32_also_where_a_gradient_is_too_large(
    llama: Small, scaled: int, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arithmetic, "SCALED", scaled)
    ids, told = np.random.default_rng(4).integers(5, 90, size=(4, 12)), list[str]()
    names = [x.name for x in llama.inventory.layers]
    low, high = Precision("int", 3), Precision("int", 6)
    fitted = {(name, p.name): p for name in names for p in (low, high)}
    work = Task(tuple((x,) for x in names), (low.name, high.name), fitted, Nearest())
    found = []
    for kind in (None, "fp16"):
        model = Model.load(llama.folder, llama.inventory)
        blocks = block_list(model.net, model.inventory)
        arithmetic.apply(model.net, blocks, kind, None, told.append)
        teacher = Teacher(model.net, Windows(ids, np.arange(4)), OwnHead(model.net))
        with model.rounded(Nearest(), dict.fromkeys(names, low)):
            found.append(slopes(model, work, teacher, (np.arange(4),)))
    exact, rough = found
    assert float(np.linalg.norm(rough - exact) / np.linalg.norm(exact)) < near
    assert len(told) == (scaled == 17) and (scaled == 17 or not np.array_equal(rough, exact))
