"""GPTQ's and AutoRound's formats, read by a reader of their own: every bit by its place, every layer's
precision as the engines find it in config.json."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from optimizer.commands import export
from optimizer.errors import PlanError
from optimizer.formats.safetensors import gptq
from optimizer.plan import UNTOUCHED, Precision
from optimizer.quantization.uniform import Nearest
from tests.formats.conftest import G64, Wide, dealt, uniform

SYMMETRIC = [Precision("int", b, g, True) for b, g in ((3, 64), (5, 32), (2, 128), (6, 64))]
MANY = [*SYMMETRIC, UNTOUCHED, G64, Precision("int", 7, None, True), Precision("int", 8, 64, True)]
FORMATS = ["gptq", "autoround"]


def field(words: np.ndarray, index: int, bits: int) -> np.ndarray:
    """Code number `index` of a little-endian stream of 32-bit words along the first axis."""
    first, offset = divmod(index * bits, 32)
    value = words[first].astype(np.uint64)
    if offset + bits > 32:
        value = value | (words[first + 1].astype(np.uint64) << np.uint64(32))
    return (value >> np.uint64(offset)) & np.uint64(2**bits - 1)


def weight(parts: dict[str, torch.Tensor], name: str, bits: int) -> np.ndarray:
    """[rows, cols] from version 1 of GPTQ's tensors."""
    codes = parts[f"{name}.qweight"].numpy().view(np.uint32)
    zeros = parts[f"{name}.qzeros"].numpy().view(np.uint32).T
    scales = parts[f"{name}.scales"].numpy().astype(np.float32)
    cols, groups, rows = len(codes) * 32 // bits, *scales.shape
    found = np.empty((cols, rows), np.float32)
    for column in range(cols):
        group = column * groups // cols
        zero = np.array([field(zeros[:, group], r, bits) for r in range(rows)]) + 1
        found[column] = (field(codes, column, bits) - zero.astype(np.float32)) * scales[group]
    return found.T


def precision_in(config: dict[str, Any], name: str) -> tuple[int, int]:
    """(bits, group size) as the engines look them up; 16 bits for what stays."""
    base = (config["bits"], config["group_size"])
    if config["quant_method"] == "auto-round":
        own = config["extra_config"].get(name, {})
        return own.get("bits", base[0]), own.get("group_size", base[1])
    for rule, own in config["dynamic"].items():  # the first that matches counts
        if re.match(rule[2:], name):
            if rule.startswith("-:"):
                return 16, -1
            return own.get("bits", base[0]), own.get("group_size", base[1])
    return base


@pytest.mark.parametrize(
    "to", [FORMATS[0], *(pytest.param(to, marks=pytest.mark.slow) for to in FORMATS[1:])]
)
def test_every_weight_is_the_plans(wide: Wide, tmp_path: Path, to: str) -> None:
    plan = wide.plan(dealt(wide.inventory.layers, MANY), "vllm")
    verdict = export.export(plan, to, tmp_path / "out", str(wide.store))
    file = tmp_path / "out" / "model.safetensors"
    assert file.stat().st_size == verdict.bytes
    parts = load_file(file)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for layer in wide.inventory.scoped(["blocks"]):
        name, precision = layer.name.removesuffix(".weight"), plan.choice[layer.name]
        bits, group = precision_in(config, name)
        assert bits == precision.bits
        own = wide.model.weight(layer.name)
        if bits == 16:
            assert torch.equal(parts[layer.name].float(), own)
        else:
            assert group == (precision.group_size or -1)
            wanted = Nearest().round(own, precision)
            assert np.array_equal(weight(parts, name, bits), wanted.numpy())
    assert (tmp_path / "out" / "manifest.json").exists()
    assert plan.id in (tmp_path / "out" / "README.md").read_text()


def test_vllm_finds_joined_layers_under_its_own_names(wide: Wide) -> None:
    plan = wide.plan(dealt(wide.inventory.layers, MANY), "vllm")
    config = gptq.config(plan, wide.inventory)
    for block in range(3):
        stem = f"model.layers.{block}."
        for joined, part in (("self_attn.qkv_proj", "self_attn.q_proj"),
                             ("mlp.gate_up_proj", "mlp.up_proj")):  # fmt: skip
            assert precision_in(config, stem + joined) == precision_in(config, stem + part)
    assert any(precision_in(config, f"model.layers.{b}.self_attn.qkv_proj")[0] != config["bits"]
               for b in range(3))  # fmt: skip
    # block 1 must not be taken for block 11
    rule = gptq.pattern("model.layers.1.mlp.down_proj", None, {})
    assert not re.match(rule, "model.layers.11.mlp.down_proj")


def test_experts_have_one_rule_for_a_block(wide: Wide) -> None:
    layer = replace(wide.inventory.layers[1], kind="experts", expert=3, role="gate_proj")
    rule = gptq.pattern("model.layers.2.mlp.experts.3.gate_proj", layer, {})
    for name in ("model.layers.2.mlp.experts", "model.layers.2.mlp.experts.11.down_proj"):
        assert re.match(rule, name)
    assert not re.match(rule, "model.layers.2.mlp.gate")
    fused = replace(layer, expert=None, role="gate_up_proj")
    rule = gptq.pattern("model.layers.2.feed_forward.experts.gate_up_proj", fused, {})
    assert re.match(rule, "model.layers.2.feed_forward.experts")
    assert not re.match(rule, "model.layers.2.feed_forward.shared_expert.up_proj")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    ("precision", "other", "words"),
    [
        (Precision("int", 4, 64), {}, ["int4_g64", "runtime="]),
        (G64, {"k_proj": Precision("int", 8, 64, True)}, ["one precision", "k_proj"]),
        (Precision.ggml("q4_k"), {}, ["q4_k"]),
        (UNTOUCHED, {}, ["quantizes none"]),
    ],
)
def test_a_plan_that_would_fail_is_refused(
    wide: Wide, tmp_path: Path, to: str, precision: Precision, other: dict, words: list[str]
) -> None:
    plan = wide.plan(uniform(wide, precision, **other), "torch")
    with pytest.raises(PlanError) as caught:
        export.export(plan, to, tmp_path / "out", str(wide.store))
    assert all(word in str(caught.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_shapes_that_fill_no_word_are_refused(wide: Wide) -> None:
    layer = next(x for x in wide.inventory.layers if x.role == "down_proj")
    assert gptq.shaped(layer, G64) is None
    assert "172" in str(gptq.shaped(replace(layer, cols=172), G64))
    assert "172" in str(gptq.shaped(replace(layer, rows=172), G64))


def test_three_bits_are_for_gptqmodel_alone(wide: Wide) -> None:
    store = str(wide.store)
    three = wide.plan(uniform(wide, Precision("int", 3, 64, True)), "gptq")
    assert "3: run it with GPTQModel" in export.check(three, "gptq", store).notes[0]
    assert not export.check(wide.plan(uniform(wide, G64), "gptq"), "gptq", store).notes
