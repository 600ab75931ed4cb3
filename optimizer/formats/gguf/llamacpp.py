"""What llama.cpp itself makes of a GGUF file: token ids and log-probabilities.

The engine is the PyPI package xllamacpp; it runs in a process of its own, because it ends the process
where a file doesn't suit it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.errors import ModelError

PACKAGE = "xllamacpp"
BESIDES = 16  # tokens of context beside the prompt
TYPES, NORMAL = "tokenizer.ggml.token_type", 1
SECONDS = 300  # seconds that a process may take per thousand million bytes of its file, and alone


def installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def ask(file: Path, context: int, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
    """llama.cpp's replies. Raises ModelError with its last words if it doesn't load the file."""
    script = Path(__file__).with_name("run_llamacpp.py")
    with tempfile.TemporaryDirectory(prefix="mezzotint-") as scratch:
        asked, answer = Path(scratch) / "asked.json", Path(scratch) / "answer.json"
        asked.write_text(json.dumps(requests), encoding="utf-8")
        command = [sys.executable, str(script), str(file), str(context), str(asked), str(answer)]
        seconds = SECONDS * (1 + file.stat().st_size / 1e9)
        try:
            done = subprocess.run(  # noqa: S603  (our own script)
                command,
                check=False,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            raise ModelError(f"llama.cpp doesn't answer on {file} in {seconds:.0f} s.") from None
        if not answer.exists():
            raise ModelError(f"llama.cpp doesn't run {file}: {_reason(done.stderr)}.")
        return list(json.loads(answer.read_text(encoding="utf-8")))


def _reason(text: str) -> str:
    """The line of llama.cpp's output that says what is wrong."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    telling = [x for x in lines if "error" in x.lower() or "assert" in x.lower()]
    return (telling or lines or ["it ended without a word"])[0][:300]


def tokens(file: Path, texts: Sequence[str], special: bool) -> list[list[int]]:
    """Ids of each text. special: with what is put before and after a text, such as BOS."""
    bodies = [{"content": t, "add_special": special, "parse_special": True} for t in texts]
    replies = ask(file, 64, [("/tokenize", body) for body in bodies])
    return [list(reply["tokens"]) for reply in replies]


def log_probabilities(
    file: Path, ids: Sequence[int], positions: Sequence[int], words: int
) -> np.ndarray:
    """ids: of a window. The prediction after each of `positions` [positions, words], natural
    logarithm; NaN for words of which llama.cpp says nothing.

    The server tells probabilities with a token that it writes, and writes no halves of a letter and no
    end of the text; so it is made to write a plain word, which changes no probability that it tells.
    """
    told = {
        "n_predict": 1,
        "n_probs": words,
        "temperature": 0,
        "cache_prompt": False,
        "logit_bias": [[_plain_word(file), 1e4]],
    }
    bodies = [{"prompt": [int(i) for i in ids[: p + 1]], **told} for p in positions]
    found = np.full((len(positions), words), np.nan, np.float64)
    replies = ask(file, len(ids) + BESIDES, [("/completion", body) for body in bodies])
    for row, reply in zip(found, replies, strict=True):
        for token in reply.get("completion_probabilities", [{"top_logprobs": []}])[0][
            "top_logprobs"
        ]:
            row[token["id"]] = token["logprob"]
    return found


def _plain_word(file: Path) -> int:
    """The id of an ordinary token of ASCII letters."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    kinds = fields[TYPES].contents() if TYPES in fields else None
    for i, text in enumerate(fields["tokenizer.ggml.tokens"].contents()):
        if (kinds is None or kinds[i] == NORMAL) and text.isascii() and text.isalpha():
            return i
    raise ModelError(f"The vocabulary of {file} has no word of plain letters.")
