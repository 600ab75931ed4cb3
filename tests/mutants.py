"""Mutation testing: one operator or constant changed at a time, and the room's own tests run.

    python -m tests.mutants ROOM [COUNT] [SEED]

draws COUNT of the room's mutants (default 50; all of them take hours), runs them with mutmut as
pyproject.toml says, and prints which survived and the share that was killed. `mutmut show NAME` in
the folder that it names shows one of them. A mutant that no test of the room runs counts as survived;
one that ran out of time counts as killed, and is named: look whether the tests are only slow.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINKED = ("optimizer", "conf", "tests", "docs", "experiments", "README.md", "pyproject.toml")
SURVIVED, UNTESTED = 0, 33  # mutmut's exit codes; all others are kills
OUT_OF_TIME = -24  # of the processor's: an endless loop, or fixtures that are slow


def settings(room: str) -> dict[str, Any]:
    """pyproject.toml's, narrowed to one room and its own tests."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["tool"]["mutmut"] | {
        "only_mutate": [f"optimizer/{room}/*"],
        "pytest_add_cli_args_test_selection": [f"tests/{room}"],
    }


def prepared(room: str) -> Path:
    """A folder for mutmut, which copies what it mutates below the one that it runs in."""
    work = ROOT / "mutants" / room
    work.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        if (ROOT / name).exists() and not (work / name).exists() and name != "pyproject.toml":
            (work / name).symlink_to(ROOT / name)
    whole = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    own, _, rest = whole.partition("[tool.mutmut]\n")
    _, table, after = rest.partition("\n[")
    (work / "pyproject.toml").write_text(own + table + after, encoding="utf-8")
    (work / "setup.cfg").write_text(as_config(settings(room)), encoding="utf-8")
    return work


def as_config(values: Mapping[str, Any]) -> str:
    lines = ["[mutmut]"]
    for key, value in values.items():
        text = "".join(f"\n    {x}" for x in value) if isinstance(value, list) else str(value)
        lines.append(f"{key} = {text}".replace("%", "%%"))
    return "\n".join(lines) + "\n"


def results(work: Path) -> dict[str, int | None]:
    """Mutant -> its exit code, None where it wasn't run."""
    found: dict[str, int | None] = {}
    for file in sorted(work.glob("mutants/optimizer/**/*.meta")):
        found |= json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def run(work: Path, names: Sequence[str]) -> None:
    command = ["mutmut", "run", "--max-children", "1", *names]
    with (work / "mutmut.log").open("w") as log:
        subprocess.run(command, cwd=work, stdout=log, stderr=log, check=False)


def wilson(killed: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z, share = 1.96, killed / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return (middle - half) / scale, (middle + half) / scale


def main(room: str, count: str = "50", seed: str = "0") -> None:
    work = prepared(room)
    run(work, ["no mutant of this name"])  # makes the mutants and times the tests
    every = sorted(results(work))
    if not every:
        sys.exit(f"mutmut made no mutants; see {work / 'mutmut.log'}")
    drawn = random.Random(f"{seed} {room}").sample(every, min(int(count), len(every)))
    run(work, drawn)
    codes = results(work)
    undecided = [name for name in drawn if codes[name] is None]
    if undecided:
        sys.exit(f"{len(undecided)} mutants weren't run; see {work / 'mutmut.log'}")
    alive = [name for name in drawn if codes[name] in (SURVIVED, UNTESTED)]
    for name in alive:
        print("survived" if codes[name] == SURVIVED else "no test ", name)
    for name in drawn:
        if codes[name] == OUT_OF_TIME:
            print("time out", name)
    killed = len(drawn) - len(alive)
    low, high = wilson(killed, len(drawn))
    print(
        f"{room}: {killed} of {len(drawn)} killed, {killed / len(drawn):.0%} [{low:.0%}, {high:.0%}], "
        f"of {len(every)} mutants; look at survivors with `mutmut show NAME` in {work}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
