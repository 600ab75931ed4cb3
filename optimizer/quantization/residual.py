"""Planes of further bits: what a base's codes left of a weight, rounded once more.

A plane of r bits goes on from the group scales s of its base, times a factor f of each row:
    R' = (q + 1/2 - 2^(r-1)) f s / 2^r,   q = 0 ... 2^r - 1,      W' = B' + R'
Where the base was rounded to nearest, the rest lies within s/2 of 0 and f = 1 is a prefix code:
no bit is spent twice. GPTQ moves weights by more than that before it rounds them, so f is 1 to 4,
which costs about a bit; a plane with group scales of its own costs that bit, too, and the scales
(experiments/18-unpack).

The base is rounded as if it were alone. Its plane is rounded to nearest, or, beside a base of GPTQ, by
GPTQ with the Hessian of the inputs that the layer gets when the layers before it are refined.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimizer.models.blockwise import Stream
from optimizer.plan import Precision, digest
from optimizer.quantization.calibrated import Calibrated, Parts
from optimizer.quantization.gptq import STACKED, Solver, _sweep, factors
from optimizer.quantization.material import Material
from optimizer.quantization.methods import Bound, Gptq
from optimizer.quantization.uniform import Levels, pack, unpack

if TYPE_CHECKING:
    from optimizer.models.model import Model, Rounder

VERSION = 3  # raised when planes get other codes
NEAR = (1.0, 1.15, 1.4)  # factors that are tried where the base was rounded to nearest


def _wide(bits: int) -> tuple[float, ...]:
    """Factors that are tried where GPTQ made the base: the more bits, the more of the tail is
    worth it."""
    middle = 0.7 + 0.4 * bits
    return (0.77 * middle, middle, 1.3 * middle)


@dataclass(frozen=True)
class PlaneCodes:
    """codes: uint8 [rows, cols]; scales: f / 2^r, fp16 [rows, 1]."""

    precision: Precision
    codes: Tensor
    scales: Tensor

    def decode(self, steps: Tensor) -> Tensor:
        """R' [rows, cols] fp32. steps [rows, groups]: the base's scales."""
        rows, cols = self.codes.shape
        step = (steps.float() * self.scales.float()).unsqueeze(-1)
        centred = self.codes.float() + (0.5 - 2 ** (self.precision.bits - 1))
        return (centred.view(rows, steps.shape[1], -1) * step).view(rows, cols)

    def pack(self) -> Parts:
        return {"codes": pack(self.codes, self.precision), "scales": self.scales}

    @classmethod
    def unpack(cls, parts: Parts, precision: Precision, cols: int) -> PlaneCodes:
        return cls(precision, unpack(parts["codes"], precision, cols), parts["scales"])


def nearest(rest: Tensor, steps: Tensor, plane: Precision, tried: Sequence[float]) -> PlaneCodes:
    """Round what a base left [rows, cols] to nearest; each row gets the factor with the least squared
    error."""
    grouped = rest.view(*steps.shape, -1)

    def one(levels: Levels) -> tuple[Tensor, Tensor]:
        wide = Levels(*(x.unsqueeze(-1) for x in vars(levels).values()))
        q = wide.nearest(grouped)
        return q.view(rest.shape), (wide.values(q) - grouped).square().flatten(1).sum(1)

    return _best(one, steps, plane, tried)


def solved(
    rest: Tensor, steps: Tensor, plane: Precision, hessian: Tensor, method: Solver
) -> PlaneCodes:
    """As `nearest`, by GPTQ under a Hessian [cols, cols], which also chooses the factors."""
    order = method.order_of(hessian.diagonal())
    _, upper = factors(hessian, method.damping, order)
    size = rest.shape[1] // steps.shape[1]

    def one(levels: Levels) -> tuple[Tensor, Tensor]:
        each = [Levels(*(x[:, g] for x in vars(levels).values())) for g in range(steps.shape[1])]
        q, loss = _sweep(rest.T.contiguous(), upper, order, size, lambda g, _j, _w: each[g])
        return q.T, loss

    return _best(one, steps, plane, _wide(plane.bits))


def _best(
    one: Callable[[Levels], tuple[Tensor, Tensor]],
    steps: Tensor,
    plane: Precision,
    tried: Sequence[float],
) -> PlaneCodes:
    """Row by row the factor with the least loss. one: levels [rows, groups] -> q [rows, cols],
    losses."""
    half = 2 ** (plane.bits - 1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for factor in tried:
        scales = torch.full((len(steps), 1), factor / 2**plane.bits, device=steps.device).half()
        step = (steps.float() * scales.float()).clamp_(min=1e-30)
        zero = torch.zeros_like(step)
        levels = Levels(step, zero + 0.5, zero - half, zero + (half - 1), step)
        found.append((*one(levels), scales))
    best = torch.stack([loss for _, loss, _ in found]).argmin(0).unsqueeze(1)
    q, scales = found[0][0], found[0][2]
    for i, (other, _, own) in enumerate(found[1:], 1):
        q, scales = torch.where(best == i, other, q), torch.where(best == i, own, scales)
    return PlaneCodes(plane, (q + half).to(torch.uint8).contiguous(), scales)


# ---------------------------------------------------------------- whole models


class Refining:
    """A bound quantizer with planes on top: it takes the quantizer's place wherever weights of the
    refined model are asked for. `rounder` gets the base's choice."""

    def __init__(
        self, quantizer: Bound, planes: Mapping[str, Precision], settings: Any, material: Material
    ) -> None:
        self._quantizer, self._planes = quantizer, dict(planes)
        self._settings, self._material = settings, material

    @property
    def key(self) -> Any:
        """What determines the codes, besides weights and the base's precisions."""
        names = sorted((name, p.name) for name, p in self._planes.items())
        return [self._quantizer.key, "planes", VERSION, names]

    def rounder(self, choice: Mapping[str, Precision], joint: bool = True) -> Stacked:
        """Costs about twice the base's own, see `Calibrated.rounder`."""
        base: Any = self._quantizer.rounder(choice, joint)
        if not isinstance(self._settings, Gptq) or not joint:
            return Stacked(base, choice, self._planes)
        chained = Chained(self._settings, self._material, base, choice, self._planes)
        return chained.stacked([self.key, sorted((n, p.name) for n, p in choice.items())])


class Stacked:
    """Rounds layers to base and plane. base: rounds to the base. find: planes made beforehand."""

    def __init__(
        self,
        base: Any,
        choice: Mapping[str, Precision],
        planes: Mapping[str, Precision],
        find: Callable[[str, Precision], Any] = lambda _layer, _plane: None,
    ) -> None:
        self._base, self._choice, self._planes, self._find = base, choice, planes, find

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        """W' [rows, cols] fp32 of the refined model. precision: the base's, which is known."""
        del precision
        if layer not in self._planes:
            base: Tensor = self._base.round(weight, self._choice[layer], layer)
            return base
        codes = self._base.encode(weight, self._choice[layer], layer)
        return codes.decode().to(weight.device) + self.rest(weight, layer)

    def rest(self, weight: Tensor, layer: str) -> Tensor:
        """R' [rows, cols] fp32. weight: of the reference."""
        steps = self._base.encode(weight, self._choice[layer], layer).scales
        return self.plane(weight, layer).decode(steps).to(weight.device)

    def plane(self, weight: Tensor, layer: str) -> PlaneCodes:
        plane = self._planes[layer]
        found: PlaneCodes | None = self._find(layer, plane)
        if found is not None:
            return found
        base = self._base.encode(weight, self._choice[layer], layer)
        return nearest(weight.float() - base.decode(), base.scales, plane, NEAR)


class Chained(Calibrated):
    """Planes by GPTQ, block by block, each layer with the inputs that refined layers send."""

    def __init__(
        self,
        settings: Gptq,
        material: Material,
        base: Any,
        choice: Mapping[str, Precision],
        planes: Mapping[str, Precision],
    ) -> None:
        super().__init__(settings, material)
        self._base, self._choice, self._planes = base, choice, planes
        self._own_key: Any = None

    @cached_property
    def key(self) -> Any:
        return self._own_key

    def stacked(self, key: Any) -> Stacked:
        """key: what determines the planes."""
        self._own_key = key
        found: Any = self._jointly(self._choice)
        assert isinstance(found, Stacked)
        return found

    def _given(self, find: Callable[..., Any], parts: Mapping[str, Parts]) -> Rounder:
        def planes(layer: str, plane: Precision) -> Any:
            return find(layer, plane) if parts.get(layer) else None

        return Stacked(self._base, self._choice, self._planes, planes)

    def _tell(self, layers: Collection[str], why: str = "") -> None:
        """The base said it of the same layers."""

    def _heads(self, real: Mapping[str, Precision]) -> dict[str, Parts]:
        """The head's plane, with the reference's inputs, as its base."""
        found: dict[str, Parts] = {}
        for name in (x.name for x in self._material.inventory.layers if x.predicts):
            if name in real and name in self._planes and name in self._cols:
                key = digest([self.key, "head", name])
                kept = self._material.store.arrays("codes", key, partial(self._head, name))
                found[name] = {k: torch.from_numpy(v) for k, v in (kept or {}).items()}
        return found

    def _head(self, name: str) -> dict[str, Any]:
        """Its plane's arrays, some rows at a time: a vocabulary is long."""
        model = self._material.model
        stream = Stream(model, self._material.calibration(), frozen=True)
        for block in self._material.track(range(len(stream.blocks)), "what the head reads"):
            stream.advance(block)
        hessian, weight, plane = stream.head_hessian(), model.weight(name), self._planes[name]
        base = self._base.encode(weight, self._choice[name], name)
        rest, rows = weight.float() - base.decode(), max(1, STACKED // weight.shape[1])
        parts = []
        for some, steps in zip(rest.split(rows), base.scales.split(rows), strict=True):
            if hessian is None:
                codes = nearest(some, steps, plane, NEAR)
            else:
                codes = solved(some, steps, plane, hessian, self._method)
            parts.append(codes.pack())
        return {k: torch.cat([part[k] for part in parts]).cpu().numpy() for k in parts[0]}

    def _unpacked(self, parts: Parts, precision: Precision, cols: int) -> Any:
        return PlaneCodes.unpack(parts, precision, cols)

    def _solved(
        self,
        model: Model,
        stream: Stream,
        block: int,
        sets: Sequence[Sequence[str]],
        wanted: Mapping[str, Sequence[Precision]],
    ) -> Iterable[tuple[str, Precision, Any]]:
        for name in (n for own in sets for n in own if n not in self._planes):
            yield name, wanted[name][0], _Nothing()  # rounded as its base is
        refined = [[n for n in own if n in self._planes] for own in sets]
        refined = [names for names in refined if names]
        if self._weights is not None:
            refined = [[name] for names in refined for name in names]
        for some in stream.portions(refined):
            hessians = stream.hessians(block, some, self._weights)
            for names, hessian in zip(some, hessians, strict=True):
                for name in names:
                    yield name, wanted[name][0], self._one(model.reference(name), name, hessian)

    def _one(self, weight: Tensor, name: str, hessian: Tensor) -> PlaneCodes:
        base = self._base.encode(weight, self._choice[name], name)
        rest = weight.float() - base.decode().to(weight.device)
        steps = base.scales.to(weight.device)
        return solved(rest, steps, self._planes[name], hessian, self._method)


class _Nothing:
    """The plane of a layer that has none."""

    def pack(self) -> Parts:
        return {}
