"""Paths and flags on the command line, and output that nobody takes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from optimizer.cli.words import flags_first, listed, placed
from optimizer.reports.run import quoted

KEYS = ["plan", "to", "budget"]


def read(override: str) -> str:
    """What Hydra and OmegaConf make of it."""
    found = OverridesParser.create().parse_override(override)
    return str(OmegaConf.create({"a": found.value()}).a)


def test_any_text_comes_through_hydra_as_it_is() -> None:
    rng = random.Random(5)
    letters = "\\'\"${}=,()[] a-b.:#%@\n\té"
    for _ in range(250):
        text = "".join(rng.choices(letters, k=rng.randint(0, 7)))
        text += rng.choice(["", "${oc.env:HOME}", "\\${x}", "\\\\${x}", "'", "\\'", "\\"])
        assert read(f"a={quoted(text)}") == text


@pytest.mark.parametrize(
    "name", ["budget.bits=4.5", "back\\slash", "${oc.env:HOME}", "-dash", "a,b"]
)
def test_a_path_that_exists_is_a_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (word,) = placed([name], ["plan"], KEYS)
    assert read(word) == name
    assert [read(word) for word in placed(["to=x", f"plan={name}"], [], KEYS)] == ["x", name]


def test_what_is_no_path_stays() -> None:
    assert placed(["to=x", "--cfg", "job"], ["plan"], KEYS) == ["to=x", "--cfg", "job"]
    assert read(placed(["no=such/plan.json"], ["plan"], KEYS)[0]) == "no=such/plan.json"
    assert listed(["a", "b", "to=x"], "plan", KEYS) == ["plan=['a','b']", "to=x"]


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        (
            "policy.pins=[blk.1.attn_v.weight=q8_0, *.1.* >= 5]",
            ["blk.1.attn_v.weight=q8_0", "*.1.* >= 5"],
        ),
        ("policy.pins=blk.1.attn_v.weight=q8_0", "blk.1.attn_v.weight=q8_0"),
        ("policy.pins=@tensor_types.txt", "@tensor_types.txt"),
        ("policy.pins=['a = int4',\"b = int8\"]", ["a = int4", "b = int8"]),
        ("policy.pins=[]", []),
    ],
)
def test_pins_need_no_quotes_of_their_own(word: str, meant: str | list[str]) -> None:
    (found,) = placed([word], [], [*KEYS, "policy"])
    assert OverridesParser.create().parse_override(found).value() == meant


def test_flags_come_first_with_their_values() -> None:
    given = ["model=x", "--config-dir", "mine", "+a=b", "--cfg", "job", "palette=tight", "-m"]
    found = flags_first(given)
    assert found == [
        "--config-dir", "mine", "--cfg", "job", "-m", "model=x", "+a=b", "palette=tight",
    ]  # fmt: skip


# ---------------------------------------------------------------- output and signals

RUN = [sys.executable, "-m", "optimizer"]


def ended(words: list[str], redirect: str) -> tuple[int, str]:
    command = " ".join(f"'{word}'" for word in [*RUN, *words])
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirect}"], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("redirect", ["> /dev/full", ">&-"])
def test_output_that_can_not_be_written_is_a_paragraph(redirect: str) -> None:
    code, said = ended(["--help"], redirect)
    assert code == 2
    assert said.startswith("mezzotint: this output") and said.count("\n") == 1


def test_a_closed_pipe_has_its_own_code() -> None:
    code, said = ended(["--help"], "| (exec 0<&-; sleep 1); exit ${PIPESTATUS[0]}")
    assert (code, said) == (141, "")


def reading(pipe: Path, deadline: float) -> int:
    """The other end of a pipe, as soon as somebody reads it."""
    while time.monotonic() < deadline:
        with suppress(OSError):
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    pytest.fail("nobody read the pipe")


def test_sigterm_stops_as_ctrl_c_does(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")  # reading it waits
    with subprocess.Popen(
        [*RUN, "show", str(tmp_path / "plan.json")], stderr=subprocess.PIPE, text=True
    ) as child:
        end = reading(tmp_path / "plan.json", time.monotonic() + 60)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=60)
        os.close(end)
    assert child.returncode == 130
    assert "stopped" in said and "Traceback" not in said
