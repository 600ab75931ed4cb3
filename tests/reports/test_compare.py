"""A sweep on one page: what its jobs have in common is left out, and lost jobs are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optimizer.errors import BudgetError, ConfigError
from optimizer.reports.html import compare
from tests.reports.test_html import EVIL, make_run


def save(folder, bits, model="tiny"):
    folder.mkdir(parents=True)
    plan, run = make_run(model)
    plan.save(folder / "plan.json")
    config = run.config | {"budget": {"bits": bits}}
    replace(run, config=config, chosen=replace(run.chosen, bytes=int(1000 * bits))).save(folder)


def test_jobs_are_sorted_and_named_by_what_differs(tmp_path):
    save(tmp_path / "0", 5.0)
    save(tmp_path / "1", 4.0)
    found = compare.gather(tmp_path)
    assert [(job.folder, job.label) for job in found.jobs] == [
        ("1", "budget.bits=4.0"),
        ("0", "budget.bits=5.0"),
    ]
    assert found.jobs[0].heldout == (0.02, 0.01, 0.03)


def test_jobs_are_named_as_they_were_typed(tmp_path):
    for name, bits in (("0", 5.0), ("1", 4.0)):
        save(tmp_path / name, bits)
        (tmp_path / name / ".hydra").mkdir()
        typed = f"- model=tiny\n- budget=card{name}\n"
        (tmp_path / name / ".hydra" / "overrides.yaml").write_text(typed)
    labels = [job.label for job in compare.gather(tmp_path).jobs]
    assert labels == ["budget=card1", "budget=card0"]


def test_lost_jobs_are_named(tmp_path):
    save(tmp_path / "0", 5.0)
    (tmp_path / "1" / ".hydra").mkdir(parents=True)
    (tmp_path / "1" / ".hydra" / "overrides.yaml").write_text("- budget.bits=1\n- model=tiny\n")
    save(tmp_path / "2", 4.0)
    (tmp_path / "2" / "run.json").write_text("{")
    assert compare.gather(tmp_path).unfinished == (("1", "budget.bits=1 model=tiny"), ("2", ""))
    assert "job 1 (budget.bits=1 model=tiny)" in compare.write(tmp_path).read_text()


def test_names_are_escaped(tmp_path):
    save(tmp_path / EVIL.replace("/", "_"), 5.0, EVIL)
    text = compare.write(tmp_path).read_text()
    assert "<script>alert" not in text and EVIL not in text


def test_a_link_leads_to_the_folder_whatever_its_name_is(tmp_path):
    save(tmp_path / "javascript:50%#1?", 5.0)
    text = compare.write(tmp_path).read_text()
    assert '<a href="./javascript%3A50%25%231%3F/report.html">' in text


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_no_sweep(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError):
        compare.gather(tmp_path / name)


def test_the_command_line(tmp_path, capsys):
    from optimizer.cli.main import main

    save(tmp_path / "0", 5.0)
    save(tmp_path / "1", 4.0)
    assert main(["compare", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "budget.bits=4.0" in said and "0.0200 [0.0100, 0.0300]" in said
    assert (tmp_path / "compare.html").exists()


def test_a_failed_job_does_not_stop_a_sweep(tmp_path, monkeypatch, capsys):
    from optimizer.cli import summary
    from optimizer.cli.main import main
    from optimizer.commands import optimize as pipeline

    asked = []

    def optimize(settings, folder, *_):
        asked.append(settings.budget.bits)
        if settings.budget.bits == 1:
            raise BudgetError("too small")
        return pipeline.Outcome(make_run()[0], {})

    monkeypatch.setattr(pipeline, "optimize", optimize)
    monkeypatch.setattr(summary, "outcome", lambda out, result: None)
    words = ["optimize", "-m", "model=stories", "budget.bits=1,2,3", f"hydra.sweep.dir={tmp_path}"]
    assert main(words) == 2
    assert asked == [1, 2, 3]
    assert "too small" in capsys.readouterr().err
