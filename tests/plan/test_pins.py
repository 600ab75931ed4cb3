"""Pins in an engine's names and llama-quantize's tensor types, as pins of layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.errors import ConfigError
from optimizer.plan.pins import translated

NAMES = ["m.0.q.weight", "m.0.gate.weight", "m.1.q.weight", "m.1.gate.weight"]
TENSORS = {
    "blk.0.attn_q.weight": ["m.0.q.weight"],
    "blk.1.attn_q.weight": ["m.1.q.weight"],
    "blk.0.ffn_gate.weight": ["m.0.gate.weight", "head.out.of.scope"],
    "token_embd.weight": ["embedding.weight"],
}


def test_engine_names_become_layers() -> None:
    pins = ["blk.*.attn_q.weight = q6_k", "blk.0.ffn_gate >= 4", "m.1.* = 8", "blk.1.attn_q = f16"]
    assert translated(pins, NAMES, TENSORS) == [
        ["m.0.q.weight = q6_k", "m.1.q.weight = q6_k"],
        ["m.0.gate.weight >= 4"],
        ["m.1.* = 8"],
        ["m.1.q.weight = 16"],
    ]
    assert translated(["blk.0.attn_q = 8"], NAMES, None) == [["blk.0.attn_q = 8"]]
    assert translated(["token_embd.weight = 8"], NAMES, TENSORS) == [["token_embd.weight = 8"]]


def test_the_first_expression_decides(tmp_path: Path) -> None:
    file = tmp_path / "tensor_types.txt"
    file.write_text("^blk\\.0\\.attn_q\\.weight$=Q6_K attn_q=q4_k\nTOKEN_EMBD=q8_0\n")
    assert translated([f"@{file}", "m.0.q = 3"], NAMES, TENSORS) == [
        ["m.0.q.weight = q6_k", "m.1.q.weight = q4_k"],
        ["m.0.q = 3"],
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attn_q", "EXPRESSION=TYPE"),
        ("=q4_k", "EXPRESSION=TYPE"),
        ("attn_q=", "EXPRESSION=TYPE"),
        ("(=q4_k", "no expression"),
        ("nothing=q4_k", "in scope"),
        ("token_embd=q4_k", "in scope"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "types.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        translated([f"@{file}"], NAMES, TENSORS)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        translated([f"@{tmp_path}/none.txt"], NAMES, TENSORS)
    with pytest.raises(ConfigError, match="runtime=llamacpp"):
        translated(["@types.txt"], NAMES, None)
