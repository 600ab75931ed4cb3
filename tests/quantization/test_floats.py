"""NVFP4, MXFP4 and FP8: the numbers of the standards, exact bytes, scales of little error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from optimizer.errors import ConfigError
from optimizer.plan import FLOATS, Precision
from optimizer.quantization import floats
from optimizer.quantization.floats import Floats
from optimizer.quantization.gptq import Solver
from optimizer.quantization.uniform import Codes, Nearest, rows_of

torch.set_num_threads(1)
ALL = [Precision.floating(kind) for kind in FLOATS]
NVFP4, MXFP4, FP8, BLOCK = ALL


def names(precision: Precision) -> str:
    return precision.name


def matrix(rows: int = 300, cols: int = 256, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, cols, generator=rng) * 0.05
    found[:, 7] *= 30  # loud columns, as in a model
    found[5] = 0
    found[6] *= 1e-3
    return found


def minifloat(code: int, exponent: int, mantissa: int, bias: int) -> float:
    """Section 5.3 of the OCP specifications: sign, exponent, mantissa; exponent 0 is subnormal."""
    sign = -1.0 if code >> (exponent + mantissa) else 1.0
    e, m = (code >> mantissa) & (2**exponent - 1), code & (2**mantissa - 1)
    fraction = m / 2**mantissa
    return sign * (fraction * 2.0 ** (1 - bias) if e == 0 else (1 + fraction) * 2.0 ** (e - bias))


def test_codes_are_those_of_the_standards() -> None:
    four = floats.values(torch.arange(16, dtype=torch.uint8), 4)
    assert four.tolist() == [minifloat(code, 2, 1, 1) for code in range(16)]
    eight = floats.values(torch.arange(256, dtype=torch.uint8), 8)
    for code, value in enumerate(eight.tolist()):
        if code & 127 == 127:  # E4M3 has no infinity, and one NaN
            assert math.isnan(value)
        else:
            assert value == minifloat(code, 4, 3, 7)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_number_becomes_the_nearest_value_and_a_tie_the_even_one(bits: int) -> None:
    count = 8 if bits == 4 else 127
    table = floats.values(torch.arange(count, dtype=torch.uint8), bits)
    assert torch.equal(floats.encoded(table, bits), torch.arange(count, dtype=torch.uint8))
    middle = (table[1:] + table[:-1]) / 2
    tied = floats.encoded(floats.nearest(middle, bits), bits)
    assert torch.equal(
        tied, torch.arange(count - 1, dtype=torch.uint8) + torch.arange(count - 1) % 2
    )
    for sign in (1, -1):
        for off, wanted in ((-1, table[:-1]), (1, table[1:])):
            x = middle * (1 + off * 1e-6)
            assert torch.equal(floats.nearest(sign * x, bits), sign * wanted)
    assert floats.nearest(torch.tensor([1e9, -1e9]), bits).tolist() == [
        float(table[-1]),
        -float(table[-1]),
    ]


def test_zero_has_no_sign() -> None:
    for bits in (4, 8):
        assert floats.encoded(
            floats.nearest(torch.tensor([-1e-9, -0.0]), bits), bits
        ).tolist() == [0, 0]


def test_the_bytes_of_two_groups_by_hand() -> None:
    """MXFP4: the largest of 1 ... gets the exponent where 6 is the top; 4 bits, the first low."""
    w = torch.zeros(1, 64)
    w[0, :3] = torch.tensor([6.0, -3.0, 0.5])
    w[0, 32:34] = torch.tensor([-1.5, 0.125])
    parts = Nearest().encode(w, MXFP4).pack()
    assert parts["scales"].tolist() == [[127, 125]]  # 2^0 and 2^-2
    assert parts["codes"][0, :2].tolist() == [0x7 | 0xD << 4, 0x1]
    assert parts["codes"][0, 16:17].tolist() == [0xF | 0x1 << 4]
    assert int(parts["codes"].count_nonzero()) == 3
    (step,) = Nearest().encode(torch.full((1, 128), 224.0), BLOCK).pack()["scales"]
    assert step.tolist() == [0.5]  # 448 / 2


@pytest.mark.parametrize("precision", ALL, ids=names)
def test_parts_have_the_promised_shapes_and_bytes(precision: Precision) -> None:
    w = matrix()
    parts = Nearest().encode(w, precision).pack()
    promised = precision.parts(*w.shape)
    assert {k: tuple(v.shape) for k, v in parts.items()} == {
        k: s for k, (_, s) in promised.items()
    }
    assert precision.bytes(*w.shape) == sum(v.numel() * v.element_size() for v in parts.values())
    exact = {"nvfp4": 300 * (128 + 16) + 4, "mxfp4": 300 * (128 + 8), "fp8": 300 * 256 + 4 * 300,
             "fp8_block": 300 * 256 + 4 * 3 * 2}  # fmt: skip
    assert precision.bytes(*w.shape) == exact[precision.kind]


@pytest.mark.parametrize("precision", ALL, ids=names)
def test_what_is_rounded_is_what_is_stored_and_stays_when_rounded_again(
    precision: Precision,
) -> None:
    w = matrix()
    coded = Nearest().encode(w, precision)
    found = coded.decode()
    assert torch.equal(found, Nearest().round(w, precision))
    assert torch.equal(Codes.unpack(coded.pack(), precision, 256).decode(), found)
    assert torch.equal(Nearest().round(found, precision), found)
    if precision.bits == 4:  # what packages unpack to
        assert torch.equal(found.bfloat16().float(), found)


@pytest.mark.parametrize("precision", ALL, ids=names)
def test_some_rows_unpack_by_themselves(precision: Precision) -> None:
    coded = Nearest().encode(matrix(), precision)
    ids = torch.tensor([299, 3, 130, 5, 127, 128])
    few = Codes.unpack(rows_of(coded.pack(), precision, ids), precision, 256)
    assert torch.equal(few.decode(), coded.decode()[ids])
    assert isinstance(coded, Floats)
    assert torch.equal(coded.take(slice(100, 200)).decode(), coded.decode()[100:200])


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("precision", ALL, ids=names)
def test_weights_of_every_size_keep_their_relative_error(
    precision: Precision, scale: float
) -> None:
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    error = (Nearest().round(w * scale, precision) / scale - w).square().mean().sqrt()
    assert float(error) < (0.14 if precision.bits == 4 else 0.03)


def test_no_scale_of_the_standard_rounds_better_than_the_one_that_was_searched_for() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    own = (Nearest().round(w, NVFP4) - w).square().view(64, -1, 16).sum(-1)
    grid = floats.fit(w, NVFP4)
    every = []
    for code in range(1, 127):
        scales = torch.full_like(grid.stored, code)
        other = floats.Grid(NVFP4, grid.shape, scales, grid.whole)
        every.append((floats.round_to(w, other) - w).square().view(64, -1, 16).sum(-1))
    best = torch.stack(every).amin(0)
    assert float(own.sum()) < 1.01 * float(best.sum())
    largest = (w.view(64, -1, 16).abs().amax(-1) / 6 / grid.whole).clamp(max=448)
    plain = floats.Grid(NVFP4, grid.shape, floats.encoded(largest, 8), grid.whole)
    usual = (floats.round_to(w, plain) - w).square().sum()
    assert float(own.sum()) < 0.8 * float(usual)


def test_columns_that_matter_get_the_scale_that_they_need() -> None:
    w = matrix(64)
    importance = torch.ones(256)
    importance[3::16] = 1e4
    for precision in (NVFP4, MXFP4):
        plain, own = floats.fit(w, precision), floats.fit(w, precision, importance)
        error = [float((floats.round_to(w, g) - w)[:, 3::16].square().sum()) for g in (plain, own)]
        assert error[1] < 0.9 * error[0]


def test_another_scale_of_the_tensor_leaves_the_weights() -> None:
    coded = Nearest().encode(matrix()[:, 16:] * 1.0, NVFP4)
    assert isinstance(coded, Floats)
    for factor in (1.0, 2.0, 8.0):
        moved = coded.shifted(float(coded.whole) * factor)
        if moved is None:
            continue
        assert torch.equal(moved.decode(), coded.decode())
        assert float(moved.whole) == factor * float(coded.whole)
    assert coded.shifted(float(coded.whole) * 2.0**20) is None  # scales below E4M3's numbers
    assert coded.shifted(float(coded.whole) * 2.0**-9) is None  # and above


# ---------------------------------------------------------------- GPTQ


def hessian(cols: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=rng) / math.sqrt(cols)
    x = torch.randn(4 * cols, cols, generator=rng) @ mix
    x *= torch.rand(cols, generator=rng).exp()
    return x.T @ x


@pytest.mark.parametrize("order", ["none", "columns", "groups"])
@pytest.mark.parametrize("precision", ALL, ids=names)
def test_errors_that_are_fed_on_lose_less(precision: Precision, order: str) -> None:
    w, h = matrix(160, 128), hessian(128)
    codes = Solver(order=order).solve([(w, precision)], h)[0]

    def loss(rounded: Tensor) -> float:
        error = (rounded - w).double()
        return float(((error @ h.double()) * error).sum())

    assert loss(codes.decode()) < 0.75 * loss(Nearest().round(w, precision))
    assert {k: tuple(v.shape) for k, v in codes.pack().items()} == {
        k: shape for k, (_, shape) in precision.parts(*w.shape).items()
    }


@pytest.mark.parametrize("precision", ALL, ids=names)
def test_a_long_matrix_is_solved_in_pieces_as_whole(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, h = matrix(160, 128), hessian(128)
    whole = Solver(order="columns").solve([(w, precision)], h)[0]
    monkeypatch.setattr("optimizer.quantization.gptq.STACKED", 4 * 128 * 50)
    pieces = Solver(order="columns").solve([(w, precision)], h)[0]
    assert isinstance(whole, Floats)
    assert isinstance(pieces, Floats)
    assert torch.equal(whole.scales, pieces.scales) and torch.equal(whole.whole, pieces.whole)
    assert (whole.codes != pieces.codes).float().mean() < 0.01  # products of other widths


# ---------------------------------------------------------------- bad input


def test_a_float_is_what_its_name_says() -> None:
    with pytest.raises(ConfigError, match="nvfp4 has 4 bits in groups of 16"):
        Precision("nvfp4", 4, 32, True)
    with pytest.raises(ConfigError, match="fp8 has 8 bits in groups of a row"):
        Precision("fp8", 8, 128, True)


def test_a_row_that_no_group_divides_stays_untouched() -> None:
    assert NVFP4.nearest(172).kind == "none" and NVFP4.nearest(176) == NVFP4
    assert FP8.nearest(173) == FP8 and BLOCK.nearest(192).kind == "none"
