"""The examples of docs/extend.md, installed as another package and used from the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from optimizer.errors import ConfigError
from optimizer.formats.format import Format, formats
from optimizer.models.model import Model
from optimizer.plan import Plan
from optimizer.quantization.methods import Quantizer, methods
from optimizer.sensitivity import estimators
from tests.conftest import QUICK, Command, Small
from tests.formats import test_contract as files
from tests.formats.conftest import Wide, wide
from tests.quantization import test_contract as quantizers
from tests.sensitivity import test_contract as scores

__all__ = ["wide"]  # a fixture of another room

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
PYTHON = re.compile(r"```python\n(\"\"\"(\w+)\.py: .*?)```", re.DOTALL)
TOML = re.compile(r"```toml\n\[project\.entry-points\.\"([\w.]+)\"\]\n(.*?)```", re.DOTALL)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site folder with the page's modules and the entry points that it tells to write."""
    site, text = tmp_path / "site", PAGE.read_text(encoding="utf-8")
    about = site / "toys-1.0.dist-info"
    about.mkdir(parents=True)
    for code, name in PYTHON.findall(text):
        (site / f"{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
    given = [(group, lines.replace('"', "")) for group, lines in TOML.findall(text)]
    points = "".join(f"[{group}]\n{lines}\n" for group, lines in given)
    (about / "entry_points.txt").write_text(points, encoding="utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(site))
    return site


def test_the_page_has_an_example_of_each(installed: Path) -> None:
    assert {p.stem for p in installed.glob("*.py")} == {"dithered", "magnitude", "arrays"}
    assert "dithered" in methods() and "magnitude" in estimators() and "arrays" in formats()


def test_the_examples_make_and_export_a_plan(
    installed: Path, mezzotint: Command, tmp_path: Path
) -> None:
    made = mezzotint(
        "optimize", "model=stories", "budget.bits=4.5", *QUICK, "quantizer=dithered",
        "quantizer.strength=0.2", "sensitivity=magnitude", "runtime=arrays", "wandb=off",
        "hydra.run.dir=run",
    )  # fmt: skip
    assert made.code == 0, made.err
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.quantizer == {"name": "dithered", "strength": 0.2} and plan.runtime == "arrays"
    assert plan.predicted["estimator"] == "magnitude"
    assert "quantizer=dithered" in plan.provenance["command"]
    assert "quantizer.strength=0.2" in plan.provenance["command"]
    written = mezzotint("export", "run/plan.json", "to=arrays", "out=packed")
    assert written.code == 0, written.err
    assert (tmp_path / "packed" / "weights.npz").is_file()
    refused = mezzotint("check", "run/plan.json", "to=vllm")
    assert refused.code == 2


def test_the_examples_keep_the_contracts(
    installed: Path, stories: Model, llama: Small, wide: Wide, tmp_path: Path
) -> None:
    """Those that every quantizer, estimator and format of ours keeps."""
    for i, precision in enumerate(quantizers.ROUGH):
        for check in (
            quantizers.test_the_parts_have_the_promised_shapes_and_decode_to_what_is_rounded,
            quantizers.test_the_same_input_gives_the_same_codes,
            quantizers.test_it_is_no_worse_than_nearest_on_its_own_tokens,
            quantizers.test_dead_rows_stay_finite,
        ):
            check(stories, tmp_path / f"{i} {check.__name__[:20]}", "dithered", precision)
    quantizers.test_a_key_names_the_method_its_version_and_its_fields("dithered")
    scores.test_untouched_costs_nothing_and_bits_cost_less_on_average(llama, "magnitude")
    scores.test_the_same_seed_gives_the_same_numbers(llama, "magnitude")
    scores.test_planted_damage_ranks_first(llama, "magnitude", 6)
    scores.test_a_key_names_the_estimator_its_version_and_each_field("magnitude")
    case = files.Case("arrays", wide)
    files.test_what_may_be_offered_is_accepted_and_read_back(case, tmp_path)
    files.test_what_it_does_not_hold_is_refused(case)


def test_a_wrong_value_of_a_registered_method_is_named(
    installed: Path, mezzotint: Command
) -> None:
    found = mezzotint(
        "optimize",
        "model=stories",
        "budget.bits=4.5",
        "quantizer=dithered",
        "quantizer.strength=x",
    )
    assert found.code == 2 and "quantizer.strength" in found.err


@pytest.mark.parametrize(
    ("group", "line", "known"),
    [
        ("mezzotint.quantizers", "broken = no_such_module:Thing", methods),
        ("mezzotint.quantizers", "broken = pathlib:Path", methods),
        ("mezzotint.formats", "broken = pathlib:no_such_name", formats),
    ],
)
def test_a_broken_entry_point_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, line: str, known: object
) -> None:
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "entry_points.txt").write_text(f"[{group}]\n{line}\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert callable(known)
    with pytest.raises(ConfigError, match="uninstall its package"):
        known()


def test_what_a_new_class_must_write_is_said() -> None:
    with pytest.raises(NotImplementedError, match="neither quantize nor build"):
        Quantizer().build(None).encode(None, None)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="no checker"):
        Format().checker(None, None)  # type: ignore[arg-type]
