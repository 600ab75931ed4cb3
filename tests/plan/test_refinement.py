"""A plan's second part: planes that go on where the base's codes end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from optimizer.errors import PlanError
from optimizer.plan import Pair, Plan, Precision, Refinement, plane_bytes
from tests.plan.test_plan import example, small_inventory

FIRST, SECOND, THIRD = (f"blocks.{i}.proj.weight" for i in range(3))
P4, PLANE = Precision("int", 4, 64), Precision("int", 2, None, True)


def test_a_pair_is_its_base_and_what_refines_it() -> None:
    alone, both = Pair(P4), Pair(P4, PLANE)
    assert (alone.name, both.name) == ("int4_g64", "int4_g64+int2_channel_sym")
    assert not alone.refined and both.refined
    # rows of 64: 32 bytes of codes, a scale of 2 and a zero point in a byte; 16 of the plane, a scale
    assert (alone.bytes(6, 64), alone.plane_bytes(6, 64)) == (6 * 35, 0)
    assert (both.bytes(6, 64), both.plane_bytes(6, 64)) == (6 * 35 + 6 * 18, 6 * 18)


def test_a_pair_fits_where_both_do() -> None:
    grouped = Precision("int", 2, 48, True)
    assert Pair(P4, PLANE).fits(128) and not Pair(P4, PLANE).fits(96)
    assert Pair(P4).fits(64) and not Pair(P4, grouped).fits(64)
    assert Pair(P4, grouped).fits(192)


def test_bytes_of_planes_are_those_of_a_real_file() -> None:
    """The header names the base by 64 digits."""
    inventory = small_inventory("F16")
    planes = {FIRST: PLANE, THIRD: Precision("int", 3, None, True)}
    tensors = {}
    for name, plane in planes.items():
        for suffix, (dtype, shape) in plane.parts(6, 64).items():
            kind = {"U8": torch.uint8, "F16": torch.float16}[dtype]
            tensors[f"{name}.{suffix}"] = torch.zeros(shape, dtype=kind)
    found = plane_bytes(inventory, planes)
    assert found["total"] == len(save(tensors, {"format": "pt", "base": "a" * 64}))
    assert found["quantized"] == 6 * (16 + 2) + 6 * (24 + 2)
    assert found["total"] == found["quantized"] + found["container"]
    assert plane_bytes(inventory, {}) == {"quantized": 0, "container": 0, "total": 0}


def refined(**changes: Any) -> Plan:
    """The example, whose first layer is int4 and second ternary, both with a plane."""
    plan = example()
    planes = {FIRST: PLANE, SECOND: Precision("int", 3, None, True)}
    whole = Refinement(
        palette={p.name: p for p in planes.values()},
        layers={name: p.name for name, p in planes.items()},
        bytes=plane_bytes(small_inventory("F16"), planes),
        size=9999,
        predicted={"kl": 0.01, "stderr": 0.001},
    )
    return replace(plan, refinement=replace(whole, **changes))


def test_a_refinement_survives_the_file(tmp_path: Path) -> None:
    plan = refined()
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert plan.refinement is not None
    assert plan.refinement.planes == {FIRST: PLANE, SECOND: Precision("int", 3, None, True)}


def test_what_a_later_version_adds_is_left_alone(tmp_path: Path) -> None:
    plan = refined()
    data = json.loads(plan.save(tmp_path / "plan.json").read_text())
    del data["checksum"]
    data["refinement"]["later"] = {"more": 1}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert Plan.load(tmp_path / "plan.json").refinement == plan.refinement


Change = Callable[[Refinement], dict[str, Any]]
WRONG: dict[str, tuple[Change, str]] = {
    "no layer of the plan": (
        lambda r: {"layers": {**r.layers, "other": PLANE.name}}, "planes of its palette"
    ),
    "a layer that isn't rounded": (
        lambda r: {"layers": {**r.layers, THIRD: PLANE.name}}, f"{THIRD} with int2_channel_sym"
    ),
    "a plane that the palette lacks": (
        lambda r: {"layers": {**r.layers, FIRST: "int8_channel_sym"}}, "planes of its palette"
    ),
    "groups": (
        lambda r: {"palette": {**r.palette, PLANE.name: Precision("int", 2, 64, True)}},
        "one scale a row; int2_channel_sym hasn't",
    ),
    "zero points": (
        lambda r: {"palette": {**r.palette, PLANE.name: Precision("int", 2)}}, "one scale a row"
    ),
    "ternary": (
        lambda r: {"palette": {**r.palette, PLANE.name: Precision("ternary", 2, None, True)}},
        "one scale a row",
    ),
    "bytes": (
        lambda r: {"bytes": {**r.bytes, "quantized": r.bytes["quantized"] + 1}}, "but they take"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_refinement_that_is_none_of_the_plan(case: str) -> None:
    change, words = WRONG[case]
    whole = refined().refinement
    assert whole is not None
    with pytest.raises(PlanError, match=words) as error:
        Plan.from_json(refined(**change(whole)).to_json(), where="here")
    assert str(error.value).startswith("here")


def test_llama_cpps_blocks_cant_be_refined() -> None:
    plan = refined()
    assert plan.refinement is not None
    choice = {**plan.choice, SECOND: Precision.ggml("q8_0")}
    with pytest.raises(PlanError, match=f"q8_0 of {SECOND}"):
        plan.refinement.check("here", choice, plan.shapes)
    with pytest.raises(PlanError, match=f"{FIRST} with"):
        plan.refinement.check("here", plan.choice, {SECOND: (6, 64)})


SURE = {"value": 0.1, "low": 0.1, "high": 0.1}
PROOF: dict[str, Any] = {"kl": {"base": SURE, "refined": SURE}, "acceptance": SURE}
BESIDE = PROOF | {"base over separate": SURE, "refined over separate": SURE}
POINT = {"share": 0.2, "threshold": 1.0, "kl": 0.1}
HARD: dict[str, Any] = {
    "signal": "entropy", "points": [POINT], "share": 0.2, "heldout": {"share": 0.2, "kl": SURE}
}  # fmt: skip


@pytest.mark.parametrize("proof", [{}, PROOF, BESIDE])
@pytest.mark.parametrize("hard", [{}, HARD])
def test_what_was_measured_of_both_comes_back_as_it_was(
    proof: dict[str, Any], hard: dict[str, Any]
) -> None:
    plan = refined(certificate=proof, hard=hard)
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"certificate": {"kl": PROOF["kl"]}}, "acceptance"),
        ({"certificate": PROOF | {"kl": {"base": SURE}}}, r"kl\.refined"),
        ({"certificate": PROOF | {"base over separate": SURE}}, "given together"),
        ({"hard": {"signal": "entropy", "points": [POINT]}}, "hard"),
        ({"hard": HARD | {"heldout": {}}}, r"heldout\.share"),
        ({"hard": HARD | {"signal": "mood"}}, "signal"),
        ({"predicted": {}}, r"predicted\.kl"),
    ],
)
def test_half_of_what_was_measured_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Plan.from_json(refined(**changes).to_json())


def test_what_was_measured_of_a_plan_changed_by_hand_is_left_out() -> None:
    plan = refined(certificate=PROOF, hard=HARD)
    data = plan.to_json()
    del data["checksum"]
    found = Plan.from_json(data)
    assert found.refinement == refined().refinement and not found.certificate
