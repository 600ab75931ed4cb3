"""What a checkpoint is stored as: quantized ones are named and refused, FP8 is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from optimizer.errors import ModelError
from optimizer.models.model import Model, take_inventory
from optimizer.models.published import unscaled
from optimizer.models.source import locate
from optimizer.store import Store
from tests.conftest import Small

MARKS: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    {"quant_method": "mxfp4"},
    {"quant_algo": "NVFP4"},
]


@pytest.fixture
def copy(llama: Small, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.folder, tmp_path / "copy"))


def marked(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize("settings", MARKS, ids=lambda s: next(iter(s.values())))
def test_a_quantized_checkpoint_is_named(copy: Path, settings: dict[str, Any]) -> None:
    marked(copy, settings)
    name = next(iter(settings.values()))
    with pytest.raises(ModelError, match=rf"quantized already \({name}.*16-bit model"):
        locate(str(copy), Store(copy.parent / "store"))


UP = "model.layers.0.mlp.up_proj"  # [96, 64]
BYTES, SHORTS = torch.zeros(96, 64, dtype=torch.uint8), torch.zeros(96, 64, dtype=torch.int16)
# what each library's checkpoints hold in place of the weight; None: the weight stays
CODED: dict[str, dict[str, Tensor | None]] = {
    "gptq": {"qweight": torch.zeros(8, 96, dtype=torch.int32), "weight": None},
    "mlx": {"weight": torch.zeros(96, 8, dtype=torch.int32).view(torch.uint32)},
    "int8": {"weight": BYTES.view(torch.int8), "weight_scale": torch.ones(96, 1)},
    "eetq": {"weight": BYTES.view(torch.int8).T.contiguous()},
    "bitnet": {"weight": BYTES[:24]},
    "nvfp4": {"weight": BYTES[:, :32], "weight_scale_2": torch.ones(())},
    "hqq": {"W_q": BYTES, "weight": None},
    "quanto": {"weight._data": BYTES.view(torch.int8), "weight": None},
    "aqlm": {"codes": SHORTS, "codebooks": torch.ones(1, 256, 1, 8), "weight": None},
    "exllama": {"trellis": SHORTS, "weight": None},
    "somebody's": {"table": torch.ones(16), "indices": SHORTS, "weight": None},
}


def with_parts(folder: Path, parts: dict[str, Tensor | None]) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **{f"{UP}.{k}": v for k, v in parts.items()}}
    kept = {k: v.contiguous() for k, v in tensors.items() if v is not None}
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", list(CODED))
def test_codes_without_a_word_in_the_config_are_seen(copy: Path, kind: str) -> None:
    with_parts(copy, CODED[kind])
    with pytest.raises(ModelError, match=r"quantized already \(.*up_proj.*16-bit model"):
        folder = locate(str(copy), Store(copy.parent / "store")).folder
        Model.load(folder, take_inventory(folder))


def test_a_parameter_of_integers_is_codes_under_any_name(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int64)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds codes"):
        take_inventory(copy)


def test_integers_beside_the_weights_are_no_codes(copy: Path) -> None:
    file = copy / "model.safetensors"
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)  # GPT-2's
    positions = torch.arange(8)  # BERT's
    more = {"model.layers.0.self_attn.bias": mask, "model.position_ids": positions}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    folder = locate(str(copy), Store(copy.parent / "store")).folder
    inventory = take_inventory(folder)
    Model.load(folder, inventory)
    assert {x.name for x in inventory.others} >= more.keys()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"llm_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"quantization_config": "gptq"}, "gptq"),
        ({"quantization_config": {}}, "by a method that config.json doesn't name"),
    ],
)
def test_wherever_the_config_says_it(copy: Path, place: dict[str, Any], name: str) -> None:
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | place))
    with pytest.raises(ModelError, match=rf"quantized already \({name}"):
        locate(str(copy), Store(copy.parent / "store"))


def test_a_file_of_modelopt_beside_the_config(copy: Path) -> None:
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (copy / "hf_quant_config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match=r"quantized already \(NVFP4"):
        locate(str(copy), Store(copy.parent / "store"))


def in_fp8(folder: Path, block: int) -> dict[str, Tensor]:
    """Turn the folder's projections into FP8 with scales of blocks; what they stand for."""
    file = folder / "model.safetensors"
    tensors, meant = load_file(file), {}
    for name in [n for n in tensors if "_proj" in n]:
        w = tensors[name].float()
        rows, cols = (-(-n // block) for n in w.shape)
        scale = torch.rand(rows, cols) + 0.5
        wide = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        wide = wide[: w.shape[0], : w.shape[1]]
        tensors[name] = (w / wide).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
        meant[name] = (tensors[name].float() * wide).bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    marked(folder, {"quant_method": "fp8", "weight_block_size": [block, block]})
    return meant


def test_fp8_is_the_reference_in_bfloat16(copy: Path) -> None:
    meant = in_fp8(copy, 32)
    store = Store(copy.parent / "store")
    source = locate(str(copy), store)
    made = load_file(source.folder / "model.safetensors")
    assert all(torch.equal(made[name], value) for name, value in meant.items())
    assert not any("scale" in name for name in made)
    assert "quantization_config" not in json.loads((source.folder / "config.json").read_text())
    assert locate(str(copy), store).fingerprint == source.fingerprint


def test_fp8_without_a_scale_is_refused(copy: Path) -> None:
    in_fp8(copy, 32)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"none for model\.layers\.1"):
        locate(str(copy), Store(copy.parent / "store"))


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,), (2, 3), (1, 3)])
def test_scales_of_every_shape(shape: tuple[int, ...]) -> None:
    codes = torch.randn(6, 12).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    grid = scale.reshape(shape + (1,) * (2 - len(shape)))
    wide = grid.repeat_interleave(6 // grid.shape[0], 0).repeat_interleave(12 // grid.shape[1], 1)
    blocks = (6 // grid.shape[0], 12 // grid.shape[1])
    assert torch.equal(unscaled("w", codes, scale, blocks), (codes.float() * wide).bfloat16())


def test_a_last_block_may_be_shorter() -> None:
    codes, scale = torch.ones(300, 130).to(torch.float8_e4m3fn), torch.rand(3, 2)
    found = unscaled("w", codes, scale, (128, 128))
    assert torch.equal(found[255], scale[1].bfloat16()[torch.arange(130) // 128])
    assert torch.equal(found[256], scale[2].bfloat16()[torch.arange(130) // 128])


@pytest.mark.parametrize("blocks", [None, (64, 128), (512, 128)])
def test_blocks_are_told_and_not_guessed(blocks: tuple[int, int] | None) -> None:
    """Three blocks over 300 rows could have 100 to 149."""
    codes, scale = torch.ones(300, 130).to(torch.float8_e4m3fn), torch.rand(3, 2)
    with pytest.raises(ModelError, match="weight_block_size"):
        unscaled("w", codes, scale, blocks)


@pytest.mark.parametrize(("shape", "block"), [((0, 0), 0), ((1, 3, 2), 128)])
def test_scales_that_are_no_grid_are_refused(shape: tuple[int, ...], block: int) -> None:
    codes = torch.ones(300, 130).to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="no grid"):
        unscaled("w", codes, torch.ones(shape), (block, block))


def test_scales_of_two_names_or_of_integers_are_refused(copy: Path) -> None:
    """Exponents as bytes would be multiplied by as if they were numbers."""
    codes = torch.zeros(96, 64).to(torch.float8_e4m3fn)
    several: dict[str, Tensor | None] = {"weight_scale": torch.ones(1)}
    several |= {"weight": codes, "weight_scale_inv": torch.ones(1)}
    for parts in (several, {"weight": codes, "weight_scale_inv": BYTES[:, :2]}):
        folder = Path(shutil.copytree(copy, copy.parent / str(len(parts))))
        with_parts(folder, parts)
        with pytest.raises(ModelError, match="one scale, of floats"):
            locate(str(folder), Store(copy.parent / "store"))


def renamed(folder: Path, change: Callable[[str], str | None]) -> None:
    file = folder / "model.safetensors"
    tensors = {change(name): value for name, value in load_file(file).items()}
    kept = {name: value for name, value in tensors.items() if name is not None}
    save_file(kept, file, metadata={"format": "pt"})


LACKING: dict[str, tuple[Callable[[str], str | None], str]] = {
    "a wrapper's names": (lambda n: f"module.{n}", r"holds module\.model\.embed.*save_pretrained"),
    "an adapter's": (lambda n: n.replace(f"{UP}.", f"{UP}.base_layer."), r"\(LoRA\).*Merge"),
    "a part": (lambda n: None if n.startswith(UP) else n, r"lacks .*up_proj.*Copy or download"),
}


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("kind", list(LACKING))
def test_why_a_weight_is_missing(copy: Path, kind: str, offload: str) -> None:
    change, said = LACKING[kind]
    renamed(copy, change)
    with pytest.raises(ModelError, match=said):
        Model.load(copy, take_inventory(copy), offload=offload)


def test_a_head_that_the_config_does_not_tie(copy: Path) -> None:
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight.*tie_word_embeddings: true"):
        Model.load(copy, take_inventory(copy))
