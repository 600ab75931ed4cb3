"""Hidden states that lie in a file between two passes."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
import torch

from optimizer.errors import StorageError
from optimizer.sensitivity.borders import Borders
from tests.conftest import largest_file


def test_each_batch_of_each_block_comes_back_as_it_was() -> None:
    """Also where writing goes on after reading, and where a batch isn't contiguous."""
    rng = torch.Generator().manual_seed(1)
    borders = Borders(10_000)
    wide = torch.randn(2, 3, 4, generator=rng)
    across = torch.randn(5, 4, 3, generator=rng).transpose(1, 2)
    half = torch.randn(1, 6, generator=rng).half()
    try:
        borders.keep(0, 0, wide)
        borders.keep(1, 0, across)
        assert torch.equal(borders.take(0, 0, torch.empty_like(wide)), wide)
        borders.keep(0, 1, half)
        for place, kept in {(1, 0): across, (0, 1): half, (0, 0): wide}.items():
            found = borders.take(*place, torch.zeros(kept.shape, dtype=kept.dtype))
            assert found.dtype == kept.dtype and torch.equal(found, kept)
    finally:
        borders.close()
    with pytest.raises(ValueError, match="closed"):
        borders.take(0, 0, wide)


@pytest.mark.parametrize("count", [1_500, 2_000_000])
def test_a_disk_that_is_full_meanwhile_is_named(count: int) -> None:
    """Also where so little was to be written that it waited in a buffer, and when it is closed."""
    with (
        largest_file(4_096),
        pytest.raises(StorageError, match="couldn't be written: File too large") as error,
        closing(Borders(8_000)) as borders,
    ):
        borders.keep(0, 0, torch.zeros(count))
    assert str(error.value).startswith(tempfile.gettempdir())


def test_a_folder_with_too_little_room_is_named_with_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, asked = shutil.disk_usage(tmp_path), list[Path]()

    def usage(folder: Path) -> object:
        asked.append(Path(folder))
        return used._replace(free=99)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(
        StorageError, match=rf"100 bytes, in {tempfile.gettempdir()}, which has 99 left"
    ):
        Borders(100)
    with pytest.raises(
        StorageError, match=r"^A slope keeps .* or lower data\.search\.sequences\.$"
    ):
        Borders(100, "A slope", "data.search.sequences")
    Borders(99).close()
    assert asked == [Path(tempfile.gettempdir())] * 3
