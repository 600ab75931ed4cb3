"""Fisher information: the second-order loss of meaning, from labels sampled from the model.

At the reference the KL divergence has zero gradient and the Fisher matrix as its Hessian, so for
a layer's error dW, with G_s the gradient of window s's log-likelihood of labels y ~ p(.|x), and T
tokens in the windows (Kunstner et al., arXiv:1905.12558, on why sampled labels and not the text's):
    diagonal      KL ~ 1/(2T) sum_s sum_ij G_s,ij^2 dW_ij^2
    directional   KL ~ 1/(2T) sum_s <G_s, dW>^2
    tokenwise     KL ~ 1/(2T) sum_t (d_t' dW x_t)^2, with x_t a layer's input at token t and d_t the
                  gradient at its output there: G_s = sum_t d_t x_t', of which the terms between
                  tokens are left out. It follows an error's direction, as directional does, but
                  averages over tokens instead of windows. On SmolLM2 with GPTQ's errors the whole is
                  1.07 times as much, by layer types 1.0 to 1.3 times, and the standard error of a
                  layer 18 % for directional and 5 % for this (64 windows of 128).
Every precision is scored from the same backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.arithmetic import unscaled
from optimizer.models.model import Model, read
from optimizer.models.watching import begin_gradients, on_gradient, rows_of
from optimizer.plan import Layer
from optimizer.sensitivity import Task

TOGETHER = 4  # windows whose inputs and output gradients are kept at a time


def diagonal(
    model: Model,
    task: Task,
    ids: np.ndarray,
    seed: Sequence[int],
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """[groups, precisions], nats per token. weights [windows, length]: how much each predicted
    token's KL counts; its log-likelihood is multiplied by the square root. Memory: one accumulator
    of the scored layers' size and one parameter's gradient at a time. Cost: a forward and a
    backward pass a window, and one rounding of the layers a precision."""
    passes = (
        partial(likelihood, model, window, own_seed, _row(weights, i))
        for i, (window, own_seed) in enumerate(_windows(model.net, ids, seed))
    )
    return squared(model, task, passes) / (2 * model.predictions(ids))


def squared(model: Model, task: Task, passes: Iterable[Callable[[], Tensor]]) -> np.ndarray:
    """sum_s sum_ij (d s / d W_ij)^2 dW_ij^2 [groups, precisions] over the scalars s that `passes`
    compute: to first order, and for errors that don't know of each other, the sum of their squared
    changes."""
    squares: dict[str, Tensor] = {}
    layers = [model.layers[name] for name in task.layers]
    names = {name for x in layers for name in x.parameters}
    with gradients(model.net, names, partial(add_square, squares)):
        for scalar in passes:
            backward(scalar())
    return task.collect({x.name: _diagonal(model, task, x, squares) for x in layers})


def backward(scalar: Tensor) -> None:
    """Nothing where it depends on none of the parameters whose gradients are asked for."""
    if scalar.requires_grad:
        torch.autograd.backward(scalar)


def add_square(squares: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    if name in squares:
        squares[name].addcmul_(gradient, gradient)
    else:
        squares[name] = gradient.square()


def _diagonal(model: Model, task: Task, layer: Layer, squares: dict[str, Tensor]) -> np.ndarray:
    """sum_ij F_ij dW_ij^2 [precisions]; squares: F of each parameter."""

    def square(name: str) -> Tensor:
        found = squares.get(name)  # None: no token's loss depends on it
        return torch.zeros_like(model.net.get_parameter(name)) if found is None else found

    fisher = read(square, layer)
    return _array([(fisher * e.square_()).sum() for _, e in rounding_errors(model, task, layer)])


def directional(
    model: Model,
    task: Task,
    ids: np.ndarray,
    seed: Sequence[int],
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """[groups, precisions]; unbiased for the whole Fisher matrix of a group, its layers' cross
    terms too, but noisier than the diagonal. Cost: as the diagonal, and one rounding a window."""
    by_parameter: dict[str, list[Layer]] = {}
    for name in task.layers:
        for parameter in model.layers[name].parameters:
            by_parameter.setdefault(parameter, []).append(model.layers[name])
    products: dict[str, np.ndarray] = {}
    waiting: dict[str, dict[str, Tensor]] = {}  # of layers that several parameters hold

    def multiply(layer: Layer, parts: dict[str, Tensor]) -> None:
        def part(name: str) -> Tensor:
            return parts[name] if name in parts else torch.zeros_like(model.parameter(name))

        own = read(part, layer)
        errors = rounding_errors(model, task, layer)
        products[layer.name] = _array([(own * error).sum() for _, error in errors])

    def dot(parameter: str, gradient: Tensor) -> None:
        for layer in by_parameter[parameter]:
            parts = waiting.setdefault(layer.name, {})
            parts[parameter] = gradient
            if len(parts) == len(layer.parameters):
                multiply(layer, waiting.pop(layer.name))

    total = np.zeros((len(task.groups), len(task.columns)))
    with gradients(model.net, set(by_parameter), dot):
        for i, (window, own_seed) in enumerate(_windows(model.net, ids, seed)):
            products |= dict.fromkeys(task.layers, np.zeros(len(task.columns)))  # unless one comes
            backward(likelihood(model, window, own_seed, _row(weights, i)))
            while waiting:  # a part of them had no gradient on this window
                name, parts = waiting.popitem()
                multiply(model.layers[name], parts)
            total += task.collect(products) ** 2
    return total / (2 * model.predictions(ids))


def tokenwise(
    model: Model,
    task: Task,
    ids: np.ndarray,
    seed: Sequence[int],
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """[groups, precisions]; layers whose inputs can't be watched get the diagonal, and so do those
    whose module isn't called, or returns more than its product. Memory: inputs and
    output gradients of TOGETHER windows, fp32. Cost: a forward and a backward pass a window, one
    product of its size a precision, and one rounding for every TOGETHER windows."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    squares: dict[str, Tensor] = {}

    met: set[str] = set()

    def keep(name: str, x: Tensor, d: Tensor) -> None:
        met.add(name)
        seen.setdefault(name, []).append((x, d))

    layers = [model.layers[name] for name in task.layers]
    unseen = [layer for layer in layers if not layer.watchable]
    losses = {name: np.zeros(len(task.columns)) for name in task.layers}
    passes = list(_windows(model.net, ids, seed))
    with (
        watching(model, [layer.name for layer in layers if layer.watchable], keep),
        gradients(
            model.net,
            {name for x in unseen for name in x.parameters},
            partial(add_square, squares),
        ),
    ):
        for i, (window, own_seed) in enumerate(passes):
            likelihood(model, window, own_seed, _row(weights, i)).backward()
            if (i + 1) % TOGETHER and i + 1 < len(passes):
                continue
            for name in list(seen):
                x, d = (torch.cat(parts) for parts in zip(*seen.pop(name), strict=True))
                errors = rounding_errors(model, task, model.layers[name])
                losses[name] += _array([((x @ e.T) * d).sum(-1).square().sum() for _, e in errors])
    losses |= {layer.name: _diagonal(model, task, layer, squares) for layer in unseen}
    missed = [layer for layer in layers if layer.watchable and layer.name not in met]
    losses |= unwatched(model, task, missed, (ids, seed, weights))
    return task.collect(losses) / (2 * model.predictions(ids))


def unwatched(
    model: Model,
    task: Task,
    missed: Sequence[Layer],
    text: tuple[np.ndarray, Sequence[int], np.ndarray | None],
) -> dict[str, np.ndarray]:
    """The diagonal's losses [precisions], times twice the tokens, of layers that `watching` doesn't
    see: their module isn't called, since the model reads its weight, or returns other things, too."""
    if not missed:
        return {}
    ids, seed, weights = text
    squares: dict[str, Tensor] = {}
    names = {name for x in missed for name in x.parameters}
    with gradients(model.net, names, partial(add_square, squares)):
        for i, (window, own_seed) in enumerate(_windows(model.net, ids, seed)):
            backward(likelihood(model, window, own_seed, _row(weights, i)))
    return {layer.name: _diagonal(model, task, layer, squares) for layer in missed}


@contextmanager
def watching(
    model: Model,
    names: Sequence[str],
    use: Callable[[str, Tensor, Tensor], None],
    begin: bool = True,
) -> Iterator[None]:
    """During backward passes, hand each layer's inputs [tokens, cols] and the gradients at its
    outputs [tokens, rows] to `use`, in fp32; nothing of a module that multiplies in parts (DeepSeek
    V4's grouped output). begin: let gradients begin at the embeddings."""
    handles: list[Any] = []
    sizes = {name: (model.layers[name].rows, model.layers[name].cols) for name in names}
    own = partial(unscaled, model.net)

    def watch(name: str, module: nn.Module) -> None:
        def forward(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            x, plain = rows_of(args, kwargs), isinstance(output, Tensor)
            if x is not None and plain and (output.shape[-1], x.shape[1]) == sizes[name]:
                on_gradient(output, lambda d: use(name, x, own(d).flatten(0, -2).float()))

        handles.append(module.register_forward_hook(forward, with_kwargs=True))

    try:
        for name in names:
            watch(name, model.net.get_submodule(model.layers[name].parameter.rpartition(".")[0]))
        if begin:
            handles.append(begin_gradients(model.net))
        yield
    finally:
        for handle in handles:
            handle.remove()


def likelihood(
    model: Model, window: Tensor, seed: list[int], weights: np.ndarray | None = None
) -> Tensor:
    """ids [1, l] -> log-likelihood (a scalar with gradient) of labels sampled from the model's own
    predictions, each times the square root of its weight [predictions]."""
    return likelihood_of(model.logits(window), seed, weights)


def likelihood_of(logits: Tensor, seed: list[int], weights: np.ndarray | None = None) -> Tensor:
    """The same from a window's logits [predictions, choices]."""
    draws = np.random.default_rng(seed).random((len(logits), 1))
    each = torch.log_softmax(logits, -1).gather(-1, sampled(logits, draws))[:, 0]
    if weights is None:
        return each.sum()
    return each @ torch.from_numpy(np.sqrt(weights)).to(each)


def _row(weights: np.ndarray | None, window: int) -> np.ndarray | None:
    return None if weights is None else weights[window]


def sampled(logits: Tensor, draws: np.ndarray) -> Tensor:
    """logits [l, vocabulary] -> one label a row [l, 1]. draws [l, 1]: uniform in 0 to 1.

    Inverse transform sampling: a uniform number per row against the cumulative probabilities.
    """
    cumulative = logits.detach().softmax(-1).cumsum(-1, dtype=torch.float64)
    places = torch.from_numpy(draws).to(logits.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, places).clamp_(max=logits.shape[-1] - 1)


def _windows(
    net: nn.Module, ids: np.ndarray, seed: Sequence[int]
) -> Iterator[tuple[Tensor, list[int]]]:
    device = next(net.parameters()).device
    for i, window in enumerate(ids):
        yield torch.from_numpy(window)[None].to(device), [*seed, i]


def rounding_errors(model: Model, task: Task, layer: Layer) -> Iterator[tuple[str, Tensor]]:
    weight = model.weight(layer.name)
    for column in task.columns:
        precision = task.fitted[layer.name, column]
        yield (
            column,
            task.quantizer.round(weight, precision, layer.name).sub_(weight)
            if (precision.kind != "none")
            else torch.zeros_like(weight),
        )


def _array(values: list[Tensor]) -> np.ndarray:
    return torch.stack(values).double().cpu().numpy()


@contextmanager
def gradients(
    net: nn.Module, names: set[str], use: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Hand each named parameter's gradient to `use` during the backward pass, then free it, so
    that all gradients never exist together."""
    handles = []
    try:
        for name in sorted(names):
            parameter = net.get_parameter(name).requires_grad_(True)

            def consume(p: Tensor, name: str = name) -> None:
                assert p.grad is not None
                use(name, unscaled(net, p.grad))
                p.grad = None

            handles.append(parameter.register_post_accumulate_grad_hook(consume))
        yield
    except (AssertionError, NotImplementedError) as error:  # a backward pass of the model's own
        raise ModelError(
            f"{type(net).__name__} gives no gradients as it is used (transformers says: "
            f"{' '.join(str(error).split())[:200]}), and every table of sensitivities needs them. "
            "This architecture isn't supported; take one that the documentation's support matrix "
            "lists."
        ) from None
    finally:
        for handle in handles:
            handle.remove()
        for name in names:
            net.get_parameter(name).requires_grad_(False).grad = None
