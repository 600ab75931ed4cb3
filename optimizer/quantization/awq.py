"""AWQ: loud inputs are kept more exactly, at the price of the quiet ones.

A layer's weight W [rows, cols] is rounded as Q(W S), S = diag(s), s [cols]; what feeds the layer gives
x / s instead of x (Lin et al., arXiv:2306.00978). With r [cols] the root mean squares of the inputs
    (1)  s = r^a / sqrt(max r^a min r^a),   a from 0 to 1 in steps of 1/20
    (2)  loss(a) = sum over layers of tr(D H D'),   D = Q(W S) S^-1 - W,   H = sum x x'
and the a of least loss is taken, one for all layers that read the same input. (2) is the squared error
of the layers' outputs, without running them.

The 1/s is folded into the previous operator: into a norm's weights, or into the rows of the layer
before (up_proj for down_proj, v_proj for o_proj). A norm's weights g become g' = g / s in 16 bits,
and s is then g / g' exactly. A layer's rows are divided in its group scales, so its codes stay; the
scales of floats have few bits, and its rows are divided before they are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optimizer.plan import Precision
from optimizer.quantization.floats import Floats
from optimizer.quantization.gptq import Job
from optimizer.quantization.uniform import Codes, Nearest

STEPS = 20
REACH = 16.0  # s lies within 1/REACH and REACH: a row's scales stay normal numbers of fp16


@dataclass(frozen=True)
class Scaled:
    """A layer's codes with the scales around them. inputs: s [cols]; outputs: t [rows], what the
    layer behind it has its inputs divided by. Both fp32."""

    codes: Codes | Floats
    inputs: Tensor
    outputs: Tensor

    def decode(self) -> Tensor:
        """What the layer does in the unfolded model: t W' / s [rows, cols] fp32."""
        return self.codes.decode() / self.inputs * self.outputs.unsqueeze(1)

    def pack(self) -> dict[str, Tensor]:
        return self.codes.pack() | {"inputs": self.inputs, "outputs": self.outputs}

    def divided(self, by: Tensor, weight: Tensor | None = None) -> Scaled:
        """Its rows divided by t [rows]: the codes stay, the group scales shrink. weight: W, which
        floats need, whose scales can't."""
        if isinstance(self.codes, Floats):
            assert weight is not None
            divided = scale(weight / by.unsqueeze(1), self.codes.precision, self.inputs)
            return replace(divided, outputs=by)
        scales = (self.codes.scales.float() / by.unsqueeze(1)).half()
        return Scaled(replace(self.codes, scales=scales), self.inputs, by)

    @classmethod
    def unpack(cls, parts: Mapping[str, Tensor], precision: Precision, cols: int) -> Scaled:
        codes = Codes.unpack(dict(parts), precision, cols)
        assert isinstance(codes, Codes | Floats)
        return cls(codes, parts["inputs"], parts["outputs"])


def scale(weight: Tensor, precision: Precision, inputs: Tensor) -> Scaled:
    """Round W S."""
    codes = Nearest().encode(weight * inputs, precision)
    assert isinstance(codes, Codes | Floats)
    return Scaled(codes, inputs, torch.ones(len(weight), device=weight.device))


def loudness(hessian: Tensor) -> Tensor:
    """r [cols]: root mean squares of the inputs, up to a factor; inputs that are always zero count
    as very quiet."""
    r = hessian.diagonal().clamp(min=0).sqrt()
    return r.clamp(min=float(r.max()) * 1e-6 + 1e-30)


def powered(r: Tensor, power: float) -> Tensor:
    """(1), within its limits."""
    s = r**power
    return (s / (s.max() * s.min()).sqrt()).clamp(1 / REACH, REACH)


def search(jobs: Sequence[Job], hessian: Tensor, r: Tensor) -> Tensor:
    """s [cols] of least loss (2) for layers that read the same input. Cost: STEPS + 1 times rows
    cols^2 multiplications a layer."""
    best, least = torch.ones_like(r), float("inf")
    for step in range(STEPS + 1):
        s = powered(r, step / STEPS)
        loss = sum(_loss(weight, precision, s, hessian) for weight, precision in jobs)
        if loss < least:
            best, least = s, loss
    return best


def _loss(weight: Tensor, precision: Precision, s: Tensor, hessian: Tensor) -> float:
    error = Nearest().round(weight * s, precision) / s - weight
    return float(((error @ hessian) * error).sum())
