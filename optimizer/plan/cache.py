"""How keys and values are kept: in how many bits, and which tokens are kept whole.

The first tokens are the ones that attention falls back on (attention sinks, arXiv:2309.17453), and the
last ones are read most (a residual window, KIVI, arXiv:2402.02750): few of them at 16 bits save
much of what a cache of 4 bits loses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from optimizer.errors import ConfigError

LONGEST = 2**20  # tokens


@dataclass(frozen=True)
class CacheKind:
    """bits of a stored value; floating: e4m3 instead of whole numbers with a scale. first, last:
    tokens of a sequence that are kept at 16 bits, whatever `bits` says."""

    bits: int = 16
    floating: bool = False
    first: int = 0
    last: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is rounded."""
        return self.bits >= 16

    @property
    def keep(self) -> str | None:
        """As a person writes it; None: no token is kept whole."""
        return f"{self.first}+{self.last}" if self.first or self.last else None

    @property
    def said(self) -> str:
        kept = (
            f", the first {self.first} and the last {self.last} tokens at 16" if self.keep else ""
        )
        return f"{self.bits} bits{kept}"

    def exact(self, tokens: int) -> int:
        """How many of a sequence's tokens are kept whole."""
        return tokens if self.whole else min(tokens, self.first + self.last)


WHOLE = CacheKind()


def parse_keep(text: str | None) -> tuple[int, int]:
    """`4+64` -> (4, 64); None -> (0, 0). Raises ConfigError."""
    if text is None:
        return 0, 0
    found = re.fullmatch(r"(\d{1,7})\+(\d{1,7})", str(text))
    first, last = map(int, found.groups()) if found else (LONGEST, LONGEST)
    if max(first, last) >= LONGEST:
        raise ConfigError(
            "budget.keep is how many of the first and of the last tokens a cache keeps at 16 bits, "
            f"such as 4+64, a list of such, or null, not {str(text)[:40]!r}."
        )
    return first, last
