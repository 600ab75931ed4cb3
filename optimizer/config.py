"""Which dataclass stands behind which group of conf/; composing, checking, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from optimizer.data import Data
from optimizer.errors import ConfigError
from optimizer.layer import GGML, Precision
from optimizer.plan import Budget
from optimizer.sensitivity import Sensitivity

INSIDE, BESIDE = Path(__file__).parent / "conf", Path(__file__).parent.parent / "conf"


def conf_folder() -> Path:
    """In a wheel conf/ lies inside the package, in a checkout beside it."""
    return INSIDE if INSIDE.is_dir() else BESIDE


@dataclass(kw_only=True)
class Palette:
    """bits: numbers 1 to 8, `ternary`, 16 (untouched), and types of llama.cpp such as q4_k.
    group_size: one or several; 0 = per channel. fit: `strict` (a group must divide every layer)
    or `nearest`."""

    bits: list[Any] = field(default_factory=lambda: [2, 3, 4, 5, 6, 8, 16])
    group_size: Any = 64
    symmetric: bool = False
    fit: str = "strict"

    def precisions(self) -> list[Precision]:
        """All of them, smallest codes first, without repetition."""
        if self.fit not in ("strict", "nearest"):
            raise ConfigError(f"palette.fit is strict or nearest, not {self.fit!r}.")
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
        if not isinstance(bits, int) or isinstance(bits, bool):
            raise ConfigError(
                f"palette.bits holds whole numbers 1 to 8, 16, ternary, and types of llama.cpp "
                f"({', '.join(GGML)}), not {bits!r}."
            )
        if bits == 16:
            return Precision()
        return Precision("int", bits, group, self.symmetric or bits == 1)


@dataclass(kw_only=True)
class Runtime:
    """An engine's rules. fused: roles that it loads as one matrix; experts: `tensor` or `block`,
    how far one precision reaches; executes: globs of the precisions that it runs, empty = all."""

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


@dataclass(kw_only=True)
class Quantizer:
    name: str = "rtn"

    def check(self) -> None:
        if self.name != "rtn":
            raise ConfigError(f"quantizer.name is rtn in this version, not {self.name!r}.")


@dataclass(kw_only=True)
class Proof:
    """What is measured after the plan is made. certify: on held-out documents. random: random
    plans measured on search documents, for the baseline and to check the prediction."""

    certify: bool = True
    random: int = 32

    def check(self) -> None:
        if self.random < 0:
            raise ConfigError(f"proof.random is a number of plans, not {self.random}.")


@dataclass(kw_only=True)
class Optimize:
    """`mezzotint optimize`."""

    model: str
    revision: str | None = None
    scope: Any = field(default_factory=lambda: ["blocks"])
    budget: Budget = field(default_factory=Budget)
    palette: Palette = field(default_factory=Palette)
    runtime: Runtime = field(default_factory=Runtime)
    quantizer: Quantizer = field(default_factory=Quantizer)
    data: Data = field(default_factory=Data)
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    proof: Proof = field(default_factory=Proof)
    seed: int = 0
    device: str = "cpu"
    store: str = "~/.cache/mezzotint"

    @property
    def scopes(self) -> list[str]:
        found = self.scope if isinstance(self.scope, list) else [self.scope]
        if not found or not all(isinstance(pattern, str) for pattern in found):
            raise ConfigError(f"scope is a pattern or a list of patterns, not {self.scope!r}.")
        return list(found)

    def check(self) -> None:
        """What can be wrong before anything is loaded."""
        self.budget.check()
        self.runtime.check(self.palette.precisions())
        self.quantizer.check()
        self.proof.check()
        self.sensitivity.check(self.data.calibration.sequences)
        self.data.check(None)
        _ = self.scopes


@dataclass(kw_only=True)
class Apply:
    """`mezzotint apply`. model: where the reference is, if no longer where the plan says."""

    plan: str
    out: str
    model: str | None = None
    overwrite: bool = False
    store: str = "~/.cache/mezzotint"


@dataclass(kw_only=True)
class Export:
    """`mezzotint export`. to: the engine or format. plan: a plan, or a folder that `apply` wrote,
    whose rounded weights are then taken as they are. Others as Apply."""

    plan: str
    to: str
    out: str
    model: str | None = None
    overwrite: bool = False
    store: str = "~/.cache/mezzotint"


@dataclass(kw_only=True)
class Check:
    """`mezzotint check`. As Export, without a folder."""

    plan: str
    to: str
    model: str | None = None
    store: str = "~/.cache/mezzotint"


@dataclass(kw_only=True)
class Evaluate:
    """`mezzotint evaluate`. model: a packed folder. reference: as Apply.model."""

    model: str
    reference: str | None = None
    data: Data = field(default_factory=Data)
    device: str = "cpu"
    store: str = "~/.cache/mezzotint"


COMMANDS: dict[str, type[Any]] = {
    "optimize": Optimize,
    "apply": Apply,
    "export": Export,
    "check": Check,
    "evaluate": Evaluate,
}


def profile(name: str) -> Runtime:
    """The rules of an engine from conf/runtime/."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(
        OmegaConf.load(conf_folder() / "runtime" / f"{name}.yaml")
    )
    return Runtime(**values.get("runtime", values))


def register() -> None:
    """Give Hydra the schemas, so that types and unknown keys are checked while it composes."""
    from hydra.core.config_store import ConfigStore

    for name, schema in COMMANDS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def build(command: str, cfg: Any) -> Any:
    """A composed configuration -> its dataclass. Raises ConfigError for missing values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(
            f"`mezzotint {command}` needs {', '.join(missing)}. Add for example {missing[0]}=..."
        )
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
