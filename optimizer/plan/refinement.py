"""A second part of a plan: planes of further bits, which refine layers that the plan already stores.

    base B' = decode(codes of the plan's precision),   refined W' = B' + decode(codes of the plane)

A plane rounds what the base left of W, in steps of the base's own group scales times a factor for each
row: its precision has one scale a row. It lies in a file of its own, so that the base can be held
without it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from optimizer.errors import PlanError
from optimizer.plan.precision import UNTOUCHED, Precision
from optimizer.plan.schema import Refined

REFINEMENT_FILE = "refinement.safetensors"
SHA256 = 64  # digits of the base's, which the refinement's header names


@dataclass(frozen=True)
class Pair:
    """How a layer is stored twice: its base, and what refines it (`none`: nothing)."""

    base: Precision
    plane: Precision = UNTOUCHED

    @property
    def name(self) -> str:
        return self.base.name + (f"+{self.plane.name}" if self.refined else "")

    @property
    def refined(self) -> bool:
        return self.plane.kind != "none"

    def fits(self, cols: int) -> bool:
        return self.base.fits(cols) and (not self.refined or self.plane.fits(cols))

    def plane_bytes(self, rows: int, cols: int) -> int:
        """Exact bytes of the refinement alone."""
        return self.plane.bytes(rows, cols) if self.refined else 0

    def bytes(self, rows: int, cols: int) -> int:
        """Exact bytes of both."""
        return self.base.bytes(rows, cols) + self.plane_bytes(rows, cols)


@dataclass(frozen=True)
class Refinement:
    """layers: layer -> its plane's name in `palette`; only those that have one. bytes: of the file:
    quantized, container, total. predicted: kl, stderr of the refined model. certificate: what was
    measured on held-out text, see `optimizer.stages.nested`. hard: what unpack=hard goes by."""

    palette: dict[str, Precision]
    layers: dict[str, str]
    bytes: dict[str, int]
    size: int
    predicted: dict[str, Any]
    certificate: dict[str, Any] = field(default_factory=dict)
    hard: dict[str, Any] = field(default_factory=dict)

    @property
    def planes(self) -> dict[str, Precision]:
        """Layer -> plane."""
        return {name: self.palette[key] for name, key in self.layers.items()}

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "palette": {key: asdict(p) for key, p in self.palette.items()}}

    @classmethod
    def of(cls, data: Refined) -> Refinement:
        """Raises ConfigError for a precision that there isn't."""
        palette = {
            key: Precision(row.kind, row.bits, row.group_size, row.symmetric)
            for key, row in data.palette.items()
        }
        told = data.model_dump(exclude={"palette", "bytes"}, by_alias=True, exclude_unset=True)
        own = {field.name for field in fields(cls)}  # others may be there, and nobody reads them
        rest = {key: value for key, value in told.items() if key in own}
        return cls(palette=palette, bytes={str(k): n for k, n in data.bytes.items()}, **rest)

    def check(
        self,
        where: str,
        choice: Mapping[str, Precision],
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        """Raises PlanError unless it refines layers of this plan, in the bytes that it says."""
        for name, key in self.layers.items():
            bare = name not in choice or choice[name].kind == "none"
            if bare or key not in self.palette or name not in shapes:
                raise PlanError(
                    f"{where}: a refinement has planes of its palette for layers that the plan "
                    f"rounds; "
                    f"{name[:80]} with {key[:40]} is none. Make the plan again."
                )
            plane, kind = self.palette[key], choice[name].kind
            if (plane.kind, plane.group_size, plane.symmetric) != ("int", None, True):
                raise PlanError(
                    f"{where}: a plane has 1 to 8 bits and one scale a row; {key[:40]} hasn't. "
                    f"Make the "
                    "plan again."
                )
            if kind not in ("int", "ternary"):
                raise PlanError(
                    f"{where}: a plane goes on from its base's group scales, and {kind} of "
                    f"{name[:80]} "
                    "has none. Make the plan again."
                )
        size = sum(p.bytes(shapes[n][0], shapes[n][1]) for n, p in self.planes.items())
        if size != self.bytes.get("quantized"):
            raise PlanError(
                f"{where} says that its planes take {self.bytes.get('quantized')} bytes, but "
                f"they take "
                f"{size}. It was changed by hand: correct bytes, or make it again."
            )
