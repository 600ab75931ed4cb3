"""Rounding to nearest with searched grids, llama.cpp's and floats', kept in the store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from optimizer.plan import Precision, digest
from optimizer.quantization import floats, ggml
from optimizer.quantization.ggml import Blocks
from optimizer.quantization.uniform import Nearest

if TYPE_CHECKING:
    from optimizer.store import Store

GRIDS = 1  # raised when the grids change


@dataclass
class Keeping(Nearest):
    """`quantizer=rtn`. Grids that are searched for are kept by the weights' content: a table asks for
    each of them once a chunk, a search once a plan, and the search for scales is most of the work."""

    store: Store | None = None

    def blocks(self, weight: Tensor, precision: Precision, layer: str) -> Blocks:
        if self.store is None or not layer:
            return super().blocks(weight, precision, layer)

        def make() -> dict[str, np.ndarray]:
            return {"blocks": ggml.encode(weight, precision).data.cpu().numpy()}

        key = digest(["blocks", GRIDS, precision.kind, list(weight.shape), _content(weight)])
        found = self.store.arrays("grids", key, make)
        assert found is not None
        data = torch.from_numpy(found["blocks"]).to(weight.device)
        return Blocks(precision, data, weight.shape[1])

    def scales(self, weight: Tensor, precision: Precision, layer: str) -> floats.Grid:
        if self.store is None or not layer:
            return super().scales(weight, precision, layer)
        shape = (weight.shape[0], weight.shape[1])

        def make() -> dict[str, np.ndarray]:
            grid = floats.fit(weight, precision)
            return {"stored": grid.stored.cpu().numpy(), "whole": grid.whole.cpu().numpy()}

        key = digest(["floats", GRIDS, precision.kind, list(shape), _content(weight)])
        found = self.store.arrays("grids", key, make)
        assert found is not None
        stored, whole = (torch.from_numpy(found[k]).to(weight.device) for k in ("stored", "whole"))
        return floats.Grid(precision, shape, stored, whole)

    def grids(self, weight: Tensor, kind: str, layer: str) -> Iterable[ggml.Grid]:
        if self.store is None or not layer:
            return super().grids(weight, kind, layer)
        content = _content(weight)

        def make() -> dict[str, np.ndarray]:
            return {
                f"{i}.{name}": part.cpu().numpy()
                for i, grid in enumerate(ggml.fitted(weight, kind))
                for name, part in grid.parts().items()
            }

        key = digest(["grids", GRIDS, ggml.CHUNK, kind, list(weight.shape), content])
        found = self.store.arrays("grids", key, make)
        assert found is not None
        kept: list[dict[str, Tensor]] = []
        for name, array in found.items():
            number, _, part = name.partition(".")
            kept += [{} for _ in range(int(number) + 1 - len(kept))]
            kept[int(number)][part] = torch.from_numpy(array).to(weight.device)
        shapes = (rows.shape for rows in ggml.slices(weight))
        return [
            ggml.Grid.of(kind, (rows, cols), parts)
            for (rows, cols), parts in zip(shapes, kept, strict=True)
        ]


def _content(weight: Tensor) -> str:
    return sha256(weight.float().cpu().contiguous().numpy().data).hexdigest()
