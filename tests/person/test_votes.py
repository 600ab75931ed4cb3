"""votes.jsonl: nothing is lost, nothing is overwritten, and what isn't a vote is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimizer.errors import StorageError, TextError
from optimizer.person.votes import About, End, Same, Undo, Vote, VoteFile, joined, standing
from tests.conftest import largest_file

FEATURES = {"kl": 0.25, "tail": 1.0}


def about(prompt: str = "p", models: tuple[str, str] = ("a", "b")) -> About:
    return About(prompt, "prose", "en", None, models, (1, 2), (FEATURES, FEATURES))


def vote(question: str = "q", choice: str = "first", judge: str = "me", prompt: str = "p") -> Vote:
    return Vote(judge=judge, session="s", question=question, about=about(prompt), choice=choice)  # type: ignore[arg-type]


def read(path: Path) -> VoteFile:
    file = VoteFile(path)
    file.refresh()
    return file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lines = [vote(), Same(judge="me", session="s", about=about()), End(judge="me", session="s")]
    lines.append(Undo(judge="me", session="s", of=lines[0].id))
    file = VoteFile(tmp_path / "new" / "votes.jsonl")
    for line in lines:
        file.append(line)
    assert read(file.path).lines == file.lines == lines
    assert len(file.path.read_text().splitlines()) == 4


def test_an_undone_vote_stays_in_the_file_and_stands_no_more(tmp_path: Path) -> None:
    first, second = vote("1"), vote("2")
    undone = Undo(judge="me", session="s", of=second.id)
    foreign = Undo(judge="somebody else", session="s", of=first.id)
    assert standing([first, second, undone, foreign]) == [first]


BROKEN = {
    "no JSON": b"{half",
    "no object": b"[1, 2]",
    "a probe": b'{"prefix": "a", "good": "b", "bad": "c"}',
    "another kind": b'{"kind": "wish"}',
    "no UTF-8": b'{"kind": "vote", "id": "\xff"}',
    "deep": b"[" * 5000,
}


def damaged(**changes: object) -> bytes:
    row = json.loads(json.dumps(_plain(vote())))
    return json.dumps(row | changes).encode()


def _plain(line: Vote) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(line)


WRONG = {
    "choice": damaged(choice="third"),
    "tags": damaged(tags=["taste"]),
    "time": damaged(time="yesterday"),
    "seconds": damaged(seconds=-1),
    "nan": damaged().replace(b'"seconds": 0.0', b'"seconds": NaN'),
    "number for text": damaged(judge=5),
    "more": damaged(mood="good"),
    "models": damaged(about=_plain(vote())["about"] | {"models": ["a"]}),  # type: ignore[operator]
}


@pytest.mark.parametrize("bad", [*BROKEN.values(), *WRONG.values()], ids=[*BROKEN, *WRONG])
def test_a_broken_or_foreign_line_is_named_and_the_rest_is_kept(
    tmp_path: Path, bad: bytes
) -> None:
    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(vote("1"))
    with file.path.open("ab") as raw:
        raw.write(bad + b"\n")
    file.append(vote("2"))
    before = file.path.read_bytes()
    again = read(file.path)
    assert [line.question for line in again.lines if isinstance(line, Vote)] == ["1", "2"]
    assert len(again.complaints) == 1
    assert "line 2 " in again.complaints[0]
    again.append(vote("3"))
    assert again.path.read_bytes().startswith(before)


def test_a_kill_in_the_middle_of_a_line_costs_that_line_only(tmp_path: Path) -> None:
    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(vote("1"), vote("2"))
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-20])
    again = read(file.path)
    again.mend()
    again.refresh()
    assert len(again.lines) == 1
    assert len(again.complaints) == 1
    again.append(vote("3"))
    assert [line.question for line in read(file.path).lines] == ["1", "3"]  # type: ignore[union-attr]


def test_a_last_line_without_its_end_counts(tmp_path: Path) -> None:
    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(vote("1"))
    file.path.write_bytes(file.path.read_bytes().rstrip(b"\n"))
    again = read(file.path)
    assert not again.lines
    again.rest()
    assert len(again.lines) == 1


def test_what_others_add_is_seen(tmp_path: Path) -> None:
    one, other = VoteFile(tmp_path / "v"), VoteFile(tmp_path / "v")
    one.append(vote("1", judge="anna"))
    assert other.refresh()
    other.append(vote("1", judge="ben"))
    assert not other.refresh()
    assert one.refresh()
    assert [line.judge for line in one.lines] == ["anna", "ben"]


def test_a_line_that_is_in_two_files_counts_once(tmp_path: Path) -> None:
    one, both = VoteFile(tmp_path / "1"), VoteFile(tmp_path / "2")
    one.append(vote("1"))
    both.path.write_bytes(one.path.read_bytes())
    both.append(vote("2"))
    both.refresh()
    assert len(joined([read(one.path), read(both.path)])) == 2


def test_a_full_disk_keeps_nothing_of_the_line(tmp_path: Path) -> None:
    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(vote("1"))
    before = file.path.read_bytes()
    with largest_file(len(before) + 50), pytest.raises(StorageError, match="not kept"):
        file.append(vote("2"))
    assert file.path.read_bytes() == before
    file.append(vote("3"))
    assert not read(file.path).complaints


def test_a_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="couldn't be read"):
        VoteFile(tmp_path).refresh()


KILLED = """
import sys
from pathlib import Path
from tests.person.test_votes import vote, VoteFile
file = VoteFile(Path(sys.argv[1]))
for i in range(10**6):
    file.append(vote(str(i)))
    print(i, flush=True)
"""


def test_a_killed_process_loses_no_vote_that_it_had_answered(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(20)]
        os.kill(child.pid, signal.SIGKILL)
        said += [int(line) for line in child.stdout]
    kept = [int(line.question) for line in read(path).lines if isinstance(line, Vote)]
    assert kept[: len(said)] == said


def test_ten_thousand_votes_load_in_a_second(tmp_path: Path) -> None:
    file = VoteFile(tmp_path / "votes.jsonl")
    file.append(*(vote(str(i), prompt=str(i % 100)) for i in range(10_000)))
    begun = time.process_time()
    assert len(standing(read(file.path).lines)) == 10_000
    assert time.process_time() - begun < 1
