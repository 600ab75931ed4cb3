"""Probes from the command line, beside the uniform plan of the same size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optimizer.commands.inspect import uniform_beside
from optimizer.data.pairs import read
from optimizer.metrics import margins
from optimizer.models.model import Model
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import UNTOUCHED, Precision, assemble, stored_bytes
from tests.conftest import Command, Small, planned
from tests.data.test_pairs import written


def test_the_uniform_plan_has_at_least_the_bytes(llama: Small) -> None:
    layers = llama.inventory.scoped(["blocks"])
    bits = [3, 4, 5]
    mixed = {x.name: Precision("int", bits[i % 3], 32) for i, x in enumerate(layers)}
    plan = assemble(
        llama.inventory, layers, mixed, model={"name": "x"}, runtime="torch",
        quantizer={"name": "rtn"}, predicted={},
    )  # fmt: skip
    found = uniform_beside(plan, llama.inventory)
    assert found is not None
    name, choice = found
    assert name in ("uniform int4_g32", "uniform int5_g32")

    def size(chosen: dict[str, Precision]) -> int:
        stored = stored_bytes(llama.inventory, chosen)
        return stored["quantized"] + stored["untouched"]

    assert size(choice) >= size(plan.choice)
    smaller = {x.name: Precision("int", choice[x.name].bits - 1, 32) for x in layers}
    assert size(smaller) < size(plan.choice)
    uniform = {x.name: Precision("int", 4, 32) for x in llama.inventory.layers}
    assert uniform_beside(planned(llama.inventory, uniform), llama.inventory) is None
    nothing = {x.name: UNTOUCHED for x in llama.inventory.layers}
    assert uniform_beside(planned(llama.inventory, nothing), llama.inventory) is None


def story_plan(stories: Model, fingerprint: str, path: Path) -> Path:
    layers = stories.inventory.scoped(["blocks"])
    choice = {x.name: Precision("int", 2 + i % 3, 32) for i, x in enumerate(layers)}
    plan = assemble(
        stories.inventory, layers, choice,
        model={"name": "stories", "revision": None, "fingerprint": fingerprint},
        runtime="torch", quantizer={"name": "rtn"}, predicted={"kl": 0.0, "stderr": 0.0},
    )  # fmt: skip
    return plan.save(path)


OTHER = {"Mia": "Tom", "Tom": "Anna", "Anna": "Ben", "Ben": "Vera", "Vera": "Ivan", "Ivan": "Mia"}


def story_pairs() -> list[dict[str, str]]:
    """What the stories model has learnt well: which kind of word comes next."""
    people = ("Mia", "Tom", "Anna", "Ben", "Vera", "Ivan")
    places = ("garden", "kitchen", "forest")
    return [
        {"prefix": f"{name} met someone near the {place} ,".replace("someone", OTHER[name]),
         "good": " and", "bad": " cup",
         "phenomenon": "order", "id": f"{name} {place}"}
        for name in people for place in places
    ]  # fmt: skip


def test_probe_from_the_command_line(
    mezzotint: Command, stories: Model, source: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    plan = story_plan(stories, source.fingerprint, tmp_path / "plan.json")
    odd = {"prefix": "Mia met Tom near the", "good": " zebra", "bad": " cup", "phenomenon": "odd"}
    file = written(tmp_path, *story_pairs(), odd)
    ended = mezzotint("probe", plan, f"probes={file}", "out=found.json")
    assert ended.code == 0, ended.err
    assert "order -" in ended.out and "18/18" in ended.out
    assert "1 pairs skipped, with words that the tokenizer doesn't know" in ended.out
    assert "Without an informative pair: odd -" in ended.out
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    (order, _) = found["cells"]
    assert order["count"]["used"] == 18
    assert set(order["damage"]) == set(found["sizes"])
    assert len(found["sizes"]) == 2
    tokenizer = load_tokenizer(source.folder)
    jobs = margins.encode(read(file)[:18], tokenizer, 256)
    reference = margins.measure(stories.net, [j for j in jobs if isinstance(j, margins.Job)])
    assert order["margin"] == pytest.approx(reference.mean(), abs=1e-4)

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(margins, "measure", never)
    again = mezzotint("probe", plan, f"probes={file}", "threshold=1")
    assert again.code == 0  # kept margins answer another threshold


def test_probe_says_what_is_wrong_before_it_works(
    mezzotint: Command, stories: Model, source: Any, tmp_path: Path
) -> None:
    plan = story_plan(stories, source.fingerprint, tmp_path / "plan.json")
    odd = {"prefix": "Der Hund", "good": " bellt", "bad": " miaut"}
    for arguments, wanted in (
        (["probe"], "needs plan"),
        (["probe", "none.json"], "No plan at"),
        (["probe", plan, "languages=fr"], "'fr'"),
        (["probe", plan, "threshold=-1"], "threshold"),
        (["probe", plan, "probes=none.jsonl"], "no probe file"),
        (["probe", plan, f"out={plan}"], "overwrite what is read"),
        (["probe", plan, f"probes={written(tmp_path, odd)}"], "None of the 1 pairs"),
    ):
        ended = mezzotint(*arguments)
        assert ended.code == 2, arguments
        assert wanted in ended.err
        assert "Traceback" not in ended.err
