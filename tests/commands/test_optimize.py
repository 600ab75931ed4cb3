"""The stages together: killed anywhere, the same command ends with the identical plan."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.commands import optimize
from optimizer.config import Optimize, Proof
from optimizer.data.text import Data, Part
from optimizer.errors import BudgetError, StorageError
from optimizer.models.source import Source
from optimizer.plan import Budget, Palette, Plan
from optimizer.quantization.methods import Rtn, bind
from optimizer.search import Search
from optimizer.sensitivity import Measured
from optimizer.sensitivity.estimators import Directional, Fisher
from optimizer.stages import refine
from optimizer.stages.session import Session
from optimizer.stages.space import search_space
from optimizer.stages.view import View
from tests.conftest import QUICK, slow_beside

SHORT = Part(sequences=8, length=32)
UNPROVED = Proof(certify=False)


def settings(source: Source, store: Path, **changes: Any) -> Optimize:
    values: dict[str, Any] = {
        "model": str(source.folder),
        "budget": Budget(bits=4),
        "data": Data(calibration=SHORT, search=SHORT, heldout=SHORT),
        "scope": ["blocks"],
        "quantizer": Rtn(),
        "sensitivity": Fisher(chunks=4),
        "proof": Proof(random=2),
        "search": Search(space="exact"),
        "store": str(store),
    }
    return Optimize(**values | changes)


# ---------------------------------------------------------------- killed and run again

DRIVER = """
import os, signal, sys
from optimizer.cli.main import main
import optimizer.commands.optimize, optimizer.quantization.uniform, optimizer.search.exact
import transformers, torch
from transformers import LlamaForCausalLM
torch.set_num_threads(1)

after, arguments = int(sys.argv[1]), sys.argv[2:]
attempts = 0
while attempts < 40:
    attempts += 1
    child = os.fork()
    if child == 0:
        writes, real = 0, os.fsync
        def fsync(handle):
            global writes
            real(handle)
            writes += 1
            if writes == after:
                os.kill(os.getpid(), signal.SIGKILL)  # written beside the target, not renamed
        os.fsync = fsync
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(arguments))
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        print(attempts, os.WEXITSTATUS(status))
        sys.exit(os.WEXITSTATUS(status))
"""


def arguments(source: Source, store: Path, out: Path) -> list[str]:
    return ["optimize", f"model={source.folder}", "budget.bits=4.5", *QUICK, f"store={store}",
            f"hydra.run.dir={out}"]  # fmt: skip


def without_paths(plan: Plan) -> Plan:
    return replace(plan, model={**plan.model, "name": ""}, provenance={})


@pytest.fixture(scope="module")
def undisturbed(source: Source, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        [sys.executable, "-m", "optimizer", *arguments(source, folder / "store", folder / "run")],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return (folder / "run" / "plan.json").read_bytes()


@pytest.mark.slow
def test_killed_again_and_again_it_goes_on_to_the_identical_plan(
    source: Source, undisturbed: bytes, tmp_path: Path
) -> None:
    """Each attempt is killed while it writes its eleventh file (the last one needs five that are
    not kept in the store). The plan has the same bytes as that of an undisturbed run."""
    call = arguments(source, tmp_path / "store", tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "11", *call], capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    attempts = int(done.stdout.split()[0])
    assert attempts >= 3, "it was hardly disturbed"
    assert (tmp_path / "run" / "plan.json").read_bytes() == undisturbed
    assert Plan.load(tmp_path / "run").certificate


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_with_the_identical_plan(
    source: Source, tmp_path: Path
) -> None:
    """Killed at every hundredth write to the disk, in the middle of trials and of slopes."""

    def call(name: str) -> list[str]:
        return [*arguments(source, tmp_path / f"store {name}", tmp_path / name),
                "search=moves", "data.search.sequences=16", "data.search.length=32",
                "search.tokens=6000", "wandb=off"]  # fmt: skip

    subprocess.run(
        [sys.executable, "-m", "optimizer", *call("unhurt")],
        check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "100", *call("hurt")], capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 3, "it was hardly disturbed"
    plans = [Plan.load(tmp_path / name) for name in ("unhurt", "hurt")]
    assert without_paths(plans[0]) == without_paths(plans[1])
    searches = [(tmp_path / name / "search.csv").read_text() for name in ("unhurt", "hurt")]
    assert searches[0] == searches[1]


@pytest.mark.slow
def test_kill_9_from_outside(source: Source, undisturbed: bytes, tmp_path: Path) -> None:
    """As soon as half of the table is there."""
    call = [sys.executable, "-m", "optimizer"]
    call += arguments(source, tmp_path / "store", tmp_path / "run")
    first = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tables = tmp_path / "store" / "tables"
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and first.poll() is None:
        if len(list(tables.glob("*.safetensors"))) >= 4:
            break
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert list(tables.glob("*.safetensors")), "killed before it had begun"
    subprocess.run(call, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "run" / "plan.json").read_bytes() == undisturbed


class Seen(View):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        self.stages.append(text)
        return items


def test_a_second_run_measures_nothing_and_says_the_same(source: Source, tmp_path: Path) -> None:
    config = settings(source, tmp_path / "store")
    first = optimize.optimize(config, tmp_path / "one")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()}
    view = Seen()
    second = optimize.optimize(config, tmp_path / "two", view)
    assert second.plan == first.plan
    rows = [[(r.name, r.id, r.measured) for r in run.measured] for run in (first, second)]
    assert rows[0] == rows[1]
    assert "loading the reference" not in view.stages
    assert files == {p: p.stat().st_mtime_ns for p in files}
    assert set(files) == {p for p in (tmp_path / "store").rglob("*") if p.is_file()}


def test_a_damaged_entry_of_the_store_is_made_again(source: Source, tmp_path: Path) -> None:
    config = settings(source, tmp_path / "store")
    first = optimize.optimize(config, tmp_path / "one")
    for kind in ("tables", "tokens", "scores", "inventories"):
        for file in sorted((tmp_path / "store" / kind).iterdir())[::2]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    view = Seen()
    assert optimize.optimize(config, tmp_path / "two", view).plan == first.plan
    assert sum("is damaged, or of an earlier version" in note for note in view.notes) > 4


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"seed": 1}, marks=pytest.mark.slow),
        pytest.param(
            {"data": Data(calibration=SHORT, search=SHORT, heldout=SHORT, seed=1)},
            marks=pytest.mark.slow,
        ),
        {"sensitivity": Directional(chunks=4)},
        pytest.param({"palette": Palette(group_size=32)}, marks=pytest.mark.slow),
        pytest.param({"scope": ["all"]}, marks=pytest.mark.slow),
    ],
)
def test_what_changes_the_table_is_not_taken_from_the_store(
    source: Source, tmp_path: Path, change: dict[str, Any]
) -> None:
    off = {"proof": Proof(certify=False)}
    warm, cold = tmp_path / "warm", tmp_path / "cold"
    optimize.optimize(settings(source, warm, **off), tmp_path / "one")
    after = optimize.optimize(settings(source, warm, **off, **change), tmp_path / "two").plan
    fresh = optimize.optimize(settings(source, cold, **off, **change), tmp_path / "three").plan
    assert without_paths(after) == without_paths(fresh)
    base = optimize.optimize(settings(source, warm, **off), tmp_path / "four").plan
    assert base.predicted != after.predicted


# ---------------------------------------------------------------- what the stages decide


def test_the_plan_is_the_best_of_the_table(source: Source, tmp_path: Path) -> None:
    """Its predicted loss is below that of every measured rival of no more bytes."""
    found = optimize.optimize(settings(source, tmp_path / "s"), tmp_path / "r")
    own = next(row for row in found.measured if row.name == "plan")
    assert own.bits <= 4
    for row in found.measured:
        if row.bits <= 4:
            assert own.predicted <= row.predicted * (1 + 1e-6), row.name


def test_a_plan_that_is_not_better_is_replaced_by_the_uniform_one(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that chooses the worst on purpose."""
    monkeypatch.setattr(optimize.exact, "solve", lambda posed: posed.uniform(0))
    found = optimize.optimize(settings(source, tmp_path / "s"), tmp_path / "r")
    assert {found.plan.choice[name].name for name in found.plan.scope} == {"int3_g64"}
    assert any("was not better than int3_g64" in note for note in found.notes)
    assert Plan.load(tmp_path / "r") == found.plan
    assert found.plan.certificate["verdict"].startswith("The same as int3_g64")


def test_measured_rows_reach_the_table(source: Source, tmp_path: Path) -> None:
    measured = Measured(groups=["*.0.self_attn.q_proj"], at="int4_g64")
    config = settings(
        source, tmp_path / "s", sensitivity=Fisher(chunks=4, measured=measured), proof=UNPROVED
    )
    view = Seen()
    optimize.optimize(config, tmp_path / "r", view)
    assert "measuring single groups" in view.stages
    again = Seen()
    optimize.optimize(config, tmp_path / "r2", again)
    assert "loading the reference" not in again.stages


@pytest.mark.parametrize(
    "scope", slow_beside([["all"]], [["head"], ["blocks", "head"], ["*mlp*"], ["all"]])
)
def test_any_scope_keeps_to_its_budget(source: Source, tmp_path: Path, scope: list[str]) -> None:
    config = settings(source, tmp_path / "s", scope=scope, budget=Budget(bits=3.3), proof=UNPROVED)
    plan = optimize.optimize(config, tmp_path / "r").plan
    size = sum(plan.choice[n].bytes(*plan.shapes[n]) for n in plan.scope)
    weights = sum(r * c for r, c in (plan.shapes[n] for n in plan.scope))
    assert 8 * size / weights == pytest.approx(plan.effective_bits)
    assert plan.effective_bits <= 3.3
    assert all(plan.layers[n] == "none" for n in plan.layers if n not in plan.scope)


@pytest.mark.parametrize("bits", slow_beside([[3]], [[1, "ternary", 2, 16], [4, 16], [3]]))
def test_small_palettes(source: Source, tmp_path: Path, bits: list[Any]) -> None:
    palette = Palette(bits=bits)
    budget = Budget(bits=6)
    config = settings(source, tmp_path / "s", palette=palette, budget=budget, proof=UNPROVED)
    plan = optimize.optimize(config, tmp_path / "r").plan
    assert plan.effective_bits <= 6
    assert {p.name for p in plan.choice.values()} <= {p.name for p in palette.precisions()} | {
        "none"
    }


def test_groups_of_a_runtime_share_their_precision(source: Source, tmp_path: Path) -> None:
    from optimizer.formats.runtime import Runtime

    fused = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
    config = settings(
        source, tmp_path / "s", runtime=Runtime(name="vllm", fused=fused), proof=UNPROVED
    )
    plan = optimize.optimize(config, tmp_path / "r").plan
    assert plan.runtime == "vllm"
    for names in fused:
        for block in range(4):
            chosen = {
                key for layer, key in plan.layers.items()
                if f".{block}." in layer and any(f".{name}." in layer for name in names)
            }  # fmt: skip
            assert len(chosen) == 1


def test_an_impossible_budget_costs_no_measurement(source: Source, tmp_path: Path) -> None:
    view = Seen()
    config = settings(source, tmp_path / "s", budget=Budget(bits=1.5))
    with pytest.raises(BudgetError):
        optimize.optimize(config, tmp_path / "r", view)
    assert "loading the reference" not in view.stages
    assert not (tmp_path / "r").exists()


def test_the_fitting_group_size_is_chosen_where_the_user_allows_it(
    source: Source, tmp_path: Path
) -> None:
    palette = Palette(bits=[4, 16], group_size=48, fit="nearest")
    plan = optimize.optimize(
        settings(source, tmp_path / "s", palette=palette, budget=Budget(bits=5), proof=UNPROVED),
        tmp_path / "r",
    ).plan
    sizes = {plan.choice[n].group_size for n in plan.scope} - {None}
    assert sizes == {64, 48}


def test_scores_are_kept_by_content(source: Source, tmp_path: Path) -> None:
    """Two names of one plan are one measurement."""
    config = settings(source, tmp_path / "s")
    view = View()
    table = Session.open(config.model, config.data, config.store, view)
    space = search_space(config, table.inventory)
    quantizer = bind(config.quantizer, table)
    choice = space.choice(np.zeros(len(space.groups), dtype=int))
    first = table.score(choice, "search", quantizer)
    kept = tmp_path / "s" / "scores"
    count = len(list(kept.glob("*.safetensors")))
    again = table.score(dict(reversed(choice.items())), "search", quantizer)
    assert np.array_equal(first.kl, again.kl)
    assert len(list(kept.glob("*.safetensors"))) == count == 1


def test_the_plan_says_how_it_was_made(source: Source, tmp_path: Path) -> None:
    plan = optimize.optimize(settings(source, tmp_path / "s"), tmp_path / "r").plan
    assert plan.model["fingerprint"] == source.fingerprint
    assert plan.provenance["data"]["calibration"] == {"sequences": 8, "length": 32}
    assert "budget.bits=4" in plan.provenance["command"]
    assert json.loads((tmp_path / "r" / "plan.json").read_text())["format"] == "mezzotint-plan"


def test_a_disk_that_is_full_while_the_search_writes_its_journal(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(refine, "refine", full)
    with pytest.raises(StorageError, match=r"journal couldn't be written: No space left"):
        optimize.optimize(
            settings(source, tmp_path / "store", search=Search(space="layers")), tmp_path / "run"
        )
