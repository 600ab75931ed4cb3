"""Experiments are typed as the package is; each folder by itself, since their scripts share names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(p.name for p in (ROOT / "experiments").iterdir() if list(p.glob("*.py")))


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_typed(folder: str) -> None:
    pytest.importorskip("mypy")
    shared = [ROOT / "experiments" / name for name in ("sampled.py", "wikitext.py")]
    own = sorted((ROOT / "experiments" / folder).glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, [*shared, *own])],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
