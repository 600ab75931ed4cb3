"""Block by block or with the whole model at once: the same table."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optimizer.errors import ConfigError, ModelError, StorageError
from optimizer.models.blockwise import Stream
from optimizer.models.head import _with_fixed, unchanged
from optimizer.models.model import Model, take_inventory
from optimizer.plan import Layer, Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import (
    Desk,
    Directional,
    Estimator,
    Fisher,
    Hessian,
    Kronecker,
    Task,
    Text,
    Tokenwise,
    by_block,
    chunks,
    errors,
    squares,
    vocabulary,
)
from optimizer.sensitivity.fisher import diagonal
from optimizer.sensitivity.pace import TOTAL
from tests.conftest import slow_beside

torch.set_num_threads(1)
BODY = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96, "hidden_size": 64}
GLU = BODY | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GLU,
    "llama tied": GLU | {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 96, "word_embed_proj_dim": 32, "max_position_embeddings": 64,
            "do_layer_norm_before": False},
    "gemma2": GLU | {"query_pre_attn_scalar": 16, "sliding_window": 8, "head_dim": 16},
    "mixtral": GLU | {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
# Each kind with weights of its tokens, one also with all alike.
WEIGHTED = slow_beside(
    [("llama", False), *((kind, True) for kind in KINDS)], product(KINDS, [False, True])
)
COLUMNS = {"int3": Precision("int", 3, 16), "int6": Precision("int", 6, 16), "none": Precision()}


def small(kind: str, folder: Path) -> Model:
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind.split(maxsplit=1)[0], **KINDS[kind])
    net = AutoModelForCausalLM.from_config(config)
    for name, value in net.named_parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.15 if "embed" not in name else 1.0)
    net.half().save_pretrained(folder)
    return Model.load(folder, take_inventory(folder))


def task_of(model: Model) -> Task:
    names = list(model.layers)
    fitted = {(name, key): p for name in names for key, p in COLUMNS.items()}
    return Task(tuple((name,) for name in names), tuple(COLUMNS), fitted, Nearest())


def text(weighted: bool) -> Text:
    rng = np.random.default_rng(1)
    weights = rng.random((7, 24)).astype(np.float32) if weighted else None
    return Text(rng.integers(96, size=(7, 24)), chunks(7, 3), 5, weights)


def whole(
    model: Model, task: Task, read: Text, score: Callable[..., np.ndarray] = diagonal
) -> np.ndarray:
    parts = [
        score(
            model,
            task,
            read.ids[run],
            [read.seed, run.start],
            None if read.weights is None else read.weights[run],
        )
        for run in read.runs
    ]
    return np.array(parts)


class Killed(Desk):
    """Keeps the last state, and ends the run after some blocks."""

    def __init__(self, after: int) -> None:
        self.after, self.states = after, list[dict[str, np.ndarray]]()

    def leave(self, state: dict[str, np.ndarray]) -> None:
        self.states.append({key: value.copy() for key, value in state.items()})
        if len(self.states) == self.after:
            raise KeyboardInterrupt

    def left(self) -> dict[str, np.ndarray] | None:
        return self.states[-1] if self.states else None


@pytest.mark.parametrize(("kind", "weighted"), WEIGHTED)
@pytest.mark.parametrize("estimator", [Directional, Tokenwise])
def test_slopes_are_those_of_the_whole_model(
    estimator: type[Estimator],
    kind: str,
    weighted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all layers, two of them in a group whose slopes add up before they are squared; also from
    disk and some at a time."""
    model, read, own = small(kind, tmp_path), text(weighted), estimator(chunks=3)
    task = task_of(model)
    inside = [x.name for x in model.layers.values() if x.block == 1]
    rest = tuple(group for group in task.groups if group[0] not in inside[:2])
    task = replace(task, groups=((inside[0], inside[1]), *rest))
    wanted = whole(model, task, read, own.score)
    found = own.samples(model, task, read, Desk())
    assert found is not None and found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-7 * wanted.max())
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    monkeypatch.setattr(by_block, "TOGETHER", 48)
    monkeypatch.setattr(by_block, "COLLECTED", 1)
    monkeypatch.setattr(squares, "SQUARES", 1)
    monkeypatch.setattr(vocabulary, "LARGE", 0)
    disk = Model.load(tmp_path, model.inventory, offload="disk")
    from_disk = own.samples(disk, task, read, Desk())
    assert from_disk is not None
    np.testing.assert_allclose(from_disk, wanted, rtol=5e-3, atol=1e-7 * wanted.max())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixtral"])
def test_traces_are_those_of_the_whole_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from disk, where no more than one block has its weights."""
    model, read, own = small(kind, tmp_path), text(weighted=False), Hessian(chunks=3, probes=2)
    task = task_of(model)
    wanted = whole(model, task, read, own.score)
    found = own.samples(model, task, read, Desk())
    assert found is not None and (wanted > 0).any()
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5 * wanted.max())
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    disk = Model.load(tmp_path, model.inventory, offload="disk")
    from_disk = own.samples(disk, task, read, Desk())
    assert from_disk is not None
    np.testing.assert_allclose(from_disk, found, rtol=1e-5, atol=1e-9 * found.max())


def test_traces_of_experts_in_one_tensor_are_left_to_the_whole(tmp_path: Path) -> None:
    model, read = small("mixtral", tmp_path), text(weighted=False)
    assert Hessian().samples(model, task_of(model), read, Desk()) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("some", [2**28, 1])
def test_factors_are_those_of_the_whole_model(
    some: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of two windows, so that chunks of two and three end within them."""
    model, read = small(kind, tmp_path), text(weighted=False)
    names = tuple((x.name,) for x in model.layers.values() if x.block is not None)
    task = replace(task_of(model), groups=names)
    monkeypatch.setattr(by_block, "TOGETHER", 48)
    monkeypatch.setattr(by_block, "COLLECTED", some)
    found = Kronecker(chunks=3).samples(model, task, read, Desk())
    wanted = whole(model, task, read, Kronecker(chunks=3).score)
    assert found is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9 * wanted.max())
    with pytest.raises(ConfigError, match="Kronecker form"):
        Kronecker(chunks=3).samples(model, task_of(model), read, Desk())


@pytest.mark.parametrize("estimator", [Tokenwise, Hessian])
def test_a_layer_whose_products_nobody_sees_is_left_to_the_whole(
    estimator: type[Estimator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block multiplies by its weight, past the module."""
    model, read = small("llama", tmp_path), text(weighted=False)
    assert estimator().samples(model, task_of(model), read, Desk()) is not None
    mlp = type(model.net.model.layers[0].mlp)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        up = torch.nn.functional.linear(x, self.up_proj.weight)
        found: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * up)
        return found

    monkeypatch.setattr(mlp, "forward", forward)
    assert estimator().samples(model, task_of(model), read, Desk()) is None


def test_a_function_without_a_forward_derivative_is_left_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = small("llama", tmp_path), text(weighted=False)
    mlp = type(model.net.model.layers[0].mlp)

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore
            return 2 * gradient

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        twice: torch.Tensor = Twice.apply(self.act_fn(self.gate_proj(x)))
        found: torch.Tensor = self.down_proj(twice * self.up_proj(x))
        return found

    monkeypatch.setattr(mlp, "forward", forward)
    assert Fisher().samples(model, task_of(model), read, Desk()) is not None
    assert Hessian().samples(model, task_of(model), read, Desk()) is None


@pytest.mark.parametrize("large", [vocabulary.LARGE, 0])
def test_a_killed_table_goes_on_after_the_last_block(
    large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the rows of the vocabulary, which need the labels that were drawn before the kill."""
    monkeypatch.setattr(vocabulary, "LARGE", large)
    model, read = small("llama", tmp_path), text(weighted=False)
    task, desk = task_of(model), Killed(2)
    wanted = by_block.samples(model, task, read, Desk())
    with pytest.raises(KeyboardInterrupt):
        by_block.samples(model, task, read, desk)
    done, own = list[int](), by_block._Passes._backward

    def backward(self: Any, block: int, arrived: Any) -> None:
        done.append(block)
        own(self, block, arrived)

    monkeypatch.setattr(by_block._Passes, "_backward", backward)
    found = by_block.samples(model, task, read, desk)
    assert found is not None and wanted is not None
    assert np.array_equal(found, wanted) and done == [0]


@pytest.mark.parametrize(("kind", "weighted"), WEIGHTED)
def test_the_table_is_that_of_the_whole_model(kind: str, weighted: bool, tmp_path: Path) -> None:
    model, read = small(kind, tmp_path), text(weighted)
    task = task_of(model)
    found = by_block.samples(model, task, read, Desk())
    assert found is not None and found.shape == (3, len(task.groups), 3)
    wanted = whole(model, task, read)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-9 * wanted.max())
    assert (found[..., :2].sum(0) > 0).all() and (found[..., 2] == 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())


@pytest.mark.parametrize(("kind", "weighted"), WEIGHTED)
def test_rows_of_the_vocabulary_by_themselves_give_the_same(
    kind: str, weighted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied and by themselves, scaled embeddings, capped logits, in memory and on disk."""
    model, read = small(kind, tmp_path), text(weighted)
    wanted = by_block.samples(model, task_of(model), read, Desk())
    monkeypatch.setattr(vocabulary, "LARGE", 0)
    monkeypatch.setattr(vocabulary, "SQUARES", 40 * 4 * 64 * 3)  # 40 rows of 96
    monkeypatch.setattr(errors, "STACK", 7 * 4 * 64 * 2)
    monkeypatch.setattr(vocabulary, "TOGETHER", 48)
    asked, own = list[str](), vocabulary.losses
    monkeypatch.setattr(vocabulary, "losses", lambda *a: asked.append(a[2].name) or own(*a))
    found = by_block.samples(model, task_of(model), read, Desk())
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9 * wanted.max())
    ends = {x.name for x in model.inventory.layers if x.rows == 96 and x.block is None}
    assert ends and ends <= set(asked)
    assert not any(p.requires_grad or p.grad is not None for p in model.net.parameters())
    assert not model.net.get_input_embeddings().sparse
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    disk = Model.load(tmp_path, model.inventory, offload="disk")
    away = by_block.samples(disk, task_of(disk), read, Desk())
    np.testing.assert_array_equal(away, found)


def test_a_layer_at_the_front_alone_beside_rows_of_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left for whole gradients doesn't reach the head: OPT's projection of embeddings."""
    model, read = small("opt", tmp_path), text(weighted=False)
    every = task_of(model)
    groups = tuple(group for group in every.groups if "project_out" not in group[0])
    task = replace(every, groups=groups)
    wanted = by_block.samples(model, task, read, Desk())
    monkeypatch.setattr(vocabulary, "LARGE", 4 * 96 * 32)  # of the embeddings, tied to the head
    found = by_block.samples(model, task, read, Desk())
    assert found is not None and wanted is not None
    assert any("project_in" in group[0] for group in groups) and (wanted[..., 0] > 0).all()
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_what_only_the_whole_shows_is_not_cut_into_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small layers, logits that don't stand for themselves, rounding that looks at all rows."""
    model = small("llama", tmp_path)
    task, head = task_of(model), model.layers["lm_head.weight"]
    assert not vocabulary.suits(model, task, head, unchanged)
    monkeypatch.setattr(vocabulary, "LARGE", 4 * head.weights)
    assert vocabulary.suits(model, task, head, unchanged)
    fixed = partial(_with_fixed, unchanged, torch.zeros(96) > 0, torch.zeros(96))
    assert not vocabulary.suits(model, task, head, fixed)
    floats = {**task.fitted, (head.name, "int3"): Precision("fp8", 8, None, True)}
    assert not vocabulary.suits(model, replace(task, fitted=floats), head, unchanged)
    handed = model.net.model.layers[0].mlp.up_proj  # a layer that isn't at an end
    name = next(n for n, x in model.layers.items() if "up_proj" in n and x.block == 0)
    assert handed.weight.shape == (model.layers[name].rows, model.layers[name].cols)
    assert not vocabulary.suits(model, task, replace(model.layers[name], rows=96), unchanged)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_disk_gives_the_same_table(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = small(kind, tmp_path), text(weighted=True)
    wanted = by_block.samples(model, task_of(model), read, Desk())
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    disk = Model.load(tmp_path, model.inventory, offload="disk")
    found = by_block.samples(disk, task_of(disk), read, Desk())
    assert wanted is not None and found is not None
    np.testing.assert_array_equal(found, wanted)


def test_a_disk_too_small_for_the_blocks_inputs_is_named_with_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = small("llama", tmp_path), text(weighted=False)
    size = 7 * 24 * 64 * 4 * 3  # windows, tokens, width, fp32, blocks
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=size - 1))
    with pytest.raises(StorageError, match=f"inputs of all blocks, {size} bytes"):
        by_block.samples(model, task_of(model), read, Desk())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=size))
    assert by_block.samples(model, task_of(model), read, Desk()) is not None


def test_squares_of_some_chunks_at_a_time_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = small("llama tied", tmp_path), text(weighted=False)
    wanted = by_block.samples(model, task_of(model), read, Desk())
    monkeypatch.setattr(squares, "SQUARES", 1)
    monkeypatch.setattr(errors, "STACK", 1)
    found = by_block.samples(model, task_of(model), read, Desk())
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("some", [2**28, 1])
def test_experts_are_scored_by_their_products(
    some: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the gradients of all experts together say, which then never exist; also where what was met
    is scored after every window, and by the model on disk."""
    model, read = small("mixtral", tmp_path), text(weighted=True)
    own, done = by_block._Passes._by_products, list[bool]()
    monkeypatch.setattr(by_block._Passes, "_by_products", lambda *_: False)
    wanted = by_block.samples(model, task_of(model), read, Desk())
    monkeypatch.setattr(by_block, "COLLECTED", some)
    monkeypatch.setattr(
        by_block._Passes, "_by_products", lambda *a: done.append(own(*a)) or done[-1]
    )
    found = by_block.samples(model, task_of(model), read, Desk())
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    disk = Model.load(tmp_path, model.inventory, offload="disk")
    from_disk = by_block.samples(disk, task_of(disk), read, Desk())
    assert done == 6 * [True]
    assert found is not None and wanted is not None and from_disk is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(from_disk, found)


def test_experts_that_have_no_product_of_their_own_go_by_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that multiplies by all experts' weights at once is left to autograd."""
    model, read = small("mixtral", tmp_path), text(weighted=False)
    wanted = by_block.samples(model, task_of(model), read, Desk())
    experts = type(model.net.model.layers[0].mlp.experts)
    forward, done = experts.forward, list[bool]()

    def twice(self: Any, *args: Any) -> torch.Tensor:
        found: torch.Tensor = forward(self, *args)
        return found + 0 * self.down_proj.sum()

    own = by_block._Passes._by_products

    def told(*args: Any) -> bool:
        done.append(own(*args))
        return done[-1]

    monkeypatch.setattr(experts, "forward", twice)
    monkeypatch.setattr(
        by_block._Passes, "_by_products", lambda *a: done.append(own(*a)) or done[-1]
    )
    found = by_block.samples(model, task_of(model), read, Desk())
    assert done == 3 * [False]
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_that_are_scored_as_they_come_give_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a batch holds more chunks than squares fit: each precision is rounded once a batch, and
    nothing of a layer's size is kept. A type that knows no rows goes through whole layers."""
    model, read = small(kind, tmp_path), text(weighted=False)
    work = task_of(model)
    name = next(x.name for x in model.layers.values() if x.block is not None)
    whole = Precision.floating("nvfp4")
    work = replace(work, fitted=work.fitted | {(name, work.columns[-1]): whole})
    wanted = by_block.samples(model, work, read, Desk())
    asked: list[tuple[tuple[int, ...], str]] = []

    class Told(Nearest):
        def round(self, weight: torch.Tensor, precision: Precision, layer: str = "") -> Any:
            asked.append((tuple(weight.shape), precision.name))
            return super().round(weight, precision, layer)

    def never(*_: Any) -> None:
        raise AssertionError("a gradient of a layer's size was kept")

    monkeypatch.setattr(squares, "SQUARES", 1)
    monkeypatch.setattr(errors, "STACK", 1)
    monkeypatch.setattr(squares.Squares, "add", never)
    blocks = [x for x in model.layers.values() if x.block is not None]
    inside = replace(
        work, groups=tuple((x.name,) for x in blocks), quantizer=Told(),
        fitted={k: v for k, v in work.fitted.items() if model.layers[k[0]].block is not None},
    )  # fmt: skip
    rows = [work.groups.index(group) for group in inside.groups]
    found = by_block.samples(model, inside, read, Desk())
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found, wanted[:, rows], rtol=1e-5)
    assert asked.count((tuple(model.weight(name).shape), whole.name)) == 1  # of all chunks


@pytest.mark.parametrize(
    ("kind", "large"), [("llama", True), ("llama tied", True), ("llama", False)]
)
def test_types_of_llama_cpp_are_scored_on_some_rows(
    kind: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In units of what integers lose there; close to what all rows lose, at any split of the work, and
    integers' own losses stay what they are. Rows of an embedding that nobody looks up tell nothing."""
    model, read = small(kind, tmp_path), text(weighted=False)
    columns = {"int3": Precision("int", 3, 16), "q4_0": Precision.ggml("q4_0"),
               "q8_0": Precision.ggml("q8_0"), "iq4_nl": Precision.ggml("iq4_nl")}  # fmt: skip
    names = list(model.layers)
    fitted = {(name, key): p for name in names for key, p in columns.items()}
    work = Task(tuple((name,) for name in names), tuple(columns), fitted, Nearest())
    wanted = by_block.samples(model, work, read, Desk())
    rounded: list[int] = []

    class Told(Nearest):
        def round(self, weight: torch.Tensor, precision: Precision, layer: str = "") -> Any:
            rounded.append(weight.numel() if precision.name == "iq4_nl" else 0)
            return super().round(weight, precision, layer)

    monkeypatch.setattr(errors, "SAMPLED", 24 * 64)
    monkeypatch.setattr(squares, "SQUARES", 1)
    monkeypatch.setattr(vocabulary, "LARGE", 0 if large else 2**30)
    found = by_block.samples(model, replace(work, quantizer=Told()), read, Desk())
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found[..., 0], wanted[..., 0], rtol=1e-5)
    ratio = found.mean(0)[:, 1:] / wanted.mean(0)[:, 1:]
    assert ratio.min() > 0.75 and ratio.max() < 1.35 and abs(np.log(ratio).mean()) < 0.05
    assert ratio.std() > 1e-3
    assert sum(rounded) < sum(x.weights for x in model.layers.values()) / 2


def test_no_sampled_row_that_costs_anything_leaves_the_proxys_loss() -> None:
    layer = Layer("a", 1024, 1024, "linear", "a", 0, "a", (1024, 1024))
    columns = {"int3": Precision("int", 3, 16), "q4_0": Precision.ggml("q4_0")}
    fitted = {("a", key): p for key, p in columns.items()}
    work = Task((("a",),), tuple(columns), fitted, Nearest())
    lost = errors.blank(work, 2)
    lost[:, 0], lost[:, 2] = (3.0, 4.0), (5.0, 7.0)
    np.testing.assert_array_equal(errors.settled(work, layer, lost), [[3, 5], [4, 7]])
    lost[0, 1], lost[0, 3] = 6.0, 2.0
    np.testing.assert_array_equal(errors.settled(work, layer, lost), [[3, 15], [4, 7]])
    assert len(errors.sample(layer)) * 1024 <= errors.SAMPLED
    assert errors.sample(layer, torch.tensor([5])).tolist() == [5]
    assert errors.sample(layer, torch.tensor([], dtype=torch.long)).tolist() == []


def test_a_model_whose_blocks_read_more_than_their_input_is_left_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings that each block gets besides: the gradients of the two ways differ."""
    model, read = small("llama", tmp_path), text(weighted=False)
    task, own = task_of(model), Stream.through
    assert by_block.samples(model, task, read, Desk()) is not None

    def through(self: Stream, block: int, batch: Any, hidden: torch.Tensor) -> torch.Tensor:
        found = own(self, block, batch, hidden)
        return found.detach() + 0.9 * (found - found.detach())  # a tenth of the gradient is lost

    monkeypatch.setattr(Stream, "through", through)
    assert by_block.samples(model, task, read, Desk()) is None


def test_a_class_whose_gradients_are_for_training_only_is_refused(tmp_path: Path) -> None:
    """Reformer's blocks take two streams, and run backwards in training mode alone."""
    settings = {
        "hidden_size": 64, "feed_forward_size": 96, "num_attention_heads": 4, "vocab_size": 96,
        "attention_head_size": 16, "attn_layers": ["local", "local"], "is_decoder": True,
        "axial_pos_embds": False, "max_position_embeddings": 64, "local_attn_chunk_length": 8,
    }  # fmt: skip
    torch.manual_seed(3)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model("reformer", **settings))
    net.save_pretrained(tmp_path / "model")
    model = Model.load(tmp_path / "model", take_inventory(tmp_path / "model"))
    assert by_block.samples(model, task_of(model), text(weighted=False), Desk()) is None
    with pytest.raises(
        ModelError, match=r"ReformerModelWithLMHead gives no gradients.*model\.train"
    ):
        diagonal(model, task_of(model), text(weighted=False).ids, [0])


class Watched(Desk):
    """Remembers what it is shown."""

    def __init__(self) -> None:
        self.told = list[tuple[int, str]]()
        self.shown = list[tuple[int, int, int]]()
        self.states = list[dict[str, np.ndarray]]()

    def meter(self, text: str, total: int) -> Any:
        assert (text, total) == ("sensitivity", TOTAL)
        return nullcontext(lambda done, news: self.told.append((done, news)))

    def show(self, layers: int, of: int, tokens: int) -> None:
        self.shown.append((layers, of, tokens))

    def leave(self, state: dict[str, np.ndarray]) -> None:
        self.states.append({key: value.copy() for key, value in state.items()})


def test_a_desk_is_shown_each_block_there_and_back_and_then_the_outside(tmp_path: Path) -> None:
    model, read, desk = small("llama", tmp_path), text(weighted=False), Watched()
    by_block.samples(model, task_of(model), read, desk)
    ways = [("forward", i) for i in (1, 2, 3)] + [("back", i) for i in (3, 2, 1)]
    said = [f"block {block} of 3 {way}, " for way, block in ways]
    assert all(
        x.startswith(y) for (_, x), y in zip(desk.told, [*said, "embeddings", ""], strict=True)
    )
    assert desk.told[-1] == (TOTAL, "") and not any("read" in news for _, news in desk.told)
    tokens = 7 * 24  # seven layers a block; the embeddings and the head are outside
    assert desk.shown == [(7, 23, tokens), (14, 23, tokens), (21, 23, tokens), (23, 23, tokens)]
    assert [int(x["block"][0]) for x in desk.states] == [2, 1, 0]
    names = set(model.layers)
    beside = {"block", "border", "labels", "normalisers"}
    assert [set(x) - names for x in desk.states] == [beside] * 3
    done = [{n for n in names if desk.states[i][n].any()} for i in range(3)]
    assert done == [
        {n for n in names if model.layers[n].block in range(2 - i, 3)} for i in range(3)
    ]


@pytest.mark.parametrize(
    ("kind", "part"),
    [(k, p) for k in ("llama", "llama tied") for p in ("embeddings", "heads", "one block")]
    + [("mixtral", "one block")],
)
def test_some_of_the_layers_get_what_they_get_among_all(
    kind: str, part: str, tmp_path: Path
) -> None:
    model, read = small(kind, tmp_path), text(weighted=True)
    whole = task_of(model)
    chosen = {
        "embeddings": lambda x: x.kind == "embedding",
        "heads": lambda x: x.predicts,
        "one block": lambda x: x.block == 1,
    }[part]
    own = [i for i, (name,) in enumerate(whole.groups) if chosen(model.layers[name])]
    some = Task(tuple(whole.groups[i] for i in own), whole.columns, whole.fitted, whole.quantizer)
    wanted = by_block.samples(model, whole, read, Desk())
    found = by_block.samples(model, some, read, Desk())
    assert own and wanted is not None and found is not None
    np.testing.assert_allclose(found, wanted[:, own], rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_windows_in_several_batches_give_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows of 24 tokens in a batch: a chunk's windows lie in several, and the last is short."""
    model, read, sizes = small(kind, tmp_path), text(weighted=True), list[list[int]]()
    wanted, begin = by_block.samples(model, task_of(model), read, Desk()), Stream._begin

    def began(self: Stream, parts: Any) -> Any:
        found = begin(self, parts)
        sizes.append([len(x.ids) for x in found])
        return found

    monkeypatch.setattr(Stream, "_begin", began)
    monkeypatch.setattr(by_block, "TOGETHER", 48)
    desk = Watched()
    found = by_block.samples(model, task_of(model), read, desk)
    assert found is not None and wanted is not None
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9 * wanted.max())
    alone = [[1] * 7] if kind == "mixtral" else []  # experts see some tokens of a window
    assert sizes == [[2, 2, 2, 1], *alone]
    assert len(desk.states[0]["border"]) == 7  # in one piece, for batches of any size


def test_blocks_that_share_a_parameter_are_left_to_the_whole(tmp_path: Path) -> None:
    model, read = small("llama", tmp_path), text(weighted=False)
    assert by_block.samples(model, task_of(model), read, Desk()) is not None
    first, last = (model.net.model.layers[i].mlp for i in (0, 2))
    last.up_proj.weight = first.up_proj.weight
    assert by_block.samples(model, task_of(model), read, Desk()) is None


def test_encoders_are_left_to_the_whole(tmp_path: Path) -> None:
    model = small("llama", tmp_path)
    encoder = Model(model.net, model.inventory, model.checkpoint, pooling="mean")
    assert by_block.samples(encoder, task_of(model), text(weighted=False), Desk()) is None


def test_rows_that_are_rounded_by_themselves_are_rounded_some_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows as STACK bytes hold of all precisions at once, whole layers of what a row can't
    tell alone, and untouched columns not at all."""
    model, asked = small("llama", tmp_path), list[tuple[tuple[int, ...], str, str]]()

    class Told(Nearest):
        def round(self, weight: torch.Tensor, precision: Precision, layer: str = "") -> Any:
            asked.append((tuple(weight.shape), precision.name, layer))
            return super().round(weight, precision, layer)

    name = next(x.name for x in model.layers.values() if x.role == "up_proj")  # [96, 64]
    columns = {"a": Precision("int", 3, 16), "b": Precision(), "c": Precision.floating("nvfp4"),
               "d": Precision("int", 4, 16)}  # fmt: skip
    fitted = {(name, key): p for key, p in columns.items()}
    work = Task(((name,),), tuple(columns), fitted, Told())
    monkeypatch.setattr(errors, "STACK", 4 * 64 * 2 * 40)  # fp32, columns, precisions, rows
    weight = model.weight(name)
    layer = model.layers[name]
    found = list(errors.stacks(work, layer, weight, errors.sample(layer)))
    int3, int4, q4 = columns["a"].name, columns["d"].name, columns["c"].name
    rows = [((n, 64), p, "") for n in (40, 40, 16) for p in (int3, int4)]
    assert asked == [*rows, ((96, 64), q4, name)]
    assert [(c, s) for c, s, _ in found[:3]] == [([0, 3], slice(a, a + 40)) for a in (0, 40, 80)]
    assert found[3][0] == [2]
    error = (Nearest().round(weight, columns["d"]) - weight).square().flatten()
    np.testing.assert_allclose(torch.cat([x[2][1] for x in found[:3]]), error, atol=1e-9)
