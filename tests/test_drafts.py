"""A folder takes another's place whole, wherever a kill falls; what the dead left is swept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optimizer import drafts
from optimizer.errors import ConfigError, StorageError
from optimizer.formats import folder as folders

OLD = {"manifest.json": "old", "packed.safetensors": "old", "stale.txt": "old"}
NEW = {"config.json": "new", "manifest.json": "new", "packed.safetensors": "new"}
CALLS = ("rename", "replace", "mkdir", "rmdir", "unlink", "open")


def fill(folder: Path) -> None:
    for name, text in NEW.items():
        (folder / name).write_text(text)


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def held(folder: Path) -> dict[str, str]:
    if not folder.exists():
        return {}
    return {p.name: "a folder" if p.is_dir() else p.read_text() for p in folder.iterdir()}


def dies_before_call(number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that is killed before its `number`th change of the file system.
    Returns whether it was."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **names: object) -> object:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **names)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        drafts.exchange = counted(drafts.exchange)  # type: ignore[assignment]
        try:
            work()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


def no_exchange(*_: object) -> None:
    raise OSError(errno.EINVAL, "this file system has none")


@pytest.fixture(params=["exchange", "moved", "current folder"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "moved":
        monkeypatch.setattr(drafts, "exchange", no_exchange)
    return str(request.param)


@pytest.mark.parametrize("before", [None, {}, OLD], ids=["new", "empty", "old"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_kill_anywhere_the_next_start_finds_a_whole_folder(
    tmp_path: Path, way: str, before: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for number in range(1, 200):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if before is not None:
            write(out, before)
            if way == "current folder":
                monkeypatch.chdir(out)
        killed = dies_before_call(number, lambda out=out: folders.publish(out, fill))
        if drafts.SEAL in held(out):  # what claims to be whole is
            assert {k: v for k, v in held(out).items() if not k.startswith(".")} in (before, NEW)
        drafts.recover(out)
        assert held(out) in (before or {}, NEW)
        assert [p.name for p in out.parent.iterdir()] in ([], ["out"])
        seen.add(held(out) == NEW)
        folders.check_target(out, overwrite=True)
        folders.publish(out, fill)
        assert held(out) == NEW
        if not killed:
            break
    assert not killed and number > 3 and seen == {False, True}


@pytest.mark.parametrize("before", [{}, OLD], ids=["empty", "old"])
def test_an_error_leaves_what_was_there(
    tmp_path: Path, way: str, before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, moves = Path.rename, 0

    def breaking(self: Path, target: Path) -> Path:
        nonlocal moves
        moves -= 1
        if moves == 0:
            raise OSError(errno.EIO, "broken")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", breaking)
    failed = 0
    for number in range(1, 12):
        out = write(tmp_path / str(number), before)
        if way == "current folder":
            monkeypatch.chdir(out)
        moves = number
        try:
            folders.publish(out, fill)
            assert held(out) == NEW
        except StorageError:
            failed += 1
            assert held(out) == before
    assert failed or way == "exchange"
    assert all(p.name.isdigit() for p in tmp_path.iterdir())


def test_links_are_followed_and_those_in_a_circle_refused(tmp_path: Path) -> None:
    real = write(tmp_path / "real", {})
    link = tmp_path / "link"
    link.symlink_to(real)
    folders.check_target(link, overwrite=False)
    folders.publish(link, fill)
    assert link.is_symlink() and held(real) == NEW
    nowhere = tmp_path / "nowhere"
    nowhere.symlink_to(tmp_path / "later")
    folders.publish(nowhere, fill)
    assert nowhere.is_symlink() and held(tmp_path / "later") == NEW
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises((ConfigError, StorageError)):
        folders.check_target(circle, overwrite=False)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    place = write(tmp_path / "mounted", {})
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this account can't mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_mount_point_is_filled(mounted: Path) -> None:
    folders.check_target(mounted, overwrite=False)
    folders.publish(mounted, fill)
    assert held(mounted) == NEW
    (mounted / "stale.txt").write_text("old")
    folders.check_target(mounted, overwrite=True)
    folders.publish(mounted, fill)
    assert held(mounted) == NEW
    assert [p.name for p in mounted.parent.iterdir()] == ["mounted"]


def test_who_comes_second_replaces_nothing(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        fill(folder)
        write(tmp_path / "out", OLD)  # meanwhile

    with pytest.raises(StorageError):
        folders.publish(tmp_path / "out", slow)
    assert held(tmp_path / "out") == OLD


WRITER = """
import sys, time
from pathlib import Path
from optimizer import drafts
with drafts.folder(Path(sys.argv[1]), "out") as own, drafts.file(Path(sys.argv[1]) / "plan.json"):
    print(own, flush=True)
    time.sleep(60)
"""


def test_only_drafts_of_the_dead_are_swept(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    root = str(Path(__file__).parents[1])
    (tmp_path / ".somebody.else-abcdefgh").write_text("kept")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as job:
        assert job.stdout is not None and job.stdout.readline().strip()
        drafts.sweep(tmp_path)
        assert len(list(tmp_path.iterdir())) == 3
        job.kill()
    drafts.sweep(tmp_path, "other")
    assert len(list(tmp_path.iterdir())) == 3
    drafts.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".somebody.else-abcdefgh"]


def test_a_name_may_be_as_long_as_a_file_system_allows(tmp_path: Path) -> None:
    with drafts.file(tmp_path / ("\N{SNOWMAN}" * 85)) as (_, draft):
        assert draft.exists() and drafts.is_draft(draft)
