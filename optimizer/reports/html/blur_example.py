"""Pieces of held-out text, shaded where the plan changed what is said: made from the scores of the
certificate, without running a model again. A small page for the run's folder and for W&B.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.metrics.blur import LABELS, level, visible

FILE = "blur.html"
TOKENS = 200  # of a window that are shown
HERE = Path(__file__).parent


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


def render(ids: np.ndarray, kl: np.ndarray, tokenizer: Any, title: str) -> str:
    """ids [windows, length], kl [windows, length - 1] in nats -> HTML. A window's first token is
    predicted by nothing, so it has no shade."""
    css = (HERE / "blur_map.css").read_text(encoding="utf-8")
    legend = "".join(f'<span class="k{i}">{label}</span>' for i, label in enumerate(LABELS))
    parts = []
    for name, window in chosen(kl).items():
        words = spelled(tokenizer, ids[window, :TOKENS])
        losses = [float("nan"), *kl[window, : TOKENS - 1].tolist()]
        shaded = "".join(map(_word, words, losses))
        mean = float(kl[window].mean())
        parts.append(
            f'<h2>{escape(name)}</h2><p class="quiet">mean KL {mean:.4f}</p><p>{shaded}</p>'
        )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head><body>"
        f"<h1>{escape(title)}</h1><div class=legend><b>KL from</b>{legend}</div>"
        f"{''.join(parts)}</body></html>\n"
    )


def _word(word: str, kl: float) -> str:
    text = escape(visible(word))
    return text if np.isnan(kl) else f'<span class="k{level(kl)}" title="{kl:.3f}">{text}</span>'
