"""The methods that round numbers, each a dataclass whose fields are its hyper-parameters.

A method says what can be set, whether it can work, what its codes depend on, and which estimator it
wants. Nothing here loads torch; `build` does, when codes are needed for the first time.

Others register a method of their own as an entry point of the group `mezzotint.quantizers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from optimizer.errors import ConfigError
from optimizer.extensions import extensions
from optimizer.plan import GGML, Precision

if TYPE_CHECKING:
    from torch import Tensor

    from optimizer.quantization.material import Material

ENTRY_POINTS = "mezzotint.quantizers"
WEIGHTINGS = ("alike", "gradient", "fisher")  # of tokens


@dataclass(kw_only=True)
class Quantizer:
    """A way to round. Derive from it, give `name` a default, and write either `quantize`, for a
    method that rounds each layer by itself and needs no data, or `build`.

    VERSION: raise it when the same settings give other codes; it is part of every stored result's
    key. calibrated: the codes depend on calibration tokens. estimator: which sensitivity suits it.
    """

    VERSION: ClassVar[int] = 1
    calibrated: ClassVar[bool] = False
    estimator: ClassVar[str] = "fisher"
    name: str = field(default="", init=False)

    @property
    def reads_head(self) -> bool:
        """Whether the output head's codes, too, depend on what it receives."""
        return False

    @property
    def reads_experts(self) -> bool:
        """Whether those of experts that lie in one tensor do."""
        return False

    def check(self) -> None:
        """Raises ConfigError for a wrong value."""

    def check_palette(self, palette: Sequence[Precision]) -> None:
        """Raises ConfigError for a precision that the method can't round to."""

    def quantize(self, weight: Tensor, precision: Precision, layer: str) -> Any:
        """weight [rows, cols], fp32 -> `uniform.Encoded`. precision is never
        `none`; layer is the tensor's name in the checkpoint."""
        raise NotImplementedError(f"{type(self).__name__} has neither quantize nor build.")

    def build(self, material: Material) -> Any:
        """What rounds layers, see `uniform.Independent`. material: the model, its calibration
        tokens and the store, none of which is loaded before it is used."""
        from optimizer.quantization.uniform import Independent

        del material
        return Independent(self.quantize)

    def described(self, tokens: str | None) -> dict[str, Any]:
        """For plan.json: the settings. tokens: the key of those that it is calibrated with."""
        return asdict(self) | ({"tokens": tokens} if self.calibrated else {})

    def key(self, tokens: str | None) -> Any:
        """For the store: what determines the codes, besides weights and precisions."""
        return [type(self).__name__, self.VERSION, self.described(tokens)]


@dataclass(kw_only=True)
class Rtn(Quantizer):
    """Round to nearest; no data needed. clip: also try smaller ranges of a group."""

    name: str = field(default="rtn", init=False)
    clip: bool = False

    def build(self, material: Material) -> Any:
        from optimizer.quantization.keeping import Keeping

        return Keeping(clip=self.clip, store=material.store)

    def described(self, tokens: str | None) -> dict[str, Any]:  # noqa: ARG002
        return {"name": self.name} | ({"clip": True} if self.clip else {})


@dataclass(kw_only=True)
class Gptq(Quantizer):
    """Later columns make up for the error of earlier ones (Frantar et al., arXiv:2210.17323).

    Such errors lean away from loud inputs, which only gain and tokenwise sensitivity can see.
    damping: added to the Hessian's diagonal, as a share of its mean. order: columns (loudest inputs
    first), groups (whole groups are moved) or none. clip: also try smaller ranges of a group.
    inputs: rounded (from the model as rounded so far), reference (each layer by itself), or auto:
    rounded where the choice has less than 4 bits a weight on average. SmolLM2: KL .78 and
    .87 at 3 bits, .197 and .198 at 4, in almost three times the time (experiments/LOG.md).
    weighting of tokens: alike, gradient (the length of the loss's gradient at the layer's output) or
    fisher (its square). head: round the output head with what it receives, too, also where it is the
    tied embedding; else to nearest.
    """

    VERSION: ClassVar[int] = 3
    calibrated: ClassVar[bool] = True
    estimator: ClassVar[str] = "gain"
    name: str = field(default="gptq", init=False)
    damping: float = 0.05
    order: str = "columns"
    clip: bool = False
    inputs: str = "auto"
    weighting: str = "alike"
    head: bool = True

    @property
    def reads_head(self) -> bool:
        return self.head

    @property
    def reads_experts(self) -> bool:
        return True

    def check(self) -> None:
        allowed = {
            "order": ("none", "columns", "groups"),
            "inputs": ("auto", "rounded", "reference"),
        }
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ConfigError(
                    f"quantizer.{key} is one of {', '.join(values)}, not {getattr(self, key)!r}."
                )
        _check_weighting(self.weighting)
        if not 0 < self.damping < 1:
            raise ConfigError(
                f"quantizer.damping is a share of the mean diagonal between 0 and 1, such as 0.05, "
                f"not {self.damping}."
            )

    def build(self, material: Material) -> Any:
        from optimizer.quantization.calibrated import Calibrated

        return Calibrated(self, material)

    def described(self, tokens: str | None) -> dict[str, Any]:
        found = super().described(tokens)
        if self.weighting == "alike":  # as in plans from before there was a choice
            del found["weighting"]
        return found


@dataclass(kw_only=True)
class Awq(Quantizer):
    """Scales go into the operator before, so that loud inputs are kept more exactly (Lin et al.,
    arXiv:2306.00978)."""

    calibrated: ClassVar[bool] = True
    estimator: ClassVar[str] = "tokenwise"
    name: str = field(default="awq", init=False)

    def check_palette(self, palette: Sequence[Precision]) -> None:
        blocks = [p.name for p in palette if p.kind in GGML]
        if blocks:
            raise ConfigError(
                f"llama.cpp's blocks ({blocks[0]}) are rounded by rtn or gptq; quantizer=awq knows "
                "integer groups and floats only. Take quantizer=gptq, or another palette."
            )

    def build(self, material: Material) -> Any:
        from optimizer.quantization.folding import ActivationAware

        return ActivationAware(self, material)


@dataclass(kw_only=True)
class Importance(Quantizer):
    """Round to nearest, errors in loud columns counting more where scales are searched for:
    llama.cpp's importance matrix for its own types, for floats and, with clip, for the ranges of
    integers. weighting of tokens: as gptq's; alike is llama.cpp's."""

    calibrated: ClassVar[bool] = True
    name: str = field(default="importance", init=False)
    weighting: str = "gradient"
    clip: bool = False

    def check(self) -> None:
        _check_weighting(self.weighting)

    def build(self, material: Material) -> Any:
        from optimizer.quantization.importance import Alone

        return Alone(self, material)


@dataclass(kw_only=True)
class Auto(Quantizer):
    """gptq or rtn, as `effort` and the model say; see `optimizer.commands.effort`. It rounds nothing
    itself. clip: also try smaller ranges of a group."""

    name: str = field(default="auto", init=False)
    clip: bool = False


BUILT_IN: dict[str, type[Quantizer]] = {
    "auto": Auto,
    "rtn": Rtn,
    "gptq": Gptq,
    "awq": Awq,
    "importance": Importance,
}


def _check_weighting(given: str) -> None:
    if given not in WEIGHTINGS:
        raise ConfigError(f"quantizer.weighting is one of {', '.join(WEIGHTINGS)}, not {given!r}.")


def methods() -> dict[str, type[Quantizer]]:
    """Name -> method: the project's own and those that other packages registered."""
    return extensions(ENTRY_POINTS, Quantizer) | BUILT_IN


def method(name: Any) -> type[Quantizer]:
    """Raises ConfigError for a name that nobody registered."""
    known = BUILT_IN if name in BUILT_IN else methods()
    if name not in known:
        raise ConfigError(f"quantizer.name is one of {', '.join(known)}, not {name!r}.")
    return known[name]


def of_plan(described: Mapping[str, Any]) -> Quantizer:
    """What `described` wrote into a plan, also by earlier versions."""
    made = method(described["name"])
    known = {f.name for f in fields(made) if f.init}
    settings = {key: value for key, value in described.items() if key in known}
    if made is Gptq:
        settings = {"weighting": "alike", "head": False} | settings  # before there was a choice
    return made(**settings)


class Bound:
    """A method with the model, tokens and store that it works on. The rounder is built at its first
    use: a finished table or score doesn't need torch."""

    def __init__(self, settings: Quantizer, material: Material) -> None:
        self._settings, self._material = settings, material

    @property
    def key(self) -> Any:
        """What determines the codes, besides weights and precisions."""
        tokens = self._material.calibration_key if self._settings.calibrated else None
        return self._settings.key(tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._built, name)

    @cached_property
    def _built(self) -> Any:
        return self._settings.build(self._material)


def bind(settings: Quantizer, material: Any) -> Bound:
    """material: the session, or whatever has its model, tokens and store."""
    settings.check()
    return Bound(settings, material)
