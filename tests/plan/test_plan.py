from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from optimizer.errors import BudgetError, ConfigError, PlanError
from optimizer.plan import (
    Budget,
    Inventory,
    Layer,
    Other,
    Plan,
    Precision,
    assemble,
    container_bytes,
    parse_size,
    stored_bytes,
)
from optimizer.search import pose
from tests.conftest import choices_of
from tests.plan.test_inventory import precisions

DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I64": torch.int64,
}

# ---------------------------------------------------------------- sizes and budgets


@pytest.mark.parametrize(
    ("text", "size"),
    [("80MiB", 80 * 2**20), ("80MB", 80 * 10**6), ("1.5GB", 15 * 10**8), ("1.5g", 15 * 10**8),
     (" 12 kib ", 12 * 1024), ("12345", 12345), ("7B", 7), (".5KiB", 512), (4096, 4096)],
)  # fmt: skip
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "80 MiBs", "-3MB", "1e6", "8O MiB", "nan", "1,5GB"])
def test_what_is_no_size_is_an_error_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"budget\.size=80MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    "budget",
    [Budget(), Budget(bits=4, size="1MB"), Budget(bits=4, code_bits=4), Budget(bits=0),
     Budget(bits=-1), Budget(bits=float("nan")), Budget(code_bits=float("inf")), Budget(size="0")],
)  # fmt: skip
def test_a_budget_is_exactly_one_positive_number(budget: Budget) -> None:
    with pytest.raises(ConfigError):
        budget.check()


def test_a_budget_reads_as_it_was_given() -> None:
    assert Budget(bits=4.5).text == "4.5 bits per weight"
    assert Budget(code_bits=4).text == "4 code bits per weight"
    assert Budget(size="80MiB").text == "80MiB"
    assert Budget(size="1000000.0").text == "1000000 bytes"


def test_sizes_end_at_a_thousand_exabytes() -> None:
    assert parse_size("999999999TB") == pytest.approx(999999999e12, rel=1e-12)
    with pytest.raises(ConfigError, match=r"below 1e\+21 bytes, and 1000000000TB"):
        parse_size("1000000000TB")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"machine": "tpu"}, "gpu, apple or cpu, not 'tpu'"),
        ({"usable": 0.0}, "usable is a share above 0, at most 1, not 0.0"),
        ({"usable": 1.01}, "not 1.01"),
        ({"context": 0}, r"budget\.context is at least 1, not 0"),
        ({"batch": -2}, r"budget\.batch is at least 1, not -2"),
        ({"overhead": "much"}, "A size is a number"),
        ({"kv": 1}, "budget.kv is bits of a cache"),
        ({"kv": 33}, "budget.kv is bits of a cache"),
        ({"kv": []}, "budget.kv is bits of a cache"),
        ({"kv": "half"}, "budget.kv is bits of a cache"),
    ],
)
def test_a_machine_that_can_not_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Budget(memory="4GB", **settings).check()


@pytest.mark.parametrize(
    "settings",
    [{}, {"usable": 1.0}, {"context": 1, "batch": 1}, {"kv": [4, 32]}, {"kv": "auto"}, {"kv": 2},
     {"machine": "apple"}, {"machine": "cpu"}, {"overhead": "1GB"}],
)  # fmt: skip
def test_a_machine_that_can(settings: dict[str, Any]) -> None:
    Budget(memory="4GB", **settings).check()


def test_caches_are_tried_from_the_widest() -> None:
    assert Budget(kv=[4, 16, 8, 4]).caches == [16, 8, 4]
    assert Budget(kv="auto").caches == []
    assert Budget(kv=[16, 8]).with_cache(8).caches == [8]


def test_several_caches_need_a_machine() -> None:
    with pytest.raises(ConfigError, match="share a machine's memory"):
        Budget(bits=4, kv=[16, 8]).check()
    Budget(bits=4, kv=[8]).check()


def test_what_determines_the_bytes() -> None:
    assert Budget(bits=4.5, context=99).asked == {"bits": 4.5}
    asked = Budget(memory="4GB", device="A phone").asked
    assert asked["memory"] == "4GB" and asked["context"] == 4096 and asked["kv"] == 16
    assert "overhead" not in asked and "bits" not in asked
    assert Budget(memory="4GB", device="A phone").text == "A phone"
    assert Budget(memory="4GB").text == "4GB"


# ---------------------------------------------------------------- exact bytes

words = st.text(st.sampled_from('abxyz019._é"\\/'), min_size=1, max_size=12)


@given(
    st.dictionaries(
        words, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 9), max_size=3))
    )
)
def test_container_bytes_are_a_real_files_header(
    entries: dict[str, tuple[str, list[int]]],
) -> None:
    tensors = {n: torch.zeros(shape, dtype=DTYPES[d]) for n, (d, shape) in entries.items()}
    real = save(tensors, metadata={"format": "pt"})
    sizes = {n: t.numel() * t.element_size() for n, t in tensors.items()}
    found = container_bytes((n, d, shape, sizes[n]) for n, (d, shape) in entries.items())
    assert found == 8 + struct.unpack("<Q", real[:8])[0]
    assert found + sum(sizes.values()) == len(real)


SURE = {"value": 0.1, "low": 0.1, "high": 0.1}
CERTIFICATE = {
    "documents": 9,
    "tokens": 90,
    "interval": "95 %",
    "rows": [
        {"name": "plan", "bytes": 5}
        | dict.fromkeys(
            ("kl", "kl_p99", "flips", "ear", "perplexity", "perplexity_reference"), SURE
        )
    ],
    "versus": {},
    "verdict": "none",
}


def small_inventory(dtype: str, layers: int = 3, rows: int = 6) -> Inventory:
    def one(i: int) -> Layer:
        name = f"blocks.{i}.proj.weight"
        shape = (rows, 64)
        return Layer(name, rows, 64, "linear", "proj", i, name, shape, dtype=dtype)

    others = (
        Other("norm.weight", "norm.weight", dtype, (64,)),
        Other("steps", "steps", "I64", (1,)),
        Other("angles", "angles", "F32", (5,)),
    )
    return Inventory(tuple(one(i) for i in range(layers)), others, dtype)


def real_file(inventory: Inventory, choice: dict[str, Precision]) -> bytes:
    """The file that a plan stands for, made without the project's own arithmetic."""
    tensors = {}
    for layer in inventory.layers:
        precision = choice[layer.name]
        if precision.kind == "none":
            tensors[layer.name] = torch.zeros(layer.shape, dtype=DTYPES[layer.dtype])
        for suffix, (dtype, shape) in precision.parts(layer.rows, layer.cols).items():
            tensors[f"{layer.name}.{suffix}"] = torch.zeros(shape, dtype=DTYPES[dtype])
    for other in inventory.others:
        tensors[other.name] = torch.zeros(other.shape, dtype=DTYPES[other.dtype])
    return save(tensors, metadata={"format": "pt"})


fitting = precisions().filter(lambda p: p.fits(64)) | st.just(Precision())


@given(st.sampled_from(["F16", "BF16"]), st.lists(fitting, min_size=3, max_size=3))
def test_stored_bytes_are_those_of_a_real_file(dtype: str, chosen: list[Precision]) -> None:
    inventory = small_inventory(dtype)
    choice = {x.name: p for x, p in zip(inventory.layers, chosen, strict=True)}
    found = stored_bytes(inventory, choice)
    assert found["total"] == len(real_file(inventory, choice))
    assert found["total"] == found["quantized"] + found["untouched"] + found["container"]
    assert found["quantized"] == sum(p.bytes(6, 64) for p in chosen if p.kind != "none")


@given(
    st.sampled_from(["F16", "BF16"]),
    st.integers(1, 60),
    st.integers(1, 20000),
    st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5).filter(any),
    st.randoms(use_true_random=False),
)
def test_a_plan_that_fits_a_size_is_a_file_that_fits_it(
    dtype: str, count: int, rows: int, weights: list[float], rng: random.Random
) -> None:
    """The search knows tensor bytes only; headers differ from plan to plan and must not break
    the promise: no assignment that the problem calls fitting makes a file over the limit."""
    inventory = small_inventory(dtype, count, rows)
    palette = [
        Precision("int", 2, 64, True), Precision("int", 4, 16), Precision("ternary", 2, 64, True),
        Precision("int", 8, 32), Precision(),
    ]  # fmt: skip
    picks = np.array(rng.choices(range(5), weights, k=count))
    choice = {x.name: palette[i] for x, i in zip(inventory.layers, picks, strict=True)}
    limit = stored_bytes(inventory, choice)["total"] - 1
    every = choices_of(inventory.layers, palette)
    with suppress(BudgetError):
        problem = pose(inventory, every, np.zeros((count, 5)), Budget(size=str(limit)))
        assert not problem.fits(picks)


# ---------------------------------------------------------------- JSON


def example() -> Plan:
    inventory = small_inventory("F16")
    first, second, _ = (x.name for x in inventory.layers)
    return assemble(
        inventory,
        inventory.layers[:2],
        {first: Precision("int", 4, 64), second: Precision("ternary", 2, 32, True)},
        model={"name": "örtlich", "revision": None, "fingerprint": "sha256:ab"},
        runtime="torch",
        quantizer={"name": "rtn"},
        predicted={"kl": 0.1, "stderr": 0.01},
        budget={"bits": 4.5},
        certificate=CERTIFICATE,
        provenance={"seed": 3},
    )


def test_averages_are_over_the_scope() -> None:
    """Two layers of 6 x 64: int4_g64 has 4 + 16/64 + 8/64 bits (a zero point alone in its byte),
    ternary_g32 13 bytes of trits and 2 scales a row."""
    plan = example()
    assert plan.effective_bits == pytest.approx(((4 + 0.25 + 0.125) + (13 + 4) * 8 / 64) / 2)
    assert plan.code_bits == pytest.approx((4 + 1.6) / 2)
    assert plan.layers["blocks.2.proj.weight"] == "none"
    assert plan.scope == ("blocks.0.proj.weight", "blocks.1.proj.weight")


def test_round_trip(tmp_path: Path) -> None:
    plan = example()
    path = plan.save(tmp_path / "deep" / "plan.json")
    assert Plan.load(path) == plan
    assert Plan.load(path.parent) == plan
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]
    assert "örtlich" in path.read_text(encoding="utf-8")


def test_the_file_keeps_to_the_published_keys() -> None:
    data = example().to_json()
    assert (data["format"], data["version"]) == ("mezzotint-plan", 1)
    published = {
        "format", "version", "model", "runtime", "quantizer", "palette", "layers", "bytes",
        "effective_bits", "predicted", "certificate", "provenance",
    }  # fmt: skip
    assert published <= data.keys()
    assert data["palette"]["int4_g64"] == {
        "kind": "int", "bits": 4, "group_size": 64, "symmetric": False,
    }  # fmt: skip
    assert {"quantized", "untouched", "total"} <= data["bytes"].keys()


def test_the_id_depends_on_the_assignment_and_not_on_the_circumstances() -> None:
    plan = example()
    assert replace(plan, certificate={}, provenance={}, predicted={}).id == plan.id
    other = {**plan.layers, "blocks.0.proj.weight": "none"}
    assert replace(plan, layers=other).id != plan.id
    assert replace(plan, model={**plan.model, "fingerprint": "sha256:cd"}).id != plan.id


def written(path: Path, change: Callable[[dict[str, Any]], Any], by_hand: bool = False) -> Path:
    data = example().to_json()
    change(data)
    if by_hand:
        del data["checksum"]
    path.write_text(json.dumps(data))
    return path


FIRST = "blocks.0.proj.weight"


def test_one_changed_value_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path / "p", lambda d: d["layers"].update({FIRST: "ternary_g32"}))
    with pytest.raises(PlanError, match=r"changed after it was written.*checksum"):
        Plan.load(path)


def test_a_consistent_plan_written_by_hand_is_welcome(tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["layers"][FIRST] = "ternary_g32"
        data["bytes"]["quantized"] = 2 * Precision("ternary", 2, 32, True).bytes(6, 64)

    plan = Plan.load(written(tmp_path / "p", change, by_hand=True))
    assert plan.layers[FIRST] == "ternary_g32"


def test_a_certificate_of_a_plan_changed_by_hand_is_left_out(tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["certificate"] = {"rows": "great", "verdict": "lossless"}

    assert example().certificate
    assert not Plan.load(written(tmp_path / "p", change, by_hand=True)).certificate


def test_a_name_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "p", lambda _: None, by_hand=True)
    text = path.read_text()
    path.write_text(text.replace('"layers": {', f'"layers": {{"{FIRST}": "none", ', 1))
    with pytest.raises(PlanError, match="twice"):
        Plan.load(path)


def test_the_published_keys_alone_make_a_plan(tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for key in ("shapes", "scope", "code_bits", "budget"):
            del data[key]

    plan = Plan.load(written(tmp_path / "p", change, by_hand=True))
    assert plan.choice == example().choice
    assert plan.scope == example().scope


BY_HAND: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "bytes": (lambda d: d["layers"].update({FIRST: "ternary_g32"}), "they take"),
    "unknown precision": (lambda d: d["layers"].update({FIRST: "int4_g7"}), "palette"),
    "group divides no row": (
        lambda d: d["palette"]["int4_g64"].update(group_size=48),
        "doesn't divide",
    ),
    "illegal precision": (lambda d: d["palette"]["int4_g64"].update(bits=11), "structure"),
    "no layers": (lambda d: d.pop("layers"), "structure"),
    "layers a list": (lambda d: d.update(layers=[]), "structure"),
    "palette of numbers": (lambda d: d.update(palette={"int4_g64": 4}), "structure"),
    "bits a word": (lambda d: d.update(effective_bits="many"), "structure"),
    "bytes null": (lambda d: d.update(bytes=None), "structure"),
    "no total": (lambda d: d["bytes"].pop("total"), "structure"),
    "no quantizer": (lambda d: d.update(quantizer={}), "structure"),
    "model a number": (lambda d: d["model"].update(name=5), r"model\.name: .*not 5"),
    "promise a word": (lambda d: d["predicted"].update(kl="low"), r"predicted\.kl: .*not 'low'"),
    "cache without end": (lambda d: d.update(kv=float("inf")), "Infinity is no JSON"),
    "scope of strangers": (lambda d: d.update(scope=["other"]), "other in its scope"),
    "shape of three": (lambda d: d["shapes"].update({FIRST: [1, 2, 3]}), "structure"),
    "other version": (lambda d: d.update(version=2), "version 2"),
    "no version": (lambda d: d.pop("version"), "version None"),
    "other format": (lambda d: d.update(format="gguf"), "mezzotint-plan"),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_an_inconsistent_plan_written_by_hand_is_refused(tmp_path: Path, case: str) -> None:
    change, words = BY_HAND[case]
    path = written(tmp_path / "hand.json", change, by_hand=True)
    with pytest.raises(PlanError, match=words) as error:
        Plan.load(path)
    assert "hand.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"plan"', "{}"])
def test_json_that_is_no_plan(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError, match="is not a plan"):
        Plan.load(tmp_path)


def test_json_that_nests_without_end(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("[" * 100_000)
    with pytest.raises(PlanError, match="one whole JSON file"):
        Plan.load(tmp_path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = example().save(tmp_path / "plan.json")
    whole = path.read_bytes()
    for length in range(0, len(whole) - 3, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError):
            Plan.load(path)


def test_flipped_bytes_never_pass_unnoticed(tmp_path: Path) -> None:
    path = example().save(tmp_path / "plan.json")
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 41):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            found = Plan.load(path)
        except PlanError:
            continue
        assert found == example(), f"byte {place} changed the plan"


def test_no_plan_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No plan at"):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="No plan at"):
        Plan.load(tmp_path / "x.json")
