"""MLX: what we write is what mx.dequantize and mlx-lm read, on its CPU build."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimizer.commands import export
from optimizer.errors import PlanError
from optimizer.formats import mlx
from optimizer.formats.safetensors import read_back
from optimizer.models.source import quiet
from optimizer.plan import UNTOUCHED, Precision
from optimizer.quantization.uniform import Nearest
from tests.formats.conftest import Wide, opened_with, uniform

KINDS = [
    Precision("int", 4, 64), Precision("int", 2, 32), Precision("int", 3, 128), UNTOUCHED,
    Precision("int", 5, 64, True), Precision("int", 6, 32), Precision("int", 8, 64),
    Precision.floating("mxfp4"),
]  # fmt: skip


def every(wide: Wide) -> dict[str, Precision]:
    """All layers, the tied embedding too, each with the next precision."""
    return {x.name: KINDS[i % len(KINDS)] for i, x in enumerate(wide.inventory.layers)}


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """By mx.dequantize, as config.json says."""
    mx = pytest.importorskip("mlx.core")
    given = json.loads((folder / "config.json").read_text())["quantization"]
    tensors = mx.load(str(folder / "model.safetensors"))
    found = {}
    for stem, scheme in given.items():
        if not isinstance(scheme, dict):
            continue
        parts = (
            tensors[f"{stem}.weight"],
            tensors[f"{stem}.scales"],
            tensors.get(f"{stem}.biases"),
        )
        parts = tuple(x if x is None or x.dtype in (mx.uint32, mx.uint8) else x.astype(mx.float32)
                      for x in parts)  # fmt: skip
        value = mx.dequantize(*parts, **scheme, dtype=mx.float32, stream=mx.cpu)
        found[f"{stem}.weight"] = torch.tensor(value.tolist())
    return found


def test_mlx_unpacks_our_numbers(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(every(wide), "mlx")
    verdict = export.export(plan, "mlx", tmp_path / "out", str(wide.store))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == verdict.bytes
    found = unpacked(tmp_path / "out")
    own = mlx.decode(tmp_path / "out", plan, wide.inventory)
    assert found.keys() == own.keys() == {k for k, p in plan.choice.items() if p.kind != "none"}
    with wide.model.rounded(Nearest(), plan.choice):
        for name, value in found.items():
            assert torch.equal(value, own[name]), plan.layers[name]
            wanted = wide.model.weight(name)
            assert float((value - wanted).abs().max()) <= 2**-11 * float(wanted.abs().max())
            if plan.choice[name].symmetric:
                assert torch.equal(value, wanted)


def test_mlx_lm_computes_what_we_compute(wide: Wide, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    plan = wide.plan(every(wide), "mlx")
    verdict = export.export(plan, "mlx", tmp_path / "out", str(wide.store))
    assert verdict.readers[0].startswith("mlx-lm") and "the plan's logits" in verdict.readers[0]
    assert any("Apple silicon" in note for note in verdict.notes)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["quantization"] == settings["quantization_config"]
    assert settings["quantization"]["model.embed_tokens"] == {
        "group_size": 64, "bits": 4, "mode": "affine",
    }  # fmt: skip


STRETCHED = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize("given", [{"rope_theta": 1e5, "rope_type": "default"}, STRETCHED])
def test_positions_are_those_of_the_model(wide: Wide, tmp_path: Path, given: dict) -> None:
    """transformers 5 writes rope_parameters, which mlx-lm's Llama doesn't read."""
    pytest.importorskip("mlx_lm")
    shutil.copytree(wide.folder, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["rope_parameters"] = given
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    model = opened_with(wide, tmp_path / "model")
    plan = model.plan(uniform(model, Precision("int", 4, 64)), "mlx")
    verdict = export.export(plan, "mlx", tmp_path / "out", str(wide.store))
    assert "the plan's logits" in verdict.readers[0]


def test_positions_by_kind_of_attention() -> None:
    given = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
             "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}  # fmt: skip
    assert mlx.rope({"rope_parameters": given}) == {
        "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 1e4,
    }  # fmt: skip
    assert mlx.rope({}) == {}


def test_a_folder_that_mlx_lm_reads_otherwise_does_not_appear(
    wide: Wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx_lm")
    own = mlx.config

    def other(*given: object) -> dict:
        found = own(*given)
        found["model.layers.0.mlp.down_proj"]["group_size"] = 128
        return found

    plan = wide.plan(uniform(wide, Precision("int", 4, 64)), "mlx")
    monkeypatch.setattr(mlx, "decode", lambda *_: _plain(plan, wide))
    monkeypatch.setattr(mlx, "config", other)
    with pytest.raises(PlanError, match="mlx-lm"):
        export.export(plan, "mlx", tmp_path / "out", str(wide.store))
    assert not list(tmp_path.iterdir())


def _plain(plan: object, wide: Wide) -> dict[str, torch.Tensor]:
    with wide.model.rounded(Nearest(), plan.choice):
        return {x.name: wide.model.weight(x.name).clone() for x in wide.inventory.layers}


def test_a_missing_mlx_lm_is_named(
    wide: Wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(read_back.NEEDS, "mlx", ("no_such_package", "mlx-lm"))
    plan = wide.plan(uniform(wide, Precision("int", 4, 64)), "mlx")
    found = export.export(plan, "mlx", tmp_path / "out", str(wide.store))
    assert "our own reader only, since mlx-lm isn't installed" in found.readers[0]


def test_scales_of_a_bfloat16_model_are_bfloat16(wide: Wide, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with quiet():
        net = AutoModelForCausalLM.from_pretrained(wide.folder, dtype=torch.bfloat16)
        net.save_pretrained(tmp_path / "half")
    for file in wide.folder.glob("tokenizer*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    half = opened_with(wide, tmp_path / "half")
    plan = half.plan(uniform(half, Precision("int", 4, 64)), "mlx")
    verdict = export.export(plan, "mlx", tmp_path / "out", str(wide.store))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.scales"].dtype == torch.bfloat16
    assert any("keep 8 of the plan's 11 bits" in note for note in verdict.notes)


def test_what_mlx_does_not_hold_is_refused(wide: Wide) -> None:
    def errors(precision: Precision) -> str:
        plan = wide.plan(uniform(wide, precision), "torch")
        return " ".join(export.check(plan, "mlx", str(wide.store)).errors)

    assert "int4_channel" in errors(Precision("int", 4, None))
    assert "int7_g64" in errors(Precision("int", 7, 64)) and "nvfp4" in errors(
        Precision.floating("nvfp4")
    )
    assert not errors(Precision("int", 4, 64, True))
