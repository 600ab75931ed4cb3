"""An engine as its rules say."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from optimizer.errors import ConfigError
from optimizer.plan import Precision


@dataclass(kw_only=True)
class Runtime:
    """An engine's rules. fused: roles that it loads as one matrix; experts: `tensor`, `block` or
    `model`, how far one precision reaches; executes: globs of precisions, empty = all."""

    name: str = "torch"
    fused: list[list[str]] = field(default_factory=list)
    experts: str = "tensor"
    executes: list[str] = field(default_factory=list)

    def runs(self, precision: Precision) -> bool:
        return not self.executes or any(fnmatchcase(precision.name, p) for p in self.executes)

    def check(self, palette: list[Precision]) -> None:
        wrong = [p.name for p in palette if not self.runs(p)]
        if wrong:
            raise ConfigError(
                f"The search may only offer what the engine executes; {self.name} runs "
                f"{', '.join(self.executes)}, and the palette holds {', '.join(wrong)}. Take "
                f"palette={self.name}, or another runtime."
            )
