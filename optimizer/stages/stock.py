"""llama.cpp's own mixture of at most the plan's bytes, on the held-out text beside the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optimizer.certificate import comparison
from optimizer.errors import ConfigError
from optimizer.formats.gguf import mixtures, retyping
from optimizer.plan import Precision, digest
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # raised when a mixture's numbers change
NAME = "llama.cpp's"  # how the rows of mixtures begin


@dataclass(frozen=True)
class Stock:
    """Rounds by llama.cpp's own functions."""

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:  # noqa: ARG002
        from optimizer.quantization import ggml_native

        blocks = ggml_native.encode_plainly(weight, precision.kind)
        return ggml_native.decode(blocks, precision.kind, weight.shape[1])


def measured(session: Session, space: SearchSpace, size: int) -> comparison.Candidate | None:
    """size: of the plan's file. None where the engine has none, or isn't here."""
    from optimizer.metrics.divergence import stored
    from optimizer.models.kv_cache import rounded
    from optimizer.quantization import ggml_native

    base = space.base
    found = None if base is None else mixtures.largest(base, size)
    if base is None or found is None:
        return None
    try:
        ggml_native.library()
    except ConfigError:  # the package that rounds as llama.cpp does isn't installed
        return None
    name, kinds = found
    choice: dict[str, Precision] = {}
    for tensor, kind in kinds.items():
        for layer in base.placed.pieces[tensor].layers:
            precision = Precision.ggml(kind)
            if choice.setdefault(layer, precision) != precision:
                return None  # its rows are in tensors of several types
    key = digest(
        [
            "stock",
            VERSION,
            session.part_key("heldout"),
            name,
            sorted(kinds.items()),
            sorted(choice),
        ]
    )

    def make() -> dict[str, np.ndarray]:
        session.view.stage(f"{NAME} {name}")
        teacher = session.teacher("heldout")
        cache = rounded(session.model.net, session.cache.kind)
        with session.model.rounded(Stock(), choice), cache:
            return teacher.score(session.model.net).arrays()

    kept = session.store.arrays("scores", key, make)
    assert kept is not None
    own = sum(entry.size for entry in retyping.entries(base, kinds))
    return comparison.Candidate(f"{NAME} {name}", own, float(own), stored(kept))
