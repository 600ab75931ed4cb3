"""Every tensor of a checkpoint is a layer, kept as it is, or named as left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, Gemma3ForConditionalGeneration

import optimizer
from optimizer.errors import ModelError
from optimizer.formats.torch import packed
from optimizer.models.model import Model, take_inventory
from optimizer.models.source import quiet
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from tests.architectures import zoo
from tests.conftest import ARCHITECTURES, GLU, build, planned

IDS = torch.arange(5, 29).view(2, 12)
FINE = Precision("int", 4, 16)


def changed(folder: Path, **tensors: Tensor | None) -> Path:
    """With tensors added, replaced, or (None) removed; `__` stands for a dot."""
    file = folder / "model.safetensors"
    stored = load_file(file) | {name.replace("__", "."): x for name, x in tensors.items()}
    save_file({k: v for k, v in stored.items() if v is not None}, file, metadata={"format": "pt"})
    return folder


def there_and_back(folder: Path) -> tuple[Model, Tensor, Tensor, dict[str, Tensor]]:
    """All layers rounded: logits in place, logits of the packed folder loaded, and what it holds."""
    inventory = take_inventory(folder)
    choice = {x.name: FINE.nearest(x.cols) for x in inventory.layers}
    plan, model = planned(inventory, choice), Model.load(folder, inventory)
    out = packed.save(plan, model, folder, folder.parent / "packed", lambda items, _: items)
    with torch.no_grad():
        with model.rounded(Nearest(), choice):
            rounded = model.net(input_ids=IDS).logits
        loaded = optimizer.load(out)(input_ids=IDS).logits
    return model, rounded, loaded, load_file(out / "packed.safetensors")


def test_an_own_head_under_a_tied_flag_is_kept_apart(tmp_path: Path) -> None:
    settings = GLU | {"tie_word_embeddings": False}
    folder = build(tmp_path / "model", "llama", settings, torch.float16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model, rounded, loaded, _ = there_and_back(folder)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= model.layers.keys()
    assert not any(x.tied for x in model.inventory.layers)
    assert torch.equal(loaded, rounded)


def test_a_head_that_is_a_copy_is_left_out_and_told(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama", *ARCHITECTURES["llama"])
    copy = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    changed(folder, lm_head__weight=copy)
    model, rounded, loaded, stored = there_and_back(folder)
    assert [name for name, _ in model.inventory.left_out] == ["lm_head.weight"]
    assert any("lm_head.weight left out" in note for note in model.inventory.notes)
    assert torch.equal(loaded, rounded) and "lm_head.weight" not in stored


def test_each_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama", GLU, torch.bfloat16)
    before = load_file(folder / "model.safetensors")
    head, norm = before["lm_head.weight"].float() + 1e-4, before["model.norm.weight"].half()
    changed(folder, lm_head__weight=head, model__norm__weight=norm)
    inventory = take_inventory(folder)
    dtypes = {x.name: x.dtype for x in (*inventory.layers, *inventory.others)}
    assert dtypes["lm_head.weight"] == "F32" and dtypes["model.norm.weight"] == "F16"
    assert inventory.dtype == "BF16"
    plan, model = planned(inventory, {}), Model.load(folder, inventory, full=False)
    out = packed.save(plan, model, folder, tmp_path / "out", lambda items, _: items)
    stored = load_file(out / "packed.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        assert stored[name].dtype == value.dtype and torch.equal(stored[name], value), name


def test_tensors_that_the_model_has_no_place_for_come_back_and_are_told(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama", *ARCHITECTURES["llama"])
    extra = torch.randn(64, 128).half()
    changed(folder, model__layers__2__eh_proj__weight=extra)
    model, rounded, loaded, stored = there_and_back(folder)
    assert torch.equal(stored["model.layers.2.eh_proj.weight"], extra)
    assert any("model.layers.2.eh_proj.weight" in note for note in model.inventory.notes)
    assert torch.equal(loaded, rounded)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal model whose vision tower is deeper than its text model."""
    folder = tmp_path_factory.mktemp("gemma3") / "model"
    text = GLU | {"sliding_window": 32, "layer_types": ["full_attention"] * 2}
    vision: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(7)
    with quiet():
        config = AutoConfig.for_model(
            "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4,
            image_token_index=5, boi_token_index=6, eoi_token_index=7,
        )  # fmt: skip
        Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    return folder


def test_a_vision_tower_comes_back_and_is_never_chosen(seeing: Path) -> None:
    model, rounded, loaded, stored = there_and_back(seeing)
    layers, before = model.inventory.layers, load_file(seeing / "model.safetensors")
    assert type(model.net) is Gemma3ForConditionalGeneration
    assert not any("vision" in x.name for x in layers)
    assert {x.block for x in model.inventory.scoped(["blocks"])} == {0, 1}
    seen = [name for name in before if "vision" in name]
    assert seen and all(torch.equal(stored[name], before[name]) for name in seen)
    assert torch.equal(loaded, rounded)


def test_routers_are_no_layers(tmp_path: Path) -> None:
    settings = GLU | {"num_local_experts": 4, "num_experts_per_tok": 2}
    folder = build(tmp_path / "model", "phimoe", settings, torch.bfloat16)
    inventory = take_inventory(folder)
    kept = [x.name for x in inventory.others if "router" in x.name or ".gate." in x.name]
    assert len(kept) == 2
    assert not any("router" in x.name or ".gate." in x.name for x in inventory.layers)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("dbrx", {}), ("doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4})],
)
def test_routers_of_other_names_and_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]
) -> None:
    """DBRX says its experts in a part of its config, and its router is a part of one; Doge's has
    another name."""
    monkeypatch.setitem(zoo.SPECIAL, kind, {**zoo.SPECIAL.get(kind, {}), **settings})
    zoo.build(kind).bfloat16().save_pretrained(tmp_path / "model")
    inventory = take_inventory(tmp_path / "model")
    assert not any("router" in x.name for x in inventory.layers)
    kept = [x for x in inventory.others if "router" in x.name]
    assert len(kept) == 2 and all("choose the experts" in x.reason for x in kept)


def test_files_beside_the_models_own_are_told(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama", *ARCHITECTURES["llama"])
    save_file({"other": torch.zeros(3)}, folder / "consolidated.safetensors")
    assert [name for name, _ in take_inventory(folder).left_out] == ["consolidated.safetensors"]


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "model", "llama", *ARCHITECTURES["llama"])
    config = AutoConfig.for_model("bart", vocab_size=96, d_model=64).to_dict()
    config |= {"architectures": ["BartForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="an encoder and a decoder"):
        take_inventory(folder)
