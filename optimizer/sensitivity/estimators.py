"""The ways to estimate what a choice costs, each a dataclass whose fields are its hyper-parameters.

Free of torch, so that a finished table can be reused in a second; the work is done by one module per
family. Others register an estimator of their own as an entry point of `mezzotint.estimators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from optimizer.errors import ConfigError
from optimizer.extensions import extensions

if TYPE_CHECKING:
    from optimizer.models.model import Model
    from optimizer.sensitivity.table import Desk, Task, Text

ENTRY_POINTS = "mezzotint.estimators"


@dataclass(kw_only=True)
class Measured:
    """Replace rows of the table by true losses, measured one group at a time.

    groups: globs over layer names; empty = measure nothing. at: the operating point of all
    other layers, `reference` or a precision of the palette such as int3_g64.
    """

    groups: list[str] = field(default_factory=list)
    at: str = "reference"


@dataclass(kw_only=True)
class Estimator:
    """Derive from it, give `estimator` (its name) a default, and write `score`.

    VERSION: raise it when the same settings give other numbers; it is part of a table's key.
    by_token: it can weigh single tokens. chunks: the windows are scored in this many parts; the
    parts' spread gives the standard errors, and a killed run loses at most one part, or a block.
    windows: how many of the windows are read, spread evenly over them; None: all.
    """

    VERSION: ClassVar[int] = 1
    by_token: ClassVar[bool] = False
    estimator: str = field(default="", init=False)
    chunks: int = 8
    windows: int | None = None
    measured: Measured = field(default_factory=Measured)

    def check(self, windows: int) -> None:
        """Raises ConfigError for a wrong value. windows: how many there are to read."""
        some, what = windows, f"data.calibration.sequences={windows}"
        if self.windows is not None and self.windows < windows:
            some, what = self.windows, f"sensitivity.windows={self.windows}"
        if not 2 <= self.chunks <= some:
            raise ConfigError(
                "A standard error needs at least two chunks of at least one window each; "
                f"sensitivity.chunks={self.chunks} with {what}."
            )

    @property
    def key(self) -> Any:
        """What a table's numbers depend on, besides the model, the tokens and the choices."""
        settings = {k: v for k, v in asdict(self).items() if k != "measured"}
        return [type(self).__name__, self.VERSION, settings]

    def score(
        self,
        model: Model,
        task: Task,
        ids: np.ndarray,
        seed: Sequence[int],
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        """One chunk of windows [n, length] -> losses [groups, precisions], nats per token. Its
        mean over chunks is the estimate. weights: of tokens, only where `by_token`."""
        raise NotImplementedError(f"{type(self).__name__} has no score.")

    def samples(
        self,
        model: Model,  # noqa: ARG002
        task: Task,  # noqa: ARG002
        text: Text,  # noqa: ARG002
        desk: Desk,  # noqa: ARG002
    ) -> np.ndarray | None:
        """All chunks' losses at once [chunks, groups, precisions], where that shares work; None: they
        are asked for chunk by chunk."""
        return None


@dataclass(kw_only=True)
class Fisher(Estimator):
    """Squared gradients times squared errors, weight by weight."""

    VERSION: ClassVar[int] = 3
    by_token: ClassVar[bool] = True
    estimator: str = field(default="fisher", init=False)

    def score(
        self,
        model: Model,
        task: Task,
        ids: np.ndarray,
        seed: Sequence[int],
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        from optimizer.sensitivity import fisher

        return fisher.diagonal(model, task, ids, seed, weights)

    def samples(
        self,
        model: Model,
        task: Task,
        text: Text,
        desk: Desk,
    ) -> np.ndarray | None:
        from optimizer.sensitivity import by_block

        return by_block.samples(model, task, text, desk)


@dataclass(kw_only=True)
class Gain(Fisher):
    """Fisher's losses of rounding to nearest, times what GPTQ leaves of them; see
    `optimizer.quantization.gain`."""

    estimator: str = field(default="gain", init=False)


@dataclass(kw_only=True)
class Directional(Estimator):
    """The squared slope along the error of a whole layer."""

    by_token: ClassVar[bool] = True
    estimator: str = field(default="directional", init=False)

    def score(
        self,
        model: Model,
        task: Task,
        ids: np.ndarray,
        seed: Sequence[int],
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        from optimizer.sensitivity import fisher

        return fisher.directional(model, task, ids, seed, weights)

    def samples(self, model: Model, task: Task, text: Text, desk: Desk) -> np.ndarray | None:
        from optimizer.sensitivity import by_block

        return by_block.samples(model, task, replace(text, apart=True), desk)


@dataclass(kw_only=True)
class Tokenwise(Estimator):
    """The squared slope along the error, token by token: it follows an error's direction."""

    by_token: ClassVar[bool] = True
    estimator: str = field(default="tokenwise", init=False)

    def score(
        self,
        model: Model,
        task: Task,
        ids: np.ndarray,
        seed: Sequence[int],
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        from optimizer.sensitivity import fisher

        return fisher.tokenwise(model, task, ids, seed, weights)

    def samples(self, model: Model, task: Task, text: Text, desk: Desk) -> np.ndarray | None:
        from optimizer.sensitivity import by_block, products, sent

        return by_block.samples(model, task, text, desk, sent.Way(products.add_token_losses))


@dataclass(kw_only=True)
class Hessian(Estimator):
    """Hutchinson's estimate of the Hessian's trace. probes: random vectors per window."""

    VERSION: ClassVar[int] = 2
    estimator: str = field(default="hessian", init=False)
    probes: int = 1

    def score(
        self,
        model: Model,
        task: Task,
        ids: np.ndarray,
        seed: Sequence[int],
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        from optimizer.sensitivity import hessian

        assert weights is None
        return hessian.trace(model, task, ids, seed, self.probes)

    def samples(self, model: Model, task: Task, text: Text, desk: Desk) -> np.ndarray | None:
        from optimizer.sensitivity import tangents

        return tangents.samples(model, task, text, desk, self.probes)


@dataclass(kw_only=True)
class Kronecker(Estimator):
    """A layer's Fisher matrix as the product of one over inputs and one over outputs."""

    estimator: str = field(default="kronecker", init=False)

    def score(
        self,
        model: Model,
        task: Task,
        ids: np.ndarray,
        seed: Sequence[int],
        weights: np.ndarray | None = None,
    ) -> np.ndarray:
        from optimizer.sensitivity import hessian

        assert weights is None
        return hessian.kronecker(model, task, ids, seed)

    def samples(self, model: Model, task: Task, text: Text, desk: Desk) -> np.ndarray | None:
        from optimizer.sensitivity import by_block, hessian, products, sent

        layers = hessian.factorable(model, task)
        if not all(layer.watchable for layer in layers):
            return None
        way = sent.Way(products.add_factored_losses, whole=True)
        return by_block.samples(model, task, text, desk, way)


@dataclass(kw_only=True)
class AutoEstimator(Estimator):
    """The one that suits the quantizer; see `optimizer.commands.effort`. It scores nothing itself."""

    by_token: ClassVar[bool] = True
    estimator: str = field(default="auto", init=False)


BUILT_IN: dict[str, type[Estimator]] = {
    "auto": AutoEstimator,
    "fisher": Fisher,
    "gain": Gain,
    "directional": Directional,
    "tokenwise": Tokenwise,
    "hessian": Hessian,
    "kronecker": Kronecker,
}


def estimators() -> dict[str, type[Estimator]]:
    """Name -> estimator: the project's own and those that other packages registered."""
    return extensions(ENTRY_POINTS, Estimator) | BUILT_IN


def estimator(name: Any) -> type[Estimator]:
    """Raises ConfigError for a name that nobody registered."""
    known = BUILT_IN if name in BUILT_IN else estimators()
    if name not in known:
        raise ConfigError(f"sensitivity.estimator is one of {', '.join(known)}, not {name!r}.")
    return known[name]
