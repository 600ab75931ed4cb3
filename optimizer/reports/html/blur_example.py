"""Pieces of held-out text, shaded where the plan changed what is said: made from the scores of the
certificate, without running a model again. A small page for the run's folder and for W&B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from optimizer.metrics.blur import LABELS
from optimizer.reports.html import pages

FILE = "blur.html"
TOKENS = 200  # of a window that are shown


def chosen(kl: np.ndarray) -> dict[str, int]:
    """kl [windows, length - 1] -> which windows are worth looking at; each once."""
    means = kl.mean(1)
    order = np.argsort(means)
    found = {
        "the worst of the held-out windows": int(order[-1]),
        "the window of the worst token": int(kl.max(1).argmax()),
        "an ordinary window (the median)": int(order[len(order) // 2]),
    }
    first: dict[int, str] = {}
    for name, window in found.items():
        first.setdefault(window, name)
    return {name: window for window, name in first.items()}


def spelled(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """The text that each token adds to those before it."""
    texts = [tokenizer.decode(ids[:i].tolist()) for i in range(len(ids) + 1)]
    return [
        now[len(before) :] if now.startswith(before) else "" for before, now in pairwise(texts)
    ]


@dataclass(frozen=True)
class Window:
    """words: what each token adds to the text, and its KL; nothing predicts the first, so None."""

    name: str
    mean: float
    words: tuple[tuple[str, float | None], ...]


def render(ids: np.ndarray, kl: np.ndarray, tokenizer: Any, title: str) -> str:
    """ids [windows, length], kl [windows, length - 1] in nats -> HTML."""
    windows = []
    for name, window in chosen(kl).items():
        words = spelled(tokenizer, ids[window, :TOKENS])
        losses = [math.nan, *kl[window, : TOKENS - 1].tolist()]
        known = (None if math.isnan(loss) else loss for loss in losses)
        pairs = tuple(zip(words, known, strict=False))
        windows.append(Window(name, float(kl[window].mean()), pairs))
    return pages.render(
        "blur_example.html", "blur_map.css", title=title, labels=LABELS, windows=windows
    )
