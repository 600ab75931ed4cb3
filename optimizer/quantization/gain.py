"""What GPTQ gains over rounding to nearest, foretold from a layer's Hessian alone.

GPTQ rounds columns in an order and lets the later ones make up for each error. With the layer's
damped Hessian H and the upper triangular U of H^-1 = U' U (see `gptq` beside this file), an error
d_j in column j costs d_j^2 / U_jj^2 in the end, where rounding to nearest pays d_j^2 H_jj, cross
terms left out. So
    gain = sum_j U_jj^-2 / sum_j H_jj,   0 < gain <= 1,
for errors of one size in all columns: 1 / U_jj^2 is what is left of input j's variance when the
inputs that come later are known. The diagonal Fisher information of rounding to nearest, times the
gain, is the loss after GPTQ, without rounding a layer at every precision first.
"""

from __future__ import annotations

from torch import Tensor

from optimizer.quantization.gptq import root_of


def gain(hessian: Tensor, damping: float, order: Tensor) -> float:
    """GPTQ's loss over that of rounding to nearest, for a Hessian [cols, cols] of inputs."""
    root = root_of(hessian, damping, order)  # U = R^-1, so 1 / U_jj = R_jj
    loud = hessian.diagonal() / (float(hessian.diagonal().mean()) or 1.0) + damping
    return float(root.diagonal().square().sum() / loud.sum())
