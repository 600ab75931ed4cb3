"""Exports of models that loaders treat in their own way, read back by the engines' own code."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimizer.commands import export
from optimizer.errors import ModelError, PlanError
from optimizer.formats.safetensors import compressed_tensors, read_back
from optimizer.formats.safetensors.loader import loading, pieces
from optimizer.models.source import locate
from optimizer.plan import UNTOUCHED, Layer, Plan, Precision, assemble
from optimizer.store import Store
from tests.conftest import GLU, WIDE, Small, build, opened, slow_beside

P4, P8 = Precision("int", 4, 32, True), Precision("int", 8, 32, True)
NVFP4, FP8 = Precision.floating("nvfp4"), Precision.floating("fp8")
KINDS: dict[str, dict[str, Any]] = {
    "falcon": WIDE | {"multi_query": True, "alibi": False},
    "mixtral": GLU | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": GLU | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mamba": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 32},
    "llama4_text": GLU | {"num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1],
                          "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Small]:
    folder = tmp_path_factory.mktemp("models")
    return {
        kind: opened(kind, build(folder / kind, kind, settings, torch.bfloat16))
        for kind, settings in KINDS.items()
    }


def planned(small: Small, store: Path, choose: Any) -> Plan:
    own = {x.name: choose(x) for x in small.inventory.layers}
    fingerprint = locate(str(small.folder), Store(store)).fingerprint
    return assemble(
        small.inventory, list(small.inventory.layers), own,
        model={"name": str(small.folder), "fingerprint": fingerprint}, runtime="transformers",
        quantizer={"name": "rtn"}, predicted={"kl": 0.1, "stderr": 0.01},
    )  # fmt: skip


def dense(layer: Layer) -> Precision:
    return P4 if layer.kind == "linear" else UNTOUCHED


def mixed(layer: Layer) -> Precision:
    """Dense layers of two widths, all experts of a third."""
    if layer.kind == "experts":
        return P8
    return P4 if layer.role != "o_proj" else P8


CASES = [
    ("falcon", dense, "Falcon touches its weights: unpacked at once"),
    ("mamba", dense, "so does Mamba"),
    ("mixtral", dense, "experts stay beside quantized layers"),
    ("llama4_text", dense, "transformers takes its experts apart"),
    ("qwen3_moe", lambda x: mixed(x) if x.kind in ("linear", "experts") else UNTOUCHED, "mixed"),
    ("mixtral", lambda x: P4 if x.kind == "experts" else UNTOUCHED, "experts alone"),
    ("falcon", lambda x: NVFP4 if x.kind == "linear" else UNTOUCHED, "unpacked at once, NVFP4"),
    ("mamba", lambda x: FP8 if x.kind == "linear" else UNTOUCHED, "so is Mamba, FP8"),
    ("mixtral", lambda x: FP8 if x.kind in ("linear", "experts") else UNTOUCHED, "FP8 everywhere"),
    ("mixtral", lambda x: NVFP4 if x.kind == "linear" else UNTOUCHED, "NVFP4 beside experts"),
]


@pytest.mark.parametrize(("kind", "choose", "why"), CASES, ids=[case[2] for case in CASES])
def test_transformers_computes_the_plan(
    models: dict[str, Small], tmp_path: Path, kind: str, choose: Any, why: str
) -> None:
    small = models[kind]
    plan = planned(small, tmp_path / "store", choose)
    found = export.export(plan, "transformers", tmp_path / "out", str(tmp_path / "store"))
    assert "the plan's logits" in found.readers[0]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == found.bytes
    assert found.readers[0] in (tmp_path / "out" / "README.md").read_text()
    ids = torch.arange(3, 35)[None]
    with torch.no_grad(), small.model.rounded(compressed(), plan.choice):
        own = small.model.net(input_ids=ids).logits
    net, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    with torch.no_grad():
        engine = net.eval()(input_ids=ids).logits
    assert float((engine - own).abs().max()) < 0.02 * float(own.std())


def compressed() -> Any:
    from optimizer.quantization.uniform import Nearest

    return Nearest()


def test_what_transformers_would_decode_wrongly_is_refused(
    models: dict[str, Small], tmp_path: Path
) -> None:
    def uneven(layer: Layer) -> Precision:
        return P8 if layer.kind == "linear" and layer.block else dense(layer)

    for kind in ("falcon", "qwen3_moe"):
        choose = uneven if kind == "falcon" else lambda x: P4 if x.expert == 0 else dense(x)
        plan = planned(models[kind], tmp_path, choose)
        (error,) = export.check(plan, "transformers", str(tmp_path)).errors
        assert "loads these with one precision" in error


def test_a_folder_that_transformers_reads_otherwise_is_not_kept(
    models: dict[str, Small], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = compressed_tensors.config

    def wrong(*args: Any) -> dict[str, Any]:
        found = own(*args)
        found["config_groups"]["group_0"]["weights"]["group_size"] = 16
        return found

    plan = planned(models["mixtral"], tmp_path / "store", dense)
    monkeypatch.setattr(compressed_tensors, "config", wrong)
    with pytest.raises(PlanError, match="Nothing was kept"):
        export.export(plan, "transformers", tmp_path / "out", str(tmp_path / "store"))
    assert not (tmp_path / "out").exists()


def test_experts_left_in_16_bits_are_compared_in_fp32_and_told(
    models: dict[str, Small], tmp_path: Path
) -> None:
    """transformers multiplies untouched experts of a 16-bit checkpoint in 16 bits whatever is asked
    for: that must neither refuse a sound export nor hide what a wrong scale moves."""
    plan = planned(models["mixtral"], tmp_path / "store", dense)
    found = export.export(plan, "transformers", tmp_path / "out", str(tmp_path / "store"))
    assert float(found.readers[0].split("KL ")[1].split()[0]) < 1e-7
    verdict = export.check(plan, "transformers", str(tmp_path / "store"))
    assert any("keeps the untouched experts" in note for note in verdict.notes)
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    experts = [p for n, p in net.named_parameters() if ".experts." in n]
    assert {p.dtype for p in experts} == {torch.bfloat16}, "the note is no longer true"


@pytest.mark.parametrize("part", ["v_proj.weight_scale", "experts.2.w1.weight"])
def test_one_tensor_at_a_wrong_scale_is_another_model(
    models: dict[str, Small], tmp_path: Path, part: str
) -> None:
    small = models["mixtral"]
    plan = planned(small, tmp_path / "store", dense)
    out = tmp_path / "out"
    export.export(plan, "transformers", out, str(tmp_path / "store"))
    with small.model.rounded(compressed(), plan.choice):
        wanted = read_back.log_probabilities(small.model.net, read_back.window(96))
    assert "the plan's logits" in read_back.by_transformers("transformers", out, wanted, False)
    tensors = load_file(out / "model.safetensors")
    name = next(n for n in tensors if n.endswith(part))
    tensors[name] = (tensors[name].float() * 1.5).to(tensors[name].dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanError, match="isn't the plan's model: it has a KL"):
        read_back.by_transformers("transformers", out, wanted, False)


def test_a_missing_package_is_named(
    models: dict[str, Small], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(read_back.NEEDS, "transformers", ("no_such_package", "no-such-package"))
    plan = planned(models["mixtral"], tmp_path / "store", dense)
    found = export.export(plan, "transformers", tmp_path / "out", str(tmp_path / "store"))
    assert "no-such-package isn't installed" in found.readers[0]


def test_what_transformers_does_to_layers(models: dict[str, Small]) -> None:
    found = {kind: loading(small.folder, small.inventory) for kind, small in models.items()}
    roles = {
        kind: {x.name: x.role for x in small.inventory.layers} for kind, small in models.items()
    }
    assert len(found["falcon"].bare) == 8 and not found["falcon"].merged
    assert {"dt_proj", "out_proj"} <= {roles["mamba"][name] for name in found["mamba"].bare}
    assert not found["mixtral"].bare and len(found["mixtral"].merged) == 24
    assert len(found["llama4_text"].split) == 2 and not found["llama4_text"].bare


def test_pieces_are_what_the_experts_compute(models: dict[str, Small]) -> None:
    small = models["llama4_text"]
    layer = next(x for x in small.inventory.layers if x.role == "gate_up_proj")
    value = small.model.checkpoint.read(layer.name)
    found = pieces(layer)
    assert len(found) == 8
    name = next(n for n in found if n.endswith("experts.2.up_proj.weight"))
    half = layer.shape[2] // 2
    assert torch.equal(found[name].take(value), value[2, :, half:].T)


def llama(folder: Path, tied: bool, change: Callable[[dict[str, Any]], None]) -> Small:
    """With a config.json that says `tied`, whatever the checkpoint holds."""
    build(folder, "llama", GLU | {"tie_word_embeddings": False}, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return opened("llama", folder)


@pytest.mark.parametrize(
    ("engine", "rounded"),
    slow_beside(
        [("transformers", True), ("vllm", False), ("mlx", True)],
        product(["transformers", "vllm", "gptq", "autoround", "mlx"], [True, False]),
    ),
)
def test_an_own_head_is_not_tied_by_an_engine(tmp_path: Path, engine: str, rounded: bool) -> None:
    """vLLM and mlx-lm drop it where config.json says that it is the embedding."""
    small = llama(tmp_path / "model", True, lambda _: None)
    kinds = ("linear", "head") if rounded and engine == "transformers" else ("linear",)
    four = Precision("int", 4, 32, engine != "mlx")
    plan = planned(small, tmp_path / "store", lambda x: four if x.kind in kinds else UNTOUCHED)
    found = export.export(plan, engine, tmp_path / "out", str(tmp_path / "store"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    if engine == "transformers":
        assert "the plan's logits" in found.readers[0]


@pytest.mark.parametrize("engine", ["vllm", "gptq", "mlx"])
def test_an_embedding_under_the_heads_name_alone_is_refused(tmp_path: Path, engine: str) -> None:
    """transformers takes it for the embedding; the others skip the name."""
    small = llama(tmp_path / "model", True, lambda t: t.pop("model.embed_tokens.weight"))
    four = Precision("int", 4, 32, engine != "mlx")
    plan = planned(small, tmp_path / "store", lambda x: four if x.kind == "linear" else UNTOUCHED)
    with pytest.raises(ModelError, match=rf"{engine} reads .*lm_head\.weight alone.*save_pretr"):
        export.check(plan, engine, str(tmp_path / "store"))
