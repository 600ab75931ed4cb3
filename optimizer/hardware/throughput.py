"""How fast a model writes, and what that costs.

By arithmetic: a step of decoding reads every weight once for all sequences of a batch, but of an
embedding only a row, of experts only those that were chosen; and the whole cache of each sequence.
Where memory is the bottleneck, tokens per second are at most bandwidth / bytes per token.

By the clock: the packed model beside its reference, in turns, so that what else the machine does
falls on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimizer.plan import UNTOUCHED, Inventory, Layer, Precision, stored_bytes

if TYPE_CHECKING:
    import numpy as np

PROMPT = 32  # tokens that are read before the clock runs
ROUNDS = 4  # turns of each model, after one that doesn't count


@dataclass(frozen=True)
class Traffic:
    """What is read for each new token. batch: sequences at a time; cache: bytes of one sequence's
    cache; experts: share of the experts that a token uses."""

    batch: int = 1
    cache: int = 0
    experts: float = 1.0

    def share(self, layer: Layer) -> float:
        """The part of a layer's bytes that one step reads."""
        if layer.kind == "embedding" and not layer.tied:
            return 1 / layer.rows
        return self.experts if layer.kind == "experts" else 1.0

    def weights(self, inventory: Inventory, choice: Mapping[str, Precision]) -> int:
        """Bytes of the weights that a step reads, norms and biases counted."""
        layers = sum(
            x.bytes(choice.get(x.name, UNTOUCHED)) * self.share(x) for x in inventory.layers
        )
        whole = stored_bytes(inventory, {})["untouched"]
        others = whole - sum(x.bytes(UNTOUCHED) for x in inventory.layers)
        return int(layers) + others

    def token(self, weights: float) -> int:
        """Bytes per token, where a step reads `weights`."""
        return int(weights / self.batch + self.cache)


def active_share(config: Mapping[str, Any]) -> float:
    """A config.json -> the share of its experts that a token uses; 1 without experts."""
    config = config.get("text_config") or config
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((config[n] for n in names if isinstance(config.get(n), int)), 0)
    used = config.get("num_experts_per_tok")
    return used / count if count and isinstance(used, int) else 1.0


@dataclass(frozen=True)
class Speed:
    """Tokens per second, one sequence, greedy; medians over turns. prices: per million tokens, in
    the currency of the hourly rate."""

    packed: float
    reference: float
    tokens: int

    @property
    def ratio(self) -> float:
        """Packed over reference; above 1 is faster."""
        return self.packed / self.reference


def price(rate: float, tokens_per_second: float) -> float:
    """Of a million tokens, on a machine that costs `rate` an hour and does nothing else."""
    return rate / 3600 * 1e6 / tokens_per_second


def measure(
    packed: Any,
    reference: Any,
    ids: np.ndarray,
    tokens: int,
    cache: Callable[[Any], Any],
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Speed:
    """Decode `tokens` after a prompt, with each model in turns. ids: token ids [n] of real text.
    cache: a model -> an empty cache for it. track: shows how far the turns are. Cost: (1 + ROUNDS)
    * 2 * tokens steps."""
    import numpy

    seconds: dict[str, list[float]] = {"packed": [], "reference": []}
    for turn in track(range(1 + ROUNDS)):
        for name, net in (("packed", packed), ("reference", reference)):
            taken = _decode(net, ids[:PROMPT], tokens, cache(net))
            if turn:
                seconds[name].append(taken / tokens)
    rates = {name: 1 / float(numpy.median(values)) for name, values in seconds.items()}
    return Speed(rates["packed"], rates["reference"], tokens)


def _decode(net: Any, prompt: np.ndarray, tokens: int, cache: Any) -> float:
    """Seconds for `tokens` steps of one token each."""
    import torch

    device = next(iter(net.parameters())).device
    ids = torch.from_numpy(prompt)[None].to(device)
    with torch.inference_mode():
        logits = net(input_ids=ids, past_key_values=cache, use_cache=True).logits
        begun = time.perf_counter()
        for _ in range(tokens):
            ids = logits[:, -1:].argmax(-1)
            logits = net(input_ids=ids, past_key_values=cache, use_cache=True).logits
        float(logits[0, -1, 0])  # a GPU is done only now
    return time.perf_counter() - begun
