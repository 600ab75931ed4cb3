"""Curvature beyond the diagonal Fisher: Hutchinson's trace and the Kronecker form.

    hessian     KL ~ 1/2 Tr(H)/n ||dW||^2, with Tr(H) = E_v[v' H v], v = +-1 (HAWQ-v2,
                arXiv:1911.03852); H is the Hessian of the mean KL to the frozen reference, taken
                by Hessian-vector products
    kronecker   KL ~ 1/(2T) tr(G dW A dW') / tau, A = sum |d|^2 x x', G = sum |x|^2 d d',
                tau = sum |d|^2 |x|^2 over tokens with input x and, for sampled labels, output
                gradient d: one power step towards the nearest Kronecker product (YAQA,
                arXiv:2505.22988) from K-FAC (arXiv:1503.05671). Plain K-FAC takes x and d as
                independent; the huge activations of a first token, where d is small, made it
                promise 3.9 times too much on SmolLM2 at 4 bits.
Legend: n weights in a layer, T tokens, x [cols], d [rows].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from optimizer.errors import ConfigError
from optimizer.models.model import Model, read
from optimizer.plan import Layer
from optimizer.sensitivity import Task
from optimizer.sensitivity.fisher import (
    _array,
    _windows,
    likelihood,
    rounding_errors,
    unwatched,
    watching,
)
from optimizer.sensitivity.products import Factors


def trace(
    model: Model, task: Task, ids: np.ndarray, seed: Sequence[int], probes: int
) -> np.ndarray:
    """[groups, precisions], nats per token. Cost: one double backward pass a window and probe;
    one vector perturbs all layers at once, which leaves each layer's expectation as it is."""
    layers = [model.layers[name] for name in task.layers]
    names = sorted({name for layer in layers for name in layer.parameters})
    total = dict.fromkeys(task.layers, 0.0)
    parameters = [model.net.get_parameter(name).requires_grad_(True) for name in names]
    try:
        with math_attention():
            for window, own_seed in _windows(model.net, ids, seed):
                for probe in range(probes):
                    vectors = [
                        signs([*own_seed, probe], n, p.shape)
                        for n, p in zip(names, parameters, strict=True)
                    ]
                    quadratic = _hvp(model, window, parameters, vectors)
                    found = dict(zip(names, quadratic, strict=True)).__getitem__
                    for layer in layers:
                        own = read(found, layer)
                        total[layer.name] += float(own.sum(dtype=torch.float64)) / probes
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    norms = {
        x.name: _array([error.square().sum() for _, error in rounding_errors(model, task, x)])
        for x in layers
    }
    return losses_of(task, layers, total, norms) / (2 * model.predictions(ids))


def losses_of(
    task: Task,
    layers: Sequence[Layer],
    traces: Mapping[str, float],
    norms: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Tr(H)/n ||dW||^2 [groups, precisions]. traces: of each layer; norms: ||dW||^2 [precisions]."""
    return task.collect(
        {x.name: max(traces[x.name], 0.0) / x.weights * norms[x.name] for x in layers}
    )


def signs(seed: Sequence[int], parameter: str, shape: Sequence[int]) -> Tensor:
    """A Rademacher vector for a parameter, int8 numbers of -1 and +1; the same whatever else there
    is."""
    rng = torch.Generator().manual_seed(_number([*seed, crc32(parameter.encode())]))
    return torch.randint(0, 2, tuple(shape), generator=rng, dtype=torch.int8).mul_(2).sub_(1)


def _hvp(
    model: Model, window: Tensor, parameters: list[Any], signs: Sequence[Tensor]
) -> list[Tensor]:
    """v * (H v) for one Rademacher vector over all parameters, H summed over the window; 0 for those
    that the window's predictions don't depend on."""
    logits = model.logits(window)
    log_q = torch.log_softmax(logits, -1)
    log_p = log_q.detach()
    kl = (log_p.exp() * (log_p - log_q)).sum()
    if not kl.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    gradients = torch.autograd.grad(kl, parameters, create_graph=True, materialize_grads=True)
    vectors = [own.to(p) for own, p in zip(signs, parameters, strict=True)]
    product = torch.stack([(g * v).sum() for g, v in zip(gradients, vectors, strict=True)]).sum()
    products = torch.autograd.grad(product, parameters, materialize_grads=True)
    return [v.mul_(hv) for v, hv in zip(vectors, products, strict=True)]


@contextmanager
def math_attention() -> Iterator[None]:
    """The fused attention kernels have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def _number(seed: Sequence[int]) -> int:
    return int(np.random.default_rng(list(seed)).integers(2**62))


def kronecker(model: Model, task: Task, ids: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """[groups, precisions], nats per token. Memory: rows^2 + cols^2 per layer. Linear and Conv1D
    layers only: fused experts and embeddings have no module whose inputs could be watched."""
    layers = factorable(model, task)
    factors = {
        x.name: Factors.none(x, model.net.get_parameter(x.parameter).device) for x in layers
    }
    met: set[str] = set()

    def add(name: str, x: Tensor, d: Tensor) -> None:
        met.add(name)
        factors[name].add(x, d)

    with watching(model, task.layers, add):
        for window, own_seed in _windows(model.net, ids, seed):
            likelihood(model, window, own_seed).backward()
    losses = {
        x.name: np.array([factors[x.name].loss(e) for _, e in rounding_errors(model, task, x)])
        for x in layers
    }
    missed = [layer for layer in layers if layer.name not in met]
    losses |= unwatched(model, task, missed, (ids, seed, None))
    return task.collect(losses) / (2 * model.predictions(ids))


def factorable(model: Model, task: Task) -> list[Layer]:
    """The task's layers. Raises ConfigError where one has no Kronecker form."""
    layers = [model.layers[name] for name in task.layers]
    for layer in layers:
        if layer.kind not in ("linear", "conv1d", "head"):
            raise ConfigError(
                f"The Kronecker form needs the inputs of a linear layer; {layer.name} is of kind "
                f"{layer.kind}. Leave it out of scope or take sensitivity=fisher."
            )
    return layers
