"""Long generation: how long the greedy texts of two models stay the same, and how often they
repeat themselves.

    T   number of tokens before the first difference; `limit` if there is none (censored there, so
        means are of min(T, limit), and a median that would lie beyond is None)
    r   share of the 4-grams of a text that occurred in it before
One flipped token in a thousand ends a text early: this is what a reader of long answers notices.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np

from optimizer.data.text import Windows
from optimizer.metrics.bootstrap import mean, resamples
from optimizer.plan.certificate import Greedy, Interval, Median

PROMPTS = 16  # documents whose beginning is continued
PROMPT = 64  # tokens of a prompt at most
GRAM = 4


def prompts(windows: Windows, context: int | None, tokens: int) -> np.ndarray:
    """The first half of the first window of each document, int64 [prompts, length], cut so that
    prompt and continuation fit the context."""
    _, first = np.unique(windows.documents, return_index=True)
    room = PROMPT if context is None else max(1, context - tokens)
    length = min(PROMPT, room, max(1, windows.ids.shape[1] // 2))
    return windows.ids[np.sort(first)[:PROMPTS], :length]


def continuations(
    net: Any, begun: np.ndarray, tokens: int, cache: Any | None = None
) -> np.ndarray:
    """What the model itself would say: begun [n, length] -> int64 [n, tokens]. The end token is
    never taken, so that every text has the same length. cache: an empty one of the plan's kind;
    None = the model's own. Cost: one pass and `tokens` steps."""
    import torch

    device = next(net.parameters()).device
    ids = torch.from_numpy(begun).to(device)
    with torch.inference_mode():
        found = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            num_beams=1,
            repetition_penalty=1.0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=net.generation_config.pad_token_id or 0,
            past_key_values=cache,
        )
    return np.asarray(found[:, begun.shape[1] :].cpu().numpy())


def compare(reference: np.ndarray, other: np.ndarray, seed: int) -> Greedy:
    """Continuations [n, limit] twice, with 95 % intervals over prompts."""
    limit = reference.shape[1]
    same = first_difference(reference, other)
    counts = resamples(np.arange(len(same)), np.random.default_rng([seed, 82]))
    repeated = {"reference": repetition(reference), "plan": repetition(other)}
    return Greedy(
        prompts=len(same),
        limit=limit,
        never=int((same == limit).sum()),
        mean=mean(same, counts),
        median=_median(same, counts, limit),
        repeated={name: mean(share, counts) for name, share in repeated.items()},
        repeated_more=mean(repeated["plan"] - repeated["reference"], counts),
    )


def first_difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Number of equal tokens before the first difference, [n]; the whole length if none."""
    differ = one != other
    return np.where(differ.any(1), differ.argmax(1), one.shape[1])


def repetition(ids: np.ndarray) -> np.ndarray:
    """Share of each text's 4-grams that occurred in it before, [n]; 0 for shorter texts."""
    found = []
    for row in ids.tolist():
        grams = list(zip(*(row[i:] for i in range(GRAM)), strict=False))
        found.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(found)


def _median(same: np.ndarray, counts: np.ndarray, limit: int) -> Median:
    """The lower median; None where it is censored."""
    order = np.argsort(same, kind="stable")
    mass = np.cumsum(counts[:, order], axis=1)
    drawn = same[order][(mass * 2 >= mass[:, -1:]).argmax(1)]
    low, high = np.quantile(drawn, [0.025, 0.975], method="inverted_cdf")
    found = Interval(float(np.sort(same)[(len(same) - 1) // 2]), float(low), float(high))
    return Median(*(value if value < limit else None for value in astuple(found)))
