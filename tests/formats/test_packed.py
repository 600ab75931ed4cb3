"""The packed folder of every architecture: its size, its logits, its generate(), its guards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import optimizer
from optimizer.errors import ConfigError, PlanError, StorageError
from optimizer.formats.folder import check_room, sha256
from optimizer.formats.torch import modules, packed
from optimizer.models.model import Model
from optimizer.plan import Plan, Precision
from optimizer.quantization.uniform import Nearest
from tests.conftest import Small, largest_file, mixed, planned


def plain(items: Iterable[Any], _text: str) -> Iterable[Any]:
    return items


def pack(small: Small, choice: dict[str, Precision], out: Path) -> tuple[Plan, Path]:
    plan = planned(small.inventory, choice)
    model = Model.load(small.folder, small.inventory, full=False)
    return plan, packed.save(plan, model, small.folder, out, plain)


@pytest.fixture(scope="session")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """Every layer packed, every kind of precision used."""
    out = tmp_path_factory.mktemp(f"packed-{small.name}") / "model"
    return pack(small, mixed(small.inventory.layers), out)


IDS = torch.arange(5, 29).view(2, 12)


def logits(net: Any) -> Tensor:
    with torch.inference_mode():
        return net(input_ids=IDS).logits


def rounded_logits(small: Small, choice: dict[str, Precision]) -> Tensor:
    with small.model.rounded(Nearest(), choice):
        return logits(small.model.net)


def test_the_file_has_exactly_the_promised_bytes(folder: tuple[Plan, Path]) -> None:
    plan, out = folder
    file = out / "packed.safetensors"
    assert file.stat().st_size == plan.bytes["total"]
    with safe_open(file, framework="pt") as tensors:
        parts = {n: tensors.get_tensor(n) for n in tensors.keys()}  # noqa: SIM118
    size = {n: t.numel() * t.element_size() for n, t in parts.items()}
    quantized = sum(v for n, v in size.items() if n.endswith((".codes", ".scales", ".zeros")))
    assert quantized == plan.bytes["quantized"]
    assert sum(size.values()) - quantized == plan.bytes["untouched"]


def test_packed_and_rounded_in_place_give_the_same_logits(
    small: Small, folder: tuple[Plan, Path]
) -> None:
    plan, out = folder
    found = logits(packed.load(out))
    expected = rounded_logits(small, plan.choice)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(small.model.net), atol=1e-2), "nothing was rounded"


def test_a_parameter_lies_in_memory_as_the_loaded_models(
    small: Small, folder: tuple[Plan, Path]
) -> None:
    """Sums of products depend on it in their last bits."""
    _, out = folder
    found = [m for m in packed.load(out).modules() if isinstance(m, modules.PackedParameter)]
    assert found and all(part().is_contiguous() for part in found)


def test_uniform_plans_of_the_blocks_alone(small: Small, tmp_path: Path) -> None:
    choice = {x.name: Precision("int", 4, 32) for x in small.inventory.scoped(["blocks"])}
    plan, out = pack(small, choice, tmp_path / "out")
    assert (out / "packed.safetensors").stat().st_size == plan.bytes["total"]
    expected = rounded_logits(small, choice)
    assert torch.allclose(logits(packed.load(out)), expected, rtol=1e-4, atol=1e-4)


def test_an_untouched_plan_is_the_reference(small: Small, tmp_path: Path) -> None:
    plan, out = pack(small, {}, tmp_path / "out")
    assert plan.bytes["quantized"] == 0
    assert torch.equal(logits(packed.load(out)), logits(small.model.net))


def test_it_generates_what_the_rounded_model_generates(
    small: Small, folder: tuple[Plan, Path]
) -> None:
    plan, out = folder
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = IDS[:1, :4]
    mask = torch.ones_like(prompt)
    found = optimizer.load(out).generate(prompt, attention_mask=mask, **settings)
    with small.model.rounded(Nearest(), plan.choice):
        expected = small.model.net.generate(prompt, attention_mask=mask, **settings)
    assert found.shape == (1, 10)
    assert torch.equal(found, expected)


def test_weights_stay_packed_in_memory(small: Small, folder: tuple[Plan, Path]) -> None:
    """No parameter of a quantized layer exists; buffers hold the plan's bytes, counted once."""
    plan, out = folder
    net = packed.load(out)
    logits(net)
    names = {n for n, _ in net.named_parameters()}
    for layer in small.inventory.layers:
        if plan.choice[layer.name].kind != "none" and layer.kind != "experts":
            assert layer.parameter not in names, layer.name
    found = 0
    for module in net.modules():
        if isinstance(module, modules.Piece) and module.precision.kind != "none":
            found += sum(b.numel() * b.element_size() for b in module.buffers())
    assert found == plan.bytes["quantized"]


def test_it_computes_in_the_wanted_dtype(small: Small, folder: tuple[Plan, Path]) -> None:
    net = optimizer.load(folder[1], dtype=torch.bfloat16)
    found = logits(net)
    assert found.dtype == torch.bfloat16
    expected = rounded_logits(small, folder[0].choice)
    near = torch.nn.functional.cosine_similarity(found.float(), expected, -1) > 0.97
    # in 16 bits a router that is nearly tied may take another expert, at a position or two
    assert near.float().mean() > 0.9


def test_packing_twice_gives_the_same_bytes(small: Small, tmp_path: Path) -> None:
    choice = mixed(small.inventory.layers)
    one, two = (pack(small, choice, tmp_path / name)[1] for name in ("one", "two"))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


# ---------------------------------------------------------------- guards


@pytest.fixture
def copy(llama: Small, tmp_path: Path) -> Path:
    return pack(llama, mixed(llama.inventory.layers), tmp_path / "copy")[1]


def flip(name: str, place: int) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        content = bytearray((out / name).read_bytes())
        content[place] ^= 1
        (out / name).write_bytes(content)

    return change


def cut(name: str, by: int) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).write_bytes((out / name).read_bytes()[:-by])

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda out: (out / name).unlink()


def outside(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    (out.parent / "other").write_text("x")
    manifest["sha256"]["../other"] = sha256(out.parent / "other")
    (out / "manifest.json").write_text(json.dumps(manifest))


def without_weights(out: Path) -> None:
    (out / "manifest.json").write_text(json.dumps({"sha256": {}}))


def list_manifest(out: Path) -> None:
    (out / "manifest.json").write_text("[]")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "one bit of the codes": flip("packed.safetensors", -1),
    "one bit of the header": flip("packed.safetensors", 40),
    "one bit of the config": flip("config.json", 30),
    "one bit of the plan": flip("plan.json", 300),
    "weights cut off": cut("packed.safetensors", 1),
    "plan cut off": cut("plan.json", 20),
    "manifest cut off": cut("manifest.json", 20),
    "no weights": remove("packed.safetensors"),
    "no plan": remove("plan.json"),
    "no config": remove("config.json"),
    "no manifest": remove("manifest.json"),
    "a manifest of other files": without_weights,
    "a manifest that reaches outside": outside,
    "a manifest that is a list": list_manifest,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_changed_folder_is_refused(copy: Path, damage: str) -> None:
    packed.verify(copy)
    DAMAGE[damage](copy)
    with pytest.raises(PlanError) as error:
        packed.load(copy)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_packed(llama: Small) -> None:
    with pytest.raises(PlanError, match="is no model that Mezzotint wrote"):
        packed.load(llama.folder)


def test_a_folder_of_an_earlier_version_says_how_to_pack_it_again(copy: Path) -> None:
    """Those had no inventory.json, and their manifest names none."""
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]["inventory.json"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "inventory.json").unlink()
    with pytest.raises(PlanError, match=r"earlier version.*mezzotint apply .*plan\.json out=NEW"):
        packed.load(copy)


def test_another_models_config_is_refused(copy: Path, small: Small) -> None:
    """Even with a matching manifest, the layers' names must be the plan's."""
    if small.name == "llama":  # its own config is welcome
        packed.load(copy)
        return
    shutil.copy(small.folder / "config.json", copy / "config.json")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["sha256"]["config.json"] = sha256(copy / "config.json")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PlanError):
        packed.load(copy)


def test_a_broken_promise_is_an_error_and_leaves_nothing(llama: Small, tmp_path: Path) -> None:
    plan = planned(llama.inventory, mixed(llama.inventory.layers))
    plan.bytes["total"] += 1
    with pytest.raises(PlanError, match="promises"):
        packed.save(plan, llama.model, llama.folder, tmp_path / "out", plain)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(llama: Small, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="couldn't be written") as caught, largest_file(20_000):
        pack(llama, {}, tmp_path / "out")
    assert str(caught.value).startswith(str(tmp_path / "out"))  # not its hidden draft
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_the_whole_folder(llama: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(llama, {}, out)
    (out / "stale.txt").write_text("x")
    with pytest.raises(ConfigError, match="overwrite=true"):
        packed.check_target(out, overwrite=False)
    packed.check_target(out, overwrite=True)
    plan, _ = pack(llama, mixed(llama.inventory.layers), out)
    assert not (out / "stale.txt").exists()
    assert packed.verify(out) == plan


def test_a_failed_overwrite_keeps_the_old_folder(llama: Small, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan, _ = pack(llama, mixed(llama.inventory.layers), out)
    with pytest.raises(StorageError), largest_file(20_000):
        pack(llama, {}, out)
    assert packed.verify(out) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_targets(tmp_path: Path) -> None:
    packed.check_target(tmp_path / "new" / "deep", overwrite=False)
    packed.check_target(tmp_path, overwrite=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="may hold other things"):
        packed.check_target(tmp_path, overwrite=True)
    with pytest.raises(StorageError, match="can't be written to"):
        packed.check_target(tmp_path / "file" / "new", overwrite=False)
    with pytest.raises(ConfigError, match="must be new or empty"):
        packed.check_target(Path(os.devnull), overwrite=True)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="must be new or empty"):
            packed.check_target(tmp_path / "file", overwrite)


def test_the_file_is_let_go(packed_folder):
    """A mapping that stays would hold the stored copy of every tensor that was cast."""
    net = packed.load(packed_folder)
    assert str(packed_folder) not in Path("/proc/self/maps").read_text()
    assert net is not None


def test_loading_leaves_the_allocator_alone_unless_asked(
    folder: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(packed, "steady_memory", lambda: asked.append(True))
    optimizer.load(folder[1])
    assert not asked
    optimizer.load(folder[1], steady=True)
    assert asked == [True]


def test_the_file_is_what_the_library_would_write(small: Small, tmp_path: Path) -> None:
    """Written a tensor at a time, in the order in which layers come."""
    choice = mixed(small.inventory.layers)
    plan, out = pack(small, choice, tmp_path / "out")
    model = Model.load(small.folder, small.inventory, full=False)
    save_file(packed.pack(plan, model, plain), tmp_path / "whole", metadata={"format": "pt"})
    assert (out / "packed.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_tensors_that_the_plan_doesnt_promise_are_refused(llama: Small, tmp_path: Path) -> None:
    plan = planned(llama.inventory, mixed(llama.inventory.layers))
    model = Model.load(llama.folder, llama.inventory, full=False)
    parts = packed.pack(plan, model, plain)
    name = next(iter(parts))
    wrong = [
        (parts | {name: parts[name][:-1]}, "promises"),
        (parts | {"one more": parts[name]}, "promises no one more"),
        ({k: v for k, v in parts.items() if k != name}, "doesn't have"),
    ]
    for given, said in wrong:
        with pytest.raises(PlanError, match=said):
            packed.put(given.items(), plan, llama.inventory, llama.folder, tmp_path)


def test_a_disk_that_is_too_small_is_told_before_work(tmp_path: Path) -> None:
    check_room(tmp_path / "out", 1000)
    with pytest.raises(StorageError, match="Free space"):
        check_room(tmp_path / "new" / "out", 10**18)
