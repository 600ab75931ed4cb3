"""A model's blocks run one by one on fixed windows, so that each sees the inputs that the blocks
before it, already rounded, really send.

One whole pass records what every block is called with besides the hidden states (positions,
masks) and which layers of a block share an input; after that only hidden states are carried.
Memory: hidden states [windows, length, width], and the inputs of one batch in one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.arithmetic import exactly, guided, guiding
from optimizer.models.experts import Experts
from optimizer.models.halving import fitting
from optimizer.models.head import batches, head_input, windows_together
from optimizer.models.model import Model
from optimizer.models.offload import block_list
from optimizer.models.watching import first_tensor, rows_of
from optimizer.plan import Layer

HESSIANS = 2**28  # bytes of experts' that exist at a time
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Batch:
    """hidden: the next block's input [b, l, width], or more of them in front (Gemma 3n). calls: what
    each block gets besides it. ids [b, l]. ahead: what the block made of `hidden`, if known."""

    hidden: Tensor
    calls: list[Call]
    ids: Tensor
    ahead: Tensor | None = None


class Stream:
    """The blocks of `model` on `ids` [windows, length]; weights are read when a block runs, so
    they may change between calls. frozen: they don't, and a pass that collects Hessians serves to
    advance, too. together: windows in a batch. experts: those in one tensor have inputs, too."""

    def __init__(
        self,
        model: Model,
        ids: np.ndarray,
        frozen: bool = False,
        together: int | None = None,
        experts: bool = False,
    ) -> None:
        self._model, self._frozen = model, frozen
        self._experts = Experts(model) if experts else None
        self._watched = [layer for layer in model.inventory.layers if layer.watchable]
        self.blocks = blocks_of(model)
        self._shared: dict[int, list[list[str]]] = {}
        self._outputs = 0  # of a block that returns several things: how many
        self.ends = False  # whether `tail` gives what the head really gets
        self._seen: dict[str, int] = {}  # by how many of the learned tokens a layer was visited
        self._learned = 0  # tokens of the first whole pass
        together = together or fitting(model.net, windows_together(ids))
        self.batches = self._begin(batches(ids, together))

    def sees_all(self, layer: str) -> bool:
        """Whether every token runs through the layer's module."""
        return self._seen.get(layer) == self._learned

    def inputs(self, block: int) -> list[list[str]]:
        """Layers of the block that have a Hessian, in the order of execution; those that read the
        same tensor stand together."""
        return [names for step in self.steps(block) for names in step]

    def steps(self, block: int) -> list[list[list[str]]]:
        """The same; what stands in one step depends on no other layer of it: all experts."""
        found = [[names] for names in self._shared.get(block, [])]
        return found + (self._experts.steps(block) if self._experts else [])

    def portions(self, sets: Sequence[Sequence[str]]) -> Iterator[Sequence[Sequence[str]]]:
        """Sets of a block whose Hessians may exist at once: of experts, HESSIANS bytes of them."""
        modules = [names for names in sets if not self._fused(names)]
        if modules:
            yield modules
        part: list[Sequence[str]] = []
        size = 0
        for names in (names for names in sets if self._fused(names)):
            own = 4 * self._model.layers[names[0]].cols ** 2
            if part and size + own > HESSIANS:
                yield part
                part, size = [], 0
            part.append(names)
            size += own
        if part:
            yield part

    def _fused(self, names: Sequence[str]) -> bool:
        return self._experts is not None and self._experts.holds(names[0])

    def hessians(
        self,
        block: int,
        sharing: Sequence[Sequence[str]],
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> list[Tensor]:
        """sum x x' [cols, cols] of each set of a portion, from one pass, which stops after the last
        set unless the weights are frozen, or they are experts.
        weights: layer -> of its tokens [windows, length], taken from the first of each set."""
        shapes = [(n, n) for n in self._columns(sharing)]
        return self._summed(block, sharing, shapes, lambda to, x: to.addmm_(x.T, x), weights)

    def squares(
        self,
        block: int,
        sharing: Sequence[Sequence[str]],
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> list[Tensor]:
        """The diagonals [cols] of `hessians`."""
        shapes = [(n,) for n in self._columns(sharing)]
        return self._summed(
            block, sharing, shapes, lambda to, x: to.add_(x.square().sum(0)), weights
        )

    def _columns(self, sharing: Sequence[Sequence[str]]) -> list[int]:
        return [self._model.layers[names[0]].cols for names in sharing]

    def _summed(
        self,
        block: int,
        sharing: Sequence[Sequence[str]],
        shapes: Sequence[tuple[int, ...]],
        count: Callable[[Tensor, Tensor], Any],
        weights: Mapping[str, np.ndarray] | None,
    ) -> list[Tensor]:
        """count: adds the inputs [tokens, cols] of some tokens to what is found of a set."""
        device = self.batches[0].hidden.device
        found = [torch.zeros(shape, device=device) for shape in shapes]
        if sharing and self._experts is not None and self._fused(sharing[0]):

            def run() -> None:
                for batch in self.batches:
                    self._run(block, batch)

            self._experts.summed(sharing, found, count, run)
            return found
        modules = [self._module(self._model.layers[names[0]]) for names in sharing]

        def add(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = rows_of(args, kwargs)
                if x is None:
                    return
                if weights is not None:
                    own = torch.from_numpy(weights[sharing[index][0]][now[0] : now[1]])
                    if own.numel() == len(x):  # else only some tokens visit the layer
                        x = x * own.to(x).reshape(-1, 1).sqrt()
                count(found[index], x)
                if index == len(modules) - 1 and not self._frozen:
                    raise _EnoughError

            return hook

        now = [0, 0]  # the windows of the batch that runs
        handles = [
            m.register_forward_pre_hook(add(i), with_kwargs=True) for i, m in enumerate(modules)
        ]
        try:
            for batch in self.batches:
                now[:] = [now[1], now[1] + len(batch.ids)]
                with suppress(_EnoughError):
                    batch.ahead = self._run(block, batch)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def advance(self, block: int) -> None:
        """Replace the hidden states by the block's outputs, with the weights as they are now."""
        for batch in self.batches:
            known = batch.ahead if self._frozen else None
            batch.hidden = self._run(block, batch) if known is None else known
            batch.ahead = None

    def head_hessian(self) -> Tensor | None:
        """sum x x' [width, width] over the output head's inputs, after the last block; None where the
        model does more between the two than can be run without its blocks."""
        if not self.ends:
            return None
        found: Tensor | None = None
        for batch in self.batches:
            with torch.no_grad():
                x = self.tail(batch.ids, batch.hidden).flatten(0, -2).float()
            found = x.T @ x if found is None else found.addmm_(x.T, x)
        return found

    def front(self, ids: Tensor) -> Tensor:
        """ids [b, l] -> the first block's input, with gradients where they are enabled."""
        caught: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _EnoughError

        hook = self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with suppress(_EnoughError):
                head_input(self._model.net, ids)
        finally:
            hook.remove()
        return caught[0]

    def through(self, block: int, batch: Batch, hidden: Tensor) -> Tensor:
        """The block's output for other inputs than the batch's own, with gradients where they are
        enabled."""
        args, kwargs = batch.calls[block]

        def run(inputs: Tensor) -> Tensor:
            found: Tensor = _first(self.blocks[block](inputs, *args, **kwargs))
            return found

        return guided(self._model.net, run, hidden)

    def tail(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The last block's outputs -> the output head's inputs [b, l, width]: the model runs with
        blocks that return these outputs, whatever they get."""

        def forward(*_args: Any, **_kwargs: Any) -> Any:
            return (hidden, *[None] * (self._outputs - 1)) if self._outputs else hidden

        try:
            for block in self.blocks:
                block.forward = forward
            return head_input(self._model.net, ids)
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)

    def moved(self, block: int, parameters: Mapping[str, Tensor]) -> float:
        """How far the block's output on the first batch moves, as a share of its own size, when it
        runs with other values for some of the model's parameters. Changes nothing."""
        batch = self.batches[0]
        module = self.blocks[block]
        names = {id(value): name for name, value in module.named_parameters()}
        own = {names[id(self._model.net.get_parameter(k))]: v for k, v in parameters.items()}
        args, kwargs = batch.calls[block]

        def run(values: Mapping[str, Tensor]) -> Tensor:
            inputs = (batch.hidden.clone(), *args)
            return _first(torch.func.functional_call(module, dict(values), inputs, kwargs))

        with torch.no_grad(), exactly(self._model.net):
            found, wanted = run(own), run({})
        return float((found - wanted).norm() / wanted.norm())

    def _run(self, block: int, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.through(block, batch, batch.hidden.clone())

    def _module(self, layer: Layer) -> nn.Module:
        return self._model.net.get_submodule(layer.parameter.rpartition(".")[0])

    def _begin(self, parts: Iterable[Tensor]) -> list[Batch]:
        """Every batch at the first block's door. One window runs through the whole model, a batch of
        them where a layer may see all of its tokens by chance; other batches only if blocks get
        what depends on the tokens, or may: something that the first block doesn't get."""
        found: list[Batch] = []
        device = next(self._model.net.parameters()).device
        routed = any(layer.expert is not None for layer in self._model.inventory.layers)
        first: Batch | None = None
        settled = False  # two batches of one size got the same in all blocks
        for batch in parts:
            moved = batch.to(device)
            if first is None:
                some = moved if routed else moved[:1]
                with (
                    self._learning(),
                    self._experts.learning() if self._experts else nullcontext(),
                ):
                    first, entered = self._record(some, whole=True)
                self._check(first, entered)
                self._learned = some.numel()
                if len(some) == len(moved):
                    found.append(first)
                    continue
            own, _ = self._record(moved, whole=False)
            known = settled and len(moved) == len(first.ids)
            if _same(own.calls[0], first.calls[0]) and (known or _plain(first.calls)):
                own = Batch(own.hidden, first.calls, moved)
            else:
                own, _ = self._record(moved, whole=True)
                settled = _same(own.calls, first.calls) and len(moved) == len(first.ids)
                first = max(first, own, key=lambda x: len(x.ids))
            found.append(own)
        return found

    def _record(self, ids: Tensor, whole: bool) -> tuple[Batch, list[Tensor]]:
        """Run the model; stop at the first block unless `whole`. Also returns what the first two
        blocks received."""
        calls: list[Call] = []
        entered: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if len(entered) < 2:
                entered.append(hidden.clone())
            calls.append((rest, kwargs))
            if not whole:
                raise _EnoughError

        last: list[Any] = []
        found: Tensor | None = None
        hooks = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in self.blocks]
        hooks.append(self.blocks[-1].register_forward_hook(lambda _m, _i, out: last.append(out)))
        try:
            with torch.no_grad(), suppress(_EnoughError), guiding(self._model.net):
                found = head_input(self._model.net, ids)
        finally:
            for hook in hooks:
                hook.remove()
        if last and found is not None:
            self._learn_end(ids, last[0], found)
        return Batch(entered[0], calls, ids), entered

    def _learn_end(self, ids: Tensor, last: Any, head: Tensor) -> None:
        """After a whole pass: whether the blocks can be left out of one. last: what the last block
        returned. head: what the head received."""
        self._outputs = len(last) if isinstance(last, tuple) else 0
        try:
            with torch.no_grad():
                found = self.tail(ids, _first(last))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return
        self.ends = found.shape == head.shape and torch.allclose(found, head, 1e-4, 1e-4)

    @contextmanager
    def _learning(self) -> Iterator[None]:
        """While a whole pass runs: which layers read the same tensor, in order of execution."""
        self._shared = {}
        self._seen = {}
        last: list[Tensor] = []  # kept alive, so that a later tensor can't be taken for it

        def see(layer: Layer, block: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = first_tensor(args, kwargs)
                if x is None:
                    return
                self._seen[layer.name] = x.numel() // layer.cols
                sets = self._shared.setdefault(block, [])
                if any(layer.name in names for names in sets):
                    return
                if not sets or last[0] is not x:
                    sets.append([])
                last[:] = [x]
                sets[-1].append(layer.name)

            return hook

        handles = [
            self._module(layer).register_forward_pre_hook(
                see(layer, layer.block), with_kwargs=True
            )
            for layer in self._watched
            if layer.block is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check(self, batch: Batch, entered: Sequence[Tensor]) -> None:
        """The second block must have been called with what the first one returns."""
        chained = len(batch.calls) == len(self.blocks)
        if chained and len(entered) > 1:
            chained = self._leads_to(entered[1], batch)
        if not chained:
            raise ModelError(
                f"A calibrated quantizer runs a model block by block, and the blocks of "
                f"{type(self._model.net).__name__} aren't a plain chain. Take quantizer=rtn."
            )

    def _leads_to(self, second: Tensor, batch: Batch) -> bool:
        """Whether the first block returns what the second was called with. Reformer's take two streams
        by names of their own, and can't be called as others are."""
        try:
            return torch.allclose(self._run(0, batch), second, rtol=1e-3, atol=1e-3)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError):
            return False


class _EnoughError(Exception):
    """Ends a forward pass whose rest isn't needed."""


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def blocks_of(model: Model) -> list[nn.Module]:
    """The transformer blocks, which the inventory numbered."""
    found = block_list(model.net, model.inventory)
    if not found:
        raise ModelError("A calibrated quantizer needs a model with blocks. Take quantizer=rtn.")
    return found


def _plain(calls: Sequence[Call]) -> bool:
    """Whether no block gets a tensor that the first one doesn't get, too."""
    known = {id(x) for x in _tensors(calls[0])}
    return all(id(x) in known for call in calls for x in _tensors(call))


def _tensors(given: Any) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict | tuple | list):
        for x in given.values() if isinstance(given, dict) else given:
            yield from _tensors(x)


def _same(a: Any, b: Any) -> bool:
    """Whether two calls' arguments are equal, tensors by value."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a is b or bool(a == b)
