"""A whole job with weights on disk gives the plan and the certificate of one in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optimizer.models.source import Source
from tests.conftest import Command

SMALL = (
    "budget.bits=4", "search=exact", "wandb=off", "proof.domains=[]", "sensitivity.chunks=2",
    "data.calibration.sequences=4", "data.calibration.length=32",
    "data.search.sequences=2", "data.search.length=32",
    "data.heldout.sequences=4", "data.heldout.length=32",
)  # fmt: skip


def made(mezzotint: Command, source: Source, out: Path, *more: str) -> dict[str, Any]:
    """The plan of a run that shares nothing with others."""
    found = mezzotint(
        "optimize", f"model={source.folder}", *SMALL, *more,
        f"store={out / 'store'}", f"hydra.run.dir={out / 'run'}",
    )  # fmt: skip
    assert found.code == 0, found.err
    assert ("stay on disk" in found.err + found.out) == ("offload=disk" in more)
    plan: dict[str, Any] = json.loads((out / "run" / "plan.json").read_text())
    del plan["provenance"], plan["checksum"]
    return plan


@pytest.mark.slow
def test_the_plan_and_its_certificate_are_the_same(
    mezzotint: Command, source: Source, tmp_path: Path
) -> None:
    wanted = made(mezzotint, source, tmp_path / "memory", "offload=none")
    assert wanted["certificate"]
    assert made(mezzotint, source, tmp_path / "disk", "offload=disk") == wanted


def test_a_cap_that_is_too_small_ends_before_any_work(
    mezzotint: Command, source: Source, tmp_path: Path
) -> None:
    found = mezzotint("optimize", f"model={source.folder}", *SMALL, "memory=1kB",
                      f"store={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    assert found.code == 2
    assert "smallest cap is memory=" in " ".join(found.err.split())
    assert not (tmp_path / "run" / "plan.json").exists()
