"""A model that holds a base and can add planes of further bits to it, token by token.

A plane refines one layer: with it open, the layer's output for inputs x [tokens, cols] is
    y = B' x + R' x,      B' the base's weight, R' the plane's, both [rows, cols].
Planes are opened for all tokens or for some (a mask). Weights are read from memory once a pass,
however many tokens it has, so that whoever opens planes for one token reads all before it with them,
too: after that the cache is the refined model's. `caught_up` reads a text as if it had been
written so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.layout import holders
from optimizer.plan import Inventory, Layer

SIGNALS = ("probe", "entropy", "margin")
FEATURES = 6  # of a distribution, before those of the head's input


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


def caught_up(
    forward: Callable[..., Any], gate: Gate, ids: Tensor, opened: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Logits of a text where planes are opened for some tokens, and then for all that came before.

    ids [windows, length]; opened: bool, the same. A token with planes is the refined model's own. One
    without is the base's, which reads the keys and values of the refined model up to the last token
    with planes, and its own since. Both models read side by side in one pass of twice the length:
    the base's tokens see the refined ones that an attention mask (of `dtype`, the model's) leaves
    them. For models whose every layer sees all tokens before and that take a mask of their caller's.
    Returns the logits [windows, length, vocabulary], and those of the base at every token, which are
    what says whether planes are needed there.
    """
    length = ids.shape[1]
    at = torch.arange(length, device=ids.device)
    before = at <= at[:, None]
    refined = torch.cat([before, torch.zeros_like(before)], 1).expand(len(ids), -1, -1)
    # the last token before each that has planes: [windows, length, 1]
    last = torch.where(opened, at, -1).cummax(1).values.roll(1, 1)
    last[:, 0] = -1
    last = last[:, :, None]
    base = torch.cat([at <= last, (at > last) & before], 2)
    seen = torch.cat([refined, base], 1)[:, None]
    gate.open = torch.cat([torch.ones_like(opened), torch.zeros_like(opened)], 1)
    try:
        logits = forward(
            input_ids=torch.cat([ids, ids], 1),
            position_ids=torch.cat([at, at]).expand(len(ids), -1),
            attention_mask=torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill_(
                ~seen, torch.finfo(dtype).min
            ),
            use_cache=False,
        ).logits
    finally:
        gate.open = False
    first, second = logits[:, :length], logits[:, length:]
    return torch.where(opened[:, :, None], first, second), second


# ---------------------------------------------------------------- where the base is unsure


@dataclass(frozen=True)
class Signal:
    """Says where planes are needed; higher is more. kind: of SIGNALS.

    entropy: -sum q log q of the base's distribution, nats. margin: log q of the second token less that
    of the first, <= 0. probe: weights [FEATURES + width] and bias of a linear probe of the
    distribution and the head's input, fitted to the log of the loss.
    """

    kind: str
    weights: tuple[float, ...] = ()
    bias: float = 0.0

    def __call__(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """[...]. logits [..., vocabulary]; hidden [..., width]: what the head made them of."""
        if self.kind == "probe":
            found = features(logits, hidden)
            return found @ torch.tensor(self.weights, device=found.device) + self.bias
        log_q = torch.log_softmax(logits.float(), -1)
        if self.kind == "margin":
            top = log_q.topk(2, dim=-1).values
            return top[..., 1] - top[..., 0]
        return -(log_q.exp() * log_q).sum(-1)


def features(logits: Tensor, hidden: Tensor) -> Tensor:
    """What a probe looks at [..., FEATURES + width] fp32: entropy and its root, the best token's
    probability and its log, the lead on the second and on the eighth; the head's input."""
    log_q = torch.log_softmax(logits.float(), -1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    top = log_q.topk(min(8, log_q.shape[-1]), dim=-1).values
    best = top[..., 0]
    of = [
        entropy,
        entropy.clamp(min=0).sqrt(),
        best,
        best.exp(),
        best - top[..., 1],
        best - top[..., -1],
    ]
    return torch.cat([torch.stack(of, -1), hidden.float()], -1)


@contextmanager
def watched(net: Any) -> Iterator[list[Tensor]]:
    """Inside, the yielded list holds what the head read in the last pass [windows, tokens, width].
    Raises ModelError for a model whose head can't be told."""
    seen, handle = watch(net)
    try:
        yield seen
    finally:
        handle.remove()


def watch(net: Any) -> tuple[list[Tensor], Any]:
    """As `watched`, until the returned handle is removed."""
    head = net.get_output_embeddings()
    if head is None:
        raise ModelError(
            "This model doesn't say which layer is its head, so that a probe can't read what goes in. "
            "Set nested.signal=entropy."
        )
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[:] = [args[0] if args else kwargs["input"]]

    return seen, head.register_forward_pre_hook(hook, with_kwargs=True)
