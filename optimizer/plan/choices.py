"""Which precision may be chosen for which layers: what a policy restricts and a search decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimizer.plan.inventory import Layer
from optimizer.plan.precision import Precision

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Choices:
    """G groups of layers, each of which takes one of P columns. scope: all of their layers. fitted:
    (layer, column) -> the precision that the column means for this layer. allowed: bool [G, P], what
    a policy and an engine leave; None: everything."""

    scope: tuple[Layer, ...]
    groups: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    fitted: Mapping[tuple[str, str], Precision]
    allowed: np.ndarray | None = None

    def choice(self, assignment: np.ndarray) -> dict[str, Precision]:
        """Column index per group -> precision per layer."""
        return {
            name: self.fitted[name, self.columns[column]]
            for group, column in zip(self.groups, assignment, strict=True)
            for name in group
        }

    @property
    def offered(self) -> dict[str, list[Precision]]:
        """All precisions of each layer, one a column."""
        return {
            x.name: [self.fitted[x.name, column] for column in self.columns] for x in self.scope
        }
