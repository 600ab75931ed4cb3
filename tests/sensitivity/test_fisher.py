"""The estimators against brute force on a model of five tokens, where the true Fisher matrix is
a sum over all labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizer.models.model import Model
from optimizer.plan import Precision
from optimizer.sensitivity import Task
from optimizer.sensitivity import estimator as estimator_of
from optimizer.sensitivity.fisher import (
    TOGETHER,
    diagonal,
    directional,
    likelihood,
    sampled,
    tokenwise,
)
from optimizer.sensitivity.hessian import kronecker, math_attention, trace
from tests.sensitivity.conftest import NAMES, VOCABULARY

SMALL, LARGE = Precision("int", 8), Precision("int", 2)


@dataclass
class Nudge:
    """A quantizer whose error is known: a fixed random matrix, the same for every call with the
    same shape and precision."""

    size: float = 1e-3

    def error(self, weight: Tensor, precision: Precision) -> Tensor:
        rng = torch.Generator().manual_seed(100 * precision.bits + weight.shape[1])
        step = self.size * (8 if precision == LARGE else 1)
        return step * torch.randn(weight.shape, generator=rng)

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        return weight + self.error(weight, precision)


def draws(logits: Tensor, seed: list[int]) -> np.ndarray:
    return np.random.default_rng(seed).random((len(logits), 1))


def task(groups: tuple[tuple[str, ...], ...] = ((NAMES[0],), (NAMES[1],)), **more: Any) -> Task:
    fitted = {(n, p.name): p for n in NAMES for p in (LARGE, SMALL, Precision())}
    columns = (LARGE.name, SMALL.name, "none")
    return Task(groups, columns, fitted, more.get("quantizer", Nudge()))


def window(length: int, count: int = 1) -> np.ndarray:
    row = np.random.default_rng(4).integers(VOCABULARY, size=length)
    return np.tile(row, (count, 1))


def label_gradients(model: Model, ids: np.ndarray) -> dict[str, Tensor]:
    """Layer -> sqrt(p(y|t)) d log p(y|t) / dW for all positions t and labels y of one window,
    [positions, labels, rows, cols]: what the exact Fisher is made of."""
    parameters = [model.net.get_parameter(n).requires_grad_(True) for n in NAMES]
    try:
        log_p = model.net(input_ids=torch.from_numpy(ids)).logits[0].log_softmax(-1)
        found: dict[str, list[Tensor]] = {n: [] for n in NAMES}
        for value in log_p.flatten():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True)
            for n, gradient in zip(NAMES, gradients, strict=True):
                found[n].append(gradient * (value.detach() / 2).exp())
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    shape = (*log_p.shape, -1)
    return {n: torch.stack(g).view(*shape[:2], *g[0].shape).double() for n, g in found.items()}


def errors(model: Model, name: str) -> list[Tensor]:
    nudge, weight = Nudge(), model.weight(name)
    zero = torch.zeros_like(weight).double()
    return [nudge.error(weight, LARGE).double(), nudge.error(weight, SMALL).double(), zero]


def exact(model: Model, ids: np.ndarray, form: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
    gradients = label_gradients(model, ids[:1])
    rows = [[float(form(gradients[n], e)) for e in errors(model, n)] for n in NAMES]
    return np.array(rows) / (2 * ids.shape[1])


def exact_diagonal(gradients: Tensor, error: Tensor) -> Tensor:
    return (gradients.square() * error.square()).sum()


def exact_directional(gradients: Tensor, error: Tensor) -> Tensor:
    return (gradients * error).sum((-1, -2)).square().sum()


SCORES = {"fisher": (diagonal, exact_diagonal), "directional": (directional, exact_directional)}


@pytest.mark.parametrize("estimator", SCORES)
def test_the_expectation_is_the_exact_fisher(tiny: Model, estimator: str) -> None:
    """600 draws of the labels of one window; the mean must be within five standard errors of
    the sum over all labels."""
    score, form = SCORES[estimator]
    expected = exact(tiny, window(4), form)
    draws = np.array([score(tiny, task(), window(4, 30), [i]) for i in range(20)])
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(0) - expected) <= 5 * error + 1e-15).all()
    assert (error[:, :2] < 0.1 * expected[:, :2]).all(), "too noisy to tell anything"
    assert (expected[:, 2] == 0).all() and (draws[..., 2] == 0).all(), "untouched costs nothing"


@pytest.mark.parametrize("estimator", SCORES)
def test_one_chunk_is_the_sum_over_its_windows(tiny: Model, estimator: str) -> None:
    """With the same sampled labels, autograd window by window gives the same numbers."""
    ids = np.random.default_rng(8).integers(VOCABULARY, size=(3, 5))
    found = SCORES[estimator][0](tiny, task(), ids, [7, 1])
    total = np.zeros((2, 3))
    parameters = [tiny.net.get_parameter(n) for n in NAMES]
    for i, row in enumerate(ids):
        for parameter in parameters:
            parameter.requires_grad_(True)
        value = likelihood(tiny, torch.from_numpy(row)[None], [7, 1, i])
        gradients = torch.autograd.grad(value, parameters)
        for parameter in parameters:
            parameter.requires_grad_(False)
        for j, (name, g) in enumerate(zip(NAMES, gradients, strict=True)):
            for k, e in enumerate(errors(tiny, name)):
                product = g.double() * e
                value = product.square().sum() if estimator == "fisher" else product.sum() ** 2
                total[j, k] += float(value)
    assert np.allclose(found, total / (2 * ids.size), rtol=1e-4)


def test_small_errors_cost_what_the_fisher_says(tiny: Model) -> None:
    """Nats per token: half the quadratic form is the true KL, measured with float64 logits."""
    ids = window(4)
    expected = exact(tiny, ids, exact_directional)
    tiny.net.double()
    try:
        for i, name in enumerate(NAMES):
            with torch.inference_mode():
                log_p = tiny.net(input_ids=torch.from_numpy(ids)).logits.log_softmax(-1)
                own = tiny.net.get_parameter(name).clone()
                tiny.net.get_parameter(name).add_(errors(tiny, name)[1])
                log_q = tiny.net(input_ids=torch.from_numpy(ids)).logits.log_softmax(-1)
                tiny.net.get_parameter(name).copy_(own)
            true = float((log_p.exp() * (log_p - log_q)).sum()) / ids.size
            assert expected[i, 1] == pytest.approx(true, rel=0.02)
    finally:
        tiny.net.float()


def test_layers_of_a_group_add_up_in_the_diagonal(tiny: Model) -> None:
    ids = window(4, 3)
    apart = diagonal(tiny, task(), ids, [1])
    together = diagonal(tiny, task((NAMES,)), ids, [1])
    assert np.allclose(together[0], apart.sum(0))


def test_layers_of_a_group_act_together_in_the_directional(tiny: Model) -> None:
    """Cross terms: one window gives (a + b)^2, not a^2 + b^2."""
    ids = window(4)
    a, b = np.sqrt(directional(tiny, task(), ids, [1])[:, 1])
    together = directional(tiny, task((NAMES,)), ids, [1])[0, 1]
    assert min(a, b) > 0.05 * max(a, b), "the example has no cross terms to see"
    assert np.isclose(together, [(a + b) ** 2, (a - b) ** 2], rtol=1e-4).any()


# ---------------------------------------------------------------- sampled labels


def test_labels_are_drawn_from_the_model() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 0.5]]).expand(20000, 4)
    found = torch.bincount(sampled(logits, draws(logits, [3])).squeeze(), minlength=4) / 20000
    assert torch.allclose(found, logits[0].softmax(-1), atol=0.015)


def test_labels_depend_on_the_seed_alone() -> None:
    logits = torch.randn(50, 9)
    torch.manual_seed(1)
    one = sampled(logits, draws(logits, [3, 4]))
    torch.manual_seed(2)
    assert torch.equal(one, sampled(logits, draws(logits, [3, 4])))
    assert not torch.equal(one, sampled(logits, draws(logits, [3, 5])))
    assert one.shape == (50, 1)


def test_impossible_labels_are_never_drawn() -> None:
    logits = torch.full((1000, 6), float("-inf"))
    logits[:, 2] = 0
    assert (sampled(logits, draws(logits, [1])) == 2).all()


# ---------------------------------------------------------------- curvature


def hessian(model: Model, name: str, ids: np.ndarray) -> Tensor:
    """The Hessian [n, n] of the summed KL of one window to the frozen reference."""
    log_p = model.net(input_ids=torch.from_numpy(ids)).logits[0].log_softmax(-1).detach()
    own = model.net.get_parameter(name).detach()

    def loss(flat: Tensor) -> Tensor:
        changed = {name: flat.view_as(own)}
        out = torch.func.functional_call(
            model.net, changed, kwargs={"input_ids": torch.from_numpy(ids)}
        )
        return (log_p.exp() * (log_p - out.logits[0].log_softmax(-1))).sum()

    with math_attention():
        found = torch.autograd.functional.hessian(loss, own.flatten().clone())
    assert isinstance(found, Tensor)
    return found.double()


def test_at_the_reference_the_hessian_is_the_fisher(tiny: Model) -> None:
    ids = window(4)
    for name, gradients in label_gradients(tiny, ids).items():
        flat = gradients.flatten(2).flatten(0, 1)
        assert torch.allclose(hessian(tiny, name, ids), flat.T @ flat, atol=1e-4)


def test_hutchinsons_trace_is_the_traces_expectation(tiny: Model) -> None:
    ids = window(4)
    draws = np.array([trace(tiny, task(), ids, [i], 25) for i in range(20)])
    error = draws.std(0, ddof=1) / np.sqrt(len(draws))
    expected = np.array(
        [
            [
                float(hessian(tiny, n, ids).trace() / e.numel() * e.square().sum())
                / (2 * ids.size)
                for e in errors(tiny, n)
            ]
            for n in NAMES
        ]
    )
    assert (np.abs(draws.mean(0) - expected) <= 5 * error + 1e-15).all()
    assert (error[:, :2] < 0.15 * expected[:, :2]).all()


@pytest.mark.parametrize("estimate", [kronecker, tokenwise])
def test_it_is_exact_where_there_is_a_single_token(tiny: Model, estimate: Any) -> None:
    """One token has G = d x', so that (d' dW x)^2 and tr(G dW A dW') / tau are <G, dW>^2."""
    ids = window(1)
    for seed in range(4):
        found = estimate(tiny, task(), ids, [seed])
        assert np.allclose(found, directional(tiny, task(), ids, [seed]), rtol=1e-4)
        assert (found[:, 0] > 0).all()


@pytest.mark.parametrize("windows", [2, 2 * TOGETHER + 1])
def test_single_tokens_by_their_definition(tiny: Model, windows: int) -> None:
    ids = np.random.default_rng(8).integers(VOCABULARY, size=(windows, 4))
    found = tokenwise(tiny, task(), ids, [9])
    for i, name in enumerate(NAMES):
        module: Any = tiny.net.get_submodule(name.removesuffix(".weight"))
        pairs: list[tuple[Tensor, Tensor]] = []
        for j, row in enumerate(ids):
            pairs += tokens_of(tiny, module, row, [9, j])
        for k, error in enumerate(errors(tiny, name)):
            value = sum(float(d @ error.float() @ x) ** 2 for x, d in pairs) / (2 * ids.size)
            assert found[i, k] == pytest.approx(value, rel=1e-4)


def test_single_tokens_follow_an_error_that_inputs_do_not_meet(tiny: Model) -> None:
    """An error at right angles to all inputs costs nothing; the diagonal can't see that."""
    ids = np.random.default_rng(8).integers(VOCABULARY, size=(1, 3))
    name = NAMES[0]
    module: Any = tiny.net.get_submodule(name.removesuffix(".weight"))
    inputs = torch.stack([x for x, _ in tokens_of(tiny, module, ids[0], [9, 0])])
    away = torch.linalg.svd(inputs, full_matrices=True).Vh[-1]

    class Sideways(Nudge):
        def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
            return weight + 0.1 * away.expand_as(weight)

    own = Task(((name,),), ("int4",), {(name, "int4"): Precision("int", 4)}, Sideways())
    assert diagonal(tiny, own, ids, [9]).item() > 0
    assert tokenwise(tiny, own, ids, [9]).item() < 1e-6 * diagonal(tiny, own, ids, [9]).item()


def test_the_kronecker_form_by_its_definition(tiny: Model) -> None:
    """Token by token, from inputs and output gradients that are caught one layer at a time."""
    ids = np.random.default_rng(8).integers(VOCABULARY, size=(2, 4))
    found = kronecker(tiny, task(), ids, [9])
    for i, name in enumerate(NAMES):
        module: Any = tiny.net.get_submodule(name.removesuffix(".weight"))
        pairs: list[tuple[Tensor, Tensor]] = []
        for j, row in enumerate(ids):
            pairs += tokens_of(tiny, module, row, [9, j])
        a = sum(d @ d * torch.outer(x, x) for x, d in pairs)
        g = sum(x @ x * torch.outer(d, d) for x, d in pairs)
        tau = sum((d @ d) * (x @ x) for x, d in pairs)
        for k, error in enumerate(errors(tiny, name)):
            e = error.float()
            value = torch.trace(g @ e @ a @ e.T) / tau / (2 * ids.size)
            assert found[i, k] == pytest.approx(float(value), rel=1e-4)


def tokens_of(
    model: Model, module: Any, row: np.ndarray, seed: list[int]
) -> list[tuple[Tensor, Tensor]]:
    caught: dict[str, Tensor] = {}

    def catch(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        caught["x"] = args[0].detach()[0]
        caught["y"] = output.detach().requires_grad_(True)
        return caught["y"]

    handle = module.register_forward_hook(catch)
    try:
        value = likelihood(model, torch.from_numpy(row)[None], seed)
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(value, caught["y"])
    return list(zip(caught["x"], gradient[0], strict=True))


# ---------------------------------------------------------------- hygiene


ESTIMATORS = ("fisher", "directional", "tokenwise", "hessian", "kronecker")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_scoring_leaves_the_model_as_it_was(tiny: Model, estimator: str) -> None:
    before = {k: v.clone() for k, v in tiny.net.state_dict().items()}
    score = estimator_of(estimator)().score
    first = score(tiny, task(), window(4, 2), [1])
    assert np.array_equal(first, score(tiny, task(), window(4, 2), [1])), "not repeatable"
    assert not np.array_equal(first, score(tiny, task(), window(4, 2), [2]))
    assert all(torch.equal(v, before[k]) for k, v in tiny.net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in tiny.net.parameters())
    for module in tiny.net.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


class Broken(Nudge):
    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_failure_leaves_no_gradients_on(tiny: Model, estimator: str) -> None:
    with pytest.raises(ZeroDivisionError):
        estimator_of(estimator)().score(tiny, task(quantizer=Broken()), window(4), [1])
    assert all(p.grad is None and not p.requires_grad for p in tiny.net.parameters())
    assert not any(module._forward_hooks for module in tiny.net.modules())
