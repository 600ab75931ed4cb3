from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.data import domains
from optimizer.data.documents import read_documents
from optimizer.data.domains import BUILT_IN, HERE, Domain, bundled, cut, parse
from optimizer.data.text import Data, Part
from optimizer.errors import ConfigError, MezzotintError, TextError


class Letters:
    """One token a character; `unknown` characters are the unknown token."""

    def __init__(self, bos: int | None = None, known: str | None = None) -> None:
        self.bos_token_id, self.known, self.unk_token_id = bos, known, 0

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id else []
        known = [ord(c) if self.known is None or c in self.known else 0 for c in text]
        return {"input_ids": start + known}


def file(folder: Path, *documents: str) -> Path:
    path = folder / "own.txt"
    path.write_text("\n---\n".join(documents), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_texts_are_documents_of_use(name: str) -> None:
    texts = list(read_documents(HERE / f"{name}.txt", "text"))
    assert len(texts) == len(set(texts)) >= 9
    assert 5000 < sum(map(len, texts)) < 65_000
    assert min(map(len, texts)) > 250
    found = cut(Domain(name), Letters(), 256, Data())
    assert found.windows is not None and not found.skipped
    assert len(np.unique(found.windows.documents)) >= 8


def test_python_in_the_code_is_python() -> None:
    texts = [text.strip() for text in read_documents(HERE / "code.txt", "text")]
    python = [t for t in texts if t.startswith(("def ", "import numpy", "@", "class Given"))]
    assert len(python) > 8
    for text in python:
        compile(text, "code.txt", "exec")


def test_entries() -> None:
    own = str(HERE / "code.txt")
    found = parse(["prose", f"mine = {own} * 2.5", f"other={own}", "long*3"])
    assert [(d.name, d.path, d.weight) for d in found] == [
        ("prose", None, 1.0), ("mine", Path(own), 2.5), ("other", Path(own), 1.0),
        ("long", None, 3.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["poetry"], "one of prose, dialogue"),
        (["mine = nowhere.txt"], "no text at nowhere.txt"),
        (["prose", "prose"], "Two texts"),
        ([f"held-out = {HERE}"], "Two texts"),
        (["prose * 0"], "number above 0"),
        ([f"mine = {HERE} * -1"], "number above 0"),
        (["prose * 1.2.3"], "number above 0"),
        ([""], "is neither"),
    ],
)
def test_entries_that_will_not_do(entries: list[str], words: str) -> None:
    with pytest.raises(MezzotintError, match=words) as caught:
        parse(entries)
    assert isinstance(caught.value, ConfigError | TextError)


def test_windows_stay_inside_documents(tmp_path: Path) -> None:
    """Every document is written in letters of its own."""
    texts = [chr(1000 + i) * n for i, n in enumerate((50, 60, 130, 200))]
    found = cut(Domain("own", file(tmp_path, *texts)), Letters(bos=7), 100, Data()).windows
    assert found is not None
    assert (found.ids[:, 0] == 7).all()
    for row, owner in zip(found.ids, found.documents, strict=True):
        assert set(row[1:].tolist()) - {10} == {1000 + owner}
    assert found.ids.shape[1] <= 100
    assert set(found.documents.tolist()) == {0, 1, 2, 3} or found.ids.shape[1] > 51


def test_a_long_text_is_cut_to_the_context_and_drawn_from_all_documents(tmp_path: Path) -> None:
    texts = [chr(1000 + i) * 5000 for i in range(3)]
    found = cut(Domain("own", file(tmp_path, *texts)), Letters(), 40, Data()).windows
    assert found is not None
    assert found.ids.shape == (domains.MOST, 40)
    assert np.bincount(found.documents).min() >= domains.MOST // 3


def test_every_skip_is_counted(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.txt"
    tuned.write_text("\n---\n".join(["a" * 60, "ab" * 40, "x" * 70]))
    path = file(tmp_path, "a" * 60, "b" * 60, "ab" * 30, "b" * 9, "щ" * 60)
    data = Data(source="text", path=str(tuned))
    found = cut(Domain("own", path), Letters(known="ab\n"), 100, data)
    assert found.skipped == {"also in data.path": 1, "not representable": 1, "too short": 1}
    assert found.windows is not None and len(found.windows.ids) == 2


def test_too_little_of_ones_own_is_an_error_and_a_built_in_set_is_left_out(tmp_path: Path) -> None:
    path = file(tmp_path, "a" * 60, "b" * 9, "c" * 9)
    with pytest.raises(TextError, match=r"has 1 \(skipped: 2 too short\)"):
        cut(Domain("own", path), Letters(), 100, Data())
    found = cut(Domain("russian"), Letters(known="abc"), 100, Data())
    assert found.windows is None and found.skipped == {"not representable": 18}


def test_the_bundled_texts_are_200_kb() -> None:
    assert sum((HERE / f"{name}.txt").stat().st_size for name in BUILT_IN) > 200_000


def _asked(count: int, length: int = 64) -> Data:
    part = Part(sequences=count, length=length)
    return Data(calibration=part, search=part, heldout=part)


def test_no_bundled_document_is_in_two_parts() -> None:
    """Sixty letters in a row are enough to know a document by."""
    found = bundled(_asked(60), Letters())
    texts = {
        text.strip(): i
        for name in BUILT_IN
        for i, text in enumerate(read_documents(HERE / f"{name}.txt", "text"))
    }
    parity = {}
    for name, windows in found.items():
        for row in windows.ids:
            piece = "".join(map(chr, row.tolist()))
            owner = next(number for text, number in texts.items() if piece in text)
            parity.setdefault(name, set()).add(owner % 2)
    assert parity == {"calibration": {0}, "search": {0}, "heldout": {1}}
    pieces = [{tuple(row) for row in windows.ids.tolist()} for windows in found.values()]
    assert not pieces[0] & pieces[1]


def test_bundled_windows_are_a_mixture_from_the_first_on() -> None:
    found = bundled(_asked(24), Letters())["heldout"]
    counts = {name: found.domains.count(name) for name in BUILT_IN}
    assert counts["prose"] >= 4 and counts["code"] >= 3 and min(counts.values()) >= 1
    assert len(set(found.head(12).domains)) == len(BUILT_IN)
    assert len(found.documents) == len(found.domains) == 24
    again, other = bundled(_asked(24), Letters()), bundled(replace(_asked(24), seed=3), Letters())
    assert (again["heldout"].ids == found.ids).all()
    assert (other["heldout"].ids != found.ids).any()


def test_kinds_that_a_model_cannot_read_leave_their_share_to_others() -> None:
    ascii_ = "".join(map(chr, range(1, 128)))
    found = bundled(_asked(24), Letters(known=ascii_))["calibration"]
    assert not {"russian", "chinese"} & set(found.domains) and len(found.ids) == 24


def test_too_much_asked_of_the_bundled_texts() -> None:
    with pytest.raises(
        TextError, match=r"bundled texts that this model can read give .* data=self"
    ):
        bundled(_asked(9, 20_000), Letters())


def test_a_domain_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes("Утро".encode("cp1251") * 50)
    with pytest.raises(TextError, match="must be UTF-8"):
        cut(Domain("own", path), Letters(), 100, Data())


def test_the_key_is_of_the_text_and_not_of_its_name(tmp_path: Path) -> None:
    path = file(tmp_path, "a" * 60, "b" * 60)
    one = Domain("one", path).key()
    assert one == Domain("two", path).key() != Domain("prose").key()
    path.write_text("other")
    assert Domain("one", path).key() != one
