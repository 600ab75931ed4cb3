"""A model folder that appears whole or not at all, and tells if anything in it was changed.

Every folder holds plan.json and manifest.json, the sha256 of all other files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from optimizer import drafts, untrusted
from optimizer.errors import ConfigError, PlanError, StorageError
from optimizer.plan import Plan
from optimizer.store import unwritable

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = drafts.SEAL
COPIED = ("*.json", "*.model", "*.txt", "*.jinja")


def check_target(out: Path, overwrite: bool) -> None:
    """Raise before any work if the folder can't be written. Finishes or removes what a killed run left
    of the same folder."""
    target = _resolved(out)
    with suppress(OSError):
        drafts.recover(target)
    used = target.exists() and not (target.is_dir() and drafts.is_empty(target))
    if used and not (overwrite and target.is_dir()):
        raise ConfigError(
            f"The folder for the model must be new or empty; {out} is not. Choose another "
            "out=DIR, or say overwrite=true to replace it."
        )
    if used and not (target / MANIFEST).is_file():
        raise ConfigError(
            f"overwrite=true replaces a folder that Mezzotint wrote a model to; {out} has no "
            f"{MANIFEST} and may hold other things. Choose another out=DIR, or remove it yourself."
        )
    place = drafts.place_of(target)
    while not place.exists():
        place = place.parent
    try:
        with drafts.folder(place, target.name):
            pass
    except OSError as error:
        raise StorageError(
            f"{place} can't be written to ({error.strerror or error}). Choose another out=DIR."
        ) from None


def check_room(out: Path, size: int) -> None:
    """Raise before any work if a folder of `size` bytes wouldn't fit beside what is there: the old
    one of an overwrite=true stays until the new one is whole."""
    place = drafts.place_of(_resolved(out))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if size > free:
        raise StorageError(
            f"The model's folder takes {size / 1e9:.2f} GB, and {place} has {free / 1e9:.2f} GB free. "
            "Free space, or choose another out=DIR."
        )


def _resolved(out: Path) -> Path:
    """Where the folder really lies, links followed."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, a current folder that is gone
        raise ConfigError(
            f"{out} leads nowhere ({error}). Choose another out=DIR, or mend the link."
        ) from None


def publish(out: Path, fill: Callable[[Path], None]) -> Path:
    """`fill` writes into a hidden draft, which then takes the place of `out`; see `drafts`. After an
    exception `out` is as it was; after a kill too, or the next `check_target` finishes the new one."""
    draft = out

    def filled(folder: Path) -> None:
        nonlocal draft
        draft = folder
        fill(folder)

    try:
        drafts.publish(_resolved(out), filled)
    except OSError as error:
        raise unwritable(out, error) from None
    except StorageError as error:  # a person looks for the folder, not for its draft
        raise StorageError(str(error).replace(str(draft), str(out))) from None
    return out


def copy_beside(folder: Path, out: Path) -> None:
    """The config, the tokenizer and other small files of a model folder."""
    for pattern in COPIED:
        for file in folder.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, out / file.name)


def save_tensors(
    tensors: dict[str, Tensor], file: Path, said: Mapping[str, str] | None = None
) -> None:
    """said: more of the header's metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt", **(said or {})})
    except SafetensorError as error:  # its own name for a full disk
        raise unwritable(file, OSError(str(error))) from None


def seal(plan: Plan, out: Path, about: Mapping[str, Any] | None = None) -> None:
    """Add the plan and, last, the manifest. about: more entries of the manifest."""
    plan.save(out / "plan.json")
    hashes = {file.name: sha256(file) for file in sorted(out.iterdir())}
    text = json.dumps({**(about or {}), "sha256": hashes}, indent=1)
    (out / MANIFEST).write_text(text + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Manifest(untrusted.Fields):
    """sha256: of every other file, by its name."""

    sha256: dict[Annotated[untrusted.Name, Field(max_length=255)], untrusted.Name]


def manifest(folder: Path, without: Collection[str] = ()) -> dict[str, Any]:
    """The manifest, after all files but those were compared with it. Raises PlanError."""
    try:
        found = untrusted.read(folder / MANIFEST)
        hashes = untrusted.checked(Manifest, found).sha256
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{folder} is no model that Mezzotint wrote: it has no readable {MANIFEST} ({error}). "
            "`mezzotint apply plan.json out=DIR` and `mezzotint export` write such folders."
        ) from None
    for file, value in ((folder / n, value) for n, value in hashes.items() if n not in without):
        if not file.is_file() or file.parent != folder or sha256(file) != value:
            raise PlanError(
                f"{file} was changed, cut off or removed after it was written. Make the folder "
                "again with the command that made it."
            )
    return dict(found)
