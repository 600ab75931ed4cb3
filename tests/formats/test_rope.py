"""Contexts that were stretched after training: llama.cpp turns positions as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimizer.commands import export
from optimizer.errors import ModelError
from optimizer.formats.gguf import rope, writer
from optimizer.plan import Precision
from tests.formats.conftest import IDS, WORDS, LlamaCpp, Wide, opened_with, random_model, uniform

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def stretched(kind: str, scaling: dict, path: Path, wide: Wide, old: bool = False) -> Wide:
    """A random model whose positions matter, and `wide`'s tokenizer. old: as transformers 4 wrote."""
    body = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_theta": 500.0, **scaling}}  # fmt: skip
    model = random_model(kind, body, 0.2, path, wide)
    if old:
        config = json.loads((path / "config.json").read_text())
        own = config.pop("rope_parameters")
        config |= {"rope_theta": own.pop("rope_theta"), "rope_scaling": own}
        (path / "config.json").write_text(json.dumps(config))
        return opened_with(wide, path)
    return model


@pytest.mark.parametrize(
    ("kind", "scaling", "old"),
    [
        ("llama", LLAMA3, False), ("llama", LLAMA3, True), ("llama", LINEAR, False),
        ("llama", YARN, False), ("qwen2", YARN, True), ("qwen3", LINEAR, True),
        ("qwen2", {"rope_type": "default"}, True),
    ],
)  # fmt: skip
def test_llama_cpp_turns_the_same(
    wide: Wide, tmp_path: Path, kind: str, scaling: dict, old: bool
) -> None:
    model = stretched(kind, scaling, tmp_path / "m", wide, old)
    plan = model.plan(uniform(model, Precision.ggml("q8_0")), "llamacpp")
    verdict = export.export(plan, "gguf", tmp_path / "out", str(wide.store))
    assert (tmp_path / "out" / writer.FILE).stat().st_size == verdict.bytes
    engine = LlamaCpp(tmp_path / "out" / writer.FILE)
    ours = model.log_p(plan, IDS)
    plain = stretched(kind, {"rope_type": "default"}, tmp_path / "plain", wide).log_p(None, IDS)
    noise = turned = 0.0
    for row, prompt in enumerate(IDS.tolist()):
        p, theirs = ours[row, -1].exp(), engine.log_p(prompt)
        noise += float((p * (ours[row, -1] - theirs)).sum()) / len(IDS)
        turned += float((p * (ours[row, -1] - plain[row, -1])).sum()) / len(IDS)
    assert noise < 0.004
    assert scaling["rope_type"] == "default" or turned > 5 * noise


@pytest.mark.parametrize(
    ("config", "architecture", "words"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "llama", "dynamic"),
        ({"rope_parameters": LLAMA3}, "qwen2", "llama3"),
        ({"rope_parameters": YARN | {"attention_factor": 1.0}}, "llama", "attention factor"),
        ({"partial_rotary_factor": 0.5}, "llama", "part of each head"),
    ],
)
def test_what_the_file_has_no_word_for(config: dict, architecture: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        rope.check(config, architecture)
