"""How far a model's distribution moved from the reference's, token by token. Never changes a
model.

p = softmax(z) is the reference's next-token distribution at a position, q the other model's.
    kl    sum_v p_v (log p_v - log q_v)                                       nats, lower is better
    ear   sum_v min(p_v, q_v) = 1 - total variation, the acceptance rate of speculative decoding
          (Leviathan et al., arXiv:2211.17192)                                 higher is better
    flip  argmax p != argmax q                                                 lower is better
    nll   -log q(true next token), and the same for the reference              nats
    hit   argmax q = true next token, and the same for the reference
The reference is kept as its last hidden states [tokens, width], not as logits [tokens,
vocabulary]: a hundred times smaller, and exact, since the head turns them into logits on demand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.data.text import Windows
from optimizer.metrics import embeddings
from optimizer.metrics.objective import Objective
from optimizer.models.arithmetic import otherwise
from optimizer.models.head import (
    BATCH_TOKENS,
    OwnHead,
    Predictor,
    final_transform,
    head_input,
    hidden_states,
    output_head,
    tokens_together,
    unchanged,
)
from optimizer.models.model import Model


@dataclass(frozen=True)
class Scores:
    """Per-token measures, each float32 [windows, length - 1], and documents int64 [windows]."""

    unit: ClassVar[Literal["token"]] = "token"
    kl: np.ndarray
    ear: np.ndarray
    flip: np.ndarray
    nll: np.ndarray
    nll_reference: np.ndarray
    hit: np.ndarray
    hit_reference: np.ndarray
    documents: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(vars(self))

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean(dtype=np.float64))

    def only(self, windows: np.ndarray) -> Scores:
        """Of some windows; bool [windows]."""
        return Scores(**{k: v[windows] for k, v in vars(self).items()})

    def after(self, position: int) -> Scores:
        """Only the predictions that have at least `position` tokens before them."""
        cut = {k: v[:, position - 1 :] for k, v in vars(self).items() if k != "documents"}
        return Scores(**cut, documents=self.documents)


COLUMNS = ("kl", "ear", "flip", "nll", "nll_reference", "hit", "hit_reference")


class Teacher:
    """The reference's predictions on fixed windows, against which other weights are scored."""

    def __init__(self, net: nn.Module, windows: Windows, own_head: OwnHead | None = None) -> None:
        """own_head: the reference's, needed where the live head's weights will change.
        `objective` (public, the mean KL unless set) is what single windows are measured by."""
        self.windows = windows
        self._together = max(1, BATCH_TOKENS // windows.ids.shape[1])
        self._hidden = [hidden for _, hidden in hidden_states(net, windows.ids, self._together)]
        self._shape = final_transform(net)
        head = output_head(net)
        self._some = tokens_together(head)
        self.objective = Objective()
        self._summaries: dict[int, tuple[Tensor, Tensor]] = {}
        self._own = own_head
        self._head = head

    def score(self, net: nn.Module) -> Scores:
        """Compare `net` as it is now with the reference. Cost: one forward pass and two heads."""
        columns: dict[str, list[Tensor]] = {key: [] for key in COLUMNS}
        for log_p, log_q, target in self.pairs(net):
            for key, value in compare(log_p, log_q, target).items():
                columns[key].append(value)
        shape = (len(self.windows.ids), self.windows.ids.shape[1] - 1)
        found = {k: torch.cat(v).float().cpu().numpy().reshape(shape) for k, v in columns.items()}
        return Scores(**found, documents=self.windows.documents)

    def noise(self, net: nn.Module) -> dict[str, Scores]:
        """The reference against itself, computed in another way: one window at a time, and with
        products in bf16, or in fp32 where the model measures in bf16. What no plan can be expected
        to beat. `net` holds the reference's weights. Cost: two passes."""
        alone = copy.copy(self)
        alone._together = 1
        alone._hidden = [one[None] for batch in self._hidden for one in batch]
        found = {"reference, one window at a time": alone.score(net)}
        with otherwise(net) as way:
            found[f"reference in {way}"] = self.score(net)
        return found

    @torch.inference_mode()
    def pairs(self, net: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of (log p, log q [tokens, vocabulary], true ids [tokens]), in the windows' order.

        Whoever takes a chunk may change it; see `head.LOGITS` for how many tokens it has.
        """
        head = output_head(net)
        for (ids, hidden), reference in zip(
            hidden_states(net, self.windows.ids, self._together), self._hidden, strict=True
        ):
            flat, target = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            truth = reference[:, :-1].flatten(0, 1)
            for i in range(0, len(flat), self._some):
                part = slice(i, i + self._some)
                log_p = torch.log_softmax(self._shape(self._reference_head(truth[part])), -1)
                log_q = torch.log_softmax(self._shape(head(flat[part]).float()), -1)
                yield log_p, log_q, target[part]

    def whole_pairs(self, net: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `pairs`, a window at a time, of a model that decides by all of a text's predictions."""
        for i, ids in enumerate(self.windows.ids):
            batch = torch.from_numpy(ids)[None].to(next(iter(net.parameters())).device)
            with torch.inference_mode():
                logits = net(input_ids=batch, use_cache=False).logits[0, :-1].float()
            yield self.log_probabilities(i), torch.log_softmax(logits, -1), batch[0, 1:]

    @torch.inference_mode()
    def log_probabilities(self, window: int) -> Tensor:
        """The reference's own of one window [length - 1, vocabulary]."""
        return torch.log_softmax(self._shape(self._reference_head(self._truth(window))), -1)

    def divergence(self, net: Any, window: int) -> Tensor:
        """KL [length - 1] of one window, with a gradient with respect to `net`'s weights.

        Where the head keeps its weights W (no own_head), the reference's logits are not made
        again. With z = W h the logits of `net`, sum_v p_v z_v = (W' p) h, so
            KL = sum_v p_v log p_v - (W' p) h + logsumexp(z),
        and only W' p and the entropy are kept for each token.
        """
        ids = torch.from_numpy(self.windows.ids[window])[None].to(self._hidden[0].device)
        return self.divergence_of(head_input(net, ids)[0], window)

    def divergence_of(self, hidden: Tensor, window: int) -> Tensor:
        """The same from what the head receives [length, width]."""
        hidden = hidden[:-1]
        parts = [slice(i, i + self._some) for i in range(0, len(hidden), self._some)]
        if self._own is None and self._shape is unchanged:
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
        """Mean objective of one window. Up to rounding (about 1e-6 nats) never below 0."""
        with torch.inference_mode():
            kl = self.divergence(net, window).double()
            return max(float(self.objective.of(kl).mean()), 0.0)

    def _truth(self, window: int) -> Tensor:
        """The reference's inputs of the head [length - 1, width]."""
        return self._hidden[window // self._together][window % self._together, :-1]

    def _summary(self, window: int) -> tuple[Tensor, Tensor]:
        """W' p [length - 1, width] and sum_v p_v log p_v - p b [length - 1], b the head's bias."""
        if window not in self._summaries:
            with torch.inference_mode(False), torch.no_grad():  # a backward pass may keep them
                self._summaries[window] = self._summarize(window)
        return self._summaries[window]

    def _summarize(self, window: int) -> tuple[Tensor, Tensor]:
        head: Any = self._head
        expected, constant = [], []
        for truth in self._truth(window).split(self._some):
            log_p = torch.log_softmax(head(truth).float(), -1)
            p = log_p.exp()
            bias = 0 if head.bias is None else p @ head.bias.float()
            expected.append(p @ head.weight.float())
            constant.append((p * log_p).sum(-1) - bias)
        return torch.cat(expected), torch.cat(constant)

    def _reference_head(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):  # `noise` is about the other side
            found: Tensor = (self._own or self._head)(hidden)
            return found.float()


AnyScores = Scores | embeddings.Scores
AnyTeacher = Teacher | embeddings.Teacher


def teacher(model: Model, windows: Windows, own_head: bool = False) -> AnyTeacher:
    """For the kind of model that it is: a language model's tokens or an encoder's geometry."""
    if model.pooling is not None:
        return embeddings.Teacher(model.net, windows, model.pooling)
    return Teacher(model.net, windows, model.own_head if own_head else None)


def stored(arrays: Mapping[str, np.ndarray]) -> AnyScores:
    """What `arrays()` of either kind gave."""
    return Scores(**arrays) if "ear" in arrays else embeddings.Scores(**arrays)


class TopTeacher:
    """The reference as its K most probable tokens at each position, and one bucket for the rest.

    8 K + 4 bytes a position, where `Teacher` keeps 4 x width and runs the reference's head again
    for every plan. With K = 512 it is the smaller one only for models wider than 1024, and not
    exact: its KL is that between distributions whose other tokens are merged, which is never above
    the whole KL (log-sum inequality). The bucket itself is exact, summed over all other tokens.
    """

    def __init__(self, net: nn.Module, windows: Windows, k: int = 512) -> None:
        self.windows = windows
        self._ids, self._top, self._rest = [], [], []
        for log_p, _ in _log_probabilities(net, windows):
            top = log_p.topk(min(k, log_p.shape[-1]))
            self._ids.append(top.indices.to(torch.int32))
            self._top.append(top.values)
            self._rest.append(_merged(log_p, top.indices))

    @property
    def bytes(self) -> int:
        kept = (*self._ids, *self._top, *self._rest)
        return sum(part.numel() * part.element_size() for part in kept)

    def kl(self, net: nn.Module) -> np.ndarray:
        """KL of the merged distributions, float32 [windows, length - 1]."""
        found = []
        parts = zip(self._ids, self._top, self._rest, strict=True)
        for (log_q, _), (ids, top, rest) in zip(
            _log_probabilities(net, self.windows), parts, strict=True
        ):
            index = ids.long()
            other = _merged(log_q, index)
            kl = (top.exp() * (top - log_q.gather(-1, index))).sum(-1)
            found.append(kl + torch.where(rest.isinf(), 0.0, rest.exp() * (rest - other)))
        shape = (len(self.windows.ids), self.windows.ids.shape[1] - 1)
        return torch.cat(found).clamp_(min=0).float().cpu().numpy().reshape(shape)


def _merged(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log of the probability of everything but `ids`: [tokens, vocabulary] -> [tokens]."""
    return log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)


@torch.inference_mode()
def _log_probabilities(net: nn.Module, windows: Windows) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (log p [tokens, vocabulary], true ids [tokens]), in the windows' order."""
    predict = Predictor(net)
    for ids, hidden in hidden_states(
        net, windows.ids, max(1, BATCH_TOKENS // windows.ids.shape[1])
    ):
        flat, target = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        for i in range(0, len(flat), predict.together):
            part = slice(i, i + predict.together)
            yield predict(flat[part]), target[part]


@torch.inference_mode()
def compare(log_p: Tensor, log_q: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Log-probabilities [tokens, vocabulary] twice, ids [tokens] -> measures [tokens]."""
    p = log_p.exp()
    top_p, top_q = log_p.argmax(-1), log_q.argmax(-1)
    nll = -log_q.gather(-1, target[:, None]).squeeze(-1)
    nll_p = -log_p.gather(-1, target[:, None]).squeeze(-1)
    q = log_q.exp()
    ear = torch.minimum(p, q, out=q).sum(-1)
    kl = torch.sub(log_p, log_q, out=log_p).mul_(p).sum(-1)
    found = (kl.clamp_(min=0), ear, top_p != top_q, nll, nll_p, top_q == target, top_p == target)
    return dict(zip(COLUMNS, found, strict=True))
