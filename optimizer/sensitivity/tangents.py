"""Hutchinson's estimate of the Hessian's trace, block by block.

At the reference the KL divergence has no gradient, so that its Hessian along a vector v of weights is
    H v = J' F J v,    F = diag(p) - p p' at each token's logits, p its probabilities
without second derivatives: J v is what a small step along v does to the logits (forward-mode
differentiation), J' is the backward pass. Then v' H v = sum over layers of <gradient at the layer's
outputs, what v makes of its inputs>, and its mean over v of -1 and +1 is the trace.

    forward    hidden states and how they move along v, one block after the other on all windows
    head       F times how the logits move
    backward   from the last block to the first, each run again from its kept input
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from optimizer.errors import ModelError
from optimizer.models.arithmetic import exactly
from optimizer.models.blockwise import Batch, Stream
from optimizer.models.head import final_transform, output_head
from optimizer.models.layout import holders
from optimizer.models.model import Model
from optimizer.models.offload import offloaded
from optimizer.models.watching import on_gradient
from optimizer.plan import Layer
from optimizer.sensitivity.agreement import agrees, shared
from optimizer.sensitivity.borders import Borders
from optimizer.sensitivity.fisher import rounding_errors
from optimizer.sensitivity.hessian import losses_of, math_attention, signs
from optimizer.sensitivity.pace import TOTAL, Pace
from optimizer.sensitivity.table import Desk, Task, Text

NEAR = 1e-3  # as a share, between the two directions
PIECES = ("linear", "conv1d", "embedding", "head")  # kinds of layers that are a module's weight
Moved = Callable[[str, Tensor, Tensor], Tensor]  # parameter, a module's output, what v makes of it


def samples(model: Model, task: Task, text: Text, desk: Desk, probes: int) -> np.ndarray | None:
    """Chunks' estimates [chunks, groups, precisions], nats per token, equal to `hessian.trace` of each
    chunk within float error. probes: vectors v for each window. None where the blocks are no chain, a
    layer isn't the weight of a module, or the model does something without a forward derivative.
    Memory: one block, and the vectors of a layer. Cost: two forward passes, one of them twice as
    expensive, a backward pass, and a product of every layer in each."""
    layers = [model.layers[name] for name in task.layers]
    owners = _owners(model, layers)
    if model.pooling is not None or owners is None:
        return None
    with exactly(model.net), math_attention(), warnings.catch_warnings():
        # PyTorch's forward mode still compiles its formulas so
        warnings.filterwarnings("ignore", "`torch.jit.script`", DeprecationWarning)
        try:
            stream = Stream(model, np.repeat(text.ids, probes, 0), frozen=True, together=1)
            if not stream.ends or shared(stream.blocks):
                return None
            totals = _Traces(model, owners, text, stream, probes).run(desk)
        except (ModelError, NotImplementedError):
            return None
        except RuntimeError as error:
            if "forward" not in str(error):  # of PyTorch: no forward derivative of this function
                raise
            return None
    if totals is None:
        return None
    norms = {
        x.name: np.array([float(e.square().sum()) for _, e in rounding_errors(model, task, x)])
        for x in layers
    }
    found = []
    for chunk, run in enumerate(text.runs):
        own = {x.name: float(totals[x.parameter][chunk]) / probes for x in layers}
        found.append(losses_of(task, layers, own, norms) / (2 * text.ids[run].size))
    return np.array(found)


def _owners(model: Model, layers: Sequence[Layer]) -> dict[str, list[nn.Module]] | None:
    """Parameter -> the modules whose weight it is; None where one is something else."""
    held, found = holders(model.net), dict[str, list[nn.Module]]()
    for layer in layers:
        value = model.net.get_parameter(layer.parameter)
        own = held[id(value)]
        plain = layer.kind in PIECES and len(layer.parameters) == 1
        if not (plain and value.numel() == layer.weights and all(x == "weight" for _, x in own)):
            return None
        found[layer.parameter] = [module for module, _ in own]
    return found


class _Traces:
    """Sums of v' H v of each parameter and chunk."""

    def __init__(
        self,
        model: Model,
        owners: dict[str, list[nn.Module]],
        text: Text,
        stream: Stream,
        probes: int,
    ) -> None:
        self._model, self._owners, self._text, self._stream = model, owners, text, stream
        self._probes, self._turn = probes, 0  # the number of the window and probe that run
        self._aside = False
        self._met: set[str] = set()
        self._wanted = 0.0
        self.totals = {name: np.zeros(len(text.runs)) for name in owners}

    def run(self, desk: Desk) -> dict[str, np.ndarray] | None:
        stream, batches = self._stream, self._stream.batches
        blocks = range(len(stream.blocks))
        disk = offloaded(self._model.net)
        size = sum(x.hidden.numel() * x.hidden.element_size() for x in batches) * len(blocks)
        with (
            desk.meter("sensitivity", TOTAL) as tell,
            closing(Borders(size)) as borders,
        ):
            read = None if disk is None else lambda: disk.read
            tokens = sum(x.ids.numel() for x in batches)
            pace = Pace(tell, len(blocks), tokens, read, outside=1)
            moved = [
                self._along(i, partial(stream.front, x.ids))[1] for i, x in enumerate(batches)
            ]
            for block in blocks:
                for i, batch in enumerate(batches):
                    borders.keep(block, i, batch.hidden)

                    def through(own: Batch = batch, i: int = i, block: int = block) -> Tensor:
                        dual = forward_ad.make_dual(own.hidden, moved[i])
                        return stream.through(block, own, dual)

                    batch.hidden, moved[i] = self._along(i, through)
                pace.passed("forward", block)
            arrived = [self._at_the_end(i, moved[i]) for i in range(len(batches))]
            for block in reversed(blocks):
                for i, batch in enumerate(batches):
                    hidden = borders.take(block, i, batch.hidden).requires_grad_(True)
                    with self._watched(i, self._add):
                        stream.through(block, batch, hidden.clone()).backward(arrived[i])
                    assert hidden.grad is not None
                    arrived[i] = hidden.grad
                pace.passed("back", block)
            if not agrees(self._model, stream, self._scalar, arrived[0][0]):
                return None
            pace.outside()
            for i, batch in enumerate(batches):
                with self._watched(i, self._add):
                    before = stream.front(batch.ids)
                    if before.requires_grad:
                        before.backward(arrived[i])
            pace.ended()
        return self.totals if self._consistent() else None

    def _consistent(self) -> bool:
        """Whether gradients came by all modules, and said forward what they say back: the sum over all
        layers is v' J' F J v, from both ends."""
        found = sum(float(own.sum()) for own in self.totals.values())
        near = abs(found - self._wanted) <= NEAR * abs(self._wanted)
        return near and self._met == self.totals.keys()

    def _along(self, index: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """What a window's pass gives, and how that moves along v."""
        with torch.no_grad(), forward_ad.dual_level(), self._watched(index, _moving):
            found = forward_ad.unpack_dual(run())
            primal, tangent = found.primal.clone(), found.tangent
            return primal, torch.zeros_like(primal) if tangent is None else tangent.clone()

    def _at_the_end(self, index: int, moved: Tensor) -> Tensor:
        """The gradient at the last block's output [1, l, width] of a window."""
        batch = self._stream.batches[index]
        logits, step = self._along(
            index,
            lambda: self._logits(batch.ids, forward_ad.make_dual(batch.hidden, moved)),
        )
        p = logits.softmax(-1)
        gradient = p * (step - (p * step).sum(-1, keepdim=True))
        if index == 0:
            self._first = gradient
        self._wanted += float((gradient * step).sum(dtype=torch.float64))
        hidden = batch.hidden.clone().requires_grad_(True)
        with self._watched(index, self._add):
            self._logits(batch.ids, hidden).backward(gradient)
        assert hidden.grad is not None
        return hidden.grad

    def _logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        net = self._model.net
        x = self._stream.tail(ids, hidden)
        found: Tensor = final_transform(net)(output_head(net)(x).float())
        return found

    def _scalar(self) -> Tensor:
        """Whose gradient is the first window's."""
        return (self._model.logits(self._stream.batches[0].ids) * self._first[0]).sum()

    def _add(self, name: str, output: Tensor, moved: Tensor) -> Tensor:
        chunk = self._text.chunk(self._turn // self._probes)

        def use(gradient: Tensor) -> None:
            self.totals[name][chunk] += float((gradient * moved).sum(dtype=torch.float64))
            self._met.add(name)

        if not output.requires_grad:  # an embedding's, where gradients end
            output = output.requires_grad_(True).clone()
        on_gradient(output, use)
        return output

    @contextmanager
    def _watched(self, index: int, then: Moved) -> Iterator[None]:
        """While a window runs, whatever is multiplied by a layer's weight is multiplied by v, too."""
        self._turn = index
        with ExitStack() as stack:
            for name, modules in self._owners.items():
                for module in modules:
                    hook = self._hook(name, then)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def _hook(self, name: str, then: Moved) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            if self._aside or not isinstance(output, Tensor):
                return None
            window, probe = divmod(self._turn, self._probes)
            shape = self._model.net.get_parameter(name).shape
            v = signs([*self._text.labels(window), probe], name, shape).to(output)
            padding, bias = (getattr(module, x, None) for x in ("padding_idx", "bias"))
            if padding is not None:
                v[padding] = 0  # as the backward pass has it
            own = {"weight": v} | ({} if bias is None else {"bias": torch.zeros_like(bias)})
            self._aside = True
            try:
                given = tuple(_primal(x) for x in args), {k: _primal(x) for k, x in kwargs.items()}
                moved = torch.func.functional_call(module, own, *given)
            finally:
                self._aside = False
            return then(name, output, moved.detach())

        return hook


def _moving(_name: str, output: Tensor, moved: Tensor) -> Tensor:
    """The output as it moves along v: by the layer's own step, beside that of its inputs."""
    return output + forward_ad.make_dual(torch.zeros_like(output), moved)


def _primal(x: Any) -> Any:
    return forward_ad.unpack_dual(x).primal.detach() if isinstance(x, Tensor) else x
