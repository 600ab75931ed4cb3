"""Calibrated rounding and token-wise tables on models whose modules return tuples or views, take
keywords, or see only some of the tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.models.model import Model
from optimizer.plan import Inventory, Precision
from optimizer.quantization.calibrated import Calibrated
from optimizer.quantization.folding import ActivationAware
from optimizer.quantization.methods import Awq, Gptq
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Task, fisher, hessian
from optimizer.sensitivity.outputs import token_weights
from optimizer.store import Store
from tests.conftest import GLU, WIDE, build, opened, slow_beside

P = Precision("int", 3, 32, True)
KINDS: dict[str, dict[str, Any]] = {
    "falcon": WIDE | {"multi_query": True, "alibi": False},  # adds to its layers' outputs in place
    "llama4_text": GLU | {"num_local_experts": 4, "num_experts_per_tok": 1, "moe_layers": [1],
                          "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
    "mamba": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 32},
    "gemma3n_text": GLU | {
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"],
        "laurel_rank": 32, "intermediate_size": [96, 96], "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0]},
}  # fmt: skip


class Given:
    """`calibrated.Material` of a tiny model."""

    calibration_key = "given"

    def __init__(self, model: Model, store: Path) -> None:
        self.model, self.store = model, Store(store)
        self.notes: list[str] = []

    @property
    def inventory(self) -> Inventory:
        return self.model.inventory

    def calibration(self) -> np.ndarray:
        return np.random.default_rng(0).integers(3, 96, (4, 24))

    def track(self, items: Iterable[Any], _text: str) -> Iterable[Any]:
        return items

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module", params=slow_beside(["falcon", "mamba"], KINDS))
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp(request.param)
    small = opened(
        request.param, build(folder, request.param, KINDS[request.param], torch.float16)
    )
    return Given(small.model, folder / "store")


def task_of(odd: Given) -> Task:
    layers = [x for x in odd.inventory.layers if x.watchable and x.cols % 32 == 0]
    fitted = {(x.name, P.name): P for x in layers}
    return Task(tuple((x.name,) for x in layers), (P.name,), fitted, Nearest())


def logits(odd: Given) -> torch.Tensor:
    ids = torch.from_numpy(odd.calibration())
    with torch.no_grad():
        found: torch.Tensor = odd.model.net(input_ids=ids, use_cache=False).logits
    return found


def test_gptq_is_better_than_nearest(odd: Given) -> None:
    """Mean squared change of the logits on the calibration windows."""
    choice = dict.fromkeys(task_of(odd).layers, P)
    rounders = {
        "rtn": Nearest(),
        "gptq": Calibrated(Gptq(order="groups"), odd).rounder(choice),
        "awq": ActivationAware(Awq(), odd).rounder(choice),
    }
    own, moved = logits(odd), {}
    for name, rounder in rounders.items():
        with odd.model.rounded(rounder, choice):
            moved[name] = float((logits(odd) - own).square().mean())
    assert 0 < moved["gptq"] < 0.9 * moved["rtn"], moved
    assert 0 < moved["awq"] < 1.2 * moved["rtn"], moved


def test_every_layer_has_weights_of_tokens(odd: Given) -> None:
    layers = [x for x in odd.inventory.layers if x.watchable]
    found = token_weights(odd.model, layers, odd.calibration(), 0, odd.track, False)
    assert {x.name for x in layers} == found.keys()
    for weights in found.values():
        assert weights.shape == (4, 24) and np.isclose(weights.mean(), 1, atol=1e-3)
    assert any(weights.std() > 0.1 for weights in found.values())


@pytest.mark.parametrize("score", [fisher.tokenwise, hessian.kronecker])
def test_no_layer_is_free(odd: Given, score: Any) -> None:
    """Also one whose weight the model reads without calling it: the diagonal stands in."""
    task, ids = task_of(odd), odd.calibration()
    diagonal = fisher.diagonal(odd.model, task, ids, [0])
    losses = score(odd.model, task, ids, [0])
    reached = diagonal[:, 0] > 0
    assert reached.mean() > 0.8 and (losses[reached, 0] > 0).all()
    unread = ~reached
    assert (losses[unread, 0] == 0).all()


def test_inputs_that_are_changed_in_place_are_seen_as_they_were() -> None:
    from optimizer.models.watching import rows_of

    x = torch.ones(2, 3)
    seen = rows_of((), {"hidden": x})
    x.zero_()
    assert seen is not None and bool((seen == 1).all())
    assert rows_of((None, torch.arange(3)), {}) is None


@pytest.mark.parametrize("inputs", ["rounded", "reference"])
def test_a_layer_that_no_token_reaches_is_rounded_to_nearest_and_named(
    tmp_path: Path, inputs: str
) -> None:
    """One module of a block is replaced in the computation, so that it never runs; the rest has
    codes of its own as before, also when they come from the store."""
    small = opened("llama", build(tmp_path / "model", "llama", GLU, torch.float16))
    choice = {x.name: P for x in small.inventory.layers if x.watchable}
    unread = next(name for name in choice if "1.mlp.gate_proj" in name)
    block = small.model.net.model.layers[1].mlp
    block.forward = lambda x: block.down_proj(block.up_proj(x))
    for _ in range(2):
        given = Given(small.model, tmp_path / "store")
        rounder = Calibrated(Gptq(inputs=inputs), given).rounder(choice)
        weights = {name: small.model.weight(name) for name in choice}
        made = {name: rounder.round(weight, P, name) for name, weight in weights.items()}
        nearest = {name: Nearest().round(weight, P) for name, weight in weights.items()}
        assert [n for n in choice if torch.equal(made[n], nearest[n])] == [unread]
        if inputs == "rounded" or _ == 0:
            assert [note for note in given.notes if unread in note and "no calibration" in note]


def test_of_experts_in_one_tensor_nobody_is_warned(tmp_path: Path) -> None:
    kind, settings = "mixtral", GLU | {"num_local_experts": 4, "num_experts_per_tok": 2}
    small = opened(kind, build(tmp_path / "model", kind, settings, torch.float16))
    given = Given(small.model, tmp_path / "store")
    choice = {x.name: P for x in small.inventory.layers if x.block is not None}
    Calibrated(Gptq(), given).rounder(choice)
    assert not given.notes  # each is rounded with what it is given
