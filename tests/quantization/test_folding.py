"""Where AWQ's scales may go, by names and shapes, and what becomes of them there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer.models.model import Model
from optimizer.plan import Inventory, Layer, Precision
from optimizer.quantization import folding
from optimizer.quantization.awq import scale
from optimizer.quantization.folding import Feeder, Folded
from optimizer.quantization.uniform import Nearest
from tests.quantization.test_calibrated import P3, small

STEM = "model.layers.1"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Four heads of 16, two of them of keys and values."""
    return small("llama", tmp_path / "llama")


def test_rows_of_the_layer_before_serve_runs_of_columns() -> None:
    """Two heads of keys and values, each for two heads of queries, two columns wide."""
    found = Feeder(layer="v", repeats=2, width=2)
    r = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    assert found.shared(r).tolist() == [2, 3, 6, 7]
    spread = found.spread(torch.tensor([1.0, 2, 3, 4]))
    assert spread.tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    assert torch.equal(found.shared(found.spread(torch.arange(6.0))), torch.arange(6.0))
    plain = Feeder(norm="n")
    assert torch.equal(plain.shared(r), r) and torch.equal(plain.spread(r), r)


def feeders(model: Model, *roles: str) -> Feeder | None:
    names = [n for n, x in model.layers.items() if x.block == 1 and x.role in roles]
    return folding.feeder(model, names)


def test_what_feeds_a_layer_of_llama(model: Model) -> None:
    attention, mlp = f"{STEM}.self_attn", f"{STEM}.mlp"
    wanted = Feeder(norm=f"{STEM}.input_layernorm.weight")
    assert feeders(model, "q_proj", "k_proj", "v_proj") == wanted
    wanted = Feeder(norm=f"{STEM}.post_attention_layernorm.weight")
    assert feeders(model, "gate_proj", "up_proj") == wanted
    wanted = Feeder(layer=f"{attention}.v_proj.weight", repeats=2, width=16)
    assert feeders(model, "o_proj") == wanted
    assert feeders(model, "down_proj") == Feeder(layer=f"{mlp}.up_proj.weight", width=96)
    assert feeders(model, "q_proj", "k_proj") is None  # others read that norm, too
    assert feeders(model, "up_proj") is None


def other(inventory: Inventory, name: str) -> Inventory:
    """With one more tensor, or without it."""
    known = [x for x in inventory.others if x.name != name]
    if len(known) == len(inventory.others):
        known.append(replace(inventory.others[0], name=name))
    return replace(inventory, others=tuple(known))


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("input_layernorm.bias", ("q_proj", "k_proj", "v_proj")),
        ("input_layernorm.weight", ("q_proj", "k_proj", "v_proj")),
        ("post_attention_layernorm.bias", ("gate_proj", "up_proj")),
        ("mlp.up_proj.bias", ("down_proj",)),
        ("self_attn.v_proj.bias", ("o_proj",)),
    ],
)
def test_what_has_a_bias_or_is_not_there_takes_no_scales(
    model: Model, name: str, roles: tuple[str, ...]
) -> None:
    assert feeders(model, *roles) is not None
    model.inventory = other(model.inventory, f"{STEM}.{name}")
    assert feeders(model, *roles) is None


def test_a_norm_before_the_feed_forward_comes_first(model: Model) -> None:
    """Gemma has both; the one after attention isn't what the feed-forward reads."""
    model.inventory = other(model.inventory, f"{STEM}.pre_feedforward_layernorm.weight")
    found = feeders(model, "gate_proj", "up_proj")
    assert found == Feeder(norm=f"{STEM}.pre_feedforward_layernorm.weight")


def test_only_linear_layers_of_a_block_have_a_norm(model: Model) -> None:
    layer = model.layers[f"{STEM}.self_attn.q_proj.weight"]
    assert folding.norm_of(model.inventory, layer) == f"{STEM}.input_layernorm.weight"
    assert folding.norm_of(model.inventory, replace(layer, kind="conv1d")) is None
    assert folding.norm_of(model.inventory, replace(layer, block=None)) is None
    assert folding.norm_of(model.inventory, replace(layer, role="other")) is None


def test_shapes_that_do_not_divide_have_no_common_rows(model: Model) -> None:
    v, o = (model.layers[f"{STEM}.self_attn.{x}_proj.weight"] for x in "vo")

    def rows(before: Layer = v, after: Layer = o) -> Feeder | None:
        return folding._rows(model, before, after)

    assert (v.rows, o.cols) == (32, 64) and rows() == Feeder(layer=v.name, repeats=2, width=16)
    assert rows(replace(v, kind="experts")) is None and rows(after=replace(o, kind="head")) is None
    assert rows(after=replace(o, cols=80)) is None
    assert rows(replace(v, rows=8)) is None  # half a head
    model.net.config.head_dim = None  # follows from the width and the heads
    assert rows() == Feeder(layer=v.name, repeats=2, width=16)
    model.net.config.head_dim = 8
    assert rows() == Feeder(layer=v.name, repeats=2, width=8)


def test_scales_are_what_the_norm_in_its_own_numbers_divides_by(model: Model) -> None:
    name = f"{STEM}.input_layernorm.weight"
    norm = model.net.get_parameter(name)
    with torch.no_grad():
        norm.copy_(torch.linspace(0.5, 3, 64).half().float())
        norm[0] = 0.0
    s = torch.linspace(0.3, 4, 64)
    s[5] = 1e9  # the norm's weight would become zero
    found = folding.held(model, Feeder(norm=name), s)
    wanted = (norm / s).half().float()
    assert found[0] == 1 and found[5] == 1
    others = [i for i in range(64) if i not in (0, 5)]
    assert torch.equal(found[others], (norm / wanted)[others])
    assert not torch.equal(found, s) and torch.allclose(found[others], s[others], rtol=1e-3)
    assert folding.held(model, Feeder(layer="x"), s) is s


def test_a_folded_choice_packs_codes_and_divides_the_norms_of_scaled_readers(
    model: Model,
) -> None:
    names = [f"{STEM}.self_attn.{x}_proj.weight" for x in "qkv"]
    up = f"{STEM}.mlp.up_proj.weight"
    s = torch.linspace(0.5, 2, 64)
    made: dict[str, Any] = {n: scale(model.weight(n), P3, s) for n in names}
    made[up] = scale(model.weight(up), P3, torch.ones(64))
    parts: dict[str, dict[str, Tensor]] = {n: x.pack() for n, x in made.items()}
    folded = Folded(lambda layer, _precision: made.get(layer), parts, model.inventory)
    weight = model.weight(names[0])
    assert folded.encode(weight, P3, names[0]) is made[names[0]].codes
    assert torch.equal(folded.round(weight, P3, names[0]), made[names[0]].decode())
    free = model.weight(f"{STEM}.mlp.gate_proj.weight")
    unknown = folded.encode(free, P3, f"{STEM}.mlp.gate_proj.weight")
    assert torch.equal(unknown.decode(), Nearest().round(free, P3))
    norm = torch.linspace(1, 2, 64).half()
    changed = folded.changed(f"{STEM}.input_layernorm.weight", norm)
    assert changed.dtype == torch.float16 and torch.equal(changed, (norm.float() / s).half())
    for name in ("post_attention_layernorm", "../0.input_layernorm"):
        assert folded.changed(f"{STEM}.{name}.weight", norm) is norm  # scales of one
    assert Precision().kind == "none"
