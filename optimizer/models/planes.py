"""A model that holds a base and can add planes of further bits to it, token by token.

A plane refines one layer: with it open, the layer's output for inputs x [tokens, cols] is
    y = B' x + R' x,      B' the base's weight, R' the plane's, both [rows, cols].
Planes are opened for all tokens or for some (a mask), so that one pass over a text gives exactly what
reading it token by token gives, each token with the weights that were chosen for it: keys and
values of an unpacked token are the refined ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.layout import holders
from optimizer.plan import Inventory, Layer

SIGNALS = ("entropy", "margin")


class Plane(Protocol):
    """bytes: read when it is used as a whole."""

    bytes: int

    def product(self, x: Tensor) -> Tensor:
        """x [..., cols] -> x R' [..., rows], in x's dtype."""

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of R' [..., cols]."""


class Dense:
    """A plane that is held unpacked: R' [rows, cols]."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.bytes = weight, weight.numel() * weight.element_size()

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x))

    def rows(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


@dataclass
class Gate:
    """open: for all tokens, for none, or bool [windows, length]. read: bytes of planes that were read
    since somebody set it to 0."""

    open: bool | Tensor = False
    read: int = 0


def refinable(net: Any, inventory: Inventory) -> list[Layer]:
    """Layers that a plane can refine: those whose weight is one matrix of a module that multiplies its
    inputs by it, or looks rows up. Fused experts and parts of fused projections are not."""
    held = holders(net)
    return [layer for layer in inventory.layers if _modules(net, held, layer)]


def _modules(
    net: Any, held: Mapping[int, list[tuple[nn.Module, str]]], layer: Layer
) -> list[nn.Module]:
    if layer.places or layer.expert is not None or len(layer.shape) != 2:
        return []
    try:
        value = net.get_parameter(layer.parameter)
    except AttributeError:
        return []
    modules = [module for module, leaf in held.get(id(value), []) if leaf == "weight"]
    known = [m for m in modules if _kind(m) is not None]
    return known if len(known) == len(held.get(id(value), [])) else []


def _kind(module: nn.Module) -> str | None:
    """By its class's name: packed layers have classes of their own of these names."""
    name = type(module).__name__
    if isinstance(module, nn.Embedding) and name == "Embedding":  # others scale what they look up
        return "rows"
    return "product" if type(module) is nn.Linear or name in ("Linear", "Conv1D") else None


def modules_of(net: Any, layers: Iterable[Layer]) -> dict[str, list[nn.Module]]:
    """Layer -> the modules that use its weight; of a net whose weights are still parameters."""
    held = holders(net)
    return {layer.name: _modules(net, held, layer) for layer in layers}


def attach(modules: Mapping[str, list[nn.Module]], planes: Mapping[str, Plane], gate: Gate) -> Any:
    """Let planes add to their layers' outputs wherever the gate is open. Returns the hooks'
    handles."""
    handles = []
    for name, plane in planes.items():
        for module in modules[name]:
            hook = _looked_up(plane, gate) if _kind(module) == "rows" else _multiplied(plane, gate)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    return handles


@contextmanager
def attached(
    modules: Mapping[str, list[nn.Module]], planes: Mapping[str, Plane], gate: Gate
) -> Iterator[None]:
    """As `attach`, for a while."""
    handles = attach(modules, planes, gate)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiplied(plane: Plane, gate: Gate) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if gate.open is False:
            return None
        x = args[0] if args else kwargs["input"]
        gate.read += plane.bytes
        if gate.open is True:
            return output + plane.product(x)
        return _added(output, x, gate.open, plane.product)

    return hook


def _looked_up(plane: Plane, gate: Gate) -> Any:
    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if gate.open is False:
            return None
        ids = args[0] if args else kwargs["input"]
        if gate.open is True:
            return output + plane.rows(ids).to(output)
        return _added(output, ids, gate.open, plane.rows)

    return hook


def _added(output: Tensor, x: Tensor, mask: Tensor, more: Any) -> Tensor:
    """The output with `more(x)` where the mask says so. The head may see the last tokens only."""
    lead = x.shape[:2] if output.ndim == 3 else x.shape[:1]
    own = mask[:, -lead[1] :] if len(lead) == 2 else mask.flatten()
    if own.shape != lead:
        raise ModelError(
            "This model shows some of its layers other tokens than it was given, so that planes can't "
            'be opened for single ones. Load it with unpack="always" or "never".'
        )
    found = output.clone()
    if bool(own.any()):
        found[own] = found[own] + more(x[own]).to(output)
    return found


def signal(logits: Tensor, kind: str) -> Tensor:
    """How unsure a distribution is [...], higher is less sure. logits [..., vocabulary].

    entropy: -sum q log q, nats. margin: log q of the second token less that of the first, <= 0.
    """
    log_q = torch.log_softmax(logits.float(), -1)
    if kind == "margin":
        top = log_q.topk(2, dim=-1).values
        return top[..., 1] - top[..., 0]
    return -(log_q.exp() * log_q).sum(-1)
