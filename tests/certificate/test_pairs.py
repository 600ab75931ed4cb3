"""Reading probes, measuring margins, and what is said about them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.certificate import pairs as damage
from optimizer.commands.inspect import uniform_beside
from optimizer.data.pairs import HERE, Pair, built_in, read
from optimizer.errors import ConfigError, TextError
from optimizer.metrics import margins
from optimizer.models.model import Model
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import UNTOUCHED, Precision, assemble, stored_bytes
from tests.conftest import Command, Small, planned

GOOD = {"prefix": "Mia had a", "good": " red ball", "bad": " red sad"}


def written(folder: Path, *lines: Any) -> Path:
    file = folder / "mine.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text(text, encoding="utf-8")
    return file


# ---------------------------------------------------------------- reading


def test_the_suite_is_whole() -> None:
    pairs = built_in()
    counts = Counter(pair.cell for pair in pairs)
    assert len(counts) == 30
    assert set(counts.values()) == {64}
    assert len({pair.id for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.prefix == pair.prefix.strip(), pair.id
        assert len({pair.good, pair.bad}) == 2, pair.id
        assert pair.id.startswith(f"{pair.phenomenon}-{pair.language}"), pair.id
        cyrillic = sum("а" <= char <= "я" for char in (pair.prefix + pair.good).lower())
        assert (cyrillic > 5) == (pair.language == "ru"), pair.id
    assert "CC0" in (HERE / "README.md").read_text(encoding="utf-8")


def test_half_of_the_pairs_are_exchanged_in_another() -> None:
    """Couples cancel a preference for one of the continuations."""
    pairs = built_in()
    ends = {(pair.cell, pair.good, pair.bad) for pair in pairs}
    coupled = sum((pair.cell, pair.bad, pair.good) in ends for pair in pairs)
    assert coupled >= 0.4 * len(pairs)


def test_a_users_file_may_leave_out_the_names(tmp_path: Path) -> None:
    first, second = read(written(tmp_path, GOOD, "", GOOD | {"id": "x", "phenomenon": "colour"}))
    assert first.cell == ("own", "-")
    assert second.cell == ("colour", "-")
    assert first.id == "line 1"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("{oops", "line 2 isn't JSON"),
        ("[1, 2]", "line 2 is no JSON object"),
        ({"prefix": "a", "good": " b"}, "line 2 lacks the field 'bad'"),
        (GOOD | {"good": 3}, "line 2: field 'good' must be text, not int"),
        (GOOD | {"bad": "  "}, "line 2: field 'bad' is empty"),
        (GOOD | {"wrong": "x"}, "line 2 has the field 'wrong'"),
        (GOOD | {"id": "line 1"}, "line 2 has the id 'line 1' of line 1"),
        (GOOD | {"bad": " red ball and a kite"}, "field 'bad' begins with the whole of 'good'"),
        (GOOD | {"bad": " red ball"}, "begins with the whole of"),
        ('{"prefix": "a", "good": " \\ud800", "bad": " b"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, wanted: str) -> None:
    file = written(tmp_path, GOOD, line)
    with pytest.raises(TextError) as caught:
        read(file)
    assert wanted in str(caught.value)
    assert str(file) in str(caught.value)


def test_files_that_are_no_probes(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="There is no probe file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(TextError, match="holds no pairs"):
        read(written(tmp_path, "", ""))
    (tmp_path / "old.jsonl").write_bytes('{"prefix": "Да"}'.encode("cp1251"))
    with pytest.raises(TextError, match="UTF-8"):
        read(tmp_path / "old.jsonl")
    with pytest.raises(ConfigError, match="'xx'"):
        built_in(["xx"])


# ---------------------------------------------------------------- damage


def test_holm_by_hand() -> None:
    assert damage.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert damage.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def suite(count: int = 40) -> list[Pair]:
    return [
        Pair(f"{name}{i}", name, "en", f"{name} {i}", f" {i} yes", f" {i} no")
        for name in ("one", "two")
        for i in range(count)
    ]


def test_damage_is_found_where_it_is() -> None:
    pairs, rng = suite(), np.random.default_rng(5)
    reference = rng.uniform(1, 3, len(pairs))
    plan = reference + rng.normal(0, 0.3, len(pairs))
    plan[:40] -= 1.5
    uniform = reference + rng.normal(0, 0.3, len(pairs))
    (one, two), (total,) = damage.judge(pairs, reference, {"plan": plan, "u": uniform}, 0.5)
    assert one.damage["plan"].p is not None and one.damage["plan"].p < 0.01
    assert two.damage["plan"].p is not None and two.damage["plan"].p > 0.05
    loss = one.damage["plan"].loss
    assert loss.value == pytest.approx((reference - plan)[:40].mean())
    assert loss.low < 1.5 < loss.high
    assert one.damage["plan"].flips.value == np.mean(plan[:40] <= 0) > 0
    assert one.damage["plan"].tail.value > loss.value
    assert one.gap is not None and one.gap.low > 1
    assert one.gap_p is not None and one.gap_p < 0.01
    assert total.damage["plan"].p is None
    said = damage.verdict([one, two], "plan", "u")
    assert "shown in 1 of 2" in said and "one en" in said and "more in 1" in said


def test_no_change_is_no_damage_and_no_proof() -> None:
    pairs = suite()
    reference = np.linspace(1, 3, len(pairs))
    cells, _ = damage.judge(pairs, reference, {"plan": reference.copy()}, 0.5)
    for cell in cells:
        assert cell.damage["plan"].loss.value == 0
        assert cell.damage["plan"].p == 1
        assert cell.damage["plan"].flips.value == 0
    assert "doesn't prove" in damage.verdict(cells, "plan", None)


def test_uninformative_pairs_are_reported_and_not_counted() -> None:
    pairs = suite(6)[:6]
    reference = np.array([2.0, 0.4, -1.0, np.nan, 1.0, 0.5])
    plan = np.array([-1.0, -9.0, 9.0, np.nan, 0.5, -9.0])
    (cell,), _ = damage.judge(pairs, reference, {"plan": plan}, 0.5)
    assert cell.count == damage.Count(pairs=6, used=2, wrong=1, weak=2, skipped=1)
    assert (
        cell.damage["plan"].flips.value == 0.5
    )  # the pair put right (third) makes up for nothing
    assert cell.damage["plan"].loss.value == pytest.approx((3.0 + 0.5) / 2)
    (none,), _ = damage.judge(pairs, np.full(6, -1.0), {"plan": plan}, 0.5)
    assert none.damage == {}
    assert "Nothing is said" in damage.verdict([none], "plan", None)


# ---------------------------------------------------------------- the command


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
