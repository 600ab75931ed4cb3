"""Under what a stored result is kept: a digest of all that determines it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from optimizer.plan.plan import digest


@dataclass(frozen=True)
class Key:
    """Derive from it and name what determines the result, as fields that JSON can hold. A field that
    is added, or another value, is another key by itself.

    VERSION: raise it when the same fields give another result."""

    VERSION: ClassVar[int] = 1

    @property
    def text(self) -> str:
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        return digest([type(self).__name__, self.VERSION, named])
