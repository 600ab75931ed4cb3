"""Tasks of lm-evaluation-harness and refusals, the same questions asked of both models."""

from __future__ import annotations

import builtins
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from optimizer.commands import harness
from optimizer.config import Evaluate
from optimizer.data import pairs
from optimizer.errors import ConfigError, ModelError
from optimizer.formats import lm_eval
from tests.conftest import Command


def test_mcnemar_is_that_of_the_questions_that_differ() -> None:
    own = np.array([True] * 20 + [False] * 10)
    other = own.copy()
    other[:8] = False
    other[20:22] = True
    found = harness.paired("x", own, other)
    assert (found.lost, found.won, found.count) == (8, 2, 30)
    assert found.reference == pytest.approx(20 / 30) and found.packed == pytest.approx(14 / 30)
    assert found.p == pytest.approx(2 * binom.cdf(2, 10, 0.5))
    assert harness.paired("x", own, own).p == 1.0


def test_our_pairs_are_tasks(tmp_path: Path) -> None:
    place = tmp_path / "it's here"
    place.mkdir()
    lm_eval.write(pairs.built_in(), place, place)
    group = json.loads((place / f"{lm_eval.GROUP}.yaml").read_text())
    assert len(group["task"]) == len({p.cell for p in pairs.built_in()})
    count = 0
    for name in group["task"]:
        task = json.loads((place / f"{name}.yaml").read_text())
        rows = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().split("\n")
        count += len(rows) - 1
        assert json.loads(rows[0]).keys() >= {"prefix", "good", "bad"}
    assert count == len(pairs.built_in())


def test_an_export_for_the_harness(mezzotint: Command, run_folder: Path) -> None:
    done = mezzotint("export", run_folder / "plan.json", "to=lm-eval", "out=tasks")
    assert done.code == 0, done.err
    assert Path("tasks/mezzotint_negation_en.yaml").is_file()
    wrong = mezzotint("check", run_folder / "plan.json", "to=lm-eval")
    assert wrong.code == 2 and "to= is one of" in wrong.err


def test_a_harness_that_is_not_installed_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'mezzotint\[harness\]'"):
        harness.check(["hellaswag"])
    harness.check([])


class Tokenizer:
    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise ValueError("no template\nset")


def test_a_template_that_fails_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"that of odd gives no prompt \(no template\)"):
        harness.check_template(Tokenizer(), "odd")


@pytest.mark.parametrize(("tasks", "names"), [("a,b", ["a", "b"]), (["a"], ["a"]), ([], [])])
def test_names_of_tasks(tasks: Any, names: list[str]) -> None:
    assert Evaluate(model="x", tasks=tasks).task_names == names
    with pytest.raises(ConfigError, match="tasks is a name"):
        Evaluate(model="x", tasks=[3]).check()
    with pytest.raises(ConfigError, match="limit is a number"):
        Evaluate(model="x", limit=0).check()


def test_what_the_harness_says_stays_out_of_our_lines(capfd: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    with harness.silenced():
        assert list(tqdm([1, 2], "Requesting")) == [1, 2]
        logging.getLogger("lm_eval.evaluator").warning("Overwriting default num_fewshot")
    logging.getLogger("lm_eval.evaluator").warning("and now it may")
    said = capfd.readouterr().err
    assert "Requesting" not in said and "Overwriting" not in said


@pytest.mark.campaign
def test_the_harness_itself_on_both_models(mezzotint: Command, packed_folder: Path) -> None:
    pytest.importorskip("lm_eval")
    done = mezzotint(
        "evaluate", f"model={packed_folder}", "tasks=mezzotint_negation_en", "limit=6"
    )
    assert done.code == 0, done.err
    assert "mezzotint_negation_en" in done.out and "McNemar" in done.out
    assert "it/s" not in done.err and "Building contexts" not in done.err  # the harness's own bars
    wrong = mezzotint("evaluate", f"model={packed_folder}", "tasks=mezzotint_negation_em")
    assert wrong.code == 2 and "no task" in wrong.err
