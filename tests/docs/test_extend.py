"""The examples of docs/extend.md, installed as another package and used from the command line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from optimizer.errors import ConfigError
from optimizer.formats.format import Format, formats
from optimizer.plan import Plan
from optimizer.quantization.methods import Quantizer, methods
from optimizer.sensitivity import estimators
from tests.conftest import QUICK, Command

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
