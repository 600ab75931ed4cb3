"""Fisher's information, block by block: what is kept of the gradients is of one block at a time, and
every precision is rounded once for all windows.

    forward    each block's input is kept in a file; the blocks run one after the other on all windows
    head       labels y ~ p(.|x) from a window's own seed, and the gradient of their log-likelihood at
               the last block's output
    backward   from the last block to the first: run it again with gradients from its kept input; its
               weights' gradients, window by window, are squared and summed (`diagonal`), or taken as
               they are (`directional`); or its layers' inputs and the gradients at their outputs are
               kept (`tokenwise`, `kronecker`); each precision is scored; what is left is the gradient
               at its input
    outside    embeddings and head, with the gradient that arrived at the first block

A layer that sees every token needs no gradient of autograd's own: it is d' x of its inputs x [tokens,
cols] and of the gradients d [tokens, rows] at its outputs. Blocks with other layers (experts) run one
window at a time; where every expert has a product of its own, so does its gradient, and no gradient
of all experts exists. What is known is left on a desk after each block. Cost: two forward passes and
a backward pass, and the head twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from optimizer.errors import ModelError
from optimizer.models.arithmetic import TooLargeError, sized, unscaled
from optimizer.models.blockwise import Batch, Stream
from optimizer.models.halving import fitting, halved
from optimizer.models.head import final_transform, output_head, tokens_together
from optimizer.models.model import Model
from optimizer.models.offload import offloaded
from optimizer.models.watching import Products, plain_experts
from optimizer.plan import Layer
from optimizer.sensitivity import agreement, vocabulary
from optimizer.sensitivity.borders import Borders
from optimizer.sensitivity.errors import blank, settled
from optimizer.sensitivity.fisher import (
    backward,
    gradients,
    likelihood,
    sampled,
    watching,
)
from optimizer.sensitivity.pace import TOTAL, Pace
from optimizer.sensitivity.products import Met, Product, add_losses
from optimizer.sensitivity.sent import Sent, Way
from optimizer.sensitivity.squares import Squares
from optimizer.sensitivity.table import Desk, Task, Text, rarely_met
from optimizer.sensitivity.vocabulary import Ends

TOGETHER = 1024  # tokens that run through a block at a time
MANY = 4096  # on a GPU
COLLECTED = 2**28  # bytes of experts' inputs and gradients from which they are scored


def samples(
    model: Model, task: Task, text: Text, desk: Desk, way: Way | None = None
) -> np.ndarray | None:
    """Chunks' estimates [chunks, groups, precisions], nats per token, equal to those of `fisher` for
    each chunk within float error: `diagonal`, `directional` where the text's windows stand apart, or,
    of modules in the blocks, another way's. None where the model's blocks can't be run by themselves:
    they are no chain, share parameters, or read more of the model than their input."""
    if model.pooling is not None or any(len(x.parameters) > 1 for x in model.inventory.layers):
        return None
    device = next(model.net.parameters()).device
    tokens = sized(device, TOGETHER, MANY)
    most = min(len(text.ids), max(1, tokens // text.ids.shape[1]))
    together = fitting(model.net, most)
    while True:
        try:
            return _made(model, task, text, desk, way, together)
        except TooLargeError:
            continue  # in fp32
        except torch.OutOfMemoryError:
            pass  # what its frames hold is freed first
        together = halved(model.net, together)


def _made(
    model: Model, task: Task, text: Text, desk: Desk, way: Way | None, together: int
) -> np.ndarray | None:
    """As `samples`, with so many windows at a time."""
    own = [model.layers[name] for name in task.layers if model.layers[name].block is not None]
    try:
        stream = Stream(model, text.ids, frozen=True, together=together)
        odd = {x.block for x in own if not (x.watchable and stream.sees_all(x.name))}
        if odd and together > 1:
            stream = Stream(model, text.ids, frozen=True, together=1)
    except ModelError:
        return None
    if not stream.ends or agreement.shared(stream.blocks):
        return None
    size = sum(x.hidden.numel() * x.hidden.element_size() for x in stream.batches)
    with closing(Borders(size * len(stream.blocks))) as borders:
        try:
            return _Passes(model, task, text, way, stream, borders, odd).run(desk)
        except _Unlike:
            return None


class _Unlike(ModelError):
    """The blocks by themselves don't show what the whole model does; it is asked itself."""


class _Passes:
    """One table in the making."""

    def __init__(
        self,
        model: Model,
        task: Task,
        text: Text,
        way: Way | None,
        stream: Stream,
        borders: Borders,
        odd: set[int | None],
    ) -> None:
        """odd: blocks with layers that some tokens pass by; they run one window at a time."""
        self.model, self.task, self.text, self.stream = model, task, text, stream
        self.way = way
        self.borders, self.odd = borders, odd
        self.head, self.shape = output_head(model.net), final_transform(model.net)
        layers = [model.layers[name] for name in task.layers]
        self.layers = {
            block: [x for x in layers if x.block == block]
            for block in [None, *range(len(stream.blocks))]
        }
        self.losses = {x.name: blank(task, text.sums) for x in layers}
        self.labels = np.zeros(text.ids.shape, np.int64)
        self.normalisers = np.zeros(text.ids.shape, np.float32)
        firsts = np.cumsum([0, *(len(batch.ids) for batch in stream.batches)])
        self.windows = [range(a, b) for a, b in pairwise(firsts.tolist())]

    def run(self, desk: Desk) -> np.ndarray | None:
        with desk.meter("sensitivity", TOTAL) as tell:
            disk = offloaded(self.model.net)
            read = None if disk is None else lambda: disk.read
            blocks = len(self.stream.blocks)
            every = [(block, x.weights) for block, own in self.layers.items() for x in own]
            inside = sum(weights for block, weights in every if block is not None) / blocks
            ends = sum(weights for block, weights in every if block is None) / max(inside, 1)
            pace = Pace(tell, blocks, self.text.ids.size, read, outside=ends)
            return self._run(desk, pace)

    def _run(self, desk: Desk, pace: Pace) -> np.ndarray | None:
        blocks = range(len(self.stream.blocks))
        for block in blocks:
            for i, batch in enumerate(self.stream.batches):
                self.borders.keep(block, i, batch.hidden)
            self.stream.advance(block)
            pace.passed("forward", block)
        left = desk.left()
        if left is None:
            first = len(blocks)
            arrived = [self._at_the_end(i) for i in range(len(self.stream.batches))]
        else:
            first, arrived = self._resume(left)
        for block in reversed(blocks):
            if block < first:
                self._backward(block, arrived)
                desk.leave(self._state(block, arrived))
            pace.passed("back", block, skipped=block >= first)
            inside = sum(len(self.layers[b]) for b in blocks[block:])
            desk.show(inside, len(self.losses), self.text.ids.size)
        if not self._agrees(arrived[0]):
            return None
        pace.outside()
        self._outside(arrived)
        desk.show(len(self.losses), len(self.losses), self.text.ids.size)
        pace.ended()
        layers, text = self.model.layers, self.text
        losses = {n: settled(self.task, layers[n], x, text.power) for n, x in self.losses.items()}
        parts = text.runs if text.apart else [slice(c, c + 1) for c in range(text.sums)]
        rare = rarely_met({n: np.array([x[p].any(0) for p in parts]) for n, x in losses.items()})
        if rare is not None:
            desk.note(rare)
        sums = np.array(
            [self.task.collect({n: x[i] for n, x in losses.items()}) for i in range(text.sums)]
        )
        if text.apart:  # a whole group's slope is squared, window by window
            sums = np.array([(sums[run] ** 2).sum(0) for run in text.runs])
        counts = [2 * self.model.predictions(text.ids[run]) for run in text.runs]
        return sums / np.array(counts)[:, None, None]

    def _state(self, block: int, arrived: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """What is known when a block is done: gradients at its input, the losses from there on."""
        border = torch.cat([x.cpu() for x in arrived]).numpy()  # whatever batches come later
        return {
            "block": np.array([block]),
            "labels": self.labels,
            "normalisers": self.normalisers,
            "border": border,
            **self.losses,
        }

    def _resume(self, left: dict[str, np.ndarray]) -> tuple[int, list[Tensor]]:
        """The last block that was done, and the gradients at its input."""
        for name, losses in self.losses.items():
            losses[:] = left[name]
        self.labels[:], self.normalisers[:] = left["labels"], left["normalisers"]
        device = self.stream.batches[0].hidden.device
        border = torch.from_numpy(left["border"])
        arrived = [border[one.start : one.stop].to(device) for one in self.windows]
        return int(left["block"][0]), arrived

    # ------------------------------------------------------------ the head

    def _likelihood(self, x: Tensor, window: int) -> None:
        """Backward from the log-likelihood of a window's sampled labels. x: the head's inputs
        [length, width]. Notes the labels and their normalisers."""
        weights = self.text.weights
        roots = None if weights is None else torch.from_numpy(np.sqrt(weights[window])).to(x)
        draws = np.random.default_rng(self.text.labels(window)).random((len(x), 1))
        some = tokens_together(self.head)
        for i in range(0, len(x), some):
            part = slice(i, i + some)
            logits = self.shape(self.head(x[part]).float())
            labels = sampled(logits, draws[part])
            each = torch.log_softmax(logits, -1).gather(-1, labels)[:, 0]
            normaliser = (logits.gather(-1, labels)[:, 0] - each).detach()
            self.labels[window, part] = labels[:, 0].cpu().numpy()
            self.normalisers[window, part] = normaliser.cpu().numpy()
            backward((each if roots is None else each * roots[part]).sum())

    def _at_the_end(self, index: int) -> Tensor:
        """The gradient at the last block's output [b, l, width] of a batch."""
        batch = self.stream.batches[index]
        hidden = batch.hidden.clone().requires_grad_(True)
        x = self.stream.tail(batch.ids, hidden)
        if x.shape[:-1] != batch.ids.shape:  # ProphetNet predicts several tokens ahead
            raise _Unlike(f"The head reads {tuple(x.shape)} of {tuple(batch.ids.shape)} tokens.")
        leaf = x.detach().requires_grad_(True)
        for row, window in zip(leaf, self.windows[index], strict=True):
            self._likelihood(row, window)
        assert leaf.grad is not None
        x.backward(leaf.grad)
        assert hidden.grad is not None
        return hidden.grad

    # ------------------------------------------------------------ a block

    def _squares(self, layers: Sequence[Layer]) -> Squares:
        batches = len(self.stream.batches)
        return Squares(self.model, self.task, self.text, layers, batches, self.losses)

    def _backward(self, block: int, arrived: list[Tensor]) -> None:
        """arrived: each batch's gradient at the block's output; at its input afterwards."""
        own = [x for x in self.layers[block] if self.way is None or not x.watchable]
        rest = [x for x in self.layers[block] if x not in own]
        alone = Sent(
            self.model, self.task, self.text, self.way, rest, self.windows, self.losses, COLLECTED
        )
        if block in self.odd and own and self._by_products(block, own, alone, arrived):
            return
        squares = self._squares(own)
        for index, batch in enumerate(self.stream.batches):
            hidden = self.borders.take(block, index, batch.hidden).requires_grad_(True)
            windows = self.windows[index]
            if block in self.odd:
                add = partial(squares.add, windows[0])
                with alone.watched(index), gradients(self.model.net, squares.names, add):
                    self.stream.through(block, batch, hidden.clone()).backward(arrived[index])
            else:
                met: set[str] = set()
                use = partial(self._multiply, squares, batch, windows, met)
                names = [x.name for x in own]
                with alone.watched(index), watching(self.model, names, use, begin=False):
                    self.stream.through(block, batch, hidden.clone()).backward(arrived[index])
                if len(met) < len(own):
                    raise _Unlike(f"{sorted({x.name for x in own} - met)[0]} had no gradient.")
            assert hidden.grad is not None
            arrived[index] = hidden.grad
            alone.score(index)
        squares.score()
        self._check(alone)

    def _by_products(
        self, block: int, own: Sequence[Layer], alone: Sent, arrived: list[Tensor]
    ) -> bool:
        """As `_backward`, for layers that are matrices by which the block multiplies some of its
        tokens. False, and nothing done, where they aren't."""
        starts = {layer.name: place for layer in own if (place := layer.start) is not None}
        if len(starts) < len(own):
            return False
        names = {name for name, _ in starts.values()}
        batches, met = self.stream.batches, Met()
        net = self.model.net

        def add(name: str, first: int, x: Tensor, d: Tensor) -> None:
            met.add(name, first, x, unscaled(net, d))

        watch = Products({name: net.get_parameter(name) for name in names}, add)
        with plain_experts(self.model.net):
            for index, batch in enumerate(batches):
                met.number = self.text.sum_of(self.windows[index][0])
                hidden = self.borders.take(block, index, batch.hidden).requires_grad_(True)
                with alone.watched(index), watch:
                    output = self.stream.through(block, batch, hidden.clone())
                if watch.odd and index == 0:
                    return False
                output.backward(arrived[index])
                assert hidden.grad is not None
                arrived[index] = hidden.grad
                alone.score(index)
                if met.bytes > COLLECTED or index + 1 == len(batches):
                    for layer in own:
                        products = met.of(layer, *starts[layer.name])
                        self._score(layer, products)
                    met.clear()
        every = {x.parameter for x in own if x.expert is not None or self.stream.sees_all(x.name)}
        if watch.odd or not every <= met.names:
            raise _Unlike(f"Of {sorted(every - met.names)[:1]} no product was seen ({watch.odd}).")
        self._check(alone)
        return True

    def _check(self, alone: Sent) -> None:
        if (name := alone.unseen) is not None:
            raise _Unlike(f"{name} had no gradient.")

    def _multiply(
        self,
        squares: Squares,
        batch: Batch,
        windows: range,
        met: set[str],
        name: str,
        x: Tensor,
        d: Tensor,
    ) -> None:
        """x [b l, cols], d [b l, rows] -> the gradient of each window, as the parameter lies."""
        met.add(name)
        layer, shape = self.model.layers[name], batch.ids.shape
        if squares.at_once:
            each = zip(windows, x.view(*shape, -1), d.view(*shape, -1), strict=True)
            products = [Product(self.text.sum_of(window), *pair) for window, *pair in each]
            self._score(layer, products)
            return
        a, b = (x, d) if layer.kind == "conv1d" else (d, x)
        for window, left, right in zip(
            windows, a.view(*shape, -1), b.view(*shape, -1), strict=True
        ):
            squares.add(window, layer.parameter, left.T @ right)

    def _score(self, layer: Layer, products: Sequence[Product]) -> None:
        found, power = self.losses[layer.name], self.text.power
        add_losses(self.model, self.task, layer, products, found, power)

    # ------------------------------------------------------------ outside the blocks

    def _agrees(self, arrived: Tensor) -> bool:
        """As `agreement.agrees`, on the first window."""
        device = self.stream.batches[0].ids.device
        window = torch.from_numpy(self.text.ids[:1]).to(device)
        weights = None if self.text.weights is None else self.text.weights[0]

        def scalar() -> Tensor:
            return likelihood(self.model, window, self.text.labels(0), weights)

        return agreement.agrees(self.model, self.stream, scalar, arrived[0])

    def _outside(self, arrived: Sequence[Tensor]) -> None:
        """Embeddings, the head, and what else lies before or behind the blocks."""
        wide = [
            x for x in self.layers[None] if vocabulary.suits(self.model, self.task, x, self.shape)
        ]
        if wide:
            ends = self._ends(arrived)
            for layer in wide:
                found = vocabulary.losses(self.model, self.task, layer, self.text, ends)
                self.losses[layer.name][:] = found
        own = [x for x in self.layers[None] if x not in wide]
        if not own:
            return
        net, squares = self.model.net, self._squares(own)
        parameters = {name: net.get_parameter(name) for name in sorted(squares.names)}
        heads = any(x.predicts for x in own)
        try:
            for value in parameters.values():
                value.requires_grad_(True)
            for index, batch in enumerate(self.stream.batches):
                for row, window in enumerate(self.windows[index]):
                    ids = batch.ids[row : row + 1]
                    before = self.stream.front(ids)
                    if before.requires_grad:
                        before.backward(arrived[index][row : row + 1])
                    last = batch.hidden[row : row + 1]
                    if heads or any(x.kind != "embedding" for x in own):
                        self._likelihood(self.stream.tail(ids, last)[0], window)
                    for name, value in parameters.items():
                        if value.grad is not None:
                            squares.add(window, name, value.grad)
                            value.grad = None
        finally:
            for value in parameters.values():
                value.requires_grad_(False).grad = None
        squares.score()

    def _ends(self, arrived: Sequence[Tensor]) -> Ends:
        """Both ends of all windows. arrived: each batch's gradient at the first block's input."""
        with torch.no_grad():
            inputs = [self.stream.tail(batch.ids, batch.hidden) for batch in self.stream.batches]
        table, looked = self.model.net.get_input_embeddings(), []
        sparse, value = getattr(table, "sparse", False), table.weight
        try:
            table.sparse = True
            value.requires_grad_(True)
            for index, batch in enumerate(self.stream.batches):
                for row in range(len(batch.ids)):
                    before = self.stream.front(batch.ids[row : row + 1])
                    if before.requires_grad:
                        before.backward(arrived[index][row : row + 1])
                    looked.append(_rows(value.grad, value))
                    value.grad = None
        finally:
            table.sparse = sparse
            value.requires_grad_(False).grad = None
        return Ends(torch.cat(inputs), self.labels, self.normalisers, self.shape, looked)


def _rows(gradient: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [n] and their rows [n, width] of an embedding's gradient; like: the embedding."""
    if gradient is None:
        return torch.empty(0, dtype=torch.long, device=like.device), like.new_empty(
            0, like.shape[1]
        )
    if gradient.is_sparse:
        whole = gradient.coalesce()
        return whole.indices()[0], whole.values()
    ids = gradient.any(1).nonzero()[:, 0]
    return ids, gradient[ids]
