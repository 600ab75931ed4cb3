"""Which layers share a precision in vLLM, from what its sources declare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimizer.config import profile
from optimizer.formats.safetensors import gptq
from optimizer.formats.safetensors.joined import Joined, declared, joined, united
from optimizer.plan import Layer


def linear(name: str, cols: int = 64) -> Layer:
    role = name.rpartition(".")[2]
    return Layer(f"{name}.weight", 64, cols, "linear", role, 0, f"{name}.weight", (64, cols))


def of(folder: Path, architecture: str) -> Joined:
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return joined(profile("vllm"), folder)


STEM = "model.layers.0."


@pytest.mark.parametrize(
    ("architecture", "parts"),
    [
        ("LlamaForCausalLM", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("DeepseekV3ForCausalLM", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
        ("Lfm2ForCausalLM", ("feed_forward.w1", "feed_forward.w3")),
        ("Glm4MoeLiteForCausalLM", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
    ],
)
def test_what_vllm_joins_is_one_group(
    tmp_path: Path, architecture: str, parts: tuple[str, ...]
) -> None:
    layers = [linear(STEM + part) for part in parts]
    layers.append(linear(STEM + parts[0].rpartition(".")[0] + ".o_proj"))
    found = of(tmp_path, architecture)
    assert [len(g) for g in found.groups(layers)] == [len(parts), 1] and not found.notes
    spelled = gptq.spellings(tmp_path)
    roles = [part.rpartition(".")[2] for part in parts]
    assert set(roles) < set(spelled[roles[0]]), "GPTQ rules name the joined matrix, too"


def test_an_architecture_that_vllm_lacks_gets_the_strictest_groups(tmp_path: Path) -> None:
    """All layers of a module with as many inputs, and a note."""
    names = ["attention.first", "attention.second", "attention.out", "mlp.up"]
    layers = [linear(STEM + name, 32 if name.endswith("out") else 64) for name in names]
    found = of(tmp_path, "OddForCausalLM")
    assert found.groups(layers) == (
        (f"{STEM}attention.first.weight", f"{STEM}attention.second.weight"),
        (f"{STEM}attention.out.weight",),
        (f"{STEM}mlp.up.weight",),
    )
    assert "OddForCausalLM" in found.notes[0]


def test_sets_that_overlap_are_one() -> None:
    number = united([["q", "k"], ["a", "b"], ["k", "v"]])
    assert number["q"] == number["k"] == number["v"] != number["a"] == number["b"]


def test_the_table_is_vllms() -> None:
    """No set of one, none of experts' own tensors, and the sets that everybody knows."""
    version, known = declared()
    assert version.count(".") == 2 and len(known) > 200
    for sets in known.values():
        for whole, parts in sets.items():
            assert len(parts) > 1 and "expert" not in whole
    assert known["Qwen3ForCausalLM"]["gate_up_proj"] == ["gate_proj", "up_proj"]


def test_own_sets_join_only_within_one_module() -> None:
    roles = ("attn.q_proj", "attn.k_proj", "attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    layers = [linear(f"m.{b}.{role}") for b in (0, 1) for role in roles]
    found = Joined({"qk": ("q_proj", "k_proj"), "gu": ("gate_proj", "up_proj")}, "tensor")
    assert found.groups(layers) == tuple(
        tuple(f"m.{b}.{x}.weight" for x in names)
        for b in (0, 1)
        for names in (roles[:2], roles[2:3], roles[3:])
    )
    assert Joined({}, "tensor").groups(layers) == tuple((x.name,) for x in layers)


@pytest.mark.parametrize(
    ("experts", "sizes"), [("tensor", [3, 3, 3, 3]), ("block", [6, 6]), ("model", [12])]
)
def test_experts_go_together_by_tensor_by_block_or_all(experts: str, sizes: list[int]) -> None:
    layers = [
        Layer(f"m.{b}.{e}.{n}.weight", 8, 8, "experts", n, b, f"m.{b}.{n}", (8, 8), expert=e)
        for b in (0, 1)
        for n in ("up", "down")
        for e in (0, 1, 2)
    ]
    assert [len(group) for group in Joined({}, experts).groups(layers)] == sizes
