"""Weights of tokens: the lengths of gradients at a layer's outputs, by brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.models import arithmetic
from optimizer.models.model import Model, take_inventory
from optimizer.models.offload import block_list
from optimizer.sensitivity.fisher import likelihood
from optimizer.sensitivity.outputs import token_weights
from tests.sensitivity.conftest import NAMES
from tests.sensitivity.test_by_block import small

IDS = np.random.default_rng(6).integers(5, size=(3, 7))
SEED = 11


def untold(items: Any, _text: str) -> Any:
    return items


def lengths(model: Model, name: str, window: int) -> np.ndarray:
    """|g_t| at the outputs of a layer, from a zero that is added there."""
    module = model.net.get_submodule(name.removesuffix(".weight"))
    added: list[torch.Tensor] = []

    def add(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        added.append(torch.zeros_like(output).requires_grad_(True))
        return output + added[0]

    hook = module.register_forward_hook(add)
    try:
        value = likelihood(model, torch.from_numpy(IDS[window])[None], [SEED, window])
        (gradient,) = torch.autograd.grad(value, added[0])
    finally:
        hook.remove()
    return gradient[0].norm(dim=-1).numpy()


@pytest.mark.parametrize("squared", [False, True])
def test_a_token_weighs_what_its_gradient_does(tiny: Model, squared: bool) -> None:
    layers = list(tiny.layers.values())
    told: list[str] = []

    def track(items: Any, text: str) -> Any:
        told.append(text)
        return items

    found = token_weights(tiny, layers, IDS, SEED, track, squared)
    assert told == ["weights of tokens"] and set(found) == set(NAMES)
    for name in NAMES:
        wanted = np.array([lengths(tiny, name, w) for w in range(3)])
        wanted = wanted**2 if squared else wanted
        assert found[name].dtype == np.float32
        assert found[name] == pytest.approx(wanted / wanted.mean(), rel=1e-4)
        assert found[name].mean() == pytest.approx(1) and found[name].std() > 0.1
    assert not any(module._forward_hooks for module in tiny.net.modules())
    assert not any(p.requires_grad for p in tiny.net.parameters())


def test_a_layer_that_no_gradient_reaches_takes_all_tokens_alike(tiny: Model) -> None:
    layers = list(tiny.layers.values())
    weight = tiny.net.get_parameter("lm_head.weight")
    before = weight.clone()
    weight.zero_()  # nothing that comes before the head counts
    try:
        found = token_weights(tiny, layers, IDS, SEED, untold, squared=True)
    finally:
        weight.copy_(before)
    assert all((found[name] == 1).all() for name in NAMES)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_block_by_block_from_disk_it_is_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(kind, tmp_path)
    layers = [x for x in model.layers.values() if x.watchable]
    ids = np.random.default_rng(1).integers(96, size=(3, 12))
    wanted = token_weights(model, layers, ids, SEED, untold, squared=False)
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    disk = Model.load(tmp_path, model.inventory, offload="disk")
    steps: list[int] = []

    def track(items: Any, _text: str) -> Any:
        for item in items:
            steps.append(item)
            yield item

    found = token_weights(disk, layers, ids, SEED, track, squared=False)
    assert steps == [0, 1, 2, 0, 1, 2]  # three blocks forth and back, not three windows
    for name, weights in wanted.items():
        assert found[name] == pytest.approx(weights, rel=1e-3), name


@pytest.mark.parametrize(("scaled", "near"), [(4, 0.1), (17, 1e-3)])
def test_in_fp16_it_is_the_same_also_where_a_gradient_is_too_large(
    scaled: int, near: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    monkeypatch.setattr(arithmetic, "SCALED", scaled)
    small("llama", tmp_path)
    ids, found, told = np.random.default_rng(1).integers(96, size=(3, 12)), [], list[str]()
    for kind in (None, "fp16"):
        disk = Model.load(tmp_path, take_inventory(tmp_path), offload="disk")
        layers = [x for x in disk.layers.values() if x.watchable]
        blocks = block_list(disk.net, disk.inventory)
        arithmetic.apply(disk.net, blocks, kind, None, told.append)
        found.append(token_weights(disk, layers, ids, SEED, untold, squared=False))
    exact, rough = found
    for name, weights in exact.items():
        off = np.abs(rough[name] - weights) / weights
        assert np.median(off) < near, name
    assert len(told) == (scaled == 17)
