"""AWQ: its arithmetic by itself, then whole models, and that what is packed is what was certified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.commands import deploy, optimize
from optimizer.config import Optimize, Proof
from optimizer.data.text import Data, Part
from optimizer.errors import ConfigError
from optimizer.formats.torch import packed
from optimizer.models.blockwise import Stream
from optimizer.plan import UNTOUCHED, Budget, Palette
from optimizer.quantization import awq, folding
from optimizer.quantization.uniform import Nearest
from optimizer.search import Search
from optimizer.stages.session import Session
from tests.cli.test_compose import composed
from tests.quantization.test_calibrated import P3, Made, everything, kl, logits, small

from optimizer.store import Store  # isort: skip
from optimizer.quantization.methods import Awq, bind
from optimizer.sensitivity.estimators import Fisher


@pytest.fixture
def material(tmp_path: Path) -> Made:
    return Made(small("llama", tmp_path / "llama"), Store(tmp_path / "store"))


def quantizer(material: Any) -> Any:
    return bind(Awq(), material)


def loud_inputs(cols: int = 64) -> torch.Tensor:
    """Inputs of which a few are thirty times as loud."""
    x = torch.randn(500, cols)
    x[:, ::16] *= 30
    return x


def test_scaling_lowers_the_error_of_the_outputs() -> None:
    torch.manual_seed(2)
    x, weight = loud_inputs(), torch.randn(48, 64)
    hessian = x.T @ x
    s = awq.search([(weight, P3)], hessian, awq.loudness(hessian))
    scaled = awq.scale(weight, P3, s)
    own = (x @ (scaled.decode() - weight).T).square().mean()
    nearest = (x @ (Nearest().round(weight, P3) - weight).T).square().mean()
    assert own < 0.6 * nearest
    assert s[::16].min() > s[1:16].max()
    assert float(s.max()) <= awq.REACH and float(s.min()) >= 1 / awq.REACH


def test_quiet_equal_inputs_need_no_scales() -> None:
    s = awq.search([(torch.randn(16, 32), P3)], torch.eye(32), torch.ones(32))
    assert torch.equal(s, torch.ones(32))


def test_dead_inputs_do_no_harm() -> None:
    x = loud_inputs()
    x[:, 3] = 0
    hessian = x.T @ x
    s = awq.search([(torch.randn(48, 64), P3)], hessian, awq.loudness(hessian))
    assert bool(torch.isfinite(s).all()) and float(s.min()) > 0


def test_dividing_rows_leaves_the_codes() -> None:
    scaled = awq.scale(torch.randn(8, 32), P3, torch.ones(32))
    by = torch.tensor([1.0, 2.0, 0.25, 8.0] * 2)
    found = scaled.divided(by)
    assert torch.equal(found.codes.codes, scaled.codes.codes)
    assert torch.allclose(found.decode(), scaled.decode(), rtol=2**-10)
    assert torch.allclose(found.codes.decode() * by.unsqueeze(1), scaled.decode(), rtol=2**-10)


def test_it_beats_rounding_to_nearest_and_restores_every_bit(material: Made) -> None:
    model = material.model
    with torch.no_grad():  # some channels of the norms are loud, as in real models
        for name, value in model.net.named_parameters():
            if "layernorm" in name:
                value[::16] *= 20
    before = {n: p.detach().clone() for n, p in model.net.named_parameters()}
    choice, reference = everything(model), logits(model.net)
    found = {}
    for name, made in (("awq", quantizer(material)), ("rtn", Nearest())):
        with model.rounded(made.rounder(choice), choice):
            found[name] = kl(reference, logits(model.net))
    assert found["awq"] < 0.7 * found["rtn"]
    assert all(torch.equal(before[n], p) for n, p in model.net.named_parameters())


def test_the_second_time_everything_is_in_the_store(material: Made) -> None:
    choice = everything(material.model)
    layer = next(iter(choice))
    weight = material.model.weight(layer)
    first = quantizer(material).rounder(choice).round(weight, P3, layer)
    material.asked.clear()
    again = quantizer(material).rounder(choice)
    assert torch.equal(first, again.round(weight, P3, layer)) and not material.asked


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "mixtral"])
def test_only_what_the_block_confirms_is_folded(kind: str, tmp_path: Path) -> None:
    """Gemma's norms multiply by 1 + w, so its scales would change what the block computes."""
    model = small(kind, tmp_path / kind)
    stream = Stream(model, np.random.default_rng(0).integers(96, size=(4, 16)))
    kept = []
    for names in stream.inputs(0):
        found = folding.feeder(model, names)
        if found is None:
            continue
        s = found.spread(
            torch.rand(len(found.shared(torch.ones(model.layers[names[0]].cols)))) + 0.5
        )
        if folding.holds(model, stream, names, found, s):
            kept.append(model.layers[names[0]].role)
    assert (
        kept
        == {
            "llama": ["q_proj", "o_proj", "gate_proj", "down_proj"],
            "gemma2": ["o_proj", "down_proj"],
            "gpt_neox": [],
            "mixtral": ["q_proj", "o_proj"],
        }[kind]
    )


def test_untouched_layers_are_not_scaled(material: Made) -> None:
    model = material.model
    choice = everything(model)
    q = next(n for n in choice if "layers.0" in n and "q_proj" in n)
    up = next(n for n in choice if "layers.0" in n and "up_proj" in n)
    choice[q] = choice[up] = UNTOUCHED
    rounder = quantizer(material).rounder(choice)
    for name in (q.replace("q_proj", "k_proj"), up.replace("up_proj", "down_proj")):
        weight = model.weight(name)
        assert torch.equal(rounder.round(weight, P3, name), Nearest().round(weight, P3))
    norm = torch.ones(64, dtype=torch.float16)
    assert torch.equal(rounder.changed("model.layers.0.input_layernorm.weight", norm), norm)
    assert not torch.equal(rounder.changed("model.layers.1.input_layernorm.weight", norm), norm)


def test_there_is_no_clipping() -> None:
    with pytest.raises(ConfigError, match=r"quantizer\.clip|clip"):
        composed("optimize", "quantizer=awq", "+quantizer.clip=true")


def test_a_plan_is_packed_as_it_was_certified(store: Path, source: object, tmp_path: Path) -> None:
    part = Part(sequences=8, length=64)
    settings = Optimize(
        model="stories",
        budget=Budget(bits=4.0),
        palette=Palette(bits=[2, 3, 4, 5], group_size=32),
        scope=["blocks"],
        quantizer=Awq(),
        sensitivity=Fisher(),
        data=Data(calibration=part, search=part, heldout=part),
        search=Search(space="exact"),
        proof=Proof(random=0),
        store=str(store),
    )
    plan = optimize.optimize(settings, tmp_path / "run").plan
    assert plan.quantizer.keys() == {"name", "tokens"}
    folder = deploy.apply(plan, tmp_path / "packed", settings.store)
    session = Session.open("stories", settings.data, settings.store)
    ids = torch.from_numpy(session.windows("heldout").ids)
    made = bind(settings.quantizer, session)
    with session.model.rounded(made.rounder(plan.choice), plan.choice), torch.no_grad():
        expected = session.model.net(ids).logits
    with torch.no_grad():
        found = packed.load(folder)(ids).logits
    assert torch.allclose(expected, found, atol=2e-4)
    own = {n: v for n, v in packed.load(folder).named_parameters() if "norm" in n}
    moved = [n for n, v in own.items() if not torch.equal(v, session.model.net.get_parameter(n))]
    assert moved, "no norm was folded"
