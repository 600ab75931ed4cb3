"""llama.cpp's own mixtures: which type `llama-quantize FILE Q4_K_M` gives each tensor.

These are its rules (llama_tensor_get_type in llama-quant.cpp) without an importance matrix, for dense
models; the bytes and the counts of types are those that llama.cpp's own files have
(experiments/08-llamacpp-mixtures). Its names are in capitals, types in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimizer.formats.gguf import retyping
from optimizer.formats.gguf.base import Base
from optimizer.plan import GGML

MIXTURES = {
    "Q2_K": "q2_k",
    "Q3_K_S": "q3_k",
    "Q3_K_M": "q3_k",
    "Q3_K_L": "q3_k",
    "Q4_K_S": "q4_k",
    "Q4_K_M": "q4_k",
    "Q5_K_S": "q5_k",
    "Q5_K_M": "q5_k",
    "Q6_K": "q6_k",
    "Q8_0": "q8_0",
}
NARROW = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
SEVENTY_B = 80  # blocks of a llama that has eight query heads for each of keys
OUTPUT, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Shape:
    """Of a dense model: blocks, and query heads for each head of keys."""

    architecture: str
    blocks: int
    shared: float

    @classmethod
    def of(cls, base: Base) -> Shape | None:
        """None for models that these rules don't know."""
        fields = base.reader.fields

        def told(key: str) -> Any:
            return fields[key].contents() if key in fields else None

        name = str(told("general.architecture"))
        blocks, heads = told(f"{name}.block_count"), told(f"{name}.attention.head_count")
        pairs = told(f"{name}.attention.head_count_kv") or heads
        plain = all(isinstance(x, int) and x > 0 for x in (blocks, heads, pairs))
        if not plain or name == "falcon" or told(f"{name}.expert_count"):
            return None
        return cls(name, blocks, heads / pairs)


def kinds(mixture: str, base: Base) -> dict[str, str] | None:
    """Tensor -> type, for the tensors that may be retyped; None for models that these rules don't
    know."""
    shape = Shape.of(base)
    if shape is None:
        return None
    widths = {t.name: int(t.shape[0]) for t in base.reader.tensors}
    found = typed(mixture, shape, widths)
    return {name: kind for name, kind in found.items() if name in base.placed.pieces}


def typed(mixture: str, shape: Shape, widths: Mapping[str, int]) -> dict[str, str]:
    """widths: tensor -> weights in a row. Tensors whose rows no type divides stay as they are."""
    head = OUTPUT if OUTPUT in widths else EMBEDDING
    found = {}
    for name, width in widths.items():
        kind = _kind(mixture, name, shape, head)
        if width % GGML[kind].weights:
            kind = "q8_0" if name == head else NARROW.get(kind, kind)
        if width % GGML[kind].weights == 0:
            found[name] = kind
    return found


def _kind(mixture: str, name: str, shape: Shape, head: str) -> str:
    """Where a row has whole blocks."""
    usual = MIXTURES[mixture]
    if name == head:
        return usual if usual == "q8_0" else "q6_k"
    match = BLOCK.fullmatch(name)
    if match is None:
        return usual
    block, role = int(match[1]), match[2]
    rule = {"attn_v": _values, "ffn_down": _down}.get(role)
    if rule is not None:
        return rule(mixture, block, shape)
    return OTHERS.get((role, mixture), usual)


OTHERS = {
    ("attn_output", "Q2_K"): "q3_k",
    ("attn_output", "Q3_K_M"): "q4_k",
    ("attn_output", "Q3_K_L"): "q5_k",
    ("attn_qkv", "Q3_K_M"): "q4_k",
    ("attn_qkv", "Q3_K_L"): "q4_k",
    ("attn_qkv", "Q4_K_M"): "q5_k",
    ("attn_qkv", "Q5_K_M"): "q6_k",
}


def _values(mixture: str, block: int, shape: Shape) -> str:
    kind = MIXTURES[mixture]
    if mixture == "Q2_K":
        kind = "q4_k" if shape.shared >= 4 else "q3_k"
    elif mixture == "Q3_K_M":
        kind = "q5_k" if block < 2 else "q4_k"
    elif mixture == "Q3_K_L" or (mixture == "Q4_K_S" and block < 4):
        kind = "q5_k"
    elif mixture in ("Q4_K_M", "Q5_K_M") and _more(block, shape.blocks):
        kind = "q6_k"
    large = shape.architecture == "llama" and shape.blocks == SEVENTY_B and shape.shared == 8
    return "q5_k" if large and kind in ("q3_k", "q4_k") else kind


def _down(mixture: str, block: int, shape: Shape) -> str:
    if mixture == "Q2_K":
        return "q3_k"
    if mixture == "Q3_K_M":
        return "q5_k" if block < shape.blocks // 16 else "q4_k"
    if mixture == "Q3_K_L" or (mixture == "Q4_K_S" and block < shape.blocks // 8):
        return "q5_k"
    if mixture in ("Q4_K_M", "Q5_K_M") and _more(block, shape.blocks):
        return "q6_k"
    return MIXTURES[mixture]


def _more(block: int, blocks: int) -> bool:
    """The first and last eighth, and every third block between."""
    first = blocks // 8
    return block < first or block >= 7 * blocks // 8 or (block - first) % 3 == 2


def largest(base: Base, most: int) -> tuple[str, Mapping[str, str]] | None:
    """The largest mixture whose file has at most so many bytes."""
    found = {name: kinds(name, base) for name in MIXTURES}
    sizes = {n: retyping.file_bytes(base, k) for n, k in found.items() if k is not None}
    fitting = [name for name, size in sizes.items() if size <= most]
    if not fitting:
        return None
    name = max(fitting, key=lambda n: sizes[n])
    return name, found[name] or {}
