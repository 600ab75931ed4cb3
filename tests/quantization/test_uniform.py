"""Rounding against the definitions, packing against Python's own integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from optimizer.plan import Precision
from optimizer.quantization import uniform
from optimizer.quantization.uniform import CACHED, Codes, Nearest, pack, unpack
from tests.plan.test_inventory import KINDS, precisions


def brute_pack(codes: list[int], precision: Precision) -> bytes:
    """One large integer in base 2^b, or base 3 in fives, cut into bytes."""
    if precision.kind == "ternary":
        fives = [codes[i : i + 5] for i in range(0, len(codes), 5)]
        return bytes(sum(code * 3**i for i, code in enumerate(five)) for five in fives)
    number = sum(code << (precision.bits * i) for i, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * precision.bits // 8), "little")


@st.composite
def coded(draw: st.DrawFn) -> tuple[Precision, np.ndarray]:
    kind, bits = draw(st.sampled_from(KINDS))
    levels = 3 if kind == "ternary" else 2**bits
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 40)))
    codes = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, levels - 1)))
    return Precision(kind, bits, None, kind == "ternary"), codes


def test_a_large_layer_is_rounded_in_pieces_as_one() -> None:
    weight = torch.randn(CACHED // 64 + 3, 64, generator=torch.Generator().manual_seed(0))
    precision = Precision("int", 3, 32)
    assert torch.equal(
        Nearest().round(weight, precision), Nearest().codes(weight, precision).decode()
    )


@given(coded())
def test_packing_is_a_dense_little_endian_stream(case: tuple[Precision, np.ndarray]) -> None:
    precision, codes = case
    packed = pack(torch.from_numpy(codes), precision)
    assert packed.dtype == torch.uint8
    assert [bytes(row) for row in packed.numpy()] == [
        brute_pack(row.tolist(), precision) for row in codes
    ]


@given(coded())
def test_unpacking_is_the_inverse(case: tuple[Precision, np.ndarray]) -> None:
    precision, codes = case
    again = unpack(pack(torch.from_numpy(codes), precision), precision, codes.shape[1])
    assert again.dtype == torch.uint8
    assert np.array_equal(again.numpy(), codes)


def test_a_large_layer_is_packed_in_pieces_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 8, (7, 40), generator=torch.Generator().manual_seed(0)).byte()
    precision = Precision("int", 3, None)
    whole = pack(codes, precision)
    monkeypatch.setattr(uniform, "PIECE", 80)
    assert torch.equal(pack(codes, precision), whole)
    assert torch.equal(unpack(whole, precision, 40), codes)


values = st.floats(-4, 4, width=32).map(lambda x: round(x, 4))


@given(precisions(), st.data())
def test_what_is_stored_unpacks_to_what_was_scored(
    precision: Precision, data: st.DataObject
) -> None:
    cols = 2 * (precision.group_size or 9)
    array = data.draw(hnp.arrays(np.float32, (2, cols), elements=values))
    weight = torch.from_numpy(array)
    before = weight.clone()
    rounded = Nearest().round(weight, precision)
    codes = Nearest().encode(weight, precision)
    assert torch.equal(weight, before), "the quantizer wrote to its input"
    assert torch.equal(codes.decode(), rounded)
    assert torch.equal(Codes.unpack(codes.pack(), precision, cols).decode(), rounded)


@given(st.integers(2, 8), st.booleans(), st.sampled_from([None, 4, 6]), st.data())
def test_rounding_is_the_nearest_of_the_levels(
    bits: int, symmetric: bool, group: int | None, data: st.DataObject
) -> None:
    """Brute force: all 2^b values that a group's scale and zero point can express."""
    precision = Precision("int", bits, group, symmetric)
    weight = data.draw(hnp.arrays(np.float32, (2, 12), elements=values))
    codes = Nearest().encode(torch.from_numpy(weight), precision)
    rounded = Nearest().round(torch.from_numpy(weight), precision).numpy()
    scales = codes.scales.double().repeat_interleave(12 // codes.scales.shape[1], 1).numpy()
    if codes.zeros is None:
        zeros = np.full_like(scales, 2 ** (bits - 1))
    else:
        zeros = codes.zeros.double().repeat_interleave(12 // codes.zeros.shape[1], 1).numpy()
    levels = (np.arange(2**bits) - zeros[..., None]) * scales[..., None]
    least = np.abs(levels - weight[..., None]).min(-1)
    assert (np.abs(rounded - weight) <= least + 1e-5 * scales + 1e-12).all()


@given(st.integers(2, 8), st.data())
def test_the_error_is_at_most_a_step(bits: int, data: st.DataObject) -> None:
    """Half a step inside the range, up to one at its ends: the zero point is rounded too."""
    weight = data.draw(hnp.arrays(np.float32, (1, 16), elements=values))
    rounded = Nearest().round(torch.from_numpy(weight), Precision("int", bits)).numpy()
    span = max(weight.max(), 0) - min(weight.min(), 0)
    assert np.abs(rounded - weight).max() <= 1.02 * span / (2**bits - 1) + 1e-6


def test_asymmetric_rounding_by_hand() -> None:
    """min -1, max 2, 2 bits: s = 1, z = 1, levels -1 0 1 2."""
    weight = torch.tensor([[-1.0, -0.4, 0.6, 2.0]])
    codes = Nearest().encode(weight, Precision("int", 2))
    assert codes.codes.tolist() == [[0, 1, 2, 3]]
    assert codes.scales.tolist() == [[1.0]] and codes.zeros is not None
    assert codes.zeros.tolist() == [[1]]
    assert codes.decode().tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_one_bit_keeps_signs_and_the_mean_size() -> None:
    weight = torch.tensor([[-3.0, 1.0, 0.0, 4.0]])
    assert Nearest().round(weight, Precision("int", 1, None, True)).tolist() == [[-2, 2, 2, 2]]


def test_ternary_drops_the_small_and_averages_the_rest() -> None:
    """Mean size 2, threshold 1.4: 3 and -4 stay, their mean 3.5."""
    weight = torch.tensor([[3.0, -4.0, 0.5, -0.5]])
    assert Nearest().round(weight, Precision("ternary", 2, None, True)).tolist() == [
        [3.5, -3.5, 0, 0]
    ]


@pytest.mark.parametrize(("kind", "bits"), KINDS)
@pytest.mark.parametrize("fill", [0.0, 1e-9, 0.75, -0.75, 6e4, -6e4])
def test_constant_and_extreme_groups_stay_finite(kind: str, bits: int, fill: float) -> None:
    weight = torch.full((2, 8), fill)
    for symmetric in {True, kind == "ternary" or bits == 1}:
        rounded = Nearest().round(weight, Precision(kind, bits, 4, symmetric))
        assert torch.isfinite(rounded).all()
        assert (rounded - weight).abs().max() <= 0.51 * abs(fill) + 1e-6


def test_a_group_does_not_hear_its_neighbours() -> None:
    weight = torch.randn(3, 64)
    loud = weight.clone()
    loud[:, 32:] *= 50
    precision = Precision("int", 4, 32)
    a, b = Nearest().round(weight, precision), Nearest().round(loud, precision)
    assert torch.equal(a[:, :32], b[:, :32])
    assert not torch.equal(a[:, 32:], b[:, 32:])


def test_more_bits_are_closer() -> None:
    weight = torch.randn(8, 64)

    def error(precision: Precision) -> float:
        return float((Nearest().round(weight, precision) - weight).norm())

    errors = [error(Precision("int", bits, 32)) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert error(Precision()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_round_as_their_fp32_values(dtype: torch.dtype) -> None:
    weight: Tensor = torch.randn(4, 32).to(dtype)
    precision = Precision("int", 3, 16)
    assert torch.equal(
        Nearest().round(weight, precision), Nearest().round(weight.float(), precision)
    )
