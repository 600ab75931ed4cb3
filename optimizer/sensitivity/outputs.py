"""How much each token's error counts, layer by layer: gradients of the layers' outputs.

A layer's outputs y_t = W x_t at tokens t; g_t the gradient of log p(labels) at y_t, labels sampled
from the model. The second-order loss of an error dW, with one weight for all outputs of a token
(GuidedQuant, arXiv:2505.07004, with a single group of outputs):
    KL ~ 1/(2T) sum_t |g_t|^2 / rows sum_j (dW_j x_t)^2
so Hessians of inputs become sum_t s_t x_t x_t', s_t = |g_t|^2 over its mean. One label a token makes
that noisy, and few tokens decide: s_t = |g_t| over its mean, between that and tokens alike, rounds
better (experiments/03-rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.arithmetic import TooLargeError, unscaled
from optimizer.models.blockwise import Stream
from optimizer.models.head import final_transform, output_head
from optimizer.models.model import Model
from optimizer.models.offload import offloaded
from optimizer.models.watching import begin_gradients, on_gradient
from optimizer.plan import Layer
from optimizer.sensitivity.borders import Borders
from optimizer.sensitivity.fisher import likelihood, likelihood_of


def token_weights(
    model: Model,
    layers: Sequence[Layer],
    ids: np.ndarray,
    seed: int,
    track: Callable[[Iterable[Any], str], Iterable[Any]],
    squared: bool,
) -> dict[str, np.ndarray]:
    """Layer -> s [windows, length] fp32 with mean 1; ones for a layer that no gradient reaches, that
    only some tokens visit, or whose module returns more than its product.
    Cost: a forward and a backward pass a window; no gradient of a weight is made."""
    net = model.net
    device = next(net.parameters()).device
    found = {layer.name: np.zeros(ids.shape, np.float32) for layer in layers}
    now = [0]

    def catch(name: str) -> Callable[..., None]:
        def use(gradient: Tensor) -> None:
            lengths = unscaled(net, gradient).float().norm(dim=-1).reshape(-1)
            if len(lengths) == ids.shape[1]:  # else only some tokens visit the layer
                found[name][now[0]] = lengths.cpu().numpy()

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            on_gradient(output, use)

        return hook

    modules = {x.name: net.get_submodule(x.parameter.rpartition(".")[0]) for x in layers}
    handles = [m.register_forward_hook(catch(name)) for name, m in modules.items()]
    handles.append(begin_gradients(net))  # weights stay without
    try:
        windows = [torch.from_numpy(row)[None].to(device) for row in ids]
        away = offloaded(net) is not None and model.pooling is None
        if not (away and _passed(model, windows, seed, track, now)):
            for now[0] in track(range(len(ids)), "weights of tokens"):
                likelihood(model, windows[now[0]], [seed, now[0]]).backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: _normal(s**2 if squared else s) for name, s in found.items()}


def _passed(model: Model, *rest: Any) -> bool:
    """`_block_by_block`, once more in fp32 where it has to be."""
    try:
        return _block_by_block(model, *rest)
    except TooLargeError:
        return _block_by_block(model, *rest)


def _block_by_block(
    model: Model,
    windows: Sequence[Tensor],
    seed: int,
    track: Callable[[Iterable[Any], str], Iterable[Any]],
    now: list[int],
) -> bool:
    """The same backward passes, all windows through a block before the next is read. now: gets the
    number of the window that runs. False: the blocks are no chain."""
    try:
        stream = Stream(model, torch.cat(list(windows)).cpu().numpy(), frozen=True, together=1)
    except ModelError:
        return False
    if not stream.ends:
        return False
    shape = final_transform(model.net)
    blocks = range(len(stream.blocks))
    steps = iter(track([*blocks, *blocks], "weights of tokens"))
    size = sum(x.hidden.numel() * x.hidden.element_size() for x in stream.batches) * len(blocks)
    with closing(Borders(size, "Weighing tokens", "data.calibration.sequences")) as borders:
        for block in blocks:
            next(steps)
            for i, batch in enumerate(stream.batches):
                borders.keep(block, i, batch.hidden)
            stream.advance(block)
        arrived = []
        for now[0], batch in enumerate(stream.batches):
            last = batch.hidden.clone().requires_grad_(True)
            x = stream.tail(batch.ids, last)
            logits = shape(output_head(model.net)(x)[0].float())
            likelihood_of(logits, [seed, now[0]]).backward()
            assert last.grad is not None
            arrived.append(last.grad)
        for block in reversed(blocks):
            next(steps)
            for now[0], batch in enumerate(stream.batches):
                hidden = borders.take(block, now[0], batch.hidden).requires_grad_(True)
                stream.through(block, batch, hidden.clone()).backward(arrived[now[0]])
                assert hidden.grad is not None
                arrived[now[0]] = hidden.grad
    for _ in steps:
        pass
    return True


def _normal(s: np.ndarray) -> np.ndarray:
    mean = float(s.mean())
    if not (np.isfinite(mean) and mean > 0):
        return np.ones_like(s)
    return s / mean
