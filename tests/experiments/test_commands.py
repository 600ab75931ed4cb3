"""Experiments run: each command on the stories model, in a copy of its folder, so that no result is
overwritten. The others need larger models, or packages of other projects: see their READMEs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import rows
from optimizer.models.source import Source
from optimizer.models.stories import corpus

ROOT = Path(__file__).parents[2]
# folder, and which of its commands -> the command's words, of which those in capitals are put in;
# and a word of what it prints
COMMANDS = {
    "03-rounding": ("measure.py stories TEXT uniform rtn 4", "rtn"),
    "04-memory": ("measure.py PACKED 64 1 float32 cpu", "64,1,float32,cpu"),
    "05-exports": ("turns.py stories PACKED OUT/turns.csv 4", "'ratio'"),
    "06-false-alarms": ("measure.py topk stories TEXT", "8 32 "),
    "07-search": ("sweep.py stories TEXT OUT --seeds 0 blocks:600:4", "14 of 14 runs"),
    "07-search gptq": (
        "sweep.py stories TEXT OUT --seeds 0 --methods 'exact,moves tpe,evolution' all:600:0.2",
        "3 of 3 runs",
    ),
    "12-first-damage": ("measure.py stories TEXT 1", " s\n"),
    "15-defaults": (
        "measure.py stories 150kB JUDGES OUT/rows.csv 0 'self: quick'",
        "'way': 'quick'",
    ),
    "16-person": ("simulate.py OUT 1 6 drawn", "'votes':"),
    "17-gguf-architectures": ("measure.py OUT llama", "'architecture': 'llama'"),
    "18-unpack": ("measure.py stories rtn 100kB 130kB OUT/rows.csv data=self", "'oracle"),
    "19-floats": ("measure.py stories rtn OUT/rows.csv", "nvfp4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(
    command: str, store: Path, source: Source, packed_folder: Path, tmp_path: Path
) -> None:
    copy, text, out = tmp_path / "experiments", tmp_path / "text.txt", tmp_path / "out"
    shutil.copytree(ROOT / "experiments", copy, ignore=shutil.ignore_patterns("*.png", "work"))
    text.write_text("\n---\n".join(corpus(1500, 5)))
    (tmp_path / "judges").mkdir()
    long = "\n---\n".join(" ".join(corpus(12, 100 + i)) for i in range(12))
    (tmp_path / "judges" / "told.txt").write_text(long)
    out.mkdir()
    begun = time.time()
    folder = command.partition(" ")[0]
    words, shown = COMMANDS[command]
    given = {"PACKED": packed_folder, "TEXT": text, "OUT": out, "JUDGES": tmp_path / "judges"}
    for name, value in given.items():
        words = words.replace(name, str(value))
    done = subprocess.run(
        [sys.executable, *shlex.split(words)],
        cwd=copy / folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MEZZOTINT_STORE": str(store)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert shown in done.stdout, done.stdout[-2000:]
    written = [file for place in (copy / folder, out) for file in place.glob("*.csv")]
    for file in (file for file in written if file.stat().st_mtime > begun):
        assert any(row["config"] for row in rows.read(file)), f"{file} has no key of its settings"
