"""A transformers tokenizer -> the tokenizer fields of a GGUF file.

llama.cpp has the tokenizers themselves built in and reads their tables from the file, so only
tokenizers that it knows can be written: byte-level BPE with a known splitting of text, and BPE with
byte fallback (Llama's), which it runs as a scored vocabulary. Whole words between spaces become a
unigram vocabulary, which finds the same words; a word outside of it is cut in another way. Any
other tokenizer is an error that says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from optimizer.errors import ModelError

# How a tokenizer splits text before merging -> llama.cpp's name for it. The key is a part of the
# pre_tokenizer's JSON that no other of them has.
SPLITTING = {
    "\\p{N}{1,3}": "llama-bpe",
    "|\\p{N}|": "qwen2",
    '"Digits"': "smollm",
}
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def read(folder: Path) -> dict[str, Any]:
    """The folder's tokenizer.json. Raises ModelError."""
    try:
        found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return dict(found)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"A GGUF file holds its tokenizer, and {folder / 'tokenizer.json'} can't be read "
            f"({error}). Save the tokenizer there."
        ) from None


def kind(tokenizer: dict[str, Any]) -> str:
    """`gpt2`, `llama` or `t5` (unigrams), llama.cpp's names. Raises ModelError."""
    model = tokenizer["model"]
    before = (tokenizer.get("pre_tokenizer") or {}).get("type")
    if model.get("type") == "WordLevel" and before == "WhitespaceSplit":
        return "t5"
    if model.get("type") == "BPE" and model.get("byte_fallback"):
        return "llama"
    if model.get("type") == "BPE" and splitting(tokenizer):
        return "gpt2"
    raise ModelError(
        f"llama.cpp has no tokenizer like this model's ({model.get('type')} after {before}); it has "
        "byte-level BPE split as gpt-2, llama 3, qwen2 or smollm do, BPE with byte fallback, and "
        "whole words. Convert the model with llama.cpp's own script and take to=llama-quantize."
    )


def splitting(tokenizer: dict[str, Any]) -> str | None:
    text = json.dumps(tokenizer.get("pre_tokenizer")).replace("\\\\", "\\")
    if "ByteLevel" not in text:
        return None
    for part, name in SPLITTING.items():
        if part in text:
            return name
    return "gpt-2" if "Split" not in text else None


def add(writer: Any, folder: Path, size: int) -> None:
    """Write the fields. size: rows of the embedding; ids without a token are padded."""
    tokenizer = read(folder)
    name = kind(tokenizer)
    model = tokenizer["model"]
    tokens = {i: text for text, i in model["vocab"].items()}
    added = {row["id"]: row for row in tokenizer.get("added_tokens", [])}
    tokens |= {i: row["content"] for i, row in added.items()}
    listed = [tokens.get(i, f"[PAD{i}]") for i in range(size)]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model.get("merges", [])]
    writer.add_tokenizer_model(name)
    types = [_type(i, text, tokens, added, model) for i, text in enumerate(listed)]
    if name == "t5":  # a word begins with its space
        listed = ["\u2581" * (t == NORMAL) + x for x, t in zip(listed, types, strict=True)]
    writer.add_token_list(listed)
    writer.add_token_types(types)
    if name == "gpt2":
        writer.add_tokenizer_pre(splitting(tokenizer))
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(listed, merges))
        prefix = name == "t5" or "Prepend" in json.dumps(tokenizer.get("normalizer"))
        writer.add_add_space_prefix(prefix)
        writer.add_add_eos_token(False)
    _special(writer, folder, {text: i for i, text in tokens.items()}, tokenizer)


def _type(
    i: int, text: str, tokens: dict[int, str], added: dict[int, Any], model: dict[str, Any]
) -> int:
    if i not in tokens:
        return USER
    if text == model.get("unk_token"):
        return UNKNOWN
    if i in added:
        return CONTROL if added[i].get("special") else USER
    return BYTE if model.get("byte_fallback") and text[:3] == "<0x" else NORMAL


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp joins the pair with the highest score, BPE the pair that was merged first."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "", 1), i)
    last = float(len(merges))
    return [-float(rank.get(token, last)) for token in tokens]


def _special(writer: Any, folder: Path, ids: dict[str, int], tokenizer: dict[str, Any]) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    adders = {
        "bos_token": writer.add_bos_token_id,
        "eos_token": writer.add_eos_token_id,
        "unk_token": writer.add_unk_token_id,
        "pad_token": writer.add_pad_token_id,
    }
    for key, add_id in adders.items():
        text = settings.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if text in ids:
            add_id(ids[text])
    start = settings.get("bos_token")
    writer.add_add_bos_token(
        bool(start) and str(start) in json.dumps(tokenizer.get("post_processor"))
    )
    template = folder / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
