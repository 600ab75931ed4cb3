from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import ConfigError
from optimizer.plan import (
    FLOATS,
    UNTOUCHED,
    Inventory,
    Layer,
    Other,
    Place,
    Precision,
    glob,
    packed_bytes,
)
from optimizer.quantization.uniform import Nearest

KINDS = [("int", bits) for bits in range(1, 9)] + [("ternary", 2)]


@st.composite
def precisions(draw: st.DrawFn) -> Precision:
    kind, bits = draw(st.sampled_from([*KINDS, *((kind, 0) for kind in FLOATS)]))
    if kind in FLOATS:
        return Precision.floating(kind)
    symmetric = kind == "ternary" or bits == 1 or draw(st.booleans())
    return Precision(kind, bits, draw(st.sampled_from([None, 1, 2, 3, 5, 8, 32])), symmetric)


@given(precisions(), st.integers(1, 5), st.integers(1, 4))
def test_bytes_are_those_of_the_stored_tensors(
    precision: Precision, rows: int, groups: int
) -> None:
    cols = groups * (precision.group_size or 7)
    stored = Nearest().encode(torch.randn(rows, cols), precision).pack()
    promised = precision.parts(rows, cols)
    assert {k: tuple(v.shape) for k, v in stored.items()} == {
        k: s for k, (_, s) in promised.items()
    }
    dtypes = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
    assert {k: v.dtype for k, v in stored.items()} == {
        k: dtypes[d] for k, (d, _) in promised.items()
    }
    assert precision.bytes(rows, cols) == sum(
        v.numel() * v.element_size() for v in stored.values()
    )


@given(st.integers(0, 500), st.integers(1, 8))
def test_packed_bytes_hold_the_bits_and_waste_less_than_a_byte(count: int, bits: int) -> None:
    size = packed_bytes(count, Fraction(bits))
    assert count * bits <= 8 * size < count * bits + 8


@given(st.integers(0, 500))
def test_a_byte_holds_five_trits(count: int) -> None:
    size = packed_bytes(count, Fraction(8, 5))
    assert 3**count <= 256**size
    assert size * 5 < count + 5


def test_untouched_is_two_bytes_a_weight() -> None:
    assert UNTOUCHED.bytes(3, 5) == 30
    assert UNTOUCHED.parts(3, 5) == {}
    assert UNTOUCHED.code_bits == 16


def test_llama_cpps_blocks_are_one_tensor() -> None:
    assert Precision.ggml("q4_k").parts(3, 512) == {"blocks": ("U8", (3, 2 * 144))}
    assert Precision.ggml("q8_0").bytes(3, 64) == 3 * 2 * 34


def test_int4_in_groups_of_64_is_what_a_person_computes() -> None:
    """Per row of 576: 288 bytes of codes, 9 scales of 2 bytes, 9 zero points in 5 bytes."""
    assert Precision("int", 4, 64).bytes(10, 576) == 10 * (288 + 18 + 5)
    assert Precision("int", 4, 64, True).bytes(10, 576) == 10 * (288 + 18)
    assert Precision("int", 3).bytes(10, 576) == 10 * (216 + 2 + 1)


def test_names_are_distinct_and_say_what_they_mean() -> None:
    assert Precision.floating("fp8_block").name == "fp8_block"
    found = {
        Precision(kind, bits, group, symmetric).name
        for (kind, bits), group, symmetric in product(KINDS[1:8], (None, 32, 64), (True, False))
    }
    assert len(found) == 7 * 3 * 2
    assert Precision("int", 4, 64).name == "int4_g64"
    assert Precision("int", 4, 64, True).name == "int4_g64_sym"
    assert Precision("int", 1, None, True).name == "int1_channel"
    assert Precision("ternary", 2, 32, True).name == "ternary_g32"
    assert UNTOUCHED.name == "none"


@pytest.mark.parametrize(
    ("kind", "bits", "group"),
    [("int", 0, 64), ("int", 9, 64), ("int", 16, None), ("ternary", 3, 64), ("none", 8, None),
     ("float", 8, None), ("int", 4, 0), ("int", 4, -1)],
)  # fmt: skip
def test_an_impossible_precision_is_refused(kind: str, bits: int, group: int | None) -> None:
    with pytest.raises(ConfigError, match="palette"):
        Precision(kind, bits, group)


@given(st.integers(1, 300), st.integers(1, 400))
def test_nearest_divides_and_no_divisor_is_nearer(wanted: int, cols: int) -> None:
    found = Precision("int", 4, wanted).nearest(cols).group_size
    assert found is not None and cols % found == 0

    def far(d: int) -> float:
        return max(d / wanted, wanted / d)

    assert far(found) <= min(far(d) for d in range(1, cols + 1) if cols % d == 0) * (1 + 1e-12)


def test_nearest_keeps_what_fits() -> None:
    precision = Precision("int", 4, 64)
    assert precision.nearest(128) is precision
    assert Precision("int", 4).nearest(7) == Precision("int", 4)


@pytest.mark.parametrize(
    ("kind", "cols", "wanted"),
    [
        ("q4_k", 512, "q4_k"),  # 256 divides
        ("q4_k", 96, "q5_0"),  # 32 does, and llama.cpp takes a bit more
        ("q2_k", 32, "q4_0"),
        ("q6_k", 288, "q8_0"),
        ("iq2_xxs", 64, "iq4_nl"),
        ("q4_k", 48, "none"),  # nothing divides
        ("q8_0", 48, "none"),  # nothing to fall back to
    ],
)
def test_what_llama_cpp_stores_where_no_block_fits(kind: str, cols: int, wanted: str) -> None:
    """As llama-quant.cpp's tensor_type_fallback."""
    assert Precision.ggml(kind).nearest(cols).name == wanted


def test_a_tie_between_two_divisors_goes_to_the_smaller() -> None:
    """Nearness is a ratio: from 8 to 16 is as far as from 8 to 4, from 10 to 25 farther than to 5."""
    assert Precision("int", 4, 10).nearest(25) == Precision("int", 4, 5)
    assert Precision("int", 4, 8).nearest(12) == Precision("int", 4, 6)
    assert Precision("int", 4, 4).nearest(14) == Precision("int", 4, 7)  # 7/4 < 4/2
    assert Precision("int", 4, 6).nearest(36) == Precision("int", 4, 6)
    assert Precision("int", 4, 3).nearest(256) == Precision("int", 4, 4)  # 4/3 < 3/2


# ---------------------------------------------------------------- where numbers lie


@pytest.mark.parametrize(
    ("place", "stored", "live", "inside"),
    [
        (Place("w", (4, 8), (8, 1), (8, 1)), 32, 32, True),
        (Place("w", (4, 8), (8, 1), (8, 1)), 31, 32, False),  # the last is number 31
        (Place("w", (4, 8), (8, 1), (8, 1)), 32, 31, False),
        (Place("w", (4, 8), (8, 1), (8, 1), at_stored=3), 35, 32, True),
        (Place("w", (4, 8), (8, 1), (8, 1), at_stored=3), 34, 32, False),
        (Place("w", (4, 8), (8, 1), (8, 1), at_live=-1), 32, 32, False),
        (Place("w", (4, 8), (8, 1), (-8, 1), at_live=24), 32, 32, False),  # strides go up only
        (Place("w", (4, 8), (1, 4), (8, 1)), 32, 32, True),  # transposed
        (Place("w", (4, 8), (8,), (8, 1)), 99, 99, False),
        (Place("w", (4,), (8, 1), (8, 1)), 99, 99, False),
        (Place("w", (4, 8), (8, 1), (8,)), 99, 99, False),
        (Place("w", (0, 8), (8, 1), (8, 1)), 99, 99, False),
        (Place("w", (1, 1), (8, 1), (8, 1)), 1, 1, True),
        (Place("w", (), (), ()), 1, 1, True),
    ],
)
def test_a_place_fits_if_its_last_number_does(
    place: Place, stored: int, live: int, inside: bool
) -> None:
    assert place.fits(stored, live) is inside


def test_places_survive_json() -> None:
    place = Place("m.fused.weight", (4, 8), (8, 1), (16, 1), at_stored=32, at_live=8)
    one = replace(layer("m.q_proj.weight"), places=(place,), expert=3, transposed=True)
    other = Other("norm.weight", "norm.weight", "F32", (8,), "a norm", (place,))
    left = (("mtp.weight", "the class has no place for it"),)
    found = Inventory((one,), (other,), "BF16", left)
    again = Inventory.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found and again.layers[0].parameters == ("m.fused.weight",)


def test_what_is_kept_or_left_out_is_a_sentence_a_reason() -> None:
    others = (
        Other("a", "a", "F16", (2,)),  # no matrix: nothing to say
        Other("b", "b", "F16", (2, 2), "they choose the experts"),
        Other("c", "", "F16", (2, 2), "they choose the experts"),
        Other("d", "d", "F16", (2, 2), "a vision tower's"),
    )
    found = Inventory((layer("m.q_proj.weight"),), others, "F16", (("e", "no place"),))
    assert found.notes == (
        "2 tensors (b, ...) kept as they are: they choose the experts.",
        "d kept as they are: a vision tower's.",
        "e left out: no place.",
    )
    assert [x.name for x in found.held] == ["m.q_proj.weight", "a", "b", "d"]


@pytest.mark.parametrize(("kind", "block", "seen"), [
    ("linear", 0, True), ("conv1d", 3, True), ("linear", None, False), ("head", 0, False),
    ("experts", 0, False), ("embedding", 0, False),
])  # fmt: skip
def test_inputs_of_modules_in_blocks_can_be_watched(
    kind: str, block: int | None, seen: bool
) -> None:
    assert layer("m.x.weight", kind, block).watchable is seen


@pytest.mark.parametrize(("dtype", "width"), [("F32", 4), ("BF16", 2), ("F16", 2)])
def test_untouched_a_layer_keeps_the_width_that_it_has(dtype: str, width: int) -> None:
    one = replace(layer("m.x.weight"), dtype=dtype)
    assert one.bytes(Precision()) == 4 * 8 * width
    # 32 codes of 4 bits, 4 fp16 scales, 4 zero points of 4 bits in a byte a row
    assert one.bytes(Precision("int", 4)) == 16 + 8 + 4


# ---------------------------------------------------------------- scope and groups


def layer(name: str, kind: str = "linear", block: int | None = 0, **more: object) -> Layer:
    role = name.split(".")[-2]
    values: dict[str, object] = {"parameter": name, "shape": (4, 8), **more}
    return Layer(name, 4, 8, kind, role, block, **values)  # type: ignore[arg-type]


NAMES = ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj")
INVENTORY = Inventory(
    layers=(
        layer("model.embed.weight", "embedding", None),
        *(layer(f"model.layers.{b}.{n}.weight", block=b) for b in (0, 1) for n in NAMES),
        layer("lm_head.weight", "head", None),
    ),
    others=(),
    dtype="F16",
)


@pytest.mark.parametrize(
    ("scope", "count"),
    [
        (["blocks"], 10),
        (["embeddings"], 1),
        (["head"], 1),
        (["all"], 12),
        (["blocks", "head"], 11),
        (["*.0.*"], 5),
        (["*q_proj"], 2),
        (["*q_proj.weight", "model.layers.0.?_proj"], 4),
        (["blocks", "blocks"], 10),
    ],
)
def test_scope_finds(scope: list[str], count: int) -> None:
    found = INVENTORY.scoped(scope)
    assert len(found) == count
    order = [x.name for x in INVENTORY.layers]
    assert [x.name for x in found] == sorted((x.name for x in found), key=order.index)


def test_an_embedding_inside_of_a_block_is_an_embedding() -> None:
    """Doge's experts look up their rows."""
    inside = layer("model.layers.0.mlp.up_embed.weight", "embedding")
    inventory = Inventory((layer("model.layers.0.q.weight"), inside), (), "BF16")
    assert inventory.scoped(["embeddings"]) == (inside,)
    assert inside not in inventory.scoped(["blocks"])


def test_a_tied_embedding_is_the_head_too() -> None:
    tied = Inventory((layer("model.embed.weight", "embedding", None, tied=True),), (), "F16")
    assert tied.scoped(["head"]) == tied.scoped(["embeddings"]) == tied.layers


@pytest.mark.parametrize("pattern", ["nothing", "q_proj", "model", "*.7.*", "Blocks", "q_proj$"])
def test_a_pattern_that_matches_nothing_is_an_error_with_examples(pattern: str) -> None:
    with pytest.raises(ConfigError) as error:
        INVENTORY.scoped(["blocks", pattern])
    said = str(error.value)
    assert repr(pattern) in said and "of the 12 layers" in said
    assert "(for example model.embed.weight, model.layers.1.q_proj.weight, lm_head.weight)" in said


def test_glob_is_over_the_whole_name_and_takes_dots_literally() -> None:
    assert glob("a.b").fullmatch("a.b.weight")
    assert not glob("a.b").fullmatch("axb")
    assert not glob("a").fullmatch("a.b.weight.scale")


def test_inventory_survives_json() -> None:
    assert Inventory.from_json(INVENTORY.to_json()) == INVENTORY
