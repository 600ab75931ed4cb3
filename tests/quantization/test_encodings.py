"""What every encoding promises: exact bytes, one decoding, and codes that stay when rounded again.
One that is added to the precisions is in these tests by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from optimizer.formats.torch.reader import TYPES
from optimizer.plan import FLOATS, GGML, Precision
from optimizer.quantization import floats, ggml, ggml_native
from optimizer.quantization.uniform import Codes, Encoded, Nearest, grouped, levels_of, rows_of

ROWS, COLS = 136, 256  # more rows than a block of FP8's, and not a multiple of it
INTEGERS = [
    Precision("int", bits, group, symmetric)
    for bits in range(1, 9)
    for group in (32, 128, None)
    for symmetric in ((True,) if bits == 1 else (False, True))
]
TERNARY = [Precision("ternary", 2, group, True) for group in (32, None)]
ENCODINGS = [*INTEGERS, *TERNARY, *map(Precision.ggml, GGML), *map(Precision.floating, FLOATS)]
LONG = (
    "iq1_s",
    "iq1_m",
    "iq2_xs",
    "iq2_s",
)  # whose lattices llama.cpp searches for seconds at first


def kinds(names: Iterable[str]) -> list[ParameterSet]:
    """As parameters of a test, those of LONG in the slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in names]


def parameters(precisions: list[Precision]) -> pytest.MarkDecorator:
    given = [
        pytest.param(p, marks=[pytest.mark.slow] if p.kind in LONG else [], id=p.name)
        for p in precisions
    ]
    return pytest.mark.parametrize("precision", given)


every = parameters(ENCODINGS)


def made() -> Tensor:
    """With loud columns, dead groups and a dead row."""
    found = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(4)) * 0.05
    found[:, ::61] *= 8
    found[:, 64:96] = 0
    found[3] = 0
    return found


WEIGHT = made()


@cache
def coded(precision: Precision) -> Encoded:
    return Nearest().encode(WEIGHT, precision)


@every
def test_the_stored_bytes_are_those_that_were_promised(precision: Precision) -> None:
    parts = coded(precision).pack()
    promised = precision.parts(ROWS, COLS)
    assert parts.keys() == promised.keys()
    for name, (dtype, shape) in promised.items():
        assert (parts[name].dtype, tuple(parts[name].shape)) == (TYPES[dtype], shape)
    stored = sum(part.numel() * part.element_size() for part in parts.values())
    assert stored == precision.bytes(ROWS, COLS)


@every
def test_what_is_stored_decodes_to_what_is_rounded(precision: Precision) -> None:
    codes = coded(precision)
    read = Codes.unpack(codes.pack(), precision, COLS).decode()
    assert torch.equal(read, codes.decode())
    assert torch.equal(read, Nearest().round(WEIGHT, precision))


@every
def test_some_rows_decode_by_themselves(precision: Precision) -> None:
    codes, ids = coded(precision), torch.tensor([ROWS - 1, 0, 70])
    some = Codes.unpack(rows_of(codes.pack(), precision, ids), precision, COLS)
    assert torch.equal(some.decode(), codes.decode()[ids])


def again(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """W', and what W' becomes on the grid of W."""
    if precision.kind in FLOATS:
        scales = floats.fit(weight, precision)
        once = floats.encode(weight, scales).decode()
        return once, floats.encode(once, scales).decode()
    if precision.kind in GGML:
        fitted = list(ggml.fitted(weight, precision.kind))
        once = ggml.encode(weight, precision, fitted).decode()
        return once, ggml.encode(once, precision, fitted).decode()
    levels = levels_of(grouped(weight, precision), precision)
    once = levels.values(levels.nearest(grouped(weight, precision)))
    return once, levels.values(levels.nearest(once))


@parameters([p for p in ENCODINGS if p.kind not in ggml_native.NATIVE])
def test_codes_stay_when_their_values_are_rounded_again(precision: Precision) -> None:
    once, twice = again(WEIGHT, precision)
    assert torch.equal(once, twice)


@every
def test_rounding_loses_less_than_leaving_the_layer_out(precision: Precision) -> None:
    found = Nearest().round(WEIGHT, precision)
    assert torch.isfinite(found).all()
    assert (found - WEIGHT).square().sum() < WEIGHT.square().sum()
    assert found[3].abs().max() <= 2.0**-14  # a row of zeros, to the smallest scale there is
