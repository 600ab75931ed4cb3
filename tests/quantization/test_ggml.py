"""ggml's blocks: the gguf package must read what we pack, and our search must find good scales."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from weakref import ReferenceType, ref

import gguf
import numpy as np
import pytest
import torch

from optimizer.errors import ConfigError
from optimizer.plan import GGML, Precision
from optimizer.quantization import ggml
from optimizer.quantization.importance import Weighted
from optimizer.quantization.uniform import Nearest


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    """Rows of different sizes; one of zeros, a constant one, one with an outlier, a positive one."""
    draw = torch.Generator().manual_seed(3)
    w = torch.randn(24, 512, generator=draw) * torch.rand(24, 1, generator=draw) * 0.1
    w[0], w[1], w[2, 7], w[3] = 0, 0.25, 4, w[3].abs()
    return w


def official(blocks: ggml.Blocks) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[blocks.precision.kind.upper()]
    return torch.from_numpy(np.array(gguf.quants.dequantize(blocks.data.numpy(), kind)))


@pytest.mark.parametrize("kind", list(ggml.LAYOUTS))
def test_the_gguf_package_reads_what_we_pack(kind: str, weight: torch.Tensor) -> None:
    precision = Precision.ggml(kind)
    blocks = ggml.encode(weight, precision)
    assert blocks.data.numel() == precision.bytes(*weight.shape)
    assert torch.equal(blocks.decode(), official(blocks))
    assert torch.equal(ggml.round_to(weight, precision), blocks.decode())
    assert not blocks.decode()[0].any()


@pytest.mark.parametrize("kind", list(GGML))
def test_sizes_are_those_of_the_gguf_package(kind: str) -> None:
    block = GGML[kind]
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    assert sizes == (block.weights, block.size)


def finite_blocks(kind: str) -> ggml.Blocks:
    """Forty blocks of random bytes, with scales that are finite numbers."""
    block, draw = GGML[kind], torch.Generator().manual_seed(5)
    raw = torch.randint(0, 256, (40, block.size), generator=draw, dtype=torch.uint8)
    half = {"q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208]}
    for at in half.get(kind, [0, 2] if kind in ("q4_1", "q5_1") else [0]):
        raw[:, at + 1] = 0x2C
    return ggml.Blocks(Precision.ggml(kind), raw, block.weights)


@pytest.mark.parametrize("kind", list(ggml.LAYOUTS))
def test_every_bit_is_found_again(kind: str) -> None:
    """Unpacked and packed they are the same."""
    blocks = finite_blocks(kind)
    grid, codes = blocks.open()
    assert torch.equal(grid.pack(codes).data, blocks.data)
    assert torch.equal(blocks.decode(), official(blocks))


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_never_worse_than_the_extremes(kind: str, weight: torch.Tensor) -> None:
    plain = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    theirs = official(ggml.Blocks(Precision.ggml(kind), torch.from_numpy(plain), 512))
    ours = ggml.round_to(weight, Precision.ggml(kind))
    assert (ours - weight).square().sum() < 1.001 * (theirs - weight).square().sum()


def test_more_bits_lose_less(weight: torch.Tensor) -> None:
    order = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"]
    lost = [(ggml.round_to(weight, Precision.ggml(k)) - weight).square().sum() for k in order]
    assert all(after < 0.5 * before for before, after in pairwise(lost))


def test_important_columns_are_kept_better(weight: torch.Tensor) -> None:
    importance = torch.ones(512)
    importance[::8] = 50.0
    rest = weight[4:]
    plain = ggml.fit(rest, "q4_k")
    guided = ggml.fit(rest, "q4_k", importance)
    lost = [(g.values(g.round(rest)) - rest)[:, ::8].square().sum() for g in (plain, guided)]
    assert lost[1] < 0.9 * lost[0]


def test_what_llama_cpp_falls_back_to() -> None:
    assert Precision.ggml("q4_k").nearest(576).name == "q5_0"
    assert Precision.ggml("q6_k").nearest(512).name == "q6_k"
    assert Precision.ggml("q3_k").nearest(576).name == "q4_0"
    assert Precision.ggml("q5_k").nearest(100).name == "none"


def test_a_type_has_one_shape() -> None:
    with pytest.raises(ConfigError, match="blocks of 256"):
        Precision("q4_k", 4, 64)


def test_uneven_levels_are_found_as_a_search_finds_them() -> None:
    """Also halfway between two, far beyond all, and where there is no number."""
    levels = torch.tensor(ggml.NONLINEAR, dtype=torch.float32)
    borders = (levels[1:] + levels[:-1]) / 2
    beside = [torch.nextafter(borders, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    far = torch.tensor([-1e9, 1e9, -torch.inf, torch.inf, torch.nan, 0.0])
    x = torch.cat([borders, *beside, levels, far, torch.linspace(-140, 140, 4001)])
    found = ggml._nearest(x, torch.ones(1), torch.zeros(1), "iq4_xs")
    assert torch.equal(found, levels[torch.bucketize(x, borders)])


@pytest.mark.parametrize("kind", ["q4_k", "iq4_xs"])
@pytest.mark.parametrize("rounder", [Nearest(), Weighted(importance=torch.ones(256))])
def test_grids_are_dropped_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, kind: str, rounder: Nearest
) -> None:
    """Those of a vocabulary together have more bytes than its blocks."""
    weight = torch.randn(12, 256)
    whole = rounder.encode(weight, Precision.ggml(kind)).pack()["blocks"]
    made: list[ReferenceType[Any]] = []
    alive: list[int] = []
    fit = ggml.fit

    def watched(*given: Any) -> Any:
        alive.append(sum(x() is not None for x in made))
        grid = fit(*given)
        made.append(ref(grid))
        return grid

    monkeypatch.setattr(ggml, "CHUNK", 512)
    monkeypatch.setattr(ggml, "fit", watched)
    found = rounder.encode(weight, Precision.ggml(kind)).pack()["blocks"]
    assert torch.equal(found, whole)
    assert len(alive) == 6
    assert max(alive) <= 1


def test_rows_of_16_bits_are_widened_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "CHUNK", 512)
    weight = torch.randn(12, 256).half()
    parts = list(ggml.slices(weight))
    assert torch.equal(torch.cat(parts), weight.float())
    assert {x.untyped_storage().nbytes() for x in parts} == {512 * 4}
