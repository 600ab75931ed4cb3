"""Several processes that make one table: what they share, and real ones, also of which one dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.errors import ProcessError
from optimizer.models.residence import Residence
from optimizer.models.source import Source
from optimizer.plan import Plan
from optimizer.stages import processes
from optimizer.stages.processes import ALONE, Processes, facts, said, started
from tests.conftest import QUICK

OPTIMIZE = ["-m", "optimizer", "optimize"]
CHUNKS = 8


def test_every_item_has_one_process_and_neighbours_stay_together() -> None:
    for of in (1, 2, 3, 5, 11):
        shares = [Processes(number, of).share(8) for number in range(of)]
        assert [i for share in shares for i in share] == list(range(8))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("prefix", [("", ""), ("OMPI_COMM_WORLD_", "OMPI_COMM_WORLD_LOCAL_")])
def test_the_environment_says_which_process_this_is(
    prefix: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, local = prefix
    size = "SIZE" if world else "WORLD_SIZE"
    monkeypatch.setenv(f"{world}RANK", "3")
    monkeypatch.setenv(f"{world}{size}", "4")
    monkeypatch.setenv(f"{local}RANK" if local else "LOCAL_RANK", "1")
    monkeypatch.setenv(f"{local}SIZE" if local else "LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert started() == ALONE  # numbers that nobody could be reached by
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert started() == (found := Processes(3, 4, 1, 2)) and not found.first
    assert found.device("cuda") == "cuda:1"
    assert [found.device(x) for x in ("cpu", "cuda:0")] == ["cpu", "cuda:0"]
    assert ALONE.device("cuda") == "cuda"


def test_who_is_told_that_accelerate_started_a_single_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert said(ALONE) == []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert said(ALONE) == []
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "started a single process" in said(ALONE)[0] and "torchrun" in said(ALONE)[0]


def test_one_process_agrees_with_itself() -> None:
    assert ALONE.agree(lambda: 7, lambda _: 1 / 0) == 7  # type: ignore[arg-type, return-value]
    with ALONE.joined():
        pass


def test_processes_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, half = Residence()._room(), Residence(processes=2)._room()
    assert 0.4 < half / whole < 0.6
    assert Residence(memory="6GB", processes=2)._room() == 6 * 10**9


class Heard(Processes):
    """The first of two processes, of which the second tells what is given."""

    other: bytes = b""

    def _gather(self, own: bytes) -> list[bytes]:
        return [own, self.other] if self.first else [self.other, own]


def heard(number: int, other: bytes) -> Heard:
    found = Heard(number, 2)
    object.__setattr__(found, "other", other)
    return found


def test_what_differs_is_named_by_the_first_process_alone() -> None:
    other = b'+{"seed": 1, "model": "%s", "more": 2}' % (b"x" * 80)
    mine: dict[str, Any] = {"seed": 0, "model": "y" * 80, "more": 2}
    with pytest.raises(ProcessError) as one:
        heard(0, other).agree(lambda: 5, lambda _: mine)
    assert "process 1 of 2 has another seed (1, not 0), model." in str(one.value)
    with pytest.raises(ProcessError) as two:
        heard(1, other).agree(lambda: 5, lambda _: mine)
    assert str(two.value) == ""
    same = b'+{"seed": 0}'
    assert heard(0, same).agree(lambda: 5, lambda _: {"seed": 0}) == 5


def test_a_mistake_on_one_process_ends_all_and_is_said_once() -> None:
    def fail() -> np.ndarray:
        raise ProcessError("The disk is full.")

    with pytest.raises(ProcessError, match=r"^The disk is full\.$"):
        heard(0, b"+[0]\n").everyones(fail)
    with pytest.raises(ProcessError, match=r"^Process 1 of 2 had to stop: No text\.$"):
        heard(0, b"-No text.").everyones(lambda: np.zeros(2))
    for other in (b"-No text.", b"+[0]\n"):
        with pytest.raises(ProcessError, match=r"^$"):
            heard(1, other).everyones(fail)


def test_rows_come_back_in_the_order_of_the_processes() -> None:
    own, other = np.arange(6.0).reshape(2, 3) / 7, np.array([[1.0, 2.0, 3.0]])
    told = b"+[1, 3]\n" + other.tobytes()
    first = heard(0, told).everyones(lambda: own)
    last = heard(1, told).everyones(lambda: own)
    for found, wanted in zip((*first, *last), (own, other, other, own), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_versions_and_settings_are_facts_and_paths_are_none() -> None:
    found = facts({"seed": 3, "store": "a", "model": "m", "palette": {"bits": [4]}}, "abc", "t")
    assert found["seed"] == 3 and found["palette"] == {"bits": [4]} and found["model"] == "abc"
    assert "store" not in found and found["version of torch"]


# ---------------------------------------------------------------- real processes


def asked(source: Source, store: Path, out: Path, *more: str) -> list[str]:
    own = [f"model={source.name}", "budget.code_bits=4", *QUICK, "proof.certify=false"]
    rest = [f"sensitivity.chunks={CHUNKS}", "wandb=off", f"store={store}"]
    return [*own, *rest, f"hydra.run.dir={out}", *more]


def several(number: int, of: int, port: int) -> dict[str, str]:
    numbers = {"RANK": number, "WORLD_SIZE": of, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in numbers.items()}}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def begun(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *OPTIMIZE, *command], env=env, text=True, stdout=pipe, stderr=pipe
    )


def entries(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.glob("tables/*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2"],
        [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--mixed_precision=no",
        ],
    ],
)
def test_two_processes_make_the_table_and_the_plan_of_one(
    launcher: list[str], tmp_path: Path, source: Source
) -> None:
    """As torchrun and accelerate start them; each chunk is the same to the last bit."""
    alone = [sys.executable, *OPTIMIZE, *asked(source, tmp_path / "s1", tmp_path / "one")]
    subprocess.run(alone, check=True, capture_output=True, timeout=300)
    if launcher[0] == "torch.distributed.run":
        launcher = [*launcher, "--master-port", str(free_port())]
    else:
        launcher = [*launcher, "--main_process_port", str(free_port())]
    command = [sys.executable, "-m", *launcher, *OPTIMIZE]
    both = [*command, *asked(source, tmp_path / "s2", tmp_path / "two")]
    done = subprocess.run(both, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes measure the table") == 1
    assert done.stdout.count("Next: mezzotint apply") == 1
    one, two = entries(tmp_path / "s1"), entries(tmp_path / "s2")
    assert len(one) == CHUNKS and one == two
    plans = [Plan.load(tmp_path / name / "plan.json") for name in ("one", "two")]
    assert plans[0].id == plans[1].id
    assert {p.name for p in tmp_path.iterdir()} == {"s1", "s2", "one", "two"}


@pytest.mark.slow
def test_processes_with_other_settings_are_refused_before_the_work(
    tmp_path: Path, store: Path, source: Source
) -> None:
    port = free_port()
    ran = [
        begun(asked(source, store, tmp_path / "x", f"seed={i}"), several(i, 2, port))
        for i in (0, 1)
    ]
    told = [process.communicate(timeout=300) for process in ran]
    assert [process.returncode for process in ran] == [2, 2]
    assert "process 1 of 2 has another seed (1, not 0)" in told[0][1]
    assert told[1] == ("", "") and "Traceback" not in told[0][1]
    assert not (tmp_path / "x" / "plan.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_end_when_a_process_dies_and_the_same_command_goes_on(
    killed: int, tmp_path: Path, source: Source
) -> None:
    """A table of 512 windows, long enough to be killed in; what was left is used."""
    store = tmp_path / "store"
    more = ["data=self", "data.calibration.sequences=512", "sensitivity.windows=512"]
    command = asked(source, store, tmp_path / "run", *more)
    port = free_port()
    ran = [begun(command, several(i, 2, port)) for i in (0, 1)]
    limit = time.monotonic() + 300
    while not entries(store) and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(ran[killed].pid, signal.SIGKILL)
    told = [process.communicate(timeout=120) for process in ran]
    other = 1 - killed
    assert [ran[killed].returncode, ran[other].returncode] == [-signal.SIGKILL, 2]
    assert f"Process {other} of 2 doesn't reach the others" in told[other][1]
    assert "the same command goes on" in told[other][1] and "Traceback" not in told[other][1]
    left = entries(store)
    assert left and not (tmp_path / "run" / "plan.json").exists()
    done = begun(command, dict(os.environ))
    _, error = done.communicate(timeout=300)
    assert done.returncode == 0, error
    kept = entries(store)
    finished = {name for name in left if name in kept}
    assert len(finished) >= CHUNKS // 2  # the share of the one that went on
    assert all(kept[name] == left[name] for name in finished)


def test_a_process_that_never_comes_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: Any) -> Any:
        raise RuntimeError("[/a/b.cpp:1] timed out after 600 seconds. [127.0.0.1]")

    monkeypatch.setattr(processes, "_group", nobody)
    with pytest.raises(
        ProcessError, match="doesn't reach the others \\(timed out after 600 seconds\\)"
    ):
        Processes(0, 2)._asked(lambda: processes._group(0, 2))
