"""What a palette's few words stand for."""

from __future__ import annotations

from typing import Any

import pytest

from optimizer.errors import ConfigError
from optimizer.plan import Precision
from optimizer.plan.palette import Palette


def names(**settings: Any) -> list[str]:
    return [p.name for p in Palette(**settings).precisions()]


def test_the_default_is_asymmetric_in_groups_of_64_and_the_reference() -> None:
    every = [f"int{bits}_g64" for bits in (2, 3, 4, 5, 6, 7, 8)]
    assert names() == [*every, "none"]
    assert not any(p.symmetric for p in Palette().precisions())


def test_smallest_codes_first_and_within_them_the_smallest_groups() -> None:
    """A channel is one group as long as a row, so it comes last; ternary's 1.6 bits lie between."""
    found = names(bits=[4, 2, "ternary", 16, 1], group_size=[128, 0, 32])
    assert found == [
        "int1_g32", "int1_g128", "int1_channel",
        "ternary_g32", "ternary_g128", "ternary_channel",
        "int2_g32", "int2_g128", "int2_channel",
        "int4_g32", "int4_g128", "int4_channel",
        "none",
    ]  # fmt: skip


def test_groups_of_hundreds_of_thousands_still_come_before_a_channel() -> None:
    assert names(bits=[4], group_size=[0, 2**20]) == [f"int4_g{2**20}", "int4_channel"]


def test_symmetric_is_asked_for_but_one_bit_and_ternary_always_are() -> None:
    plain = Palette(bits=[1, "ternary", 4]).precisions()
    assert [p.symmetric for p in plain] == [True, True, False]
    assert all(p.symmetric for p in Palette(bits=[1, 4, 8], symmetric=True).precisions())
    assert names(bits=[4], symmetric=True) == ["int4_g64_sym"]


def test_llama_cpps_types_have_their_own_blocks_and_no_repetition() -> None:
    assert Palette(bits=["q4_k", "q8_0"], group_size=[32, 64]).precisions() == [
        Precision("q4_k", 4, 256),
        Precision("q8_0", 8, 32),
    ]
    assert names(bits=[16, 16, 4, 4]) == ["int4_g64", "none"]


def test_floats_have_groups_of_their_own() -> None:
    found = Palette(bits=["fp8", "nvfp4", "mxfp4", "fp8_block", 16], group_size=64).precisions()
    assert [(p.name, p.group_size) for p in found] == [
        ("nvfp4", 16), ("mxfp4", 32), ("fp8_block", 128), ("fp8", None), ("none", None),
    ]  # fmt: skip
    assert all(p.symmetric for p in found[:-1])


def test_a_channel_and_groups_of_the_same_width_can_be_put_in_order() -> None:
    found = Palette(bits=[8], group_size=[64, 0], symmetric=True).precisions()
    assert [p.name for p in sorted(found, key=lambda p: p)] == ["int8_g64_sym", "int8_channel_sym"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": []}, "at least one entry"),
        ({"group_size": []}, "at least one entry"),
        ({"fit": "loose"}, "untouched, nearest, strict, not 'loose'"),
        ({"group_size": -1}, "not -1"),
        ({"group_size": True}, "not True"),
        ({"group_size": [64, "32"]}, "not '32'"),
        ({"bits": [True]}, "not True"),
        ({"bits": ["int4"]}, "not 'int4'"),
        ({"bits": [4.5]}, "not 4.5"),
        ({"bits": [9]}, "9 bits"),
        ({"bits": [0]}, "0 bits"),
    ],
)
def test_what_is_no_palette(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Palette(**settings).precisions()
    assert words in str(error.value)


@pytest.mark.parametrize("fit", ["untouched", "nearest", "strict"])
def test_every_fit_that_is_offered_is_taken(fit: str) -> None:
    assert names(bits=[4], fit=fit) == ["int4_g64"]
