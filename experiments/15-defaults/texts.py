"""The texts that plans are made with: what `data=` offers, and what was only tried here.

bundled, self: the program's own sources. chat: the model's answers to `prompts.txt` through its own
chat template and generation settings, whole conversations. A+B: half of the windows from each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from optimizer.data import domains
from optimizer.data.text import Data, Part
from optimizer.models.tokenizer import load_tokenizer
from optimizer.stages.session import Session

PROMPTS = Path(__file__).with_name("prompts.txt")
BETWEEN = "\n---\n"
FEW = Part(sequences=2, length=128)  # of the parts that no combination here reads


def data(
    name: str, session: Session, calibration: Part, search: Part, seed: int, folder: Path
) -> Data:
    """Settings for `optimize`, where needed with a file in `folder`."""
    rest: dict[str, Any] = {
        "calibration": calibration,
        "search": search,
        "heldout": FEW,
        "seed": seed,
    }
    if name in ("bundled", "self"):
        return Data(source=name, **rest)
    windows = calibration.sequences + search.sequences + FEW.sequences + 6
    path = folder / f"{name}-{seed}-{windows}.txt"
    if not path.exists():
        path.write_text(BETWEEN.join(documents(name, session, windows, seed)), encoding="utf-8")
    return Data(source="text", path=str(path), **rest)


def documents(name: str, session: Session, windows: int, seed: int) -> list[str]:
    """About `windows` documents of a window each or more, of each part of the mixture as many."""
    parts = name.split("+")
    each = -(-windows // len(parts))
    made = {"bundled": bundled, "self": sampled, "chat": answered}
    return [text for part in parts for text in made[part](session, each, seed)]


def bundled(session: Session, count: int, seed: int) -> list[str]:
    """Windows of the half that plans may be tuned on."""
    parts = Data(source="bundled", seed=seed, search=FEW, heldout=FEW)
    parts.calibration = Part(sequences=count, length=136)
    tokenizer = load_tokenizer(session.source.folder)
    return decoded(tokenizer, domains.bundled(parts, tokenizer)["calibration"].ids)


def sampled(session: Session, count: int, seed: int) -> list[str]:
    from optimizer.data.text import generate

    # a little longer: read again it shrinks
    ids = generate(session.model, count, 136, [seed, 0, 0])["ids"]
    return decoded(load_tokenizer(session.source.folder), ids[:, 1:])


def answered(session: Session, count: int, seed: int) -> list[str]:
    """Sampled where the model's generation settings are silent."""
    import torch

    tokenizer, net = load_tokenizer(session.source.folder), session.model.net
    prompts = PROMPTS.read_text(encoding="utf-8").strip().splitlines()
    order = np.random.default_rng(seed).permutation(len(prompts))
    texts, pad = [], tokenizer.pad_token_id or 0
    torch.manual_seed(seed)
    for first in range(0, count, 32):
        asked = [prompts[order[i % len(prompts)]] for i in range(first, min(first + 32, count))]
        turns = [[{"role": "user", "content": text}] for text in asked]
        told = [
            tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            for turn in turns
        ]
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in told]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            said = net.generate(
                ids, attention_mask=mask, do_sample=True, min_new_tokens=100, max_new_tokens=100,
                pad_token_id=pad,
            )  # fmt: skip
        answers = tokenizer.batch_decode(said[:, width:])
        texts += [question + answer for question, answer in zip(told, answers, strict=True)]
    return texts


def decoded(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """`---` alone on a line would part a document."""
    return [text.replace("\n---", "\n - - -") for text in tokenizer.batch_decode(ids)]
