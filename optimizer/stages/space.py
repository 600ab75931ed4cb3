"""Which precision may be chosen for which layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optimizer import sensitivity
from optimizer.config import Optimize
from optimizer.errors import ConfigError
from optimizer.formats import registry
from optimizer.formats.rules import Demands
from optimizer.formats.runtime import Runtime
from optimizer.plan import Choices, Inventory, Policy, policy
from optimizer.plan.pins import translated

if TYPE_CHECKING:
    from optimizer.formats.gguf.base import Base


@dataclass(frozen=True)
class SearchSpace(Choices):
    """The table's rows and columns. held: what the engine leaves, bool [G, P], of which `allowed` is
    what the policy leaves, too; None: everything. notes: what the engine doesn't hold. overhead: bytes
    of its file beyond our own, counted where the budget is a file's."""

    held: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    overhead: int = 0
    demands: Demands = field(default_factory=lambda: Demands(Runtime()))
    base: Base | None = None
    pins: Sequence[Sequence[str]] = ()


def search_space(
    config: Optimize, inventory: Inventory, folder: Path | None = None, base: Base | None = None
) -> SearchSpace:
    """folder: the model's, whose class an engine may ask for; None: what it asks of any. base: what
    the engine's file is made from, see `formats.registry.base_of`."""
    scope = inventory.scoped(config.scopes)
    palette = config.palette.precisions()
    fitted = sensitivity.palette_columns(scope, palette, config.palette.fit)
    if config.runtime.experts not in ("tensor", "block", "model"):
        raise ConfigError(
            f"runtime.experts is tensor, block or model, not {config.runtime.experts!r}."
        )
    demands = registry.demands(config.runtime, inventory, folder, base)
    outside: tuple[str, ...] = ()
    if config.scopes == ["all"]:  # of what the engine can round
        scope, outside = registry.rounded(demands, scope, [p.name for p in palette], fitted)
    groups = demands.groups(scope)
    columns = tuple(p.name for p in palette)
    fitted = sensitivity.agreeing(groups, columns, fitted, demands.beside)
    every = Choices(scope, groups, columns, fitted)
    rules = registry.offered(demands, inventory, every)
    pins = translated(
        config.policy.listed,
        [layer.name for layer in scope],
        None if base is None else {name: p.layers for name, p in base.placed.pieces.items()},
    )
    own = replace(config.policy, pins=[pin for some in pins for pin in some])
    left, held = (policy.allowed(p, every, rules) for p in (own, Policy()))
    notes = demands.notes + outside + registry.told(config.runtime, rules)
    notes += sensitivity.unfitting(scope, palette, config.palette.fit) + inventory.notes
    return SearchSpace(
        scope, groups, columns, fitted, left, held, notes, demands=demands, base=base, pins=pins
    )
