"""The precisions that a search may choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optimizer.errors import ConfigError
from optimizer.plan.precision import FLOATS, GGML, Precision

FITS = ("untouched", "nearest", "strict")


@dataclass(kw_only=True)
class Palette:
    """bits: numbers 1 to 8, `ternary`, 16 (untouched), floats such as nvfp4 and types of llama.cpp
    such as q4_k. group_size: one or several; 0 = per channel. fit: where a group doesn't divide a
    layer's columns, the layer stays `untouched`, gets the `nearest` divisor, or is an error
    (`strict`)."""

    bits: list[Any] = field(default_factory=lambda: [2, 3, 4, 5, 6, 7, 8, 16])
    group_size: Any = 64
    symmetric: bool = False
    fit: str = "untouched"

    def precisions(self) -> list[Precision]:
        """All of them, smallest codes first, without repetition."""
        if self.fit not in FITS:
            raise ConfigError(f"palette.fit is one of {', '.join(FITS)}, not {self.fit!r}.")
        sizes = self.group_size if isinstance(self.group_size, list) else [self.group_size]
        if not self.bits or not sizes:
            raise ConfigError("A palette needs at least one entry in bits and in group_size.")
        found: dict[str, Precision] = {}
        for bits in self.bits:
            for size in sizes:
                precision = self._one(bits, size)
                found[precision.name] = precision
        return sorted(found.values(), key=lambda p: (p.code_bits, p.group_size or 10**9))

    def _one(self, bits: Any, size: Any) -> Precision:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ConfigError(
                f"palette.group_size is a whole number or a list of them, not {size!r}; 0 means "
                "one scale per channel."
            )
        group = size or None
        if bits == "ternary":
            return Precision("ternary", 2, group, True)
        if bits in GGML:
            return Precision.ggml(bits)
        if bits in FLOATS:
            return Precision.floating(bits)
        if not isinstance(bits, int) or isinstance(bits, bool):
            raise ConfigError(
                "palette.bits holds whole numbers 1 to 8, 16, ternary, floats of GPUs "
                f"({', '.join(FLOATS)}), and types of llama.cpp ({', '.join(GGML)}), not {bits!r}."
            )
        if bits == 16:
            return Precision()
        return Precision("int", bits, group, self.symmetric or bits == 1)
