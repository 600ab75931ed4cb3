"""Workers started by Hydra's launchers: their configurations, and two processes on one study."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from optimizer import config
from optimizer.cli import compose as composing
from optimizer.models.source import Source
from optimizer.plan import Plan
from tests.conftest import QUICK

LAUNCHERS = ["processes", "slurm", "submitit_local"]


def composed(name: str) -> dict[str, Any]:
    composing.register("optimize")
    with initialize_config_dir(str(config.conf_folder()), version_base="1.3"):
        found = compose(
            "optimize",
            ["model=stories", f"hydra/launcher={name}", "search.worker=1"],
            return_hydra_config=True,
        )
    assert found.search.worker == 1
    values: Any = OmegaConf.to_container(found.hydra.launcher, resolve=False)
    return dict(values)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_composes(name: str) -> None:
    assert composed(name)["_target_"].startswith("hydra_plugins.hydra_")


@pytest.mark.parametrize(
    ("name", "plugin"), [("processes", "joblib"), ("slurm", "submitit_slurm")]
)
def test_a_launcher_has_exactly_its_plugins_keys(name: str, plugin: str) -> None:
    own = composed(name)
    module, _, kind = own["_target_"].rpartition(".")
    assert hasattr(import_module(module), kind)
    import_module(module.rpartition(".")[0] + ".config")
    node = ConfigStore.instance().load(f"hydra/launcher/{plugin}.yaml").node
    assert set(own) == set(OmegaConf.to_container(node, resolve=False))  # type: ignore[arg-type]
    assert own["_target_"] == node["_target_"]


@pytest.mark.slow
def test_two_processes_share_one_study(tmp_path: Path, store: Path, source: Source) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    command = [
        sys.executable, "-m", "optimizer", "optimize", "-m", f"model={source.name}",
        "budget.code_bits=3", *QUICK[:-1], "data.search.sequences=16", "proof.random=0",
        f"store={store}", "search=moves", "search.tokens=12000", f"search.storage={url}",
        "search.heartbeat=2", "hydra/launcher=processes", "search.worker=0,1", "wandb=off",
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    plans = [(tmp_path / "sweep" / k / "plan.json").read_text() for k in "01"]
    assert len(plans) == 2
    study = optuna.load_study(study_name=None, storage=url)
    spent = sum(t.user_attrs.get("tokens", 0) for t in study.trials)
    assert 0 < spent < 2 * 12000


@pytest.mark.slow
def test_submitit_runs_jobs_on_this_machine(tmp_path: Path, store: Path, source: Source) -> None:
    """Its executor for one machine, with a process a job: one plan a budget, as without a launcher."""
    command = [
        sys.executable, "-m", "optimizer", "optimize", "-m", f"model={source.name}",
        "budget.code_bits=3,4", *QUICK[:-2], "search=exact", "proof.certify=false", "wandb=off",
        f"store={store}", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20",
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    plans = [Plan.load(tmp_path / "sweep" / name / "plan.json") for name in "01"]
    assert plans[0].bytes["total"] < plans[1].bytes["total"]
    logs = list((tmp_path / "sweep" / ".submitit").rglob("*_log.out"))
    assert len(logs) == 2  # submitit ran them, each in a process of its own


@pytest.mark.slow
def test_a_mistake_in_a_process_is_told_and_ends_with_2(tmp_path: Path, store: Path) -> None:
    command = [
        sys.executable, "-m", "optimizer", "optimize", "-m", "model=stories",
        "budget.code_bits=1,1.5", f"store={store}", "hydra/launcher=processes",
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "A plan must fit its budget" in done.stderr and "Traceback" not in done.stderr
