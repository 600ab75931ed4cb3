"""What other installed packages add: classes registered as entry points.

[project.entry-points."mezzotint.quantizers"]
mine = "my_package:Mine"
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, TypeVar

from optimizer.errors import ConfigError

T = TypeVar("T")


def extensions(group: str, parent: type[T]) -> dict[str, type[T]]:
    """Name -> class of every entry point of `group`. Raises ConfigError for one that can't be
    imported, or isn't a class derived from `parent`."""
    found: dict[str, type[T]] = {}
    for point in entry_points(group=group):
        try:
            made: Any = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"{point.name} ({point.value}), registered as {group}, can't be imported: {error}. "
                "Repair or uninstall its package."
            ) from None
        if not (isinstance(made, type) and issubclass(made, parent)):
            raise ConfigError(
                f"{point.value}, registered as {group}, must be a class derived from "
                f"{parent.__name__}. Repair or uninstall its package."
            )
        found[point.name] = made
    return found
