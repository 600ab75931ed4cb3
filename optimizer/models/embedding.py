"""Texts -> embeddings, and their cosines: the outputs of an encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimizer.data.short_texts import TEXTS

# 1 / 20, the default scale of sentence-transformers' MultipleNegativesRankingLoss. Measured with it on
# all-MiniLM-L6-v2, held-out sentences: at 6 bits cosines change by .0056 on average, and KL is .0031.
TEMPERATURE = 0.05


def embed(net: Any, ids: Tensor, pooling: str) -> Tensor:
    """ids [n, length], padded on the right with PADDING -> embeddings [n, width] of length one.
    pooling: `mean` over the tokens, or `cls` (the first one)."""
    there = ids >= 0
    ids = ids[:, : int(there.sum(1).max())]
    there = there[:, : ids.shape[1]]
    blank = getattr(net.config, "pad_token_id", None) or 0
    mask = there.long()
    hidden = net(input_ids=torch.where(there, ids, blank), attention_mask=mask)[0].float()
    if pooling == "mean":
        weights = there[..., None].float()
        hidden = (hidden * weights).sum(1) / weights.sum(1)
    else:
        hidden = hidden[:, 0]
    return torch.nn.functional.normalize(hidden, dim=-1)


def logits(net: Any, window: Tensor, pooling: str) -> Tensor:
    """ids [TEXTS * length] of one window -> c_ij / TEMPERATURE [TEXTS, TEXTS - 1], with gradient."""
    return cosines(embed(net, window.view(TEXTS, -1), pooling)) / TEMPERATURE


def cosines(z: Tensor) -> Tensor:
    """Embeddings [n, width] -> cosines with the others [n, n - 1]; a text's own is left out."""
    n = len(z)
    off = ~torch.eye(n, dtype=torch.bool, device=z.device)
    return (z @ z.T)[off].view(n, n - 1)
