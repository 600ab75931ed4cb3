"""How tokens are weighed, and layers whose inputs and output gradients nobody sees."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optimizer.data.text import Windows
from optimizer.errors import ConfigError, ModelError
from optimizer.metrics.divergence import Teacher
from optimizer.models.head import OwnHead
from optimizer.models.model import Model
from optimizer.plan import Precision
from optimizer.sensitivity import Estimator, Task, estimator, estimators
from optimizer.sensitivity.fisher import diagonal, directional, gradients, likelihood, tokenwise
from optimizer.sensitivity.hessian import kronecker, trace
from optimizer.sensitivity.measured import measure
from optimizer.sensitivity.outputs import token_weights
from optimizer.sensitivity.slope import slopes
from tests.sensitivity.conftest import NAMES, VOCABULARY
from tests.sensitivity.test_fisher import LARGE, SMALL, Nudge, errors, task

IDS = np.random.default_rng(8).integers(VOCABULARY, size=(6, 5))
BY_TOKEN = {"fisher": diagonal, "directional": directional, "tokenwise": tokenwise}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_loss_is_linear_in_the_weights_of_windows(tiny: Model, name: str) -> None:
    """Window i counts w_i times: the weighted loss is the sum of w_i times each window's own."""
    score = BY_TOKEN[name]
    each = np.array([1.0, 4.0, 0.0, 0.25, 9.0, 1.0])
    alone = [
        score(tiny, task(), IDS, [3], np.eye(6, dtype=np.float32)[i][:, None].repeat(5, 1))
        for i in range(6)
    ]
    found = score(tiny, task(), IDS, [3], each[:, None].repeat(5, 1))
    assert np.array([x[:, :2] for x in alone]).min() > 0
    np.testing.assert_allclose(found, np.tensordot(each, alone, 1), rtol=1e-4)
    np.testing.assert_allclose(sum(alone), score(tiny, task(), IDS, [3]), rtol=1e-4)
    through = estimators()[name]().score(tiny, task(), IDS, [3], each[:, None].repeat(5, 1))
    np.testing.assert_array_equal(through, found)


def test_a_token_counts_by_the_square_root_in_its_log_likelihood(tiny: Model) -> None:
    window = torch.from_numpy(IDS[:1])
    one = [float(likelihood(tiny, window, [1], np.eye(5, dtype=np.float32)[t])) for t in range(5)]
    assert all(value < 0 for value in one)
    weights = np.array([0.0, 1.0, 4.0, 9.0, 0.25])
    wanted = float(np.sqrt(weights) @ one)
    assert float(likelihood(tiny, window, [1], weights)) == pytest.approx(wanted, rel=1e-5)
    assert float(likelihood(tiny, window, [1])) == pytest.approx(sum(one), rel=1e-5)


# ---------------------------------------------------------------- layers that nobody sees


class Silent(nn.Module):
    """Llama's feed-forward with the weight of down_proj read, not called."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = inner.gate_proj, inner.up_proj
        self.down_proj, self.act_fn = inner.down_proj, inner.act_fn

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return nn.functional.linear(hidden, self.down_proj.weight)


class Halved(Silent):
    """The same with down_proj called on a window's first tokens alone."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return torch.cat([self.down_proj(hidden[:, :2]), torch.zeros_like(x[:, 2:])], 1)


class Skipped(Silent):
    """Nothing of it is computed at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.fixture(params=[Silent])
def unseen(request: pytest.FixtureRequest, tiny: Model) -> Iterator[Model]:
    """`tiny`, whose second layer's module isn't called as it should be."""
    block = tiny.net.model.layers[0]
    inner = block.mlp
    block.mlp = request.param(inner)
    yield tiny
    block.mlp = inner


@pytest.mark.parametrize("weighted", [False, True])
def test_a_layer_whose_module_is_not_called_gets_the_diagonal(
    unseen: Model, weighted: bool
) -> None:
    weights = np.random.default_rng(1).random(IDS.shape) if weighted else None
    found = tokenwise(unseen, task(), IDS, [3], weights)
    wanted = diagonal(unseen, task(), IDS, [3], weights)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4)
    assert (found[1, :2] > 0).all() and not np.allclose(found[0], wanted[0], rtol=1e-2)
    if not weighted:
        other = kronecker(unseen, task(), IDS, [3])
        np.testing.assert_allclose(other[1], wanted[1], rtol=1e-4)
        assert not np.allclose(other[0], wanted[0], rtol=1e-2)


def probed(model: Model, work: Task, ids: np.ndarray, seed: list[int]) -> np.ndarray:
    return trace(model, work, ids, seed, 2)


@pytest.mark.parametrize("unseen", [Skipped], indirect=True)
@pytest.mark.parametrize("score", [diagonal, directional, tokenwise, kronecker, probed])
@pytest.mark.parametrize("alone", [False, True])
def test_a_layer_that_nothing_depends_on_costs_nothing(
    unseen: Model, score: Any, alone: bool
) -> None:
    """Such as an expert that no token of these windows visits; also if no other is asked for."""
    found = score(unseen, task(((NAMES[1],),) if alone else ((NAMES[1],), (NAMES[0],))), IDS, [3])
    assert (found[0] == 0).all() and (found[1:, :2] > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in unseen.net.parameters())


@pytest.mark.parametrize("unseen", [Skipped], indirect=True)
def test_a_layer_that_nothing_depends_on_has_no_slope(unseen: Model) -> None:
    work, windows = task(quantizer=Nudge(0.05)), Windows(IDS, np.arange(6))
    teacher = Teacher(unseen.net, windows, OwnHead(unseen.net))
    with unseen.rounded(work.quantizer, dict.fromkeys(NAMES, LARGE)):
        for groups in (((NAMES[0],), (NAMES[1],)), ((NAMES[1],),)):
            found = slopes(unseen, task(groups), teacher, [np.arange(6)])
            assert (found[:, -1] == 0).all() and found[:, :-1].all()


class Sometimes(Silent):
    """Computed for every second window only."""

    windows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.windows += 1
        return super().forward(x) if self.windows % 2 else torch.zeros_like(x)


@pytest.mark.parametrize("unseen", [Sometimes], indirect=True)
def test_a_window_that_a_layer_does_not_see_adds_nothing_to_its_loss(unseen: Model) -> None:
    """What it lost on the window before isn't counted once more."""
    found = directional(unseen, task(), IDS, [3])[1]
    live, total = unseen.net.get_parameter(NAMES[1]), np.zeros(3)
    for i in (0, 2, 4):
        unseen.net.model.layers[0].mlp.windows = 0
        live.requires_grad_(True)
        value = likelihood(unseen, torch.from_numpy(IDS[i])[None], [3, i])
        (gradient,) = torch.autograd.grad(value, live)
        live.requires_grad_(False)
        total += [float((gradient * e).sum()) ** 2 for e in errors(unseen, NAMES[1])]
    assert found == pytest.approx(total / (2 * IDS.size), rel=1e-4) and found[0] > 0


@pytest.mark.parametrize("unseen", [Halved, Silent], indirect=True)
def test_a_layer_that_some_tokens_pass_by_weighs_all_alike(unseen: Model) -> None:
    layers = list(unseen.layers.values())
    found = token_weights(unseen, layers, IDS, 4, lambda items, _text: items, squared=False)
    assert (found[NAMES[1]] == 1).all() and found[NAMES[0]].std() > 0.1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_ones(tiny: Model, wrong: float) -> None:
    weight = tiny.net.get_parameter("lm_head.weight")
    before = weight.clone()
    weight.fill_(wrong)
    try:
        found = token_weights(
            tiny, list(tiny.layers.values()), IDS, 4, lambda items, _text: items, squared=True
        )
    finally:
        weight.copy_(before)
    assert all((found[name] == 1).all() for name in NAMES)


@pytest.mark.parametrize("kind", [AssertionError, NotImplementedError])
def test_a_backward_pass_that_a_class_refuses_is_told_in_its_own_words(
    tiny: Model, kind: type[Exception]
) -> None:
    with (
        pytest.raises(ModelError) as error,
        gradients(tiny.net, set(NAMES), lambda _name, _value: None),
    ):
        raise kind("only for\n   training" + "!" * 300)
    text = str(error.value)
    assert text.startswith("LlamaForCausalLM gives no gradients as it is used")
    assert f"says: only for training{'!' * 183})" in text  # two hundred characters of it
    assert not any(p.requires_grad for p in tiny.net.parameters())


def test_gradients_come_one_by_one_and_are_let_go(tiny: Model) -> None:
    seen: list[tuple[str, bool]] = []

    def use(name: str, value: Tensor) -> None:
        others = [p for n, p in tiny.net.named_parameters() if n != name and p.grad is not None]
        seen.append((name, not others and value.shape == tiny.net.get_parameter(name).shape))

    with gradients(tiny.net, set(NAMES), use):
        assert {n for n, p in tiny.net.named_parameters() if p.requires_grad} == set(NAMES)
        likelihood(tiny, torch.from_numpy(IDS[:1]), [1]).backward()
        assert all(p.grad is None for p in tiny.net.parameters())
    assert sorted(seen) == sorted((name, True) for name in NAMES)


# ---------------------------------------------------------------- measured rows


@pytest.mark.parametrize("at", ["reference", LARGE.name])
def test_a_measured_rows_error_is_that_of_its_windows_mean(tiny: Model, at: str) -> None:
    """Per window: the loss with the group changed, less the loss without; by hand for six."""
    work = task(quantizer=Nudge(0.05))
    windows = Windows(IDS, np.arange(6))
    found = measure(tiny, work, windows, (NAMES[0],), at)
    assert found["loss"].shape == found["stderr"].shape == (3,)
    teacher = Teacher(tiny.net, windows, OwnHead(tiny.net))
    other = {} if at == "reference" else {NAMES[1]: work.fitted[NAMES[1], at]}
    floor = np.zeros(6)
    if other:
        with tiny.rounded(work.quantizer, other):
            floor += teacher.score(tiny.net).kl.mean(1)
    for i, column in enumerate((LARGE, SMALL, Precision())):
        with tiny.rounded(work.quantizer, other | {NAMES[0]: column}):
            gaps = teacher.score(tiny.net).kl.mean(1).astype(np.float64) - floor
        assert found["loss"][i] == pytest.approx(gaps.mean(), abs=2e-8)
        error = np.sqrt(((gaps - gaps.mean()) ** 2).sum() / 5 / 6)
        assert found["stderr"][i] == pytest.approx(error, abs=2e-8)
    assert found["loss"][0] > 1e-5 and found["loss"][2] == found["stderr"][2] == 0


# ---------------------------------------------------------------- names and settings


def test_an_estimator_that_nobody_knows_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"one of auto, fisher.*kronecker, not 'fischer'"):
        estimator("fischer")
    assert estimator("gain") is estimators()["gain"]


def test_other_packages_are_not_asked_for_the_projects_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that can't be imported stands in nobody's way."""
    monkeypatch.setitem(vars(sys.modules[Estimator.__module__]), "extensions", None)
    assert estimator("fisher").__name__ == "Fisher"


@pytest.mark.parametrize(("count", "windows"), [(2, 2), (8, 8), (8, 9)])
def test_as_many_chunks_as_windows_are_enough(count: int, windows: int) -> None:
    estimators()["fisher"](chunks=count).check(windows)
    with pytest.raises(ConfigError, match=f"chunks={count} with data.calibration.sequences=1"):
        estimators()["fisher"](chunks=count).check(1)


def test_an_estimator_without_a_score_says_which() -> None:
    class Empty(Estimator):
        pass

    with pytest.raises(NotImplementedError, match="Empty has no score"):
        Empty().score(None, None, IDS, [1])  # type: ignore[arg-type]
    assert Empty().samples(None, None, None, None) is None  # type: ignore[arg-type]
    name, version, settings = Empty().key
    assert (name, version) == ("Empty", 1) and settings["chunks"] == 8
    assert "measured" not in settings  # rows that stand beside the table


def test_the_trace_takes_as_many_probes_as_it_is_told(tiny: Model) -> None:
    """A mean over probes: those of window i are seeded by [*seed, i, probe]."""
    several = trace(tiny, task(), IDS, [2], 3)
    made = estimators()["hessian"](probes=3)
    np.testing.assert_array_equal(made.score(tiny, task(), IDS, [2]), several)
    assert not np.allclose(several, trace(tiny, task(), IDS, [2], 1), rtol=1e-3)


def test_the_kronecker_form_refuses_what_has_no_inputs(tiny: Model) -> None:
    from dataclasses import replace

    name = NAMES[0]
    layer = replace(tiny.layers[name], kind="experts")
    own = Task(((name,),), ("int8",), {(name, "int8"): SMALL}, Nudge())
    before = tiny.layers[name]
    tiny.layers[name] = layer
    try:
        with pytest.raises(ConfigError, match=rf"{name} is of kind experts.*sensitivity=fisher"):
            kronecker(tiny, own, IDS, [1])
    finally:
        tiny.layers[name] = before
