"""Every architecture, built small from its config: all of the checkpoint is found, and rounding
in place leaves no trace.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from optimizer.errors import ModelError, PlanError
from optimizer.formats.safetensors.joined import Joined
from optimizer.models.model import Model, read, take_inventory, write
from optimizer.models.source import quiet
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import UNTOUCHED, Precision
from optimizer.quantization.uniform import Nearest
from tests.conftest import Small, build, mixed, opened


def checkpoint(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened_file:
            for name in opened_file.keys():  # noqa: SIM118
                tensors[name] = opened_file.get_tensor(name)
    return tensors


def state(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.net.state_dict().items()}


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def assert_same(model: Model, before: dict[str, Tensor]) -> None:
    for name, value in model.net.state_dict().items():
        assert torch.equal(bits(value), bits(before[name])), name


# ---------------------------------------------------------------- what a model is made of


def test_every_tensor_of_the_checkpoint_is_found_once_by_name_and_shape(small: Small) -> None:
    real = {name: tuple(value.shape) for name, value in checkpoint(small.folder).items()}
    found = [(x.name, x.shape) for x in small.inventory.layers]
    found += [(x.name, x.shape) for x in small.inventory.others]
    assert len(found) == len(dict(found))
    assert dict(found) == real


def test_every_matrix_is_a_layer_but_routers_and_biases(small: Small) -> None:
    for other in small.inventory.others:
        small_tensor = len(other.shape) < 2 or "router" in other.name or "bias" in other.name
        assert small_tensor or ".gate.weight" in other.name, other


def test_a_layers_matrix_is_the_checkpoints(small: Small) -> None:
    stored = checkpoint(small.folder)
    for layer in small.inventory.layers:
        value = stored[layer.name].float()
        if layer.transposed:
            value = value.transpose(-1, -2)
        wanted = value.reshape(layer.rows, layer.cols)
        assert torch.equal(small.model.weight(layer.name), wanted), layer.name


def test_matrices_are_outputs_by_inputs(small: Small) -> None:
    """Groups run along the inputs: x W' must be what the module computes."""
    for layer in small.inventory.layers:
        if layer.kind not in ("linear", "conv1d", "head"):
            continue
        module = small.model.net.get_submodule(layer.parameter.rpartition(".")[0])
        x = torch.randn(2, layer.cols)
        bias = module.bias if module.bias is not None else 0
        expected = x @ small.model.weight(layer.name).T + bias
        assert torch.allclose(module(x), expected, atol=1e-5), layer.name


EXPECTED_LAYERS = {
    "llama": 1 + 2 * 7,  # tied
    "gpt2": 2 + 2 * 4,  # tied; positions; c_attn, c_proj, c_fc, c_proj
    "opt": 4 + 2 * 6,  # tied; positions, project_in, project_out
    "qwen3": 2 + 2 * 7,
    "gpt_neox": 2 + 2 * 4,
    "qwen3_moe": 2 + 2 * (4 + 4 * 3),
    "gpt_oss": 2 + 2 * (4 + 2),  # experts fused on disk, too
    "mixtral": 2 + 2 * (4 + 4 * 3),
    "gemma2": 1 + 2 * 7,
}


def test_the_number_of_layers_is_the_architectures(small: Small) -> None:
    assert len(small.inventory.layers) == EXPECTED_LAYERS[small.name]
    blocks = [x.block for x in small.inventory.layers if x.block is not None]
    assert set(blocks) == {0, 1} and blocks.count(0) == blocks.count(1)
    assert all(x.kind not in ("embedding", "head") for x in small.inventory.scoped(["blocks"]))


def test_tied_weights_are_one_layer(small: Small) -> None:
    net = small.model.net
    tied = net.get_input_embeddings().weight is net.get_output_embeddings().weight
    assert [x.tied for x in small.inventory.layers].count(True) == int(tied)
    if not tied:
        assert [x.kind for x in small.inventory.layers].count("head") == 1


def test_experts_of_a_block_can_be_grouped(small: Small) -> None:
    scope = small.inventory.scoped(["blocks"])
    experts = {x.name for x in scope if x.kind == "experts"}
    assert bool(experts) == (small.name in ("qwen3_moe", "gpt_oss", "mixtral"))
    groups = [set(g) for g in Joined({}, "block").groups(scope) if set(g) & experts]
    assert len(groups) == (2 if experts else 0)
    assert set().union(*groups) == experts if experts else True


# ---------------------------------------------------------------- rounding in place


def test_rounding_changes_what_it_should_and_restores_all(small: Small) -> None:
    model, choice = small.model, mixed(small.inventory.layers)
    before = state(model)
    own = {name: model.weight(name).clone() for name in choice}
    with model.rounded(Nearest(), choice):
        for name, precision in choice.items():
            expected = Nearest().round(own[name], precision)
            assert torch.equal(model.weight(name), expected), name
            assert torch.equal(expected, own[name]) == (precision == UNTOUCHED)
    assert_same(model, before)
    assert not model.is_rounded


class Interrupted(Exception):
    pass


def test_an_exception_inside_restores_all(small: Small) -> None:
    before = state(small.model)
    with pytest.raises(Interrupted), small.model.rounded(Nearest(), mixed(small.inventory.layers)):
        raise Interrupted
    assert_same(small.model, before)


class BreaksAtThird(Nearest):
    """A quantizer that fails in the middle of the work."""

    left = 2

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return super().round(weight, precision)


def test_a_quantizer_that_fails_half_way_restores_all(llama: Small) -> None:
    before = state(llama.model)
    with (
        pytest.raises(Interrupted),
        llama.model.rounded(BreaksAtThird(), mixed(llama.inventory.layers)),
    ):
        pass
    assert_same(llama.model, before)


def test_set_goes_from_one_plan_to_another(llama: Small) -> None:
    model = llama.model
    before = state(model)
    first, second, *_ = (x.name for x in llama.inventory.layers)
    low, high = Precision("int", 2, 32), Precision("int", 6, 32)
    own = {name: model.weight(name).clone() for name in (first, second)}
    with model.rounded(Nearest()) as rounding:
        assert_same(model, before)
        rounding.set({first: low})
        rounding.set({first: high, second: low})
        assert torch.equal(model.weight(first), Nearest().round(own[first], high)), "rounded twice"
        assert torch.equal(model.weight(second), Nearest().round(own[second], low))
        rounding.set({second: low})
        assert torch.equal(model.weight(first), own[first])
        rounding.set({})
        assert_same(model, before)
    assert_same(model, before)


def test_an_unknown_layer_is_refused_and_nothing_stays(llama: Small) -> None:
    before = state(llama.model)
    choice = {"nowhere.weight": Precision("int", 4, 32)}
    words = r"no layer nowhere\.weight"
    with pytest.raises(PlanError, match=words), llama.model.rounded(Nearest(), choice):
        pass
    assert_same(llama.model, before)


def test_read_and_write_are_inverse(small: Small) -> None:
    for layer in small.inventory.layers:
        value = small.model.net.get_parameter(layer.parameter).detach().clone()
        values = {layer.parameter: value}.__getitem__
        new = torch.randn(layer.rows, layer.cols)
        others = [
            x for x in small.inventory.layers if x.parameter == layer.parameter and x != layer
        ]
        kept = {x.name: read(values, x).clone() for x in others}
        write(values, layer, new)
        assert torch.equal(read(values, layer), new)
        for other in others:
            assert torch.equal(read(values, other), kept[other.name]), "wrote outside its slice"


# ---------------------------------------------------------------- what can be wrong


@pytest.fixture
def copy(llama: Small, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(llama.folder, tmp_path / "copy"))


def damage(folder: Path, name: str, index: int, value: float) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[index] = value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_no_number_names_its_tensor(copy: Path, name: str, value: float) -> None:
    damage(copy, name, 17, value)
    with pytest.raises(ModelError, match=f"{name} has 1 that are NaN or infinite"):
        opened("damaged", copy)


def test_a_bad_expert_is_named(tmp_path: Path) -> None:
    from tests.conftest import ARCHITECTURES

    folder = build(tmp_path / "moe", "mixtral", *ARCHITECTURES["mixtral"])
    name = next(n for n in checkpoint(folder) if "experts.2" in n)
    damage(folder, name, 5, float("nan"))
    with pytest.raises(ModelError, match="experts"):
        opened("damaged", folder)


def test_what_is_too_large_for_sixteen_bits_stays_as_it_is(tmp_path: Path) -> None:
    settings = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 96, "n_positions": 32}
    folder = build(tmp_path / "wide", "gpt2", settings, torch.float32)
    name = "transformer.h.0.mlp.c_fc.weight"
    damage(folder, name, 3, 1e6 + 1)
    small = opened("wide", folder)
    before = state(small.model)
    with small.model.rounded(Nearest(), mixed(small.inventory.layers)):
        pass
    assert_same(small.model, before)
    assert small.model.weight(name).T.flatten()[3] == 1e6 + 1


def test_a_truncated_weight_file(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        opened("cut", copy)


def test_a_truncated_second_shard(llama: Small, tmp_path: Path) -> None:
    with quiet():
        net = AutoModelForCausalLM.from_pretrained(llama.folder)
        net.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert opened("whole", tmp_path / "shards").inventory.layers == llama.inventory.layers
    shards[-1].write_bytes(shards[-1].read_bytes()[:-64])
    with pytest.raises(ModelError):
        opened("cut", tmp_path / "shards")


def test_a_checkpoint_without_one_of_its_tensors_is_not_filled_with_noise(copy: Path) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        opened("holey", copy)


def test_a_checkpoint_of_other_shapes(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    with pytest.raises(ModelError):
        opened("reshaped", copy)


@pytest.mark.parametrize("kind", ["t5", "no-such-architecture"])
def test_what_is_no_causal_language_model(copy: Path, kind: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(ModelError, match="isn't a causal language model"):
        take_inventory(copy)


def test_a_folder_without_a_tokenizer(llama: Small) -> None:
    with pytest.raises(ModelError, match="data=self"):
        load_tokenizer(llama.folder)


def test_a_change_of_weights_within_another_is_refused(llama: Small) -> None:
    """Two open changes would restore each other's rounded weights as the model's own."""
    choice = mixed(llama.inventory.layers)
    before = {name: value.clone() for name, value in llama.model.net.named_parameters()}
    with (
        pytest.raises(RuntimeError, match="rounded already"),
        llama.model.rounded(Nearest(), choice),
    ):
        assert llama.model.is_rounded
        with llama.model.rounded(Nearest(), choice):
            pass
    assert all(torch.equal(value, before[n]) for n, value in llama.model.net.named_parameters())
    with llama.model.rounded(Nearest(), choice):  # and it can be changed again afterwards
        pass
