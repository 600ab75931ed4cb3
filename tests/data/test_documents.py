from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from optimizer.data.documents import by_template, others, read_documents, text_files
from optimizer.data.text import Data, Part, cut
from optimizer.errors import ConfigError, TextError

TEXTS = ["one fox", "NA", 'two, "quoted"\nlines', "007", "U+2028: a\u2028b", "Ещё одна"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def as_csv(rows: list[dict[str, Any]], separator: str = ",") -> bytes:
    quoted = ('"' + row["text"].replace('"', '""') + '"' for row in rows)
    lines = (f"{i}{separator}{q}" for i, q in enumerate(quoted))
    return (f"id{separator}text\n" + "\n".join(lines) + "\n").encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def as_lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


FORMS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": as_lines,
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + as_lines(rows),
    "crlf.jsonl": lambda rows: as_lines(rows).replace(b"\n", b"\r\n"),
    "array.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "lines.json": as_lines,
    "a.csv": as_csv,
    "semicolons.csv": lambda rows: as_csv(rows, ";"),
    "tabs.csv": lambda rows: as_csv(rows, "\t"),
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows),
    "a.parquet": as_parquet,
}


def squeezed(data: bytes, suffix: str) -> bytes:
    if suffix.lower() == ".gz":
        return gzip.compress(data)
    codec = pyarrow.Codec("zstd")
    return bytes(codec.compress(data, asbytes=True))


@pytest.mark.parametrize("suffix", ["", ".gz", ".GZ", ".zst"])
@pytest.mark.parametrize("name", list(FORMS))
def test_every_form_of_rows_gives_the_same_texts(tmp_path: Path, name: str, suffix: str) -> None:
    data = FORMS[name](ROWS)
    file = tmp_path / (name + suffix)
    file.write_bytes(squeezed(data, suffix) if suffix else data)
    assert list(read_documents(file)) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_prose_may_be_compressed(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a.txt{suffix}"
    file.write_bytes(squeezed(b"one\n\ntwo\n\nthree", suffix))
    assert list(read_documents(file)) == ["one\n", "two\n", "three\n"]


@pytest.mark.parametrize("name", ["a.py", "README", "a.gz", "a.tar.gz", "a.xlsx", "a.json.bz2"])
def test_a_name_that_says_nothing_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prose?")
    with pytest.raises(TextError, match=r"doesn't say.*\.parquet.*Rename"):
        list(read_documents(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2.*surrogate"),
        ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "twice"),
        ("a.jsonl", b'{"text": 5}', "holds int"),
        ("a.jsonl", b'["a"]', "no object"),
        ("a.jsonl", b'{"body": "a"}', "it has: body"),
        ("a.jsonl", b'{"text": NaN}', "NaN"),
        ("a.json", b'{"text": "a"', "isn't JSON"),
        ("a.json", b"5", "no rows"),
        ("a.csv", b"", "holds no text"),
        ("a.csv", b"body\na\n", "no text field 'text'"),
        ("a.csv", b'text\none\n"two\nthree\n', "line 4: unexpected end"),
        ("a.csv", b"text,text\none,two\n", "two columns have one name"),
        ("a.csv", b"id,text\n1,one\n2,two, three\n", "line 3: 3 cells under 2 names"),
        ("a.csv", "text\n".encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PAR1 not", "can't be read as a Parquet"),
        ("a.jsonl.gz", b"not gzip", "can't be read"),
        ("a.jsonl.zst", b"not zstd", "can't be read"),
        ("a.txt", b"\xff\xfea\x00", "UTF-16"),
        ("a.txt", "день".encode("cp1251"), "at byte 0"),
        ("a.jsonl", b'{"messages": [5]}', "a chat is a list of turns"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": 5}]}', "a chat is a list"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "line 1: .*a part of the type 'image'",
        ),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError, match=said):
        list(read_documents(tmp_path / name))


def test_something_small_may_not_unpack_to_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizer.data.documents.MOST_BYTES", 1000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 10_000))
    with pytest.raises(TextError, match="unpacks to more"):
        list(read_documents(tmp_path / "a.txt.gz"))


# ---------------------------------------------------------------- what is left out is told


class Letters:
    bos_token_id = None
    chat_template: str | None = "yes"

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        return {"input_ids": [ord(c) for c in text]}

    def apply_chat_template(self, turns: list[dict[str, Any]], tokenize: bool) -> str:
        assert not tokenize
        if turns[0]["role"] == "system":
            raise ValueError("no system turn")
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)


def few(path: Path, **settings: Any) -> Data:
    parts = {name: Part(sequences=1, length=2) for name in ("calibration", "search", "heldout")}
    return Data(source="text", path=str(path), **parts, **settings)


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}"} for i in range(9)] + [{"text": None}, {"text": "  "}]
    (tmp_path / "a.jsonl").write_bytes(as_lines(rows))
    said: list[str] = []
    cut(few(tmp_path / "a.jsonl"), Letters(), said.append)
    assert len(said) == 1
    assert said[0].startswith("2 of 11 rows")


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n\nfour")
    (tmp_path / "b.pdf").write_text("%PDF")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/c.txt").write_text("hidden")
    (tmp_path / "d.txt").mkdir()
    said: list[str] = []
    cut(few(tmp_path), Letters(), said.append)
    assert text_files(tmp_path) == [tmp_path / "a.txt"]
    assert others(tmp_path) == ["b.pdf"]
    assert "b.pdf" in said[0]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_can_not_be_read_in_a_folder_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("one")
    if kind == "link":
        (tmp_path / "b.txt").symlink_to("/nowhere")
    else:
        os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(TextError, match=r"b\.txt is (a link to nothing|no file)"):
        few(tmp_path).check(None)


def test_a_pipe_can_not_be_the_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(TextError, match="neither a file nor a folder"):
        few(tmp_path / "p.txt").check(None)


# ---------------------------------------------------------------- chats

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize("form", ["a.jsonl", "array.json", "a.parquet"])
@pytest.mark.parametrize("column", ["text", "messages"])
def test_chats_are_read_with_or_without_the_template(
    tmp_path: Path, form: str, column: str
) -> None:
    (tmp_path / form).write_bytes(FORMS[form]([{"id": 1, "messages": CHAT}]))
    spoken = by_template(Letters())
    assert list(read_documents(tmp_path / form, column, spoken)) == ["<user>Hi<assistant>Ho"]
    assert list(read_documents(tmp_path / form, column)) == ["Hi\n\nHo"]


def test_a_book_is_one_cell_of_a_table(tmp_path: Path) -> None:
    book = "word\n" * 300_000
    (tmp_path / "a.csv").write_bytes(as_csv([{"text": book}, {"text": "short"}]))
    assert list(read_documents(tmp_path / "a.csv")) == [book, "short"]


@pytest.mark.parametrize("form", ["a.jsonl", "a.parquet"])
def test_turns_in_parts_and_calls_of_tools(tmp_path: Path, form: str) -> None:
    """A table gives every turn every field; a template asks which are there."""

    class Fields(Letters):
        def apply_chat_template(self, turns: list[dict[str, Any]], tokenize: bool) -> str:
            return "".join(f"<{','.join(sorted(turn))}>{turn['content']}" for turn in turns)

    said = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]
    call = {"role": "assistant", "content": [], "tool_calls": [{"name": "add"}]}
    chat = [{"role": "user", "content": said}, call]
    (tmp_path / form).write_bytes(FORMS[form]([{"messages": chat}]))
    found = list(read_documents(tmp_path / form, spoken=by_template(Fields())))
    assert found == ["<content,role>Hi\nyou<content,role,tool_calls>"]
    assert list(read_documents(tmp_path / form)) == ["Hi\nyou"]


def test_the_switch_reaches_the_tokens(tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": f"chat {i}"}]} for i in range(9)]
    (tmp_path / "a.jsonl").write_bytes(as_lines(chats))
    path = tmp_path / "a.jsonl"
    with_it = cut(few(path), Letters())["calibration"].ids.ravel().tolist()
    without = cut(few(path, template=False), Letters())["calibration"].ids.ravel().tolist()
    assert (with_it, without) == ([ord("<"), ord("u")], [ord("c"), ord("h")])


def test_a_template_that_refuses_or_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        as_lines([{"messages": [{"role": "system", "content": "x"}]}])
    )
    with pytest.raises(TextError, match=r"line 1.*no system turn.*data\.template=false"):
        list(read_documents(tmp_path / "a.jsonl", spoken=by_template(Letters())))
    plain = Letters()
    plain.chat_template = None
    with pytest.raises(TextError, match="no template for chats"):
        list(read_documents(tmp_path / "a.jsonl", spoken=by_template(plain)))


def test_the_template_is_no_part_of_an_older_key(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    data, plain = few(tmp_path / "a.txt"), few(tmp_path / "a.txt", template=False)
    assert "template" not in data.key("f")[2]
    assert data.key("f") != plain.key("f")


def test_a_template_s_own_first_token_is_not_doubled(tmp_path: Path) -> None:
    class Beginning(Letters):
        bos_token_id = 1  # type: ignore[assignment]

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            ids = [1 if c == "^" else ord(c) for c in text]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    (tmp_path / "a.jsonl").write_bytes(as_lines([{"text": f"^{i}{i}{i}"} for i in range(9)]))
    ids = cut(few(tmp_path / "a.jsonl"), Beginning())["search"].ids
    assert (ids[:, 0] == 1).all()
    assert (ids[:, 1:] != 1).all()


def test_data_without_a_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.path"):
        Data(source="text").check(None)
