"""The output head: what it receives, and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.errors import ModelError

CHUNK = 512  # tokens whose logits exist at one time, twice
BATCH_TOKENS = 2048  # tokens that run through the blocks together


class Predictor:
    """A model's head and what follows it: hidden states -> log-probabilities of the next token."""

    def __init__(self, net: nn.Module) -> None:
        self._head = output_head(net)
        self._shape = final_transform(net, np.zeros((1, 2), np.int64))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Input of the head [tokens, width] -> [tokens, vocabulary]. Give CHUNK tokens at most."""
        return torch.log_softmax(self._shape(self._head(hidden).float()), -1)


def batches(ids: np.ndarray, together: int | None = None) -> Iterator[Tensor]:
    step = together or max(1, BATCH_TOKENS // ids.shape[1])
    for i in range(0, len(ids), step):
        yield torch.from_numpy(ids[i : i + step])


def output_head(net: Any) -> nn.Module:
    head: nn.Module | None = net.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(net).__name__} has no output head, so it predicts no tokens.")
    return head


def hidden_states(
    net: nn.Module, ids: np.ndarray, together: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (ids [b, l], input of the head [b, l, width]), `together` windows each."""
    device = next(net.parameters()).device
    for batch in batches(ids, together):
        with torch.inference_mode():
            yield batch.to(device), head_input(net, batch.to(device))


def head_input(net: nn.Module, ids: Tensor) -> Tensor:
    """ids [b, l] -> what the head receives [b, l, width]. The head itself runs on one position
    of one window only, so full logits never exist."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0])
        return (args[0][:1, -1:].contiguous(),)

    handle = output_head(net).register_forward_pre_hook(catch)
    try:
        net(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def final_transform(net: Any, ids: np.ndarray) -> Callable[[Tensor], Tensor]:
    """What the architecture does to the head's output: nothing, soft-capping (Gemma), scaling
    (Granite, Cohere). Checked against the model's own logits; ModelError if none agrees."""
    config = net.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    divide = getattr(config, "logits_scaling", None)
    times = getattr(config, "logit_scale", None)
    candidates: list[Callable[[Tensor], Tensor]] = [unchanged]
    if cap:
        candidates.append(lambda z: torch.tanh(z / cap) * cap)
    if divide:
        candidates.append(lambda z: z / divide)
    if times:
        candidates.append(lambda z: z * times)
    batch = torch.from_numpy(ids).to(next(net.parameters()).device)
    with torch.inference_mode():
        wanted = net(input_ids=batch, use_cache=False).logits.float()
        raw = output_head(net)(head_input(net, batch)).float()
        for transform in candidates:
            if torch.allclose(transform(raw), wanted, rtol=1e-3, atol=1e-3):
                return transform
    raise ModelError(
        f"{type(net).__name__} changes its head's output in a way that this version doesn't know. "
        "Please report the architecture."
    )


def unchanged(logits: Tensor) -> Tensor:
    return logits


def is_head(net: Any, parameter: str) -> bool:
    """Whether the named parameter is the output head's, perhaps shared with the embeddings."""
    return net.get_parameter(parameter) is getattr(net.get_output_embeddings(), "weight", None)
