"""Planes of further bits in a packed folder: written beside their base, read back, multiplied.

A nested folder has base.safetensors in place of packed.safetensors, and refinement.safetensors with
NAME.codes and NAME.scales of each layer's plane; its header names the sha256 of its base.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimizer import untrusted
from optimizer.errors import PlanError
from optimizer.formats.folder import save_tensors, sha256
from optimizer.formats.torch import kernels
from optimizer.formats.torch.reader import tensors
from optimizer.hardware.memory import MANY_UNPACKED, UNPACKED
from optimizer.models.arithmetic import sized
from optimizer.models.source import BASE_FILE
from optimizer.plan import Layer, Plan, Precision
from optimizer.plan.refinement import REFINEMENT_FILE
from optimizer.quantization.residual import PlaneCodes
from optimizer.quantization.uniform import Codes

PLACES = ("memory", "cpu", "disk")
INSTEAD = 'The base still works: unpack="never" loads it alone.'


def put(parts: dict[str, Tensor], plan: Plan, out: Path) -> None:
    """Write the refinement beside its base and read it back. Raises PlanError if it isn't what was
    promised."""
    assert plan.refinement is not None
    file = out / REFINEMENT_FILE
    save_tensors(parts, file, {"base": sha256(out / BASE_FILE)})
    promised, size = plan.refinement.bytes["total"], file.stat().st_size
    if size != promised:
        raise PlanError(
            f"The plan promises a refinement of {promised} bytes and the file has {size}. The "
            f"plan was "
            "made for another version or another checkpoint; make it again."
        )
    with tensors(file) as stored:
        for name, value in parts.items():
            if not torch.equal(stored.get(name, value.dtype), value):
                raise PlanError(f"Read back, {name} is not what was written. Is the disk sound?")


def check(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raises PlanError for a refinement that isn't there, isn't whole, or is another base's.
    hashes: of the folder's manifest."""
    file = folder / REFINEMENT_FILE
    if not file.is_file():
        raise PlanError(f"{file} is missing, so that nothing can be unpacked. {INSTEAD}")
    if _base(file) not in (None, hashes.get(BASE_FILE)):
        raise PlanError(
            f"{file} refines another base than the one beside it: their checksums differ. {INSTEAD}"
        )
    if sha256(file) != hashes.get(REFINEMENT_FILE):
        raise PlanError(
            f"{file} was changed or cut off after it was written, so that nothing can be unpacked. "
            f"{INSTEAD}"
        )


def _base(file: Path) -> str | None:
    """The sha256 of its base that a refinement names; None for a header that can't be read."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                return None
            found = untrusted.parse(stream.read(length))
        return str(found["__metadata__"]["base"])
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


class StoredPlane:
    """One layer's plane as it is stored, unpacked for each use; see `models.planes.Plane`.

    get: a stored tensor by its name. steps: the base's scales [rows, groups]. place: memory (on the
    device), cpu (brought to the device for each use) or disk (read for each use).
    """

    def __init__(
        self,
        layer: Layer,
        precision: Precision,
        steps: Tensor,
        get: Callable[[str], Tensor],
        place: str,
        device: str,
    ) -> None:
        self.layer, self.precision = layer, precision
        self._device, self._get = device, get
        self._steps = steps.to(device)
        self._kept: dict[str, Tensor] | None = None
        if place != "disk":
            where = device if place == "memory" else "cpu"
            self._kept = {suffix: part.to(where) for suffix, part in self._read().items()}
        self.bytes = precision.bytes(layer.rows, layer.cols)

    def _read(self) -> dict[str, Tensor]:
        return {suffix: self._get(f"{self.layer.name}.{suffix}") for suffix in ("codes", "scales")}

    def _parts(self) -> dict[str, Tensor]:
        found = self._read() if self._kept is None else self._kept
        return {suffix: part.to(self._device) for suffix, part in found.items()}

    def weight(self) -> Tensor:
        """R' [rows, cols] fp32, made a few rows at a time, as `modules.Piece` does."""
        parts, layer = self._parts(), self.layer
        step = max(1, sized(self._steps.device, UNPACKED, MANY_UNPACKED) // layer.cols)
        value = torch.empty(layer.rows, layer.cols, device=self._steps.device)
        for i in range(0, layer.rows, step):
            own = {suffix: part[i : i + step] for suffix, part in parts.items()}
            value[i : i + step] = self._decoded(own, self._steps[i : i + step])
        return value

    def _decoded(self, parts: dict[str, Tensor], steps: Tensor) -> Tensor:
        return PlaneCodes.unpack(parts, self.precision, self.layer.cols).decode(steps)

    def product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight().to(x))

    def rows(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        own = {suffix: part[flat] for suffix, part in self._parts().items()}
        return self._decoded(own, self._steps[flat]).view(*ids.shape, self.layer.cols)


class ProductPlane(StoredPlane):
    """As `StoredPlane`, multiplied packed in bf16: with codes of 4 bits, or of 8 where it has more."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._product = kernels.Product(self._stored())
        self.bytes = sum(b.numel() * b.element_size() for b in self._product.buffers())
        if not self.layer.tied:
            self._kept = {}  # an embedding looks its rows up

    def _stored(self) -> Codes:
        parts = PlaneCodes.unpack(self._parts(), self.precision, self.layer.cols)
        bits = 4 if self.precision.bits <= 4 else 8
        groups = self.layer.cols // self._steps.shape[1]
        scales = self._steps.float() * parts.scales.float()
        middle = torch.full_like(scales, 2 ** (self.precision.bits - 1) - 0.5)
        return Codes(Precision("int", bits, groups), parts.codes, scales, middle)

    @classmethod
    def fits(cls, layer: Layer, steps: Tensor, target: kernels.Target) -> bool:
        precision = Precision("int", 4, layer.cols // steps.shape[1])
        return kernels.fits(precision, layer.rows, layer.cols, target)

    def product(self, x: Tensor) -> Tensor:
        found: Tensor = self._product(x)
        return found


def read(
    folder: Path,
    plan: Plan,
    layers: Mapping[str, Layer],
    steps: Callable[[str], Tensor],
    place: str,
    fast: kernels.Target | None,
    device: str,
) -> dict[str, StoredPlane]:
    """The planes by layer. steps: a layer's base scales. fast: multiply packed where that can be."""
    assert plan.refinement is not None
    file = folder / REFINEMENT_FILE

    def again(name: str) -> Tensor:
        with tensors(file) as stored:
            return stored.get(name)

    found: dict[str, StoredPlane] = {}
    with tensors(file) as stored:
        for name, plane in plan.refinement.planes.items():
            layer, scales = layers[name], steps(name)
            quick = fast is not None and place == "memory"
            kind: type[StoredPlane] = StoredPlane
            if quick and fast is not None and ProductPlane.fits(layer, scales, fast):
                kind = ProductPlane
            get = again if place == "disk" else stored.get
            found[name] = kind(layer, plane, scales, get, place, device)
    return found
