"""NVFP4, MXFP4 and FP8 in files: our folder, and compressed-tensors, read by transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import optimizer
from optimizer.commands import deploy, export
from optimizer.errors import MezzotintError, PlanError
from optimizer.formats.safetensors import floating
from optimizer.plan import FLOATS, UNTOUCHED, Precision
from optimizer.quantization.uniform import Nearest
from tests.formats.conftest import IDS, Wide, dealt, uniform
from tests.formats.test_engines import mixture

ALL = [Precision.floating(kind) for kind in FLOATS]
MIXED = [*ALL, UNTOUCHED, Precision("int", 4, 64, True)]
NVFP4 = ALL[0]


def log_p(folder: Path, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
    """dtype: that transformers is asked for; None: as config.json says."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        how = {} if dtype is None else {"dtype": dtype}
        net = AutoModelForCausalLM.from_pretrained(folder, **how).eval()
        if dtype is not None and hasattr(net, "ct_decompress_hook"):
            net.hf_quantizer.compressor.decompress_model(net)
            for value in net.parameters():  # 4-bit floats come in bfloat16, exactly
                value.data = value.data.to(dtype)
        return torch.log_softmax(net(input_ids=IDS).logits, -1)


def test_a_folder_of_ours_gives_the_plans_numbers(wide: Wide, tmp_path: Path) -> None:
    choice = dealt(wide.inventory.layers, MIXED)
    tied = next(x for x in wide.inventory.layers if x.tied)
    for precision in (NVFP4, ALL[3]):  # one scale of all rows; a scale of 128 of the 288
        plan = wide.plan(choice | {tied.name: precision}, "torch")
        folder = deploy.apply(plan, tmp_path / precision.name, str(wide.store))
        net = optimizer.load(folder, dtype=torch.float32)
        with torch.inference_mode():
            found = torch.log_softmax(net(input_ids=IDS).logits, -1)
        assert torch.equal(found, wide.log_p(plan, IDS))


@pytest.mark.parametrize("to", ["vllm", "transformers"])
def test_every_float_beside_integers_is_what_transformers_computes(
    wide: Wide, tmp_path: Path, to: str
) -> None:
    plan = wide.plan(dealt(wide.inventory.layers, MIXED), to)
    verdict = export.export(plan, to, tmp_path / "out", str(wide.store))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == verdict.bytes
    reader = {"vllm": "compressed-tensors", "transformers": "logits"}[to]
    assert any(reader in text for text in verdict.readers)
    assert torch.equal(log_p(tmp_path / "out"), wide.log_p(plan, IDS))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    forms = {group["format"] for group in settings["config_groups"].values()}
    assert settings["format"] == "mixed-precision"
    assert forms == {*floating.FORMS.values(), "pack-quantized"}
    if to == "transformers":  # as a user loads it
        assert any("bfloat16" in note for note in verdict.notes)
        own, found = wide.log_p(plan, IDS), log_p(tmp_path / "out", None).float()
        assert float((own.exp() * (own - found)).sum(-1).mean()) < 1e-3


@pytest.mark.parametrize("precision", ALL, ids=lambda p: p.name)
def test_one_float_alone_names_its_format(
    wide: Wide, tmp_path: Path, precision: Precision
) -> None:
    plan = wide.plan(uniform(wide, precision), "vllm")
    export.export(plan, "vllm", tmp_path / "out", str(wide.store))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == floating.FORMS[precision.kind]
    assert torch.equal(log_p(tmp_path / "out"), wide.log_p(plan, IDS))
    export.export(plan, "transformers", tmp_path / "same", str(wide.store))
    whole = log_p(tmp_path / "same", torch.float64).float()  # in whatever dtype is asked for
    assert torch.allclose(whole, wide.log_p(plan, IDS), atol=1e-4)


@pytest.mark.parametrize("precision", ALL, ids=lambda p: p.name)
def test_the_package_packs_our_numbers_into_our_bytes(wide: Wide, precision: Precision) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    layer = next(x for x in wide.inventory.layers if x.role == "down_proj")
    coded = Nearest().encode(wide.model.weight(layer.name), precision)
    stored = {f"{layer.name}.{k}": v for k, v in coded.pack().items()}
    ours = {k.rpartition(".")[2]: v for k, v in floating.tensors(layer, precision, stored).items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=floating.scheme(precision))
    package = BaseCompressor.get_value_from_registry(floating.FORMS[precision.kind])
    unpacked = package.decompress(dict(ours), scheme)
    assert torch.equal(unpacked["weight"].float(), coded.decode())
    scale = ours["weight_scale"].float()
    if precision.kind == "mxfp4":
        scale = torch.exp2(scale - 127)
    raw = {"weight": coded.decode(), "weight_scale": scale}
    if precision.kind == "nvfp4":
        raw["weight_global_scale"] = ours["weight_global_scale"]
    again = package.compress(raw, scheme)
    for name in ("weight_packed", "weight") if precision.bits == 4 else ("weight",):
        if name in ours:
            assert torch.equal(again[name].view(torch.uint8), ours[name].view(torch.uint8))


def test_layers_that_vllm_joins_get_one_scale_of_the_tensor(wide: Wide, tmp_path: Path) -> None:
    """vLLM takes the largest weight_global_scale of q, k and v for all of them."""
    plan = wide.plan(uniform(wide, NVFP4), "vllm")
    weight = wide.model.net.get_parameter("model.layers.1.self_attn.q_proj.weight")
    before = weight.detach().clone()
    packed = {}
    try:
        with torch.no_grad():
            weight *= 8
        for layer in wide.inventory.layers:
            precision = plan.choice[layer.name]
            if precision.kind != "none":
                coded = Nearest().encode(wide.model.weight(layer.name), precision)
                packed |= {f"{layer.name}.{k}": v for k, v in coded.pack().items()}
    finally:
        with torch.no_grad():
            weight.copy_(before)
    stem = "model.layers.1.self_attn"
    groups = ((f"{stem}.q_proj.weight", f"{stem}.k_proj.weight", f"{stem}.v_proj.weight"),)
    found = floating.together(plan, wide.inventory, packed, groups)
    scales = {float(found[f"{name}.scale"]) for name in groups[0]}
    assert len(scales) == 1 < len({float(packed[f"{name}.scale"]) for name in groups[0]})
    for layer in wide.inventory.layers:
        if plan.choice[layer.name].kind == "none":
            continue
        values = []
        for tensors in (packed, found):
            file = floating.tensors(layer, NVFP4, tensors)
            scheme = floating.scheme(NVFP4)
            values.append(
                floating.decoded(file.__getitem__, layer.name[: -len(".weight")], scheme)
            )
        assert torch.equal(*values)
    packed[f"{groups[0][1]}.scale"] = packed[f"{groups[0][1]}.scale"] * 2.0**-30
    with pytest.raises(PlanError, match=r"policy\.pins"):
        floating.together(plan, wide.inventory, packed, groups)


def test_what_an_export_joins_lies_in_the_file(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(uniform(wide, NVFP4), "vllm")
    export.export(plan, "vllm", tmp_path / "out", str(wide.store))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for block in range(3):
        for parent, roles in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            names = [f"model.layers.{block}.{parent}.{r}_proj.weight_global_scale" for r in roles]
            assert len({float(tensors[name]) for name in names}) == 1


def test_notes_say_which_gpus_multiply(wide: Wide) -> None:
    def notes(precision: Precision) -> str:
        plan = wide.plan(uniform(wide, precision), "vllm")
        return " ".join(export.check(plan, "vllm", str(wide.store)).notes)

    assert "Blackwell (compute capability 10) multiplies NVFP4" in notes(NVFP4)
    assert "Ada and Hopper" in notes(ALL[2]) and "Ada and Hopper" in notes(ALL[3])
    assert "multipl" not in notes(Precision("int", 4, 64, True))
    found = export.check(wide.plan(uniform(wide, NVFP4), "vllm"), "autoround", str(wide.store))
    assert "nvfp4" in found.errors[0]


def test_inputs_are_rounded_where_that_is_asked_for(wide: Wide, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    plan = wide.plan(dealt(wide.inventory.layers, MIXED), "vllm")
    verdict = export.export(plan, "vllm", tmp_path / "out", str(wide.store), activations=True)
    assert "The inputs of fp8, fp8_block, mxfp4 are rounded" in " ".join(verdict.notes)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(settings).config_groups.values()
    found = {(g.weights.num_bits, g.weights.strategy): g.input_activations for g in groups}
    assert found[4, "tensor_group"] is None and found[4, "group"] is not None
    assert found[8, "channel"].strategy == "token" and found[8, "channel"].dynamic is True
    assert found[8, "block"].group_size == 128


def test_rounded_inputs_move_what_transformers_computes(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(uniform(wide, ALL[2]), "vllm")
    export.export(plan, "vllm", tmp_path / "out", str(wide.store), activations=True)
    own, found = wide.log_p(plan, IDS), log_p(tmp_path / "out")
    assert 1e-5 < float((own.exp() * (own - found)).sum(-1).mean()) < 0.1


def test_inputs_that_cannot_be_rounded_are_refused(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(uniform(wide, NVFP4), "vllm")
    for to, words in (("vllm", "none of them"), ("transformers", "to=vllm")):
        with pytest.raises(MezzotintError, match=words):
            export.export(plan, to, tmp_path / "out", str(wide.store), activations=True)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- experts


def everywhere(model: Wide, precision: Precision, **other: Precision) -> dict[str, Precision]:
    inside = (x for x in model.inventory.layers if x.block is not None)
    return {x.name: other.get(x.kind, precision) for x in inside}


def test_experts_of_fp8_are_what_transformers_computes(wide: Wide, tmp_path: Path) -> None:
    model = mixture("qwen3_moe", tmp_path / "moe", wide)
    plan = model.plan(everywhere(model, NVFP4, experts=ALL[2]), "transformers")
    verdict = export.export(plan, "transformers", tmp_path / "out", str(wide.store))
    assert "logits" in verdict.readers[0]


def test_experts_that_transformers_cannot_merge_are_refused(wide: Wide, tmp_path: Path) -> None:
    model = mixture("qwen3_moe", tmp_path / "moe", wide)
    for precision in (NVFP4, ALL[1]):
        plan = model.plan(everywhere(model, precision), "transformers")
        (error,) = export.check(plan, "transformers", str(wide.store)).errors
        assert f"merges experts of integers and of fp8 only, not of {precision.name}" in error


def test_an_experts_gate_and_up_share_a_scale_in_vllm(wide: Wide, tmp_path: Path) -> None:
    model = mixture("qwen3_moe", tmp_path / "moe", wide)
    plan = model.plan(everywhere(model, NVFP4), "vllm")
    export.export(plan, "vllm", tmp_path / "out", str(wide.store))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = {k: float(v) for k, v in tensors.items() if k.endswith("weight_global_scale")}
    experts = [k for k in scales if "experts" in k and "gate_proj" in k]
    assert len(experts) == 8
    assert all(scales[k] == scales[k.replace("gate_proj", "up_proj")] for k in experts)
