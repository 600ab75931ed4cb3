"""Texts on which two tokenizers must agree: digits, spaces, case, contractions, code, scripts, emoji.

All are in Unicode's composed form (NFC): llama.cpp composes nothing, so decomposed accents
differ for models whose tokenizer does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def texts(special: Sequence[str]) -> list[str]:
    """About 200 of them. special: a tokenizer's own tokens, which are put between words."""
    file = Path(__file__).with_name("strings.json")
    kinds: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    words, numbers = kinds["words"], kinds["numbers"]
    plain = [*words, *numbers, *kinds["code"]]
    spaced = [f" {text}" for text in plain]
    joined = [f"{a}\n{b} {c}" for a, b, c in zip(words, words[7:], numbers[3:], strict=False)]
    within = [t for s in special[:8] for t in (s, f"hello{s}world", f"a {s} b")]
    return [*plain, *kinds["spaces"], *spaced, *joined, *within]
