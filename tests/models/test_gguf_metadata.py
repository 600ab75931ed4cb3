"""GGUF files as they are opened for their tensors, without a vocabulary's elements."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from optimizer.errors import ModelError
from optimizer.formats.gguf import retyping
from optimizer.formats.gguf.placement import Piece, Placement
from optimizer.models import from_gguf, gguf_metadata

WORDS = 20_000
HEADS = [4, 2, 4]


def written(file: Path) -> Path:
    """Two tensors, and lists of words, merges, scores and, short, heads of each block."""
    writer = GGUFWriter(file, "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"é{i}" * (i % 3) for i in range(WORDS)])
    writer.add_array("tokenizer.ggml.scores", [float(i) for i in range(WORDS)])
    writer.add_head_count(HEADS)
    writer.add_array("tokenizer.ggml.merges", [f"a {i}" for i in range(WORDS)])
    writer.add_file_type(1)
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.normal(size=(8, 32)).astype(np.float16))
    writer.add_tensor("output_norm.weight", rng.normal(size=32).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_tensors_and_short_fields_are_where_gguf_finds_them(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf")
    found, wanted = gguf_metadata.opened(file), GGUFReader(file)
    assert found.data_offset == wanted.data_offset
    assert list(found.fields) == list(wanted.fields)
    for name in ("general.file_type", "tokenizer.ggml.merges"):
        assert found.fields[name].offset == wanted.fields[name].offset
    assert found.fields["llama.attention.head_count"].contents() == HEADS
    for mine, theirs in zip(found.tensors, wanted.tensors, strict=True):
        assert (mine.name, mine.field.offset) == (theirs.name, theirs.field.offset)
        assert np.array_equal(mine.data, theirs.data)
    assert gguf_metadata.read(file).fields["attention.head_count"] == HEADS


def test_a_vocabulary_takes_no_memory(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf")
    tracemalloc.start()
    reader = gguf_metadata.opened(file)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(reader.tensors) == 2
    assert most < 2e6  # gguf's own reader takes 1.2 kB an element


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells a map's memory")
def test_pages_that_were_read_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf")
    reader = gguf_metadata.opened(file)
    before = np.array(reader.data)  # reads all of it
    assert resident(file) >= file.stat().st_size // 1024
    gguf_metadata.release(reader)
    assert resident(file) == 0
    assert np.array_equal(reader.data, before)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells a map's memory")
def test_a_layer_that_was_read_back_leaves_no_pages(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf")
    piece = Piece(("embeddings",), np.zeros(8, int), np.arange(8))
    base: Any = SimpleNamespace(placed=Placement({"token_embd.weight": piece}, {}))
    found = retyping.Decoded(file, base, {"embeddings": (8, 32)})
    wanted = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float16)
    assert np.array_equal(found["embeddings"].numpy(), wanted.astype(np.float32))
    assert resident(file) == 0


def resident(file: Path) -> int:
    """kB of the mapped file in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    sizes, ours = [], False
    for line in lines:
        if "-" in line.split()[0]:  # a map's addresses and file, its sizes below
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            sizes.append(int(line.split()[1]))
    return sum(sizes)


def test_a_file_that_ends_within_its_words_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf")
    file.write_bytes(file.read_bytes()[:50_000])
    with pytest.raises(ModelError, match="It may be cut off"):
        gguf_metadata.read(file)


def test_a_file_is_first_opened_while_it_is_converted(tmp_path: Path) -> None:
    """Then gguf's own reader is another."""
    file = written(tmp_path / "a.gguf")
    gguf_metadata._skimming.cache_clear()
    with from_gguf._read_once():
        assert gguf_metadata.read(file).fields["attention.head_count"] == HEADS
