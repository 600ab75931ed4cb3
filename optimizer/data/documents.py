"""Files of text -> documents: prose, rows of JSON Lines, JSON, CSV or Parquet, chats.

A file's name says what it is; one that says nothing is refused, because brackets and commas read as
prose would calibrate a model on brackets and commas. The only module that imports datasets.
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimizer import untrusted
from optimizer.errors import ModelError, TextError

PROSE = (".txt", ".md")
ROWS = (".jsonl", ".json", ".csv", ".parquet")
SQUEEZED = {".gz": "gzip", ".zst": "zstd"}
KINDS = f"{', '.join(PROSE + ROWS)}, each also with {' or '.join(SQUEEZED)} behind it"
MOST_BYTES = 8 * 2**30  # of one file, unpacked: a few kB can unpack to any size
LONGEST_CELL = 2**31 - 1  # of a CSV file; Python's own limit is 128 KiB
SEPARATORS = ",;\t|"
CHAT = "messages"  # the column of chats, where data.column isn't there

Spoken = Callable[[list[dict[str, Any]]], str]


@dataclass
class Documents:
    """The documents of a file or a folder, to be read once. Afterwards `rows` counts the rows that
    were seen and `empty` those without text (null, or blank). spoken: makes one text of a chat."""

    path: Path
    column: str = "text"
    spoken: Spoken | None = None
    rows: int = 0
    empty: int = 0

    def __iter__(self) -> Iterator[str]:
        """Raises TextError."""
        found = False
        for file in text_files(self.path):
            for text in self.of(file):
                found = found or bool(text.strip())
                yield text
        if not found:
            raise TextError(f"{self.path} holds no text. Give a file that does: {KINDS}.")

    def of(self, file: Path) -> Iterator[str]:
        """The documents of one of the files."""
        if kind_of(file) in PROSE:
            yield from split_documents(read_text(file))
        else:
            yield from self.texts(rows(file, (self.column, CHAT)))

    def texts(self, found: Iterable[tuple[str, Any]]) -> Iterator[str]:
        """The texts of (where, row) pairs."""
        for where, row in found:
            self.rows += 1
            text = self._text(row, where)
            if text is None or not text.strip():
                self.empty += 1
            else:
                yield text

    def _text(self, row: Any, where: str) -> str | None:
        if not isinstance(row, dict):
            raise TextError(f'{where} is no object with named fields. A row is {{"text": ...}}.')
        column = CHAT if self.column not in row and CHAT in row else self.column
        if column not in row:
            raise TextError(
                f"{where} has no text field {column!r} (it has: {_listed(row)}). Name the right one "
                "with data.column."
            )
        value = row[column]
        if isinstance(value, list):
            return self._chat(value, where)
        if value is not None and not isinstance(value, str):
            raise TextError(
                f"{where}: text is wanted, and {column!r} holds {type(value).__name__}. Name the "
                "right one with data.column."
            )
        if value is not None and untrusted.NO_CHARACTER.search(value):
            raise TextError(
                f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
                "character. Write the character itself, or leave the row out."
            )
        return value

    def _chat(self, turns: list[Any], where: str) -> str | None:
        if not turns:
            return None
        for turn in turns:
            whole = isinstance(turn, dict) and isinstance(turn.get("role"), str)
            if not whole or not isinstance(turn.get("content"), str | list | None):
                raise TextError(
                    f"{where}: a chat is a list of turns, each with the texts role and content. "
                    "Bring it into that form, or name a column of text with data.column."
                )
        speak = plainly if self.spoken is None else self.spoken
        try:
            return speak([_turn(turn) for turn in turns])
        except TextError as error:
            raise TextError(f"{where}: {error}") from None

    @property
    def told(self) -> str | None:
        """What was left out, in a sentence; None if nothing was."""
        if not self.empty:
            return None
        return f"{self.empty} of {self.rows} rows in {self.path} hold no text and were left out"


def read_documents(path: Path, column: str = "text", spoken: Spoken | None = None) -> Documents:
    """What is to be read, as `Documents`; nothing is read yet."""
    return Documents(path, column, spoken)


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose content is one text, also if it was given in parts, without the fields that a
    table has to have for every turn (templates ask whether a field is there). Raises TextError for
    parts that are no text."""
    content = turn.get("content")
    if isinstance(content, list):
        content = "\n".join(map(_part, content))
    return {k: v for k, v in turn.items() if v is not None} | {"content": content}


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = str(part.get("type"))[:40] if isinstance(part, dict) else type(part).__name__
        raise TextError(
            f"the content of a turn has a part of the type {kind!r}, and only texts are read. Leave "
            "such chats out."
        )
    return text


def plainly(turns: list[dict[str, Any]]) -> str:
    """What was said in a chat, without who said it."""
    return "\n\n".join(turn["content"] for turn in turns if turn.get("content"))


def by_template(tokenizer: Any) -> Spoken:
    """Chats as the tokenizer's own template writes them: what a chat model reads."""

    def speak(turns: list[dict[str, Any]]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise TextError(
                "it is a chat, and the model's tokenizer has no template for chats. Take "
                "data.template=false, which reads what was said as plain text."
            )
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False))
        except ModelError as error:  # it doesn't end
            raise TextError(str(error)) from None
        except Exception as error:  # noqa: BLE001  (a template is a program of its author's)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason"
            raise TextError(
                f"the tokenizer's template refuses this chat ({reason}). Correct it, or take "
                "data.template=false."
            ) from None

    return speak


# ---------------------------------------------------------------- files


def kind_of(file: Path) -> str | None:
    """`.txt`, `.csv` ...: what a file holds, compressed or not; None where its name doesn't say."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in SQUEEZED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in PROSE + ROWS else None


def text_files(path: Path) -> list[Path]:
    """The file itself, or the texts in a folder, hidden ones not counted. Raises TextError."""
    if path.is_file():
        if kind_of(path) is None:
            raise TextError(
                f"{path.name} doesn't say what kind of text it holds; known are {KINDS}. Rename it: "
                "plain text ends in .txt."
            )
        return [path]
    if not path.is_dir():
        raise TextError(f"{path} is neither a file nor a folder, so it can't be read twice.")
    try:
        known = sorted(p for p in path.rglob("*") if kind_of(p) and not _hidden(p, path))
    except OSError as error:
        raise TextError(f"{path} can't be read ({error.strerror}).") from None
    files = [p for p in known if not p.is_dir()]
    odd = next((p for p in files if not p.is_file()), None)
    if odd is not None:
        what = "a link to nothing" if odd.is_symlink() else "no file that can be read twice"
        raise TextError(f"{odd} is {what}. Mend or remove it, or name the files' own folder.")
    if not files:
        raise TextError(f"The folder {path} holds no text: {KINDS}.")
    return files


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def others(path: Path) -> list[str]:
    """Names of the files in a folder that aren't read, because they don't say that they are text."""
    if not path.is_dir():
        return []
    left = (p for p in path.rglob("*") if p.is_file() and not kind_of(p) and not _hidden(p, path))
    return sorted(str(p.relative_to(path)) for p in left)


def read_text(file: Path) -> str:
    """The whole of a UTF-8 file, unpacked if need be, without a byte order mark. Raises TextError."""
    data = _bytes(file)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise TextError(f"Text must be UTF-8; {file} is UTF-16. {_remedy(file, 'UTF-16')}")
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise TextError(
            f"Text must be UTF-8; {file} isn't, at byte {error.start}. {_remedy(file, 'CP1251')}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _remedy(file: Path, coding: str) -> str:
    return f"Convert it, for example with: iconv -f {coding} -t UTF-8 {file}"


def _bytes(file: Path) -> bytes:
    """Raises TextError for what can't be read, or unpacks to more than memory should hold."""
    try:
        if file.suffix.lower() not in SQUEEZED:
            return file.read_bytes()
        import pyarrow

        packing = SQUEEZED[file.suffix.lower()]
        with pyarrow.input_stream(str(file), compression=packing) as stream:
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error).strip().splitlines()[0]
        raise TextError(f"{file} can't be read ({reason}).") from None
    if len(data) > MOST_BYTES:
        raise TextError(f"{file} unpacks to more than {MOST_BYTES >> 30} GiB. Give less of it.")
    return bytes(data)


# ---------------------------------------------------------------- rows


def rows(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(where, row) of a file of rows. columns: those of a table that are wanted, if it has them.
    Raises TextError."""
    kind = kind_of(file)
    if kind == ".jsonl":
        return _json_lines(file, read_text(file))
    if kind == ".json":
        return _json(file)
    return _csv(file, columns) if kind == ".csv" else _parquet(file, columns)


def _json_lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """A line ends at \\n only: U+2028 and its like may stand inside a JSON string."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                yield where, untrusted.parse(line)
            except ValueError as error:
                raise TextError(f"{where} isn't JSON ({error}). Correct it.") from None


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    """An array of rows; many files of JSON Lines are called .json, too."""
    text = read_text(file)
    first = text.lstrip()[:1]
    if first == "{" and len([line for line in text.split("\n") if line.strip()]) > 1:
        try:
            untrusted.parse(text.strip().split("\n")[0])
        except ValueError:
            pass
        else:
            yield from _json_lines(file, text)
            return
    try:
        found = untrusted.parse(text)
    except ValueError as error:
        raise TextError(f"{file} isn't JSON ({error}). Correct it.") from None
    if isinstance(found, dict):
        found = [found]
    if not isinstance(found, list):
        raise TextError(f"{file} holds no rows but {type(found).__name__}. Give an array of rows.")
    for number, row in enumerate(found, 1):
        yield f"{file}, row {number}", {"text": row} if isinstance(row, str) else row


def _csv(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file with a line of names, every cell as text: `NA`, `null` and `007` are
    words. Cells are separated by what the wanted column stands between in that line, else by commas.
    Raises TextError for what can be read in two ways: a quote without an end, a row of more or fewer
    cells, two columns of one name."""
    text = read_text(file)
    csv.field_size_limit(LONGEST_CELL)
    first = text.partition("\n")[0]
    wanted = (
        s for s in SEPARATORS if set(columns) & set(next(csv.reader([first], delimiter=s), []))
    )
    lines = csv.reader(io.StringIO(text, ""), delimiter=next(wanted, ","), strict=True)
    try:
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise csv.Error(f"two columns have one name, among {_listed(dict.fromkeys(names))}")
        for number, cells in enumerate((cells for cells in lines if cells), 1):
            if len(cells) != len(names):
                raise csv.Error(f"{len(cells)} cells under {len(names)} names")
            yield f"{file}, row {number}", dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise TextError(
            f"{file} can't be read as a CSV file with a line of names (line {lines.line_num}: "
            f"{error}). Correct it."
        ) from None


def _parquet(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Through Arrow, which datasets reads it by."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    source = pyarrow.BufferReader(_bytes(file)) if file.suffix.lower() in SQUEEZED else file
    number = 0
    try:
        with ParquetFile(source) as table:
            wanted = [name for name in columns if name in table.schema_arrow.names]
            for batch in table.iter_batches(columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason"
        raise TextError(
            f"{file} can't be read as a Parquet file ({reason}). Correct it."
        ) from None


def _listed(row: dict[str, Any]) -> str:
    names = [str(name)[:40] for name in row]
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"


# ---------------------------------------------------------------- prose


TITLE = re.compile(r"^ = [^=\n].* = *$", re.MULTILINE)  # an article's title in WikiText
RULE = re.compile(r"\f|^[ \t]*(?:-{3,}|\*{3,}|={3,})[ \t]*$", re.MULTILINE)
STRETCH = 2000  # characters


def split_documents(text: str) -> list[str]:
    """A plain text -> its documents.

    Cut at the first of these that it has: WikiText article titles; form feeds or lines of ---,
    *** or ===; blank lines; else stretches of 2,000 characters.
    """
    starts = [match.start() for match in TITLE.finditer(text)]
    if len(starts) > 1:
        return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]
    for rule in (RULE, re.compile(r"\n[ \t]*\n")):
        pieces = [piece for piece in rule.split(text) if piece.strip()]
        if len(pieces) > 2:
            return [piece + "\n" for piece in pieces]
    return [text[i : i + STRETCH] for i in range(0, len(text), STRETCH)]


# ---------------------------------------------------------------- data sets of a hub


def hub_rows(path: str, name: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a data set for `datasets`. Raises TextError."""
    from datasets import load_dataset

    try:
        for row in load_dataset(path, name, split=split, streaming=True):
            yield path, row
    except TextError:
        raise
    except Exception as error:  # noqa: BLE001  (datasets raises whatever its readers raise)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(
            f"The data set {path} couldn't be read ({reason}). Check data.path, data.name, "
            "data.split and the network."
        ) from None
