from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from optimizer.data.documents import split_documents
from optimizer.data.text import Data, Part, Tokens, cut, sample
from optimizer.errors import ConfigError, TextError


class Letters:
    """A tokenizer of one token a character; puts `bos` before a text if it has one."""

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        prefix = (
            [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        )
        return {"input_ids": prefix + [ord(c) for c in text]}


def few(**settings: Any) -> Data:
    parts = {name: Part(sequences=3, length=4) for name in ("calibration", "search", "heldout")}
    return Data(**{"source": "text", **parts, **settings})


def tokens_of(tokens: Tokens) -> dict[str, set[int]]:
    return {name: set(windows.ids.ravel().tolist()) for name, windows in tokens.items()}


# ---------------------------------------------------------------- disjoint parts


@given(
    st.lists(st.integers(1, 30), min_size=3, max_size=60),
    st.integers(0, 5),
    st.booleans(),
    st.tuples(*[st.tuples(st.integers(1, 5), st.integers(3, 9))] * 3),
)
def test_no_document_is_in_two_parts(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seed: int,
    bos: bool,
    needs: tuple[tuple[int, int], ...],
) -> None:
    """Every document is written in letters of its own, so a window tells where it comes from."""
    path = tmp_path_factory.mktemp("text") / "t.jsonl"
    letters = [chr(1000 + i) for i in range(len(lengths))]
    path.write_text(
        "\n".join(json.dumps({"text": c * n}) for c, n in zip(letters, lengths, strict=True))
    )
    parts = dict(zip(("calibration", "search", "heldout"), needs, strict=True))
    data = Data(
        source="text",
        path=str(path),
        seed=seed,
        **{k: Part(sequences=s, length=n) for k, (s, n) in parts.items()},
    )
    try:
        tokens = cut(data, Letters(1 if bos else None))
    except TextError:
        assume(False)
    found = tokens_of(tokens)
    for name, (sequences, length) in parts.items():
        ids = tokens[name].ids
        assert ids.shape == (sequences, length) and ids.dtype == np.int64
        assert tokens[name].documents.shape == (sequences,)
        assert (ids[:, 0] == 1).all() == bos
        found[name].discard(1)
    assert not found["calibration"] & found["search"]
    assert not found["calibration"] & found["heldout"]
    assert not found["search"] & found["heldout"]
    together = np.concatenate([windows.ids[:, bos:].ravel() for windows in tokens.values()])
    for letter, length in zip(letters, lengths, strict=True):
        assert (together == ord(letter)).sum() <= length, "a token was used twice"


def test_windows_of_one_document_share_its_number(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": chr(1000 + i) * 9}) for i in range(6)))
    tokens = cut(few(path=str(path)), Letters())
    for windows in tokens.values():
        first = windows.ids[:, 0].tolist()
        assert len(set(zip(first, windows.documents.tolist(), strict=True))) == len(set(first))
        assert len(set(windows.documents.tolist())) == len(set(first)) == 2


def test_a_repeated_document_cannot_leak(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [json.dumps({"text": chr(1000 + i) * 12}) for i in range(3)]
    path.write_text("\n".join(rows * 5))
    found = tokens_of(cut(few(path=str(path)), Letters()))
    assert sum(len(part) for part in found.values()) == 3


def test_the_seed_decides_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(chr(1000 + i) * 12 for i in range(30)))

    def once(seed: int) -> Tokens:
        return cut(few(path=str(path), seed=seed), Letters())

    same, again, other = once(1), once(1), once(2)
    assert all(np.array_equal(same[k].ids, again[k].ids) for k in same)
    assert any(not np.array_equal(same[k].ids, other[k].ids) for k in same)


def test_a_tokenizer_without_bos_gets_no_prefix(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\n\n".join(chr(1000 + i) * 12 for i in range(9)))
    assert (cut(few(path=str(path)), Letters())["search"].ids >= 1000).all()


# ---------------------------------------------------------------- documents of a plain text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a\n\nb\n\n\nc\n", 3),
        ("a\n---\nb\n***\n c\n\n d\n=====\ne", 4),
        ("a\fb\fc", 3),
        (" = One = \n\n text\n = = Section = = \n more\n = Two = \n text", 2),
        ("x" * 4001, 3),
    ],
)
def test_a_text_is_split_at_its_own_marks(text: str, count: int) -> None:
    pieces = [piece for piece in split_documents(text) if piece.strip()]
    assert len(pieces) == count


@given(st.text(alphabet="ab \n\f-=*", max_size=60))
def test_splitting_loses_no_letter(text: str) -> None:
    def letters(pieces: Iterable[str]) -> Counter[str]:
        return Counter(c for piece in pieces for c in piece if c in "ab")

    assert letters(split_documents(text)) == letters([text])


# ---------------------------------------------------------------- sources


def lines(count: int) -> list[str]:
    return [f"{chr(97 + i % 26) * 5} document {i} " * 3 for i in range(count)]


def test_a_folder_gives_all_its_texts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("\n\n".join(chr(1000 + i) * 12 for i in range(4)))
    rows = (json.dumps({"text": chr(2000 + i) * 12}) for i in range(4))
    (tmp_path / "sub" / "b.jsonl").write_text("\n".join(rows) + "\n\n")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    found = set().union(*tokens_of(cut(few(path=str(tmp_path)), Letters())).values())
    assert {t // 1000 for t in found} == {1, 2}


def test_another_column(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"body": text, "n": 1}) for text in lines(9)))
    assert cut(few(path=str(path), column="body"), Letters())["heldout"].tokens == 12


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that datasets.load_dataset understands; its cache stays in the test's folder."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": text, "id": i} for i, text in enumerate(lines(40))]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_local_folder_through_datasets(dataset: Path) -> None:
    tokens = cut(few(source="hub", path=str(dataset)), Letters())
    text = "".join(chr(t) for t in tokens["heldout"].ids[0])
    assert any(text in line for line in lines(40))


def test_datasets_columns_and_splits_are_checked(dataset: Path) -> None:
    with pytest.raises(TextError, match=r"no text field 'body' \(it has: text, id\)"):
        cut(few(source="hub", path=str(dataset), column="body"), Letters())
    with pytest.raises(TextError, match=r"'id' holds int"):
        cut(few(source="hub", path=str(dataset), column="id"), Letters())
    with pytest.raises(TextError, match=r"data\.split"):
        cut(few(source="hub", path=str(dataset), split="test"), Letters())


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"couldn't be read.*Check data\.path"):
        cut(few(source="hub", path=str(tmp_path / "nothing")), Letters())


def test_a_text_counts_by_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("some text")
    two.write_text("some text")
    assert few(path=str(one)).key("f") == few(path=str(two)).key("f")
    assert few(path=str(one)).key("f") != few(path=str(one)).key("g")
    before = few(path=str(one)).key("f")
    one.write_text("some more text")
    assert few(path=str(one)).key("f") != before


# ---------------------------------------------------------------- errors


def text_file(content: bytes, name: str = "t.txt") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def nothing_inside(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


BAD_TEXT: list[tuple[Callable[[Path], Path], str]] = [
    (text_file(b""), "holds no text"),
    (text_file(b" \n\n\t \n"), "holds no text"),
    (text_file(b"short"), r"needs 3 windows of 4 tokens.*\(5 tokens in 1 documents\) gives"),
    (text_file("Привет".encode("cp1251")), "UTF-8.*byte 0.*iconv"),
    (text_file(b'{"text": "a"}\n{"text"', "t.jsonl"), "line 2 isn't JSON"),
    (text_file(b'{"body": "a"}\n', "t.jsonl"), r"no text field 'text' .*body.*data\.column"),
    (text_file(b'{"text": 3}\n', "t.jsonl"), "line 1: text is wanted.*int"),
    (text_file(b"[1]\n", "t.jsonl"), "line 1 is no object"),
    (text_file(b"", "t.jsonl"), "holds no text"),
    (nothing_inside, r"holds no text: \.txt, \.md, \.jsonl"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), BAD_TEXT)
def test_a_text_that_will_not_do(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    with pytest.raises(TextError, match=words):
        cut(few(path=str(make(tmp_path))), Letters())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Data(source="web"), r"data\.source is bundled, self, text or hub"),
        (Data(source="text"), r"needs data\.path"),
        (Data(source="hub"), r"needs data\.path"),
        (Data(search=Part(sequences=0, length=9)), r"data\.search needs at least one"),
        (Data(heldout=Part(sequences=1, length=1)), r"data\.heldout needs at least one"),
        (Data(calibration=Part(sequences=1, length=513)), "context of 512 tokens"),
    ],
)
def test_wrong_settings_are_found_before_any_work(data: Data, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        data.check(512)


def test_a_missing_text_is_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="There is no text at"):
        few(path=str(tmp_path / "no.txt")).check(None)


# ---------------------------------------------------------------- text sampled from the model


class Held:
    """A model with five tokens, whose start and end tokens are as given."""

    def __init__(self, bos: Any, eos: Any, **generation: Any) -> None:
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, bos_token_id=bos, eos_token_id=eos, pad_token_id=None,
            max_position_embeddings=64,
        )  # fmt: skip
        self.net = LlamaForCausalLM(config).eval()
        torch.nn.init.normal_(self.net.lm_head.weight, std=0.6)
        self.net.generation_config.update(**generation)


def plain(items: Iterable[Any], _text: str) -> Iterable[Any]:
    return items


def make_now(_name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return make()


def drawn(held: Held, **settings: Any) -> Tokens:
    return sample(Data(**settings), held, make_now, plain)


PARTS = {name: Part(sequences=8, length=12) for name in ("calibration", "search", "heldout")}


@pytest.mark.parametrize(
    ("bos", "eos", "starts"),
    [(1, 2, {1}), (None, 2, {2}), (None, [3, 2], {3}), (None, None, None), (99, 2, {2})],
)
def test_every_model_can_start(bos: Any, eos: Any, starts: set[int] | None) -> None:
    """BOS, else the end token, else any token: 24 starts hit at least three of five."""
    tokens = drawn(Held(bos, eos), **PARTS)
    first = {int(t) for windows in tokens.values() for t in windows.ids[:, 0]}
    assert first == starts if starts else len(first) >= 3
    for windows in tokens.values():
        assert windows.ids.shape == (8, 12)
        assert windows.documents.tolist() == list(range(8))
        if eos is not None:
            ends = eos if isinstance(eos, list) else [eos]
            assert not np.isin(windows.ids[:, 1:], ends).any(), "a window ended early"


def test_sampled_text_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = drawn(Held(1, 2), **PARTS, seed=5)
    torch.manual_seed(2)
    same, other = drawn(Held(1, 2), **PARTS, seed=5), drawn(Held(1, 2), **PARTS, seed=6)
    assert all(np.array_equal(one[k].ids, same[k].ids) for k in one)
    assert all(not np.array_equal(one[k].ids, other[k].ids) for k in one)
    assert not np.array_equal(one["search"].ids, one["heldout"].ids)


def test_sampling_leaves_the_global_generator_alone() -> None:
    held = Held(1, 2)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    drawn(held, **PARTS)
    assert torch.equal(torch.rand(3), expected)


def test_sampling_is_from_the_models_own_distribution() -> None:
    """A checkpoint's generation settings (cold, truncated, repetition punished) must not count."""
    habits = {"temperature": 0.2, "top_k": 1, "top_p": 0.3, "repetition_penalty": 5.0}
    held = Held(1, None, do_sample=True, **habits)
    one = Part(sequences=1, length=2)
    many = Part(sequences=3000, length=2)
    ids = drawn(held, calibration=many, search=one, heldout=one)["calibration"].ids
    with torch.inference_mode():
        expected = held.net(torch.tensor([[1]])).logits[0, 0].softmax(-1).numpy()
    found = np.bincount(ids[:, 1], minlength=5) / len(ids)
    assert np.ptp(expected) > 0.1
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / len(ids))


def test_batches_are_kept_under_distinct_names() -> None:
    seen: dict[str, tuple[int, ...]] = {}

    def keep(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        assert name not in seen
        batch = make()
        seen[name] = batch["ids"].shape
        return batch

    parts = PARTS | {"calibration": Part(sequences=70, length=4)}
    sample(Data(**parts), Held(1, 2), keep, plain)
    assert seen == {
        "calibration 0 64 4 0": (64, 4), "calibration 64 6 4 0": (6, 4),
        "search 0 8 12 0": (8, 12), "heldout 0 8 12 0": (8, 12),
    }  # fmt: skip
