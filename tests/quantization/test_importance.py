"""Rounding to nearest under an importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.errors import ConfigError
from optimizer.models.model import Model
from optimizer.plan import Precision
from optimizer.quantization.importance import Alone, Weighted
from optimizer.quantization.methods import Importance
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Task, errors
from optimizer.store import Store
from tests.quantization.test_contract import Material, watched

KINDS = ("q4_0", "q5_1", "iq4_nl")  # of rows of 64


def made(model: Model, folder: Path, **settings: Any) -> Alone:
    return Alone(Importance(**settings), Material(model, Store(folder)))


def inputs(model: Model, layer: str) -> torch.Tensor:
    """Of the material's tokens [tokens, cols]."""
    module, seen = model.net.get_submodule(layer.removesuffix(".weight")), []
    handle = module.register_forward_pre_hook(
        lambda _m, given: seen.append(given[0].flatten(0, -2))
    )
    ids = Material(model, Store(Path())).calibration()
    with torch.inference_mode():
        model.net(input_ids=torch.from_numpy(ids))
    handle.remove()
    return torch.cat(seen)


def test_with_tokens_alike_a_column_counts_as_the_mean_square_of_its_inputs(
    stories: Model, tmp_path: Path
) -> None:
    layer = watched(stories)
    found = made(stories, tmp_path, weighting="alike").of_rows(layer)
    wanted = inputs(stories, layer).square().mean(0)
    torch.testing.assert_close(found.importance, wanted, rtol=1e-4, atol=0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("weighting", ["gradient", "fisher"])
def test_gradients_weigh_tokens_and_never_shut_a_column_off(
    stories: Model, tmp_path: Path, weighting: str
) -> None:
    layer = watched(stories)
    alike, own = (
        made(stories, tmp_path, weighting=w).of_rows(layer).importance  # type: ignore[attr-defined]
        for w in ("alike", weighting)
    )
    assert (own > 0).all()
    assert not torch.allclose(own / own.mean(), alike / alike.mean(), rtol=0.01)


@pytest.mark.parametrize("kind", [*KINDS, "q3_k", "iq3_xxs", "nvfp4"])
def test_the_loss_of_outputs_falls_where_columns_differ(kind: str) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, v = torch.randn(16, 256, generator=draw), torch.randn(256, generator=draw).exp()
    precision = Precision.floating(kind) if kind == "nvfp4" else Precision.ggml(kind)
    own = (Weighted(importance=v).round(weight, precision) - weight).square()
    plain = (Nearest().round(weight, precision) - weight).square()
    assert (own @ v).sum() < 0.97 * (plain @ v).sum()
    assert own.sum() > plain.sum()  # what that costs


def test_some_rows_become_what_they_become_in_the_whole(stories: Model, tmp_path: Path) -> None:
    """The table scores rows, the packer packs layers."""
    layer, rounder = watched(stories), made(stories, tmp_path)
    weight = stories.weight(layer).float()
    some = torch.tensor([3, 5, 17])
    for precision in (*map(Precision.ggml, KINDS), Precision("int", 3, 32)):
        whole = rounder.round(weight, precision, layer)
        assert torch.equal(rounder.of_rows(layer).round(weight[some], precision), whole[some])


def test_an_export_finds_the_payloads_of_a_certificate(
    stories: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, precision = watched(stories), Precision.ggml("iq4_nl")
    weight = stories.weight(layer).float()
    rounded = made(stories, tmp_path).round(weight, precision, layer)
    monkeypatch.delattr(Nearest, "encode")
    found = made(stories, tmp_path).encode(weight, precision, layer)
    assert torch.equal(found.decode(), rounded)
    with pytest.raises(AttributeError):
        made(stories, tmp_path).encode(weight * 2, precision, layer)


def test_a_table_sees_the_matrix(stories: Model, tmp_path: Path) -> None:
    layer = next(x for x in stories.inventory.layers if x.name == watched(stories))
    weight, precision = stories.weight(layer.name).float(), Precision.ggml("q4_0")
    losses = []
    for rounder in (Nearest(), made(stories, tmp_path)):
        task = Task(((layer.name,),), ("q4_0",), {(layer.name, "q4_0"): precision}, rounder)
        losses.append(errors.errors_of_rows(task, layer, weight, [precision], 2))
        wanted = (rounder.round(weight, precision, layer.name) - weight).square()
        np.testing.assert_allclose(losses[-1].numpy(), wanted.reshape(1, -1).numpy(), rtol=1e-5)
    assert not torch.allclose(*losses)


def test_a_head_counts_its_own_inputs_and_what_is_only_looked_up_is_rounded_plainly(
    stories: Model, tmp_path: Path
) -> None:
    rounder = made(stories, tmp_path, weighting="alike")
    (head,) = (x.name for x in stories.inventory.layers if x.predicts)
    wanted = inputs(stories, "lm_head.weight").square().mean(0)
    torch.testing.assert_close(rounder.of_rows(head).importance, wanted, rtol=1e-4, atol=0)  # type: ignore[attr-defined]
    assert not isinstance(rounder.of_rows("looked up"), Weighted)


def test_a_wrong_weighting_is_named() -> None:
    with pytest.raises(ConfigError, match=r"alike, gradient, fisher, not 'loud'"):
        Importance(weighting="loud").check()
