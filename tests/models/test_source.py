from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from optimizer.errors import ModelError, StorageError
from optimizer.models import source as models
from optimizer.models.source import Source, _made, fingerprint, locate
from optimizer.store import Store
from tests.conftest import Small, largest_file


@pytest.fixture
def copy(llama: Small, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.folder, tmp_path / "copy"))


def test_a_built_in_model_is_made_once(source: Source, store: Path) -> None:
    again = locate("stories", Store(store))
    assert again == source
    assert again.folder.is_relative_to(store)
    assert not list(store.rglob(".*.mezzotint-*"))


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1000] ^= 0x40
    file.write_bytes(data)


DAMAGE: list[Callable[[Path], None]] = [
    lambda folder: flipped(folder / "model.safetensors"),
    lambda folder: (folder / "model.safetensors").write_bytes(b""),
    lambda folder: (folder / "tokenizer.json").unlink(),
    lambda folder: (folder / "config.json").unlink(),
    lambda folder: (folder / "config.json").write_text("{}"),
    lambda folder: (folder / "left.safetensors").write_text("a stranger"),
    lambda folder: folder.with_name(f"{folder.name}.sha256.json").unlink(),
    lambda folder: folder.with_name(f"{folder.name}.sha256.json").write_text("[1"),
]


def test_a_damaged_model_of_the_store_is_made_again(tmp_path: Path, store: Path) -> None:
    shutil.copytree(store / "models", tmp_path / "models")
    told: list[str] = []
    kept = Store(tmp_path, told.append)

    def made(folder: Path) -> None:
        shutil.copytree(source_folder, folder, dirs_exist_ok=True)

    source_folder = next(p for p in (store / "models").iterdir() if p.is_dir())
    folder = _made(kept, source_folder.name, made)
    expected = fingerprint(folder, kept)
    assert not told
    for number, change in enumerate(DAMAGE, 1):
        change(folder)
        assert _made(kept, source_folder.name, made) == folder
        assert len(told) == number and "is damaged" in told[-1]
        assert fingerprint(folder, kept) == expected
        assert not (folder / "left.safetensors").exists()


def test_the_hash_of_a_big_file_remembers_more_than_size_and_time(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "REMEMBERED", 0)
    monkeypatch.setattr(models, "SETTLED", 0)
    store, file = Store(tmp_path / "store"), copy / "model.safetensors"
    os.utime(file, (1, 1))
    before = fingerprint(copy, store)
    time.sleep(0.05)
    flipped(file)
    os.utime(file, (1, 1))
    assert fingerprint(copy, store) != before
    flipped(file)
    os.utime(file, (1, 1))
    assert fingerprint(copy, store) == before


def test_a_disk_that_is_full_of_half_a_model_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors has its own error for that."""
    monkeypatch.setattr("optimizer.models.stories.STEPS", 10)  # of training: its size is the same
    with largest_file(20_000), pytest.raises(StorageError, match="Free space"):
        locate("stories", Store(tmp_path))
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_folder_is_used_where_it_lies(llama: Small, tmp_path: Path) -> None:
    found = locate(str(llama.folder), Store(tmp_path))
    assert found.folder == llama.folder
    assert found.fingerprint.startswith("sha256:") and len(found.fingerprint) == 7 + 64


# ---------------------------------------------------------------- fingerprints


def test_copies_agree_wherever_they_lie(llama: Small, copy: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert fingerprint(copy, store) == fingerprint(llama.folder, store)


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_program_that_saved_the_config_does_not_count(copy: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    before = fingerprint(copy, store)
    rewrite(copy, transformers_version="0.0.1", _name_or_path="elsewhere")
    assert fingerprint(copy, store) == before
    rewrite(copy, rms_norm_eps=0.1)
    assert fingerprint(copy, store) != before


def test_whether_a_hub_could_be_asked_does_not_count(copy: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    file = copy / "tokenizer_config.json"
    found = []
    for offline, bos in ((False, "a"), (True, "a"), (True, "b")):
        text = json.dumps({"local_files_only": offline, "bos_token": bos}, indent=2)
        file.write_text(text)
        found.append(fingerprint(copy, store))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("place", [200, -1])
def test_one_changed_bit_of_the_weights_counts(copy: Path, tmp_path: Path, place: int) -> None:
    store = Store(tmp_path / "store")
    before = fingerprint(copy, store)
    file = copy / "model.safetensors"
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint(copy, store) != before


def test_the_tokenizer_counts(copy: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    before = fingerprint(copy, store)
    (copy / "tokenizer.json").write_text("{}")
    assert fingerprint(copy, store) != before


# ---------------------------------------------------------------- what is no model


def only_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_weights(folder: Path) -> None:
    (folder / "config.json").unlink()


def empty(folder: Path) -> None:
    only_config(folder)
    for file in folder.iterdir():
        file.unlink()


def already_packed(folder: Path) -> None:
    (folder / "packed.safetensors").write_bytes(b"")


def config(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_bytes(text.encode("latin-1"))

    return change


def two_ggufs(folder: Path) -> None:
    only_weights(folder)
    (folder / "a.gguf").write_bytes(b"")
    (folder / "b.gguf").write_bytes(b"")


NO_MODEL: list[tuple[Callable[[Path], None], str]] = [
    (only_config, "lacks weights"),
    (only_weights, "lacks a config"),
    (empty, "it holds nothing"),
    (already_packed, "mezzotint evaluate"),
    (two_ggufs, r"several GGUF files \(a\.gguf, b\.gguf\)"),
    (config(""), "can't be read"),
    (config('{"a":'), "can't be read"),
    (config("\xff\xfe"), "can't be read"),
    (config("[1, 2]"), "can't be read"),
    (config("null"), "can't be read"),
]


@pytest.mark.parametrize(("change", "words"), NO_MODEL)
def test_a_folder_that_is_no_model(
    copy: Path, tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    change(copy)
    with pytest.raises(ModelError, match=words):
        locate(str(copy), Store(tmp_path / "store"))


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nothing", "~/nothing", "a/b/c", "we ird"])
def test_a_path_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="There is no model at"):
        locate(name, Store(tmp_path))


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="model= is empty"):
        locate(name, Store(tmp_path))


def test_a_hub_id_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no/such-model is no local folder.*network"):
        locate("no/such-model", Store(tmp_path))


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"a folder or a \.gguf file"):
        locate(str(tmp_path / "model.bin"), Store(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all", b"\0" * 4000])
def test_a_damaged_gguf_leaves_nothing_behind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="couldn't be read as a GGUF"):
        locate(str(tmp_path / "model.gguf"), Store(tmp_path / "store"))
    left = (tmp_path / "store" / "models").iterdir()
    assert [p.name for p in left if p.suffix != ".lock"] == []


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="couldn't be written"):
        locate("stories", Store(tmp_path / "file"))
