"""What a model folder's safetensors files hold: every tensor's dtype and shape, and its values one
at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer import untrusted
from optimizer.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAPPED = 2**26  # bytes of a file that are mapped at a time, if more than a tensor's are to


@dataclass(frozen=True)
class Stored:
    """A tensor as its file describes it. dtype: safetensors' spelling."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder by name. beside: weight files that transformers doesn't read,
    since the index or model.safetensors comes first. device: where a tensor that is read goes. kept:
    those that stay in memory, as they are stored; homes: where, on the device if they don't say."""

    folder: Path
    tensors: Mapping[str, Stored]
    beside: tuple[str, ...] = ()
    device: str = "cpu"
    kept: dict[str, Tensor] | None = None
    homes: Mapping[str, str] = field(default_factory=dict)

    def keeping(self, homes: Mapping[str, str]) -> Checkpoint:
        """The same, with every tensor that was read once kept."""
        return replace(self, kept={}, homes=homes)

    def read(self, name: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor as it is stored, or some rows of it: [shape], its own dtype."""
        from safetensors import safe_open

        if self.kept is not None and name in self.kept:
            return self._sent(self.kept[name], rows)
        with readable(self.tensors[name].file) as file, safe_open(file, framework="pt") as opened:
            return self._sent(opened.get_tensor(name), rows)

    def _sent(self, value: Tensor, rows: slice | Tensor | None) -> Tensor:
        """To the device; no more than is wanted travels."""
        if rows is not None:
            value = value[rows if isinstance(rows, slice) else rows.to(value.device)]
        return value.to(self.device)

    def several(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors as they are stored, one at a time. A file is opened anew for every MAPPED bytes of
        it: what was read of an open file counts as this process's memory."""
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            if self.kept is not None and name in self.kept:
                yield name, self._sent(self.kept[name], None)
                continue
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for path, own in by_file.items():
            rest = deque(own)
            while rest:
                mapped = 0
                with readable(path) as file, safe_open(file, framework="pt") as opened:
                    while rest and mapped < MAPPED:
                        name = rest.popleft()
                        value = opened.get_tensor(name)
                        mapped += value.nbytes
                        if self.kept is not None:
                            # no view of the file
                            home = self.homes.get(name, self.device)
                            self.kept[name] = value = value.to(home, copy=True)
                        yield name, self._sent(value, None)


def open_checkpoint(folder: Path) -> Checkpoint:
    """From the files' headers alone. Raises ModelError for a file that isn't whole, and where two
    files hold a tensor of one name."""
    from safetensors import safe_open

    files = weight_files(folder)
    tensors: dict[str, Stored] = {}
    for file in files:
        with readable(file), safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  (safe_open has no __iter__)
                if name in tensors:
                    raise ModelError(
                        f"A tensor has one value; {name} is in {tensors[name].file.name} and in "
                        f"{file.name}. Remove the file that doesn't belong to {folder}."
                    )
                part = opened.get_slice(name)
                tensors[name] = Stored(file, str(part.get_dtype()), tuple(part.get_shape()))
    if not tensors:
        raise ModelError(f"The weight files in {folder} hold no tensors.")
    rest = sorted({f.name for f in folder.glob("*.safetensors")} - {f.name for f in files})
    return Checkpoint(folder, tensors, tuple(rest))


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: model.safetensors; without it those that the index names;
    without both, all there are."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = _indexed(folder / INDEX)
        lacking = sorted(name for name in names if not (folder / name).is_file())
        if lacking:
            raise ModelError(
                f"{folder / INDEX} names {lacking[0]}, which isn't there. Copy or download the "
                "model again."
            )
        return [folder / name for name in sorted(names)]
    return sorted(file for file in folder.glob("*.safetensors") if file.is_file())


def _indexed(index: Path) -> set[str]:
    try:
        names = {str(v) for v in untrusted.read(index)["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index} can't be read as an index of weight files ({type(error).__name__}: {error}). "
            "Copy or download the model again."
        ) from None
    outside = sorted(name for name in names if "/" in name or "\\" in name)
    if outside:
        raise ModelError(f"{index} names a file outside of its folder, {outside[0]!r}.")
    return names


@contextmanager
def readable(file: Path) -> Iterator[Path]:
    """Errors of the safetensors library as a ModelError that names the file."""
    from safetensors import SafetensorError

    try:
        yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is no whole safetensors file ({error}). Copy or download it again."
        ) from None
