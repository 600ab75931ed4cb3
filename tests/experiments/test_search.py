"""The joined runs of experiments/07-search: ranks in cells, ratios over the same documents."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from experiments import rows

ROOT = Path(__file__).parents[2]
SHARES = {"moves tpe": 0.9, "directions gp": 0.8, "random": 1.0}  # of the table's loss


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "07-search"))
    return importlib.import_module("experiments.07-search.collect")


def run(budget: float, seed: int, method: str, loss: float) -> dict[str, Any]:
    space, _, sampler = method.partition(" ")
    documents = (loss * np.array([0.5, 1.0, 1.5])).tolist()
    value = {"value": loss, "low": loss / 2, "high": loss * 2}
    return {
        "terms": "blocks", "tokens_allowed": 1000, "budget": budget, "seed": seed,
        "method": space, "sampler": sampler, "tokens": 1100, "seconds": 2.0,
        "heldout": dict.fromkeys(("kl", "kl_p99", "kl_cvar99", "flips"), value),
        "documents": documents, "curve": [[500, loss * 2], [1000, loss]],
        "commit": "", "config": "a key",
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two budgets and two seeds; one more cell, in which two methods have not ended."""
    folder = tmp_path / "runs" / "planted"
    folder.mkdir(parents=True)
    planted = [run(budget, 0, "exact", budget) for budget in (2, 3)]
    planted += [
        run(budget, seed, method, budget * share)
        for budget in (2, 3)
        for seed in (0, 1)
        for method, share in SHARES.items()
    ]
    planted += [run(2, 2, "random", 0.001)]
    for i, one in enumerate(planted):
        (folder / f"{i}.json").write_text(json.dumps(one))
    return tmp_path / "runs"


def test_methods_are_ranked_where_all_of_them_ended(
    collect: ModuleType, runs: Path, tmp_path: Path
) -> None:
    collect.main(runs, tmp_path)
    found = {row["method"]: row for row in rows.read(tmp_path / "ranks.csv")}
    ranks = {method: float(row["rank"]) for method, row in found.items()}
    assert ranks == {"directions gp": 1, "moves tpe": 2, "random": 3.5, "exact": 3.5}
    assert all(row["cells"] == "4" for row in found.values())
    assert found["directions gp"]["over_table"] == "0.800"
    assert found["directions gp"]["better_than_moves"] == "4"
    assert found["random"]["worse_than_table"] == "0"
    assert (tmp_path / "results.png").stat().st_size > 1000
    assert (tmp_path / "curves-planted.png").stat().st_size > 1000


def test_a_ratio_is_taken_over_the_same_documents(
    collect: ModuleType, runs: Path, tmp_path: Path
) -> None:
    """Losses of documents that differ threefold, all of them a tenth lower: no spread is left."""
    collect.main(runs, tmp_path)
    table = rows.read(tmp_path / "results.csv")
    assert len(table) == 2 + 4 * len(SHARES) + 1  # the start has no seed
    own = [row for row in table if row["method"] == "moves tpe"]
    assert {(row["over_table"], row["over_low"], row["over_high"]) for row in own} == {
        ("0.9000", "0.9000", "0.9000")
    }


def test_rows_of_other_runs_are_kept(collect: ModuleType, runs: Path, tmp_path: Path) -> None:
    """The runs are joined in two parts, one run in both; the second time its row is replaced."""
    collect.main(runs, tmp_path)
    once = (tmp_path / "results.csv").read_text()
    for file in sorted((runs / "planted").iterdir())[3:]:
        file.unlink()
    again = runs / "planted" / "again.json"
    again.write_text(json.dumps(run(2, 0, "random", 1.9)))
    collect.main(runs, tmp_path)
    table = rows.read(tmp_path / "results.csv")
    changed = [r for r in table if (r["budget"], r["seed"], r["method"]) == ("2", "0", "random")]
    assert [r["kl_value"] for r in changed] == ["1.90000"]
    assert len(table) == len(once.splitlines()) - 1
