"""What methods that see calibration tokens work with, and how much each token counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from optimizer.plan import Inventory, digest
from optimizer.quantization.methods import Gptq

if TYPE_CHECKING:
    from optimizer.models.model import Model
    from optimizer.store import Store

SEED = 0  # of the labels that weigh tokens


class Material(Protocol):
    """A model, its tokens, where results are kept and who is told; loaded when it is used."""

    @property
    def store(self) -> Store: ...
    @property
    def inventory(self) -> Inventory: ...
    @property
    def model(self) -> Model: ...
    @property
    def calibration_key(self) -> str: ...
    def calibration(self) -> np.ndarray: ...
    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]: ...
    def note(self, text: str) -> None: ...


def token_shares(material: Material, weighting: str) -> dict[str, np.ndarray] | None:
    """How much each calibration token counts for each watchable layer [windows, length], kept in the
    store; None: all alike. The model must hold its own weights when they are made."""
    from optimizer.sensitivity.outputs import token_weights

    if weighting == "alike":
        return None
    squared = weighting == "fisher"

    def make() -> dict[str, np.ndarray]:
        layers = [x for x in material.inventory.layers if x.watchable]
        ids = material.calibration()
        return token_weights(material.model, layers, ids, SEED, material.track, squared)

    own = ["token weights"] if squared else ["token weights", weighting]
    key = digest([*own, Gptq.VERSION, material.calibration_key, SEED])
    return material.store.arrays("weights", key, make)
