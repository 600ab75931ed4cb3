"""How many bits a model's blocks multiply in, and what on a device comes in larger pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.config import Optimize
from optimizer.data.text import Data, Part, Windows
from optimizer.errors import ConfigError
from optimizer.metrics.divergence import Teacher
from optimizer.models import arithmetic
from optimizer.models.blockwise import Stream
from optimizer.models.checkpoint import open_checkpoint
from optimizer.models.model import Model, take_inventory
from optimizer.models.offload import block_list
from optimizer.models.opening import spread
from optimizer.models.residence import Residence, card_rooms, least_work
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Fisher, Task, Text, chunks
from optimizer.sensitivity.table import Desk
from optimizer.stages.session import Session
from tests.conftest import ARCHITECTURES, Small, build, opened

IDS = np.random.default_rng(0).integers(5, 90, (4, 24))


@pytest.fixture
def model(llama: Small) -> Iterator[Model]:
    yield Model.load(llama.folder, llama.inventory)


def _logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.net(torch.from_numpy(IDS), use_cache=False).logits
    return found


def _apply(model: Model, guide: bool, measure: bool) -> None:
    kinds = ("bf16" if guide else None, "bf16" if measure else None)
    arithmetic.apply(model.net, block_list(model.net, model.inventory), *kinds)


def test_only_passes_that_guide_multiply_in_bf16(model: Model) -> None:
    exact = _logits(model)
    _apply(model, guide=True, measure=False)
    assert torch.equal(_logits(model), exact)
    kinds = list[torch.dtype]()
    linear = block_list(model.net, model.inventory)[0].mlp.down_proj
    handle = linear.register_forward_hook(lambda _m, _i, out: kinds.append(out.dtype))
    with arithmetic.guiding(model.net):
        rough = _logits(model)
        handle.remove()
        assert kinds == [torch.bfloat16]
        assert rough.dtype == torch.float32
        off = float((rough - exact).norm() / exact.norm())
        assert 1e-5 < off < 0.02  # three digits
    assert torch.equal(_logits(model), exact)


def test_a_block_that_fails_leaves_the_arithmetic_as_it_was(model: Model) -> None:
    exact = _logits(model)
    _apply(model, guide=True, measure=False)
    with pytest.raises(IndexError), arithmetic.guiding(model.net):
        model.net(torch.full((1, 4), 10**6))
    block = block_list(model.net, model.inventory)[1]
    handle = block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), arithmetic.guiding(model.net):
        _logits(model)
    handle.remove()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.equal(_logits(model), exact)


def test_all_passes_may_and_fp32_changes_nothing(model: Model) -> None:
    exact = _logits(model)
    _apply(model, guide=False, measure=False)
    with arithmetic.guiding(model.net):
        assert torch.equal(_logits(model), exact)
    _apply(model, guide=True, measure=True)
    assert not torch.equal(_logits(model), exact)


def test_a_table_in_bf16_is_that_of_fp32_but_for_its_noise(llama: Small) -> None:
    text, names = Text(IDS, chunks(len(IDS), 2), 0), [x.name for x in llama.inventory.layers]
    fitted = {(name, "int4"): Precision("int", 4, 16) for name in names}
    task = Task(tuple((name,) for name in names), ("int4",), fitted, Nearest())
    found = []
    for guide in (False, True):
        model = Model.load(llama.folder, llama.inventory)
        _apply(model, guide, measure=False)
        table = Fisher().samples(model, task, text, Desk())
        assert table is not None
        found.append(table)
    exact, rough = found
    real = exact > 0
    off = np.abs(rough[real] / exact[real] - 1)
    assert 0 < np.median(off) < 0.1 and not np.array_equal(rough, exact)


def _table(
    small: Small, told: list[str] | None, scale: float = 1.0, up: float = 1.0
) -> np.ndarray:
    """A table in fp16, or in fp32 where nobody is told. scale: of all gradients. up: of a weight."""
    model = Model.load(small.folder, small.inventory)
    weights = np.full(IDS.shape, scale**2, np.float32)
    names = [x.name for x in small.inventory.layers]
    fitted = {(name, "int4"): Precision("int", 4, 16) for name in names}
    task = Task(tuple((name,) for name in names), ("int4",), fitted, Nearest())
    blocks = block_list(model.net, model.inventory)
    if up != 1.0:
        mlp: Any = blocks[1].mlp
        mlp.up_proj.weight.data *= up
        mlp.down_proj.weight.data /= up
    if told is not None:
        arithmetic.apply(model.net, blocks, "fp16", None, told.append)
    text = Text(IDS, chunks(len(IDS), 2), 0, weights)
    found = Fisher().samples(model, task, text, Desk())
    assert found is not None
    return found


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e6])
def test_a_table_in_fp16_is_that_of_fp32_for_gradients_of_any_size(
    llama: Small, scale: float
) -> None:
    told: list[str] = []
    exact, rough = _table(llama, None, scale), _table(llama, told, scale)
    real = exact > 0
    off = np.abs(rough[real] / exact[real] - 1)
    assert 0 < np.median(off) < 0.01 and off.max() < 0.2 and not told


def test_gradients_of_experts_are_unscaled(tmp_path: Path) -> None:
    mixtral = opened("mixtral", build(tmp_path, "mixtral", *ARCHITECTURES["mixtral"]))
    exact, rough = _table(mixtral, None), _table(mixtral, [])
    real = exact > 0
    assert 0 < np.median(np.abs(rough[real] / exact[real] - 1)) < 0.01


@pytest.mark.parametrize("what", ["an activation", "a gradient"])
def test_numbers_too_large_for_fp16_are_told_and_computed_in_fp32(
    llama: Small, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    up = 1e6 if what == "an activation" else 1.0
    exact = _table(llama, None, up=up)
    if what == "a gradient":
        monkeypatch.setattr(arithmetic, "SCALED", 17)
    found = _table(llama, told, up=up)
    assert len(told) == 1 and "too large for fp16" in told[0]
    np.testing.assert_allclose(found, exact, rtol=1e-5 if what == "a gradient" else 0.1)


def test_a_weights_gradient_too_large_for_fp16_gets_into_no_sum(model: Model) -> None:
    """Where the one that leaves the block isn't: products over many tokens are larger."""
    told: list[str] = []
    arithmetic.apply(model.net, block_list(model.net, model.inventory), "fp16", None, told.append)
    infinite = torch.tensor([1.0, np.inf])
    assert arithmetic.unscaled(model.net, infinite) is infinite  # outside of a block
    stream = Stream(model, IDS, frozen=True)
    hidden = stream.batches[0].hidden.requires_grad_(True)
    handle = model.net.model.layers[0].mlp.up_proj.register_full_backward_hook(
        lambda *_: arithmetic.unscaled(model.net, infinite)
    )
    with pytest.raises(arithmetic.TooLargeError):
        stream.through(0, stream.batches[0], hidden).sum().backward()
    handle.remove()
    assert len(told) == 1
    assert arithmetic.unscaled(model.net, infinite) is infinite
    again = stream.batches[0].hidden.detach().requires_grad_(True)
    assert stream.through(0, stream.batches[0], again).isfinite().all() and len(told) == 1


def test_whether_a_block_moves_is_told_in_fp32(model: Model) -> None:
    """In bf16 it always moved a little, and no activation scale was ever folded."""
    _apply(model, guide=True, measure=True)
    stem = "model.layers.1"
    parameters = {
        f"{stem}.self_attn.{x}_proj.weight": model.parameter(f"{stem}.self_attn.{x}_proj.weight")
        * 3
        for x in "qkv"
    }
    norm = f"{stem}.input_layernorm.weight"
    stream = Stream(model, IDS, frozen=True)
    assert stream.moved(1, parameters | {norm: model.parameter(norm) / 3}) < 1e-5
    assert stream.moved(1, parameters) > 1e-2


def test_the_noise_floor_is_what_another_arithmetic_makes(model: Model) -> None:
    windows = Windows(IDS, np.arange(len(IDS)))
    for measure, other in ((False, "bf16"), (True, "fp32")):
        _apply(model, guide=measure, measure=measure)
        noise = Teacher(model.net, windows).noise(model.net)[f"reference in {other}"]
        assert 1e-9 < noise.mean_kl < 0.01, other


def test_auto_is_fp32_on_a_cpu_and_16_bits_where_it_guides_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert arithmetic.settled("auto", "cpu") == (None, None)
    assert arithmetic.settled("bf16", "cpu") == ("bf16", "bf16")
    assert arithmetic.settled("fp16", "cpu") == ("fp16", None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert arithmetic.settled("auto", "cuda:0") == ("bf16", None)
    assert arithmetic.settled("fp32", "cuda:0") == (None, None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    for capability, name in (((7, 5), "fp16"), ((6, 1), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _d, own=capability: own)
        assert arithmetic.settled("auto", "cuda:0") == (name, None)


def test_an_arithmetic_that_does_not_exist_is_refused(llama: Small) -> None:
    with pytest.raises(
        ConfigError, match="arithmetic is one of auto, fp32, bf16, fp16, not 'fp8'"
    ):
        Optimize(model=str(llama.folder), arithmetic="fp8").check()


def test_results_of_another_arithmetic_have_another_key(llama: Small, tmp_path: Path) -> None:
    part = Part(sequences=2, length=16)
    data = Data(source="self", calibration=part, search=part, heldout=part)

    def session(name: str) -> Session:
        config = Optimize(
            model=str(llama.folder), arithmetic=name, store=str(tmp_path / "store"), data=data
        )
        return Session.open(config.model, config.data, config.store, residence=config.residence)

    rough, exact = session("bf16"), session("fp32")
    windows = exact.windows("calibration")
    assert rough.guide_key(windows) != exact.guide_key(windows)
    assert rough.part_key("heldout") != exact.part_key("heldout")
    assert rough.calibration_key == exact.calibration_key  # by which a plan names its tokens
    assert session("auto").part_key("heldout") == exact.part_key("heldout")


# ---------------------------------------------------------------- where weights are


def test_on_a_gpu_weights_stay_there_as_they_are_stored_if_fp32_is_too_much(
    llama: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = 4 * sum(x.weights for x in llama.inventory.layers)

    def settled(offload: str, free: float) -> str:
        monkeypatch.setattr(
            "optimizer.models.residence.device_room", lambda _name: int(free * whole)
        )
        return Residence(offload, device="cuda").settled(llama.inventory)

    assert settled("auto", 3) == settled("none", 3) == "none"
    assert settled("none", 2) == settled("none", 0.1) == "device"
    assert settled("auto", 0.1) == "cpu"
    assert settled("cpu", 3) == "cpu" and settled("disk", 3) == "disk"
    monkeypatch.setattr("optimizer.models.residence.COMFORT", 1000)
    assert settled("auto", 100) == "device"


def test_weights_are_spread_over_gpus_that_hold_them_together(
    llama: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = least_work(llama.inventory)
    stored = 2 * sum(prod(x.shape) for x in llama.inventory.held)
    free = {"cuda": 0, "cuda:0": 0, "cuda:1": 0}

    def settled(first: float, second: float, **more: Any) -> str:
        free["cuda"] = free["cuda:0"] = int(1.5 * least + first * stored)
        free["cuda:1"] = int(second * stored)
        return Residence("auto", **{"device": "cuda", **more}).settled(llama.inventory)

    monkeypatch.setattr("optimizer.models.residence.COMFORT", 1000)
    monkeypatch.setattr("optimizer.models.residence.device_room", free.__getitem__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert settled(1.6, 0) == "device"
    assert settled(0.6, 1) == "devices"
    assert settled(0.6, 0.8) == "cpu"
    assert settled(0.6, 1, device="cuda:0") == "cpu"
    assert settled(0.6, 1, processes=2) == "cpu"
    assert settled(0.6, 1, memory="1GB") == "cpu"
    assert card_rooms("cuda", least) == {"cuda:0": int(0.6 * stored), "cuda:1": stored}
    assert card_rooms("cuda:1", 10) == {"cuda:1": stored - 15}


def test_a_block_lies_on_one_gpu_and_what_no_gpu_holds_in_the_hosts_memory(tmp_path: Path) -> None:
    config, dtype = ARCHITECTURES["llama"]
    build(tmp_path, "llama", config | {"num_hidden_layers": 5}, dtype)
    inventory = take_inventory(tmp_path)
    sizes: dict[int | None, int] = {}
    for x in inventory.layers:
        sizes[x.block] = sizes.get(x.block, 0) + 2 * x.weights

    def homes(*rooms: int) -> list[str]:
        names = [f"cuda:{i}" for i in range(len(rooms))]
        found = spread(tmp_path, inventory, dict(zip(names, rooms, strict=True)))
        assert found.keys() == {x.name for x in inventory.held}
        own = [{v for k, v in found.items() if f".layers.{i}." in k} for i in range(5)]
        return ["".join(sorted(one)) for one in own]

    every = 10 * sum(sizes.values())
    assert homes(every, 0) == 5 * ["cuda:0"]
    assert homes(0, every) == 5 * ["cuda:1"]
    two = homes(sizes[None] // 2 + 4 * sizes[0], every)
    assert two == sorted(two) and set(two) == {"cuda:0", "cuda:1"}
    assert homes(0, 0) == 5 * ["cpu"]


def test_weights_that_lie_elsewhere_compute_as_in_fp32(
    llama: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single machine has one CPU, but its memory has two names."""
    asked: list[dict[str, int]] = []

    def rooms(name: str, work: int) -> dict[str, int]:
        asked.append({"cpu:0": work // 5, "cpu:1": 10**9})
        assert name == "cpu"
        return asked[-1]

    monkeypatch.setattr("optimizer.models.model.card_rooms", rooms)
    whole = Model.load(llama.folder, llama.inventory, offload="none")
    stored = Model.load(llama.folder, llama.inventory, offload="devices")
    assert set(stored.checkpoint.homes.values()) == {"cpu:0", "cpu:1"} and asked
    assert torch.equal(_logits(whole), _logits(stored))


def test_a_session_asks_for_room_on_its_own_device(
    llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizer.stages.session.check_device", lambda _name: None)
    part = Part(sequences=2, length=16)
    config = Optimize(model=str(llama.folder), device="cuda", offload="disk", arithmetic="fp32")
    session = Session.open(
        config.model,
        Data(source="self", calibration=part, search=part, heldout=part),
        str(tmp_path),
        device="cuda",
        residence=config.residence,
    )
    assert session.residence == Residence("disk", device="cuda", arithmetic="fp32")


def test_what_is_read_goes_to_the_device_and_no_more_than_is_asked(llama: Small) -> None:
    """meta: a device that is not the CPU."""
    name = next(x.name for x in llama.inventory.layers if x.block == 0)
    plain = open_checkpoint(llama.folder)
    own = replace(plain, device="meta").keeping({name: "cpu"})
    read = dict(own.several([name]))[name]
    assert own.kept is not None and own.kept[name].device.type == "cpu"
    for value in (read, own.read(name), replace(plain, device="meta").read(name)):
        assert value.device.type == "meta"
    assert own.read(name, slice(2, 5)).shape[0] == 3
    assert torch.equal(plain.read(name, torch.tensor([4, 1])), plain.read(name)[[4, 1]])
    there = replace(plain, device="meta").keeping({})
    assert dict(there.several([name]))[name] is there.read(name)


def test_weights_on_the_device_as_stored_compute_as_in_fp32(llama: Small) -> None:
    whole = Model.load(llama.folder, llama.inventory, offload="none")
    stored = Model.load(llama.folder, llama.inventory, offload="device")
    assert torch.equal(_logits(whole), _logits(stored))
