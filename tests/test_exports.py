"""The public surface: what is exported, what it costs to import, how it is called."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import optimizer
from optimizer import errors

EXPORTED = ["Budget", "MezzotintError", "Plan", "Precision", "apply", "load", "optimize"]


def test_all_is_what_it_was() -> None:
    """Removing a name breaks users; adding one is a promise. Change this list on purpose."""
    assert sorted(optimizer.__all__) == EXPORTED
    assert len(set(optimizer.__all__)) == len(optimizer.__all__)


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_names_exist_and_explain_themselves(name: str) -> None:
    assert inspect.getdoc(getattr(optimizer, name))


def test_star_import_gives_exactly_these() -> None:
    space: dict[str, object] = {}
    exec("from optimizer import *", space)
    assert sorted(space.keys() - {"__builtins__"}) == EXPORTED


def test_every_error_is_in_the_drawn_tree() -> None:
    kinds = [v for v in vars(errors).values() if inspect.isclass(v) and issubclass(v, Exception)]
    assert all(issubclass(kind, errors.MezzotintError) for kind in kinds)
    drawn = str(errors.__doc__)
    assert all(kind.__name__ in drawn for kind in kinds)


def loaded_by(code: str) -> set[str]:
    program = f"{code}\nimport sys; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


HEAVY = {"torch", "transformers", "datasets", "optuna", "wandb", "scipy"}


@pytest.mark.parametrize(
    "code",
    [
        "import optimizer",
        "import optimizer.config, optimizer.plan.plan, optimizer.stages.session",
        "from optimizer.cli.main import main; main(['--help'])",
    ],
)
def test_light_paths_load_nothing_heavy(code: str) -> None:
    assert not loaded_by(code) & HEAVY


def test_help_does_not_even_load_numpy_or_hydra() -> None:
    modules = loaded_by("from optimizer.cli.main import main; main(['--help'])")
    assert not modules & {"hydra", "numpy", "rich", "omegaconf"}
