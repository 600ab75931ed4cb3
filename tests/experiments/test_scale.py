"""The script for a lent GPU ends on a CPU, at its own number of tokens: nobody sees it before it runs
there, and a minute there is dear."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import rows
from optimizer.models.source import Source

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_rows_of_a_gpu_end_on_a_cpu(source: Source, store: Path, tmp_path: Path) -> None:
    own = {"PYTHON": sys.executable, "WORK": str(tmp_path), "OUT": str(tmp_path)}
    own |= {"PYTHONPATH": str(ROOT), "MEZZOTINT_STORE": str(store)}
    script = ROOT / "experiments" / "14-scale" / "gpu.sh"
    wanted = ["streamed", "gptq", "generate"]
    done = subprocess.run(
        ["bash", str(script), "tiny", "cpu", "64", "256", *wanted],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr[-2000:]
    found = {row["row"]: row for row in rows.read(tmp_path / "gpu.csv")}
    assert list(found) == wanted
    assert float(found["generate"]["packed_from_unpacked"]) < 0.02
