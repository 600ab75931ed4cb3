"""Margins of probes: how much likelier a model finds the right continuation than the wrong one.

    m = log p(good | prefix) - log p(bad | prefix)                        nats, higher is better
prefix + good and prefix + bad are each cut into tokens as one text, since a token may straddle the
boundary: g_1..g_m and b_1..b_n. If their first c tokens agree, those cancel, and
    m = sum_{i>c} log p(g_i | g_<i) - sum_{i>c} log p(b_i | b_<i).
Never changes a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.data.pairs import Pair
from optimizer.data.text import text_start
from optimizer.models.head import BATCH_TOKENS, Predictor, head_input

TOO_LONG = "longer than the model's context"
UNKNOWN = "with words that the tokenizer doesn't know"
ALIKE = "whose continuations the tokenizer can't tell apart"
NO_START = "with nothing before the first different token"


@dataclass(frozen=True)
class Job:
    """A pair in tokens. common: how many tokens the two share at the beginning."""

    good: list[int]
    bad: list[int]
    common: int


def encode(pairs: Sequence[Pair], tokenizer: Any, context: int | None) -> list[Job | str]:
    """For each pair its tokens, or the reason why it can't be measured."""
    first = text_start(tokenizer)
    unknown = getattr(tokenizer, "unk_token_id", None)
    found: list[Job | str] = []
    for pair in pairs:
        good, bad = (first + _cut(tokenizer, pair.prefix + end) for end in (pair.good, pair.bad))
        common = _common(good, bad)
        if context is not None and max(len(good), len(bad)) > context:
            found.append(TOO_LONG)
        elif unknown is not None and unknown in good[len(first) :] + bad[len(first) :]:
            found.append(UNKNOWN)
        elif common == min(len(good), len(bad)):
            found.append(ALIKE)
        elif common == 0:
            found.append(NO_START)
        else:
            found.append(Job(good, bad, common))
    return found


def _cut(tokenizer: Any, text: str) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def measure(net: nn.Module, jobs: Sequence[Job]) -> np.ndarray:
    """Margins in nats, float64 [jobs]. Cost: one forward pass over both texts of every job."""
    rows = [(job.good, job.common) for job in jobs] + [(job.bad, job.common) for job in jobs]
    sums = np.zeros(len(rows))
    predict = Predictor(net)
    for batch in _batches([len(ids) for ids, _ in rows]):
        with torch.inference_mode():
            sums[batch] = _score(net, predict, [rows[i] for i in batch]).cpu().numpy()
    return sums[: len(jobs)] - sums[len(jobs) :]


def live(net: nn.Module, predict: Predictor, jobs: Sequence[Job]) -> Tensor:
    """Margins [jobs] with a gradient with respect to the weights. All jobs run together."""
    sides = [[(job.good, job.common) for job in jobs], [(job.bad, job.common) for job in jobs]]
    good, bad = (_score(net, predict, side) for side in sides)
    return good - bad


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers, shortest first, so that little is padded; at most BATCH_TOKENS with padding."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[row] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score(net: nn.Module, predict: Predictor, rows: list[tuple[list[int], int]]) -> Tensor:
    """Log-probability of the tokens after the common ones [rows], float64.

    Padding stands on the right, where causal attention never looks back from, so no mask is needed.
    """
    ids = torch.zeros((len(rows), max(len(tokens) for tokens, _ in rows)), dtype=torch.long)
    for row, (tokens, _) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
    where = torch.tensor(
        [(row, i) for row, (tokens, common) in enumerate(rows) for i in range(common, len(tokens))]
    )
    hidden = head_input(net, ids.to(next(net.parameters()).device))
    total = torch.zeros(len(rows), dtype=torch.float64, device=hidden.device)
    for part in where.split(predict.together):
        row, at = part.unbind(1)
        log_p = predict(hidden[row, at - 1])
        value = log_p.gather(-1, ids[row, at].to(hidden.device)[:, None]).squeeze(-1).double()
        total = total.index_add(0, row.to(hidden.device), value)
    return total
