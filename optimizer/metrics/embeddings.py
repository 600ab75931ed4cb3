"""Encoders: models whose output is an embedding of a text. There meaning is the geometry: who is
near whom, and how near.

A window is a batch of TEXTS texts. Legend: z_i the embedding of text i, of length one; c_ij = z_i z_j
the cosine; j runs over the other texts of the batch.
    p_i(j) = softmax_j(c_ij / TEMPERATURE)       the reference's similarity distribution, q_i another's
    kl       sum_j p_i(j) (log p_i(j) - log q_i(j))              nats per text, lower is better
    cosine   |c_ij of the other model - c_ij of the reference|, of every pair in the batch
    flip     another text of the whole part is the nearest                        lower is better
    overlap  share of the reference's NEAREST texts of the whole part that are still among the
             NEAREST                                                              higher is better
p_i takes the place of a language model's next-token distribution: its KL has zero gradient at the
reference and the Fisher matrix of labels j ~ p_i as its Hessian, so tables and slopes are made alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from optimizer.data.short_texts import TEXTS
from optimizer.data.text import Windows
from optimizer.metrics.objective import Objective
from optimizer.models.arithmetic import otherwise
from optimizer.models.embedding import TEMPERATURE, cosines, embed, logits

NEAREST = 10


@dataclass(frozen=True)
class Scores:
    """kl, flip, overlap: float32 [windows, TEXTS]; cosine: [windows, TEXTS * (TEXTS - 1)];
    documents: int64 [windows], the number of the batch. Texts of one batch are each other's
    neighbours, so intervals draw whole batches."""

    unit: ClassVar[Literal["text"]] = "text"
    kl: np.ndarray
    cosine: np.ndarray
    flip: np.ndarray
    overlap: np.ndarray
    documents: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(vars(self))

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean(dtype=np.float64))


class Teacher:
    """The reference's embeddings of fixed batches, against which other weights are scored."""

    def __init__(self, net: Any, windows: Windows, pooling: str) -> None:
        """`objective` (public, the mean KL unless set) is what single windows are measured by."""
        self.windows, self.objective = windows, Objective()
        self._pooling = pooling
        with torch.no_grad():  # not inference mode: a backward pass may keep them
            self._own = self._embedded(net)

    def score(self, net: Any) -> Scores:
        """Compare `net` as it is now with the reference. Cost: one forward pass, and the cosines
        of each text with all others of the part, a batch at a time."""
        with torch.inference_mode():
            return self._scores(self._embedded(net))

    def noise(self, net: Any) -> dict[str, Scores]:
        """The reference against itself, computed in another way: one text at a time, and with
        products in bf16, or in fp32 where the model measures in bf16. `net` holds the reference's
        weights. Cost: two passes."""
        with torch.inference_mode():
            alone = [
                embed(net, text[None], self._pooling) for w in self._batches(net) for text in w
            ]
            found = {"reference, one text at a time": self._scores(torch.cat(alone))}
            with otherwise(net) as way:
                rough = self._embedded(net)
            found[f"reference in {way}"] = self._scores(rough)
        return found

    def divergence(self, net: Any, window: int) -> Tensor:
        """KL [TEXTS] of one window, with a gradient with respect to `net`'s weights."""
        own = self._own[window * TEXTS : (window + 1) * TEXTS]
        ids = torch.from_numpy(self.windows.ids[window]).to(own.device)
        log_p = torch.log_softmax(cosines(own) / TEMPERATURE, -1)
        log_q = torch.log_softmax(logits(net, ids, self._pooling), -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def window(self, net: Any, window: int) -> float:
        """Mean objective of one window. Up to rounding never below 0."""
        with torch.inference_mode():
            kl = self.divergence(net, window).double()
            return max(float(self.objective.of(kl).mean()), 0.0)

    def _batches(self, net: Any) -> Iterator[Tensor]:
        device = next(net.parameters()).device
        for window in self.windows.ids:
            yield torch.from_numpy(window).to(device).view(TEXTS, -1)

    def _embedded(self, net: Any) -> Tensor:
        """Embeddings of all texts [windows * TEXTS, width]."""
        return torch.cat([embed(net, batch, self._pooling) for batch in self._batches(net)])

    def _scores(self, other: Tensor) -> Scores:
        rows: dict[str, list[Tensor]] = {"kl": [], "cosine": [], "flip": [], "overlap": []}
        for first in range(0, len(other), TEXTS):
            for key, value in compare(self._own, other, first).items():
                rows[key].append(value)
        found = {key: torch.stack(row).float().cpu().numpy() for key, row in rows.items()}
        return Scores(**found, documents=self.windows.documents)


def compare(own: Tensor, other: Tensor, first: int) -> dict[str, Tensor]:
    """Embeddings of all texts twice -> measures of the batch that begins with text `first`."""
    part = slice(first, first + TEXTS)
    before, after = cosines(own[part]), cosines(other[part])
    log_p = torch.log_softmax(before / TEMPERATURE, -1)
    log_q = torch.log_softmax(after / TEMPERATURE, -1)
    near, now = _nearest(own, first), _nearest(other, first)
    shared = (near[:, :, None] == now[:, None, :]).any(-1).float().mean(-1)
    return {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).clamp_(min=0),
        "cosine": (after - before).abs().flatten(),
        "flip": (near[:, 0] != now[:, 0]).float(),
        "overlap": shared,
    }


def _nearest(z: Tensor, first: int) -> Tensor:
    """Indices of the NEAREST texts of each text of a batch, the nearest first."""
    near = z[first : first + TEXTS] @ z.T
    rows = torch.arange(len(near), device=z.device)
    near[rows, first + rows] = -torch.inf  # a text is not its own neighbour
    return near.topk(min(NEAREST, len(z) - 1), dim=-1).indices
