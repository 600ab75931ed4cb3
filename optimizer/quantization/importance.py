"""Rounding to nearest under an importance matrix: errors in loud columns count more.

For a layer with inputs x_t at tokens t, scales and codes minimise
    sum_ij v_j (w_ij - w'_ij)^2,    v_j = sum_t s_t x_tj^2 / sum_t s_t
s_t = 1 gives llama.cpp's importance matrix; the length of the loss's gradient at the layer's
output, or its square, counts tokens by what an error there does (`sensitivity.outputs`). v is the
diagonal of the Hessian that GPTQ factors, so this is what GPTQ does without passing errors on: a
fraction of its time, and most of its gain where columns differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from optimizer.models.blockwise import Stream
from optimizer.plan import FLOATS, GGML, Precision, digest
from optimizer.quantization import floats, ggml, ggml_native
from optimizer.quantization.material import Material, token_shares
from optimizer.quantization.methods import Importance
from optimizer.quantization.uniform import (
    Codes,
    Encoded,
    Independent,
    Levels,
    Nearest,
    clipped,
    levels_of,
)

LEAST = 1e-4  # of a layer's mean: a column that no token of the text reached may be met by others


@dataclass(kw_only=True)
class Weighted(Nearest):
    """Rounds rows of one layer. importance: of its columns [cols], above zero."""

    importance: Tensor

    def grids(self, weight: Tensor, kind: str, layer: str) -> Iterable[ggml.Grid]:  # noqa: ARG002
        return ggml.fitted(weight, kind, self.importance.to(weight.device))

    def blocks(self, weight: Tensor, precision: Precision, layer: str) -> ggml.Blocks:  # noqa: ARG002
        data = ggml_native.encode(weight, precision.kind, self.importance)
        return ggml.Blocks(precision, data, weight.shape[1])

    def scales(self, weight: Tensor, precision: Precision, layer: str) -> floats.Grid:  # noqa: ARG002
        return floats.fit(weight, precision, self.importance.to(weight.device))

    def _levels(self, w: Tensor, precision: Precision) -> Levels:
        if not self.clip:
            return levels_of(w, precision)
        return clipped(w, precision, self.importance.to(w.device).view(w.shape[1], -1))


class Alone(Independent):
    """`quantizer=importance`, bound to a model. Codes are kept by content, as GPTQ's are."""

    name: ClassVar[str] = "importance"
    by_row: ClassVar[bool] = True

    def __init__(self, settings: Importance, material: Material) -> None:
        self._settings, self._material = settings, material

    def of_rows(self, layer: str) -> Nearest:
        """What rounds some rows of the layer by themselves, and keeps nothing."""
        found = self.columns.get(layer)
        if found is None:  # it only looks rows up, or no token reached it
            return Nearest(clip=self._settings.clip)
        v = torch.from_numpy(found)
        return Weighted(clip=self._settings.clip, importance=v.clamp(min=LEAST * float(v.mean())))

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        if precision.kind in GGML or precision.kind in FLOATS:
            return self.encode(weight, precision, layer).decode().to(weight.device)
        return self.of_rows(layer).round(weight, precision)

    def encode(self, weight: Tensor, precision: Precision, layer: str = "") -> Encoded:
        rounder = self.of_rows(layer)
        if precision.kind not in GGML and precision.kind not in FLOATS:
            return rounder.encode(weight, precision)

        def make() -> dict[str, np.ndarray]:
            parts = rounder.encode(weight, precision).pack()
            return {name: part.contiguous().cpu().numpy() for name, part in parts.items()}

        content = sha256(weight.float().cpu().contiguous().numpy().data).hexdigest()
        key = [self._key, "alone", layer, precision.name, content]
        found = self._material.store.arrays("codes", digest(key), make)
        assert found is not None
        parts = {name: torch.from_numpy(part).to(weight.device) for name, part in found.items()}
        return Codes.unpack(parts, precision, weight.shape[1])

    def prepare(self, wanted: Mapping[str, Sequence[Precision]]) -> None:  # noqa: ARG002
        """The columns are weighed while the model holds its own weights."""
        _ = self.columns

    def rounder(self, choice: Mapping[str, Precision], joint: bool = True) -> Alone:  # noqa: ARG002
        _ = self.columns
        return self

    @property
    def _key(self) -> object:
        return self._settings.key(self._material.calibration_key)

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Layer -> v [cols]. Costs a pass over the calibration tokens if new, and one with gradients
        where tokens don't count alike."""
        material, weighting = self._material, self._settings.weighting

        def make() -> dict[str, np.ndarray]:
            model, ids = material.model, material.calibration()
            shares = token_shares(material, weighting)
            stream = Stream(model, ids, frozen=True, experts=True)
            found: dict[str, np.ndarray] = {}
            for block in material.track(range(len(stream.blocks)), "importance of columns"):
                sets = stream.inputs(block)
                if shares is not None:
                    sets = [[name] for names in sets for name in names]
                for some in stream.portions(sets):
                    for names, v in zip(some, stream.squares(block, some, shares), strict=True):
                        found |= dict.fromkeys(names, (v / ids.size).cpu().numpy())
                stream.advance(block)
            head = stream.head_hessian()
            heads = [x.name for x in material.inventory.layers if x.predicts]
            if head is not None:
                found |= dict.fromkeys(heads, (head.diagonal() / ids.size).cpu().numpy())
            return {name: v for name, v in found.items() if np.isfinite(v).all() and v.any()}

        key = digest(["columns", Importance.VERSION, material.calibration_key, weighting])
        return material.store.arrays("columns", key, make) or {}
