"""The GGUF of the unquantized model: llama.cpp's own converter makes it, and llama.cpp itself must
make the same tokens and probabilities of it as transformers does of the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from optimizer.commands import export
from optimizer.errors import ModelError
from optimizer.formats.gguf import base as gguf_base
from optimizer.formats.gguf import placement, writer
from optimizer.formats.gguf.strings import texts
from optimizer.models.source import locate
from optimizer.plan import Precision
from optimizer.store import Store
from tests.conftest import slow_beside
from tests.formats.conftest import (
    IDS,
    WORDS,
    LlamaCpp,
    Wide,
    byte_tokenizer,
    opened_with,
    random_model,
    uniform,
)

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
SMALL = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
         "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def stretched(kind: str, scaling: dict, path: Path, wide: Wide) -> Wide:
    """A random model whose positions matter, and `wide`'s tokenizer."""
    return random_model(kind, SMALL | {"rope_parameters": {"rope_theta": 500.0, **scaling}}, 0.2,
                        path, wide)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [("llama", LLAMA3), ("llama", LINEAR), ("llama", YARN)],
)
@pytest.mark.slow
def test_llama_cpp_turns_positions_the_same(
    wide: Wide, tmp_path: Path, kind: str, scaling: dict
) -> None:
    model = stretched(kind, scaling, tmp_path / "m", wide)
    plan = model.plan(uniform(model, Precision.ggml("q8_0")), "llamacpp")
    verdict = export.export(plan, "gguf", tmp_path / "out", str(wide.store))
    file = tmp_path / "out" / writer.FILE
    assert file.stat().st_size == verdict.bytes
    ours, engine = model.log_p(plan, IDS), LlamaCpp(file)
    noise = [gguf_base.divergence(ours[row, -1].double().numpy(), engine.log_p(p).double().numpy())
             for row, p in enumerate(IDS.tolist())]  # fmt: skip
    assert np.median(noise) < 0.004
    back = locate(str(file), Store(wide.store))  # and the other way, which transformers forgets
    found = json.loads((back.folder / "config.json").read_text())["rope_parameters"]
    wanted = {"rope_theta": 500.0, **scaling}
    assert found["rope_type"] == wanted.pop("rope_type")
    assert {k: found.get(k) for k in wanted} == pytest.approx(wanted, rel=1e-3, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("pct", [0.25, 1.0])
def test_what_transformers_drops_from_a_config_reaches_the_converter(
    wide: Wide, tmp_path: Path, pct: float
) -> None:
    """GPT-NeoX's `rotary_pct`, which its class takes and doesn't write."""
    body = {k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": pct}
    model = random_model("gpt_neox", body | {"rope_parameters": rope}, 0.2, tmp_path / "m", wide)
    found = export.check(model.plan({}, "llamacpp"), "gguf", str(wide.store))
    assert not found.errors


@pytest.mark.slow
def test_a_window_that_llama_cpp_hasnt(wide: Wide, tmp_path: Path) -> None:
    for kind, more in (
        ("mistral", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
    ):
        body = {k: v for k, v in SMALL.items() if k != "head_dim"} | {"sliding_window": 16} | more
        model = random_model(kind, body, 0.2, tmp_path / kind, wide)
        found = export.check(model.plan({}, "llamacpp"), "gguf", str(wide.store))
        assert "16 tokens back" in found.errors[0]


@pytest.mark.slow
def test_another_activation_is_noticed(wide: Wide, tmp_path: Path) -> None:
    model = random_model("llama", SMALL | {"hidden_act": "relu"}, 0.2, tmp_path / "m", wide)
    found = export.check(model.plan({}, "llamacpp"), "gguf", str(wide.store))
    assert "computes another model" in found.errors[0]


SPLITS = [
    (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
    (pre_tokenizers.ByteLevel(add_prefix_space=False), True),
    (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        True,
    ),
    (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), False),
]


@pytest.mark.parametrize(("before", "works"), slow_beside(SPLITS[:1], SPLITS))
def test_tokenizers_are_known_or_refused(
    wide: Wide, tmp_path: Path, before: pre_tokenizers.PreTokenizer, works: bool
) -> None:
    shutil.copytree(wide.folder, tmp_path / "m")
    tokenizer = byte_tokenizer(before)
    tokenizer.save_pretrained(tmp_path / "m")
    model = opened_with(wide, tmp_path / "m")
    plan = model.plan(uniform(model, Precision.ggml("q8_0")), "llamacpp")
    verdict = export.check(plan, "gguf", str(wide.store))
    if not works:
        assert "refuses" in verdict.errors[0] and "gguf=FILE" in verdict.errors[0]
        return
    export.export(plan, "gguf", tmp_path / "out", str(wide.store))
    engine = LlamaCpp(tmp_path / "out" / writer.FILE)
    wanted = texts(["<s>", "</s>"])
    assert len(wanted) >= 150
    for text in wanted:
        body = {"content": text, "add_special": False, "parse_special": True}
        assert engine.ask("tokenize", body)["tokens"] == tokenizer(text)["input_ids"], text


def test_a_file_of_the_users_own(wide: Wide, tmp_path: Path) -> None:
    """gguf=FILE stands for the converter; another model's is refused by its first wrong tensor."""
    store = Store(wide.store)
    source = locate(str(wide.folder), store)
    made = gguf_base.find(source, wide.inventory, store, None)
    mine = tmp_path / "mine.gguf"
    shutil.copy(made.file, mine)
    own = gguf_base.find(source, wide.inventory, store, str(mine))
    assert own.origin == "given" and own.placed.pieces.keys() == made.placed.pieces.keys()
    raw = bytearray(mine.read_bytes())
    first = next(t for t in own.reader.tensors if t.name == "blk.1.attn_k.weight")
    raw[first.data_offset] ^= 1
    mine.write_bytes(raw)
    with pytest.raises(ModelError, match=r"blk\.1\.attn_k\.weight isn't made of the model's rows"):
        gguf_base.find(source, wide.inventory, store, str(mine))
    with pytest.raises(ModelError, match="there is no file"):
        gguf_base.find(source, wide.inventory, store, str(tmp_path / "none.gguf"))


def test_only_payloads_and_types_change(wide: Wide, tmp_path: Path) -> None:
    from gguf import GGUFReader

    store = Store(wide.store)
    made = gguf_base.find(locate(str(wide.folder), store), wide.inventory, store, None)
    plan = wide.plan(uniform(wide, Precision.ggml("q4_k"), o_proj=Precision()), "llamacpp")
    export.export(plan, "gguf", tmp_path / "out", str(wide.store))
    old, new = made.reader, GGUFReader(tmp_path / "out" / writer.FILE)
    for name, field in old.fields.items():
        if name != "general.file_type":
            assert new.fields[name].contents() == field.contents(), name
    for a, b in zip(old.tensors, new.tensors, strict=True):
        assert a.name == b.name and list(a.shape) == list(b.shape)
        if b.tensor_type == a.tensor_type:
            assert np.array_equal(a.data, b.data)
    kinds = {t.name: t.tensor_type.name for t in new.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_K" and kinds["blk.0.attn_output.weight"] == "F16"


def test_rows_are_found_wherever_they_are(wide: Wide) -> None:
    """Permuted, split, stacked, and with copies; what is changed in one bit is not."""
    layers = wide.inventory.layers[1:4]
    rng = np.random.default_rng(3)
    weights = {x.name: torch.randn(x.rows, x.cols).half() for x in layers}
    first = layers[0].name
    weights[first][5] = weights[first][9]
    order = rng.permutation(layers[0].rows)

    class Tensor:
        def __init__(self, name: str, data: np.ndarray) -> None:
            self.name, self.data, self.shape = name, data, tuple(reversed(data.shape))
            self.tensor_type = type("T", (), {"name": "F16"})

    joined = np.concatenate([weights[layers[1].name].numpy(), weights[layers[2].name].numpy()])
    tensors = {
        "blk.0.a.weight": Tensor("blk.0.a.weight", weights[first].numpy()[order]),
        "blk.0.b.weight": Tensor("blk.0.b.weight", joined),
    }

    def placed() -> placement.Placement:
        return placement.place(tensors, layers, lambda x: weights[x.name], "F16")

    found = placed()
    piece = found.pieces["blk.0.a.weight"]
    own = weights[first].numpy()
    assert np.array_equal(own[piece.row], own[order]) and not found.refused
    assert found.groups == (frozenset(x.name for x in layers[1:]),)
    tensors["blk.0.b.weight"].data[-1] += 1
    found = placed()
    assert set(found.pieces) == {"blk.0.a.weight"}
    assert set(found.refused) == {x.name for x in layers[1:]}
