"""Blocks on disk give the numbers of blocks in memory, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from optimizer.data.text import Windows
from optimizer.errors import ModelError
from optimizer.metrics.divergence import Teacher
from optimizer.models.blockwise import Stream
from optimizer.models.head import OwnHead
from optimizer.models.model import Model, take_inventory
from optimizer.models.offload import OnDisk, block_list, offloaded
from optimizer.plan import BY_ROW, WIDTH, Precision
from optimizer.quantization.keeping import Keeping
from optimizer.quantization.uniform import Codes, Encoded, Given, Nearest, rows_of
from optimizer.sensitivity.outputs import token_weights
from optimizer.store import Store
from tests.conftest import Small, build, mixed

IDS = np.random.default_rng(3).integers(3, 96, (5, 24))
WINDOWS = Windows(IDS, np.arange(5))


@dataclass(frozen=True)
class Pair:
    memory: Model
    disk: Model


@pytest.fixture(scope="module", params=["ends stay", "ends go"])
def pair(small: Small, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """With embeddings and head in memory, and with them on disk as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "ends go":
            patch.setattr("optimizer.models.offload.LARGE", 0)
        disk = Model.load(small.folder, small.inventory, offload="disk")
    yield Pair(small.model, disk)


def blocks(model: Model) -> OnDisk:
    found = offloaded(model.net)
    assert found is not None
    return found


def scores(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Of the reference and of a mixture, in three batches."""
    monkeypatch.setattr("optimizer.metrics.divergence.BATCH_TOKENS", 48)
    teacher = Teacher(model.net, WINDOWS, OwnHead(model.net))
    found = [teacher.score(model.net)]
    with model.rounded(Nearest(), mixed(model.inventory.layers)):
        found.append(teacher.score(model.net))
    found.append(teacher.score(model.net))
    return [value for one in found for value in one.arrays().values()]


def test_scores_are_equal(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, found = (scores(model, monkeypatch) for model in (pair.memory, pair.disk))
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
    assert expected[7].mean() > 1e-3  # the mixture's KL: it was rounded at all


def test_a_pass_reads_each_block_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizer.metrics.divergence.BATCH_TOKENS", 24)
    teacher = Teacher(pair.disk.net, WINDOWS)
    before = blocks(pair.disk).brought
    teacher.score(pair.disk.net)
    assert blocks(pair.disk).brought - before == 2


def test_one_block_at_most_is_in_memory(pair: Pair) -> None:
    """Where gradients are taken, none beside a head that comes."""
    disk = blocks(pair.disk)
    stem = next(x.parameter for x in pair.disk.inventory.layers if x.block == 0).partition(".0.")[
        0
    ]
    first, last = (list(pair.disk.net.get_submodule(f"{stem}.{i}").parameters()) for i in (0, 1))
    for alone in (False, True):
        with torch.set_grad_enabled(alone):
            pair.disk.net(input_ids=torch.from_numpy(IDS))
        here = [p.untyped_storage().nbytes() == p.nbytes for p in last]
        assert here == [not alone or len(disk._units) == 2] * len(last)
        assert all(p.untyped_storage().nbytes() == p.element_size() for p in first)


def test_weights_are_equal(pair: Pair) -> None:
    choice = mixed(pair.memory.inventory.layers)
    with pair.memory.rounded(Nearest(), choice), pair.disk.rounded(Nearest(), choice) as change:
        for name in choice:
            assert torch.equal(pair.memory.weight(name), pair.disk.weight(name)), name
            assert torch.equal(pair.memory.reference(name), pair.disk.reference(name)), name
        name = next(iter(choice))
        change.set({})
        assert torch.equal(pair.disk.weight(name), pair.disk.reference(name))
    for name in choice:
        assert torch.equal(pair.memory.weight(name), pair.disk.weight(name)), name


def test_gradients_are_equal(pair: Pair) -> None:
    """A backward pass brings the blocks back."""
    found = []
    for model in (pair.memory, pair.disk):
        names = [name for name, _ in model.net.named_parameters()]
        try:
            model.net.requires_grad_(True)
            logits = model.logits(torch.from_numpy(IDS[:1]))
            torch.log_softmax(logits, -1)[:, 7].sum().backward()
            found.append({n: model.net.get_parameter(n).grad for n in names})
        finally:
            model.net.requires_grad_(False)
            model.net.zero_grad(set_to_none=True)
    memory, disk = found
    assert memory.keys() == disk.keys()
    for name, value in memory.items():
        assert value is not None or disk[name] is None
        assert value is None or torch.equal(value, disk[name]), name


def test_blocks_run_one_by_one_alike(pair: Pair) -> None:
    found = []
    for model in (pair.memory, pair.disk):
        stream = Stream(model, IDS)
        found.append([])
        for block in range(2):
            sets = stream.inputs(block)
            found[-1] += stream.hessians(block, sets) if sets else []
            stream.advance(block)
    assert len(found[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_two_passes_may_come_before_their_backward_passes(pair: Pair) -> None:
    """A head that was dropped in between is brought back for its gradient."""
    found = []
    for model in (pair.memory, pair.disk):
        embeddings = model.net.get_input_embeddings()
        begin = embeddings.register_forward_hook(lambda _m, _a, x: x.requires_grad_(True).clone())
        caught: list[torch.Tensor] = []
        first = blocks(pair.disk) if model is pair.disk else None
        hook = (block_list(model.net, model.inventory)[0]).register_forward_pre_hook(
            lambda _m, args, kwargs, caught=caught: caught.append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        try:
            total = sum(model.logits(torch.from_numpy(IDS[i : i + 1]))[:, 5].sum() for i in (0, 1))
            found.append(torch.autograd.grad(total, caught[:2]))
        finally:
            hook.remove()
            begin.remove()
        assert first is None or len(first._here) <= 2
    for wanted, value in zip(*found, strict=True):
        assert torch.equal(wanted, value)


def test_weights_of_tokens_are_equal_and_read_each_block_few_times(pair: Pair) -> None:
    def found(model: Model) -> dict[str, np.ndarray]:
        layers = [x for x in model.inventory.layers if x.watchable]
        return token_weights(model, layers, IDS, 4, lambda items, _text: items, squared=False)

    expected, before = found(pair.memory), blocks(pair.disk).brought
    for name, value in found(pair.disk).items():
        assert np.array_equal(value, expected[name]), name
    assert max(value.std() for value in expected.values()) > 0.1
    assert blocks(pair.disk).brought - before <= 4 * 2  # not once a window


def test_an_absent_block_holds_no_numbers(small: Small) -> None:
    """What is computed without a block can't pass for a result."""
    model = Model.load(small.folder, small.inventory, offload="disk")
    name = next(x.parameter for x in model.inventory.layers if x.block == 0)
    assert bool(torch.isnan(model.net.get_parameter(name)).all())
    assert bool(torch.isfinite(model.parameter(name)).all())


def test_large_ends_are_away_once_a_block_is_here(
    llama: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    model = Model.load(llama.folder, llama.inventory, offload="disk")
    own = model.net.get_input_embeddings().weight
    assert model.net.get_output_embeddings().weight is own
    model.net(input_ids=torch.from_numpy(IDS))
    assert bool(torch.isfinite(own).all())
    model.parameter(next(x.parameter for x in llama.inventory.layers if x.block == 0))
    assert own.untyped_storage().nbytes() == own.element_size()


def test_large_embeddings_are_read_row_by_row_unless_they_are_rounded(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a large head, which is all needed, a piece at a time."""
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    monkeypatch.setattr("optimizer.models.offload.PIECE", 4 * 64 * 7)
    model = Model.load(small.folder, small.inventory, offload="disk")
    own, done = OnDisk._bring_rows, list[bool]()

    def told(self: OnDisk, index: int, ids: torch.Tensor) -> bool:
        done.append(own(self, index, ids))
        return done[-1]

    monkeypatch.setattr(OnDisk, "_bring_rows", told)
    ids = torch.from_numpy(IDS[:1])
    tied = model.net.get_output_embeddings().weight is model.net.get_input_embeddings().weight
    choice = mixed(model.inventory.layers)
    for holding in ({}, choice, {}):
        with model.rounded(Nearest(), holding), small.model.rounded(Nearest(), holding):
            assert torch.equal(
                model.net(input_ids=ids).logits, small.model.net(input_ids=ids).logits
            )
    looked = next(x.name for x in model.inventory.layers if x.kind == "embedding")
    known = choice[looked].kind in ("none", *BY_ROW)
    if tied:  # a head that didn't change is there already
        assert done == ([] if choice[looked].kind == "none" else [known, True])
    else:
        assert done == [True, known, True]
    model.parameter(next(x.parameter for x in model.inventory.layers if x.block == 0))
    before, layer = blocks(model).read, model.layers[looked]
    model.net.get_input_embeddings()(ids)
    assert blocks(model).read - before == WIDTH[layer.dtype] * layer.cols * len(ids.unique())
    assert torch.equal(  # a head that has only those rows is read whole
        model.net(input_ids=ids).logits, small.model.net(input_ids=ids).logits
    )


@pytest.mark.parametrize("joint", [True, False])
def test_rows_of_known_codes_are_those_of_the_whole(
    small: Small, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing unpacks a large embedding or head as a whole."""
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    monkeypatch.setattr("optimizer.models.offload.PIECE", 4 * 64 * 7)
    disk = Model.load(small.folder, small.inventory, offload="disk")
    net = small.model.net
    large = {id(end.weight) for end in (net.get_input_embeddings(), net.get_output_embeddings())}
    ends = [x for x in small.inventory.layers if id(net.get_parameter(x.parameter)) in large]
    choice = {x.name: Precision("int", 5, 16) for x in ends}
    codes = {n: Nearest().encode(small.model.weight(n), p) for n, p in choice.items()}
    kinds = list[str]()

    def find(layer: str, _precision: Precision) -> Encoded:
        kinds.append("whole")
        return codes[layer]

    def some(layer: str, precision: Precision, rows: slice | torch.Tensor) -> Encoded:
        kinds.append("rows")
        ids = torch.arange(small.model.layers[layer].rows)[rows]
        own = rows_of(codes[layer].pack(), precision, ids)
        return Codes.unpack(own, precision, small.model.layers[layer].cols)

    given = Given(find, some if joint else None)
    ids = torch.from_numpy(IDS[:1])
    with small.model.rounded(Given(find), choice):
        exact = small.model.net(input_ids=ids).logits
    kinds.clear()
    disk.net(input_ids=ids)  # a head that is here is rounded anew
    with disk.rounded(given, choice):
        assert torch.equal(disk.net(input_ids=ids).logits, exact)
    assert set(kinds) == {"rows" if joint else "whole"}


def test_rows_of_embeddings_without_codes_are_rounded_to_nearest(
    llama: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibrated quantizer has none for them. Nobody rounds them whole."""
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    disk = Model.load(llama.folder, llama.inventory, offload="disk")
    looked = next(x.name for x in llama.inventory.layers if x.kind == "embedding")
    choice = {looked: Precision("int", 3, 16)}
    given = Given(lambda *_: None, lambda *_: None)
    ids = torch.from_numpy(IDS[:1])
    with disk.rounded(given, choice), llama.model.rounded(Nearest(), choice):
        whole = list[int]()
        monkeypatch.setattr(given, "round", lambda *_: whole.append(1))
        assert torch.equal(disk.net(input_ids=ids).logits, llama.model.net(input_ids=ids).logits)
    assert not whole


def test_codes_that_are_known_need_no_copy_of_the_weight(llama: Small) -> None:
    """Nobody makes fp32 of a weight that codes replace; other roundings get fp32, as they say."""
    disk = Model.load(llama.folder, llama.inventory, offload="disk")
    choice, seen = mixed(llama.inventory.layers), set[torch.dtype]()
    codes = {n: Nearest().encode(llama.model.weight(n), p) for n, p in choice.items()
             if p.kind != "none"}  # fmt: skip

    class Told(Given):
        def round(
            self, weight: torch.Tensor, precision: Precision, layer: str = ""
        ) -> torch.Tensor:
            seen.add(weight.dtype)
            return super().round(weight, precision, layer)

    ids = torch.from_numpy(IDS[:1])
    with llama.model.rounded(Nearest(), choice):
        wanted = llama.model.net(input_ids=ids).logits
    with disk.rounded(Told(lambda name, _: codes.get(name)), choice):
        found = disk.net(input_ids=ids).logits
    assert torch.equal(found, wanted)
    assert torch.float16 in seen or torch.bfloat16 in seen


def test_what_is_kept_in_memory_is_not_read_from_a_file_again(
    llama: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """offload=cpu: blocks, embeddings and head come from their copies in 16 bits."""
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    model = Model.load(llama.folder, llama.inventory, offload="cpu")

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(safetensors, "safe_open", opened)
    ids = torch.from_numpy(IDS[:1])
    assert torch.equal(model.net(input_ids=ids).logits, llama.model.net(input_ids=ids).logits)


def test_a_pass_that_fails_leaves_the_model_usable(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = scores(pair.disk, monkeypatch)
    jobs = [lambda: pair.disk.net(input_ids=torch.from_numpy(IDS[:1])).logits] * 2
    with pytest.raises(ZeroDivisionError):
        blocks(pair.disk).in_turns([*jobs, lambda: 1 // 0])
    after = scores(pair.disk, monkeypatch)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("mapped", [1, 10**4, 2**26])
def test_a_file_is_mapped_in_pieces_and_every_tensor_read(
    stories: Model, mapped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, own = list[str](), safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda f, **k: opened.append(f) or own(f, **k))
    monkeypatch.setattr("optimizer.models.checkpoint.MAPPED", mapped)
    names = [x.name for x in stories.inventory.held]
    found = [(name, value.clone()) for name, value in stories.checkpoint.several(names)]
    assert [name for name, _ in found] == names
    assert all(torch.equal(value, stories.checkpoint.read(name)) for name, value in found)
    read = len(opened) - len(names)  # what the line before opened
    assert read == len(names) if mapped == 1 else 1 <= read < len(names)


def test_the_stories_model_in_two_files(stories: Model, tmp_path: Path) -> None:
    """Shards are opened by tensor."""
    from optimizer.models.inventory import take_inventory

    stories.net.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    inventory = take_inventory(tmp_path)
    model = Model.load(tmp_path, inventory, offload="disk")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.net(ids).logits, stories.net(ids).logits)
    for name, layer in stories.layers.items():
        assert torch.equal(model.weight(name), stories.weight(name)), layer


def test_a_model_that_changes_its_weights_as_it_runs_stays_in_memory(tmp_path: Path) -> None:
    """RWKV divides some of them by powers of two, in place, before its first pass."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
    more = {"attention_hidden_size": 64, "intermediate_size": 96, "context_length": 128}
    folder = build(tmp_path / "rwkv", "rwkv", sizes | more, torch.float16)
    inventory = take_inventory(folder)
    assert Model.load(folder, inventory, offload="none").layers
    for where in ("cpu", "disk"):
        with pytest.raises(ModelError, match="RwkvForCausalLM changes its own weights"):
            Model.load(folder, inventory, offload=where)


def test_rows_that_are_looked_up_are_rounded_and_not_kept(
    llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a head come again at every pass, and their searched scales are kept by content; any
    text's words would be as many entries as there are texts."""
    monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    disk = Model.load(llama.folder, llama.inventory, offload="disk")
    looked = next(x.name for x in llama.inventory.layers if x.kind == "embedding")
    choice = {looked: Precision.ggml("q4_0")}
    keeping = Keeping(store=Store(tmp_path))
    with disk.rounded(keeping, choice), llama.model.rounded(Nearest(), choice):
        for row in IDS[:3]:
            ids = torch.from_numpy(row)[None]
            table = (disk.net.get_input_embeddings(), llama.model.net.get_input_embeddings())
            assert torch.equal(*(embed(ids) for embed in table))
    assert not list(tmp_path.rglob("*.safetensors"))
