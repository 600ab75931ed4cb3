"""Equations (1) and (2) of `gptq` for a run of columns as one GPU kernel.

PyTorch needs some fifteen kernels a column, of microseconds each, and a GPU waits for each. Rows don't
know of each other, so that a few rows' columns of a run are kept in registers and gone through there.
Triton comes with PyTorch's CUDA wheels; without it, and for grids other than `Levels`, the loop of
`gptq` does the same.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, TypeGuard

from torch import Tensor

from optimizer.quantization.uniform import Levels

ROWS = 32  # of one program
WHOLE = 12_582_912.0  # 1.5 2^23: adding it and taking it away rounds halves to even numbers


def serves(levels: object, w: Tensor) -> TypeGuard[Levels]:
    """Whether `run` can take columns of w, up to `gptq.BLOCK`, that may become these levels."""
    return w.is_cuda and isinstance(levels, Levels) and _kernel() is not None


def run(w: Tensor, upper: Tensor, levels: Levels, q: Tensor, errors: Tensor) -> None:
    """Fills q and errors, [n, rows] as w is, for n columns that share their levels [rows]. upper
    [n, n]: U between these columns. w itself stays."""
    columns, rows = w.shape
    fields = (levels.step, levels.shift, levels.low, levels.high, levels.value)
    _kernel()[(-(-rows // ROWS),)](
        *(w, q, errors, upper.contiguous()),
        *(field.contiguous() for field in fields),
        *(columns, rows, w.stride(0), q.stride(0), errors.stride(0), WHOLE),
        ROWS=ROWS,
        COLUMNS=1 << (columns - 1).bit_length(),
    )


@cache
def _kernel() -> Any:
    """Compiled when it is first used; None where Triton isn't installed."""
    try:
        triton: Any = import_module("triton")
        tl: Any = import_module("triton.language")
    except ImportError:
        return None

    # Triton reads the annotations, and knows no type but its own
    def sweep(  # type: ignore[no-untyped-def]
        w_at,
        q_at,
        e_at,
        u_at,
        step_at,
        shift_at,
        low_at,
        high_at,
        value_at,
        columns,
        rows,
        w_next,
        q_next,
        e_next,
        whole,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        here = row < rows
        within = (column < columns)[:, None] & here[None, :]
        w = tl.load(w_at + column[:, None] * w_next + row[None, :], mask=within, other=0.0)
        step = tl.load(step_at + row, mask=here, other=1.0)
        shift = tl.load(shift_at + row, mask=here, other=0.0)
        low = tl.load(low_at + row, mask=here, other=0.0)
        high = tl.load(high_at + row, mask=here, other=0.0)
        value = tl.load(value_at + row, mask=here, other=0.0)
        for j in range(columns):
            own = tl.sum(tl.where((column == j)[:, None], w, 0.0), axis=0)
            q = tl.minimum(tl.maximum(own / step - shift, low), high)
            q = (q + whole) - whole
            u = tl.load(u_at + j * columns + column, mask=column < columns, other=0.0)
            error = (own - (q + shift) * value) / tl.load(u_at + j * columns + j)
            w -= tl.where((column > j)[:, None], u[:, None] * error[None, :], 0.0)
            tl.store(q_at + j * q_next + row, q, mask=here)
            tl.store(e_at + j * e_next + row, error, mask=here)

    return triton.jit(sweep)
