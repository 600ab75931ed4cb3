"""How far a model's distribution moved from the reference's, token by token. Never changes a
model.

p = softmax(z) is the reference's next-token distribution at a position, q the other model's.
    kl    sum_v p_v (log p_v - log q_v)                                       nats, lower is better
    ear   sum_v min(p_v, q_v) = 1 - total variation, the acceptance rate of speculative decoding
          (Leviathan et al., arXiv:2211.17192)                                 higher is better
    flip  argmax p != argmax q                                                 lower is better
    nll   -log q(true next token), and the same for the reference              nats
The reference is kept as its last hidden states [tokens, width], not as logits [tokens,
vocabulary]: a hundred times smaller, and exact, since the head turns them into logits on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.data import Windows
from optimizer.errors import ModelError

CHUNK = 512  # tokens whose logits exist at one time, twice
BATCH_TOKENS = 2048  # tokens that run through the blocks together


@dataclass(frozen=True)
class Scores:
    """Per-token measures, each float32 [windows, length - 1], and documents int64 [windows]."""

    kl: np.ndarray
    ear: np.ndarray
    flip: np.ndarray
    nll: np.ndarray
    nll_reference: np.ndarray
    documents: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(vars(self))

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean(dtype=np.float64))


class Teacher:
    """The reference's predictions on fixed windows, against which other weights are scored."""

    def __init__(self, net: nn.Module, windows: Windows, own_head: bool = False) -> None:
        """own_head: copy the head's weights, needed where the head itself will be quantized."""
        self.windows = windows
        self._hidden = [hidden for _, hidden in _hidden_states(net, windows.ids)]
        self._shape = _final_transform(net, windows.ids[:1])
        head = _head(net)
        self._summaries: dict[int, tuple[Tensor, Tensor]] = {}
        self._weights: dict[str, Tensor] | None = None
        if own_head:
            self._weights = {n: p.detach().clone() for n, p in head.named_parameters()}
        self._head = head

    def score(self, net: nn.Module) -> Scores:
        """Compare `net` as it is now with the reference. Cost: one forward pass and two heads."""
        columns: dict[str, list[Tensor]] = {k: [] for k in ("kl", "ear", "flip", "nll", "nll_p")}
        for log_p, log_q, target in self.pairs(net):
            for key, value in compare(log_p, log_q, target).items():
                columns[key].append(value)
        shape = (len(self.windows.ids), self.windows.ids.shape[1] - 1)
        kl, ear, flip, nll, nll_p = (
            torch.cat(columns[key]).float().cpu().numpy().reshape(shape) for key in columns
        )
        return Scores(kl, ear, flip, nll, nll_p, self.windows.documents)

    @torch.inference_mode()
    def pairs(self, net: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of (log p, log q [tokens, vocabulary], true ids [tokens]), in the windows' order.

        Whoever takes a chunk may change it; no more than CHUNK tokens of logits exist at a time.
        """
        head = _head(net)
        for (ids, hidden), reference in zip(
            _hidden_states(net, self.windows.ids), self._hidden, strict=True
        ):
            flat, target = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            truth = reference[:, :-1].flatten(0, 1)
            for i in range(0, len(flat), CHUNK):
                part = slice(i, i + CHUNK)
                log_p = torch.log_softmax(self._shape(self._reference_head(truth[part])), -1)
                log_q = torch.log_softmax(self._shape(head(flat[part]).float()), -1)
                yield log_p, log_q, target[part]

    def divergence(self, net: Any, window: int) -> Tensor:
        """KL [length - 1] of one window, with a gradient with respect to `net`'s weights.

        Where the head keeps its weights W (own_head=False), the reference's logits are not made
        again. With z = W h the logits of `net`, sum_v p_v z_v = (W' p) h, so
            KL = sum_v p_v log p_v - (W' p) h + logsumexp(z),
        and only W' p and the entropy are kept for each token.
        """
        ids = torch.from_numpy(self.windows.ids[window])[None].to(self._hidden[0].device)
        hidden = head_input(net, ids)[0, :-1]
        parts = [slice(i, i + CHUNK) for i in range(0, len(hidden), CHUNK)]
        if self._weights is None and self._shape is _unchanged:
            expected, constant = self._summary(window)
            return torch.cat(
                [
                    constant[part]
                    - (expected[part] * hidden[part].float()).sum(-1)
                    + torch.logsumexp(self._head(hidden[part]).float(), -1)
                    for part in parts
                ]
            )
        truth, found = self._truth(window), []
        for part in parts:
            with torch.no_grad():
                log_p = torch.log_softmax(self._shape(self._reference_head(truth[part])), -1)
            log_q = torch.log_softmax(self._shape(self._head(hidden[part]).float()), -1)
            found.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(found)

    def window(self, net: nn.Module, window: int) -> float:
        """Mean KL of one window. Up to rounding (about 1e-6 nats) never below 0."""
        with torch.inference_mode():
            return max(float(self.divergence(net, window).double().mean()), 0.0)

    def _truth(self, window: int) -> Tensor:
        """The reference's inputs of the head [length - 1, width]."""
        step = max(1, BATCH_TOKENS // self.windows.ids.shape[1])
        return self._hidden[window // step][window % step, :-1]

    def _summary(self, window: int) -> tuple[Tensor, Tensor]:
        """W' p [length - 1, width] and sum_v p_v log p_v - p b [length - 1], b the head's bias."""
        if window not in self._summaries:
            with torch.inference_mode(False), torch.no_grad():  # a backward pass may keep them
                self._summaries[window] = self._summarize(window)
        return self._summaries[window]

    def _summarize(self, window: int) -> tuple[Tensor, Tensor]:
        head: Any = self._head
        expected, constant = [], []
        for truth in self._truth(window).split(CHUNK):
            log_p = torch.log_softmax(head(truth).float(), -1)
            p = log_p.exp()
            bias = 0 if head.bias is None else p @ head.bias.float()
            expected.append(p @ head.weight.float())
            constant.append((p * log_p).sum(-1) - bias)
        return torch.cat(expected), torch.cat(constant)

    def _reference_head(self, hidden: Tensor) -> Tensor:
        if self._weights is None:
            return self._head(hidden).float()
        return torch.func.functional_call(self._head, self._weights, (hidden,)).float()


class Predictor:
    """A model's head and what follows it: hidden states -> log-probabilities of the next token."""

    def __init__(self, net: nn.Module) -> None:
        self._head, self._shape = _head(net), _final_transform(net, np.zeros((1, 2), np.int64))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Input of the head [tokens, width] -> [tokens, vocabulary]. Give CHUNK tokens at most."""
        return torch.log_softmax(self._shape(self._head(hidden).float()), -1)


@torch.inference_mode()
def compare(log_p: Tensor, log_q: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Log-probabilities [tokens, vocabulary] twice, ids [tokens] -> measures [tokens]."""
    p = log_p.exp()
    flip = log_p.argmax(-1) != log_q.argmax(-1)
    nll = -log_q.gather(-1, target[:, None]).squeeze(-1)
    nll_p = -log_p.gather(-1, target[:, None]).squeeze(-1)
    ear = torch.minimum(p, log_q.exp()).sum(-1)
    kl = torch.sub(log_p, log_q, out=log_p).mul_(p).sum(-1)
    return {"kl": kl.clamp_(min=0), "ear": ear, "flip": flip, "nll": nll, "nll_p": nll_p}


def batches(ids: np.ndarray) -> Iterator[Tensor]:
    step = max(1, BATCH_TOKENS // ids.shape[1])
    for i in range(0, len(ids), step):
        yield torch.from_numpy(ids[i : i + step])


def _head(net: Any) -> nn.Module:
    head: nn.Module | None = net.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(net).__name__} has no output head, so it predicts no tokens.")
    return head


def _hidden_states(net: nn.Module, ids: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (ids [b, l], input of the head [b, l, width])."""
    device = next(net.parameters()).device
    for batch in batches(ids):
        with torch.inference_mode():
            yield batch.to(device), head_input(net, batch.to(device))


def head_input(net: nn.Module, ids: Tensor) -> Tensor:
    """ids [b, l] -> what the head receives [b, l, width]. The head itself runs on one position
    of one window only, so full logits never exist."""
    caught: list[Tensor] = []

    def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(args[0])
        return (args[0][:1, -1:].contiguous(),)

    handle = _head(net).register_forward_pre_hook(catch)
    try:
        net(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def _final_transform(net: Any, ids: np.ndarray) -> Callable[[Tensor], Tensor]:
    """What the architecture does to the head's output: nothing, soft-capping (Gemma), scaling
    (Granite, Cohere). Checked against the model's own logits; ModelError if none agrees."""
    config = net.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    divide = getattr(config, "logits_scaling", None)
    times = getattr(config, "logit_scale", None)
    candidates: list[Callable[[Tensor], Tensor]] = [_unchanged]
    if cap:
        candidates.append(lambda z: torch.tanh(z / cap) * cap)
    if divide:
        candidates.append(lambda z: z / divide)
    if times:
        candidates.append(lambda z: z * times)
    batch = torch.from_numpy(ids).to(next(net.parameters()).device)
    with torch.inference_mode():
        wanted = net(input_ids=batch, use_cache=False).logits.float()
        raw = _head(net)(head_input(net, batch)).float()
        for transform in candidates:
            if torch.allclose(transform(raw), wanted, rtol=1e-3, atol=1e-3):
                return transform
    raise ModelError(
        f"{type(net).__name__} changes its head's output in a way that this version doesn't know. "
        "Please report the architecture."
    )


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def is_head(net: Any, parameter: str) -> bool:
    """Whether the named parameter is the output head's, perhaps shared with the embeddings."""
    return net.get_parameter(parameter) is getattr(_head(net), "weight", None)
