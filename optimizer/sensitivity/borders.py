"""Hidden states between a model's blocks, kept in a file while the blocks run one after the other."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from optimizer.errors import StorageError
from optimizer.store import unwritable


class Borders:
    """Hidden states before each block, in a file of `size` bytes. Raises StorageError before any
    work if the disk hasn't that much. what: keeps them; fewer: the setting by which it keeps less."""

    def __init__(
        self, size: int, what: str = "The table", fewer: str = "sensitivity.windows"
    ) -> None:
        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
        if free < size:
            raise StorageError(
                f"{what} keeps the inputs of all blocks, {size} bytes, in {folder}, which has "
                f"{free} left. Free some, set TMPDIR to a folder on a larger disk, or lower "
                f"{fewer}."
            )
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as this
        self._places: dict[tuple[int, int], int] = {}

    def close(self) -> None:
        with suppress(OSError):  # what a full disk didn't take is tried once more, and not needed
            self._file.close()

    def keep(self, block: int, batch: int, hidden: Tensor) -> None:
        data = hidden.contiguous().cpu().numpy()
        try:
            self._places[block, batch] = self._file.seek(0, 2)
            self._file.write(data.data)
            self._file.flush()
        except OSError as error:
            raise unwritable(Path(tempfile.gettempdir()), error) from None

    def take(self, block: int, batch: int, like: Tensor) -> Tensor:
        found = torch.empty(like.shape, dtype=like.dtype)
        self._file.seek(self._places[block, batch])
        self._file.readinto(found.numpy().data)
        return found.to(like.device)
