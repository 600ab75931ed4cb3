"""llama.cpp's own types: its functions give libgguf's bytes, the package gguf reads what we write, and
errors that are fed on from vector to vector lower the loss."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from optimizer.errors import ConfigError
from optimizer.plan import GGML, Precision
from optimizer.quantization import ggml, ggml_native, lattice
from optimizer.quantization.gptq import Solver
from optimizer.quantization.uniform import Nearest
from tests.quantization.test_encodings import kinds

ROWS, COLS = 12, 512


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.fixture(scope="module")
def hessian() -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    shared = torch.randn(900, 48, generator=rng) @ torch.randn(48, COLS, generator=rng)
    inputs = (shared + torch.randn(900, COLS, generator=rng)) * (0.3 + torch.arange(COLS) / COLS)
    return inputs.T @ inputs / len(inputs)


def read(blocks: ggml.Blocks) -> torch.Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[blocks.precision.kind.upper()]
    return torch.from_numpy(np.array(dequantize(blocks.data.numpy(), kind)))


@pytest.mark.parametrize("kind", kinds(ggml_native.NATIVE))
def test_bytes_are_the_oracle_s(kind: str, weight: torch.Tensor) -> None:
    """libgguf carries the same C functions, built by somebody else."""
    libgguf = pytest.importorskip("libgguf")
    importance = torch.linspace(0.1, 3, COLS)
    mine = ggml_native.encode(weight[:4], kind, importance).numpy()
    scaled = np.ascontiguousarray((importance / importance.mean()).numpy())
    number = libgguf.GGMLQuantizationType[kind.upper()]
    theirs = libgguf.quantize_rows(weight[:4].numpy(), number, imatrix=scaled)
    assert np.array_equal(mine, np.asarray(theirs).reshape(mine.shape))
    plain = ggml_native.encode(weight[:4], kind).numpy()
    assert kind.startswith("tq") or not np.array_equal(mine, plain)  # the weights matter


@pytest.mark.parametrize("run", range(8))
def test_zeros_inside_a_block_leave_the_rest_where_it_was(weight: torch.Tensor, run: int) -> None:
    """llama.cpp's function for iq3_s would write the rest of the block one place too early."""
    holed = weight[:, :256].clone()
    holed[:, 32 * run : 32 * run + 32] = 0
    found, plain = (Nearest().round(w, Precision.ggml("iq3_s")) for w in (holed, weight[:, :256]))
    kept = torch.arange(256) // 32 != run
    error, usual = (
        (f - w)[:, kept].square().sum() for f, w in ((found, holed), (plain, weight[:, :256]))
    )
    assert error < 1.2 * usual and (found[:, ~kept].abs() <= plain.abs().amax() / 8).all()
    assert not Nearest().round(torch.zeros(4, 256), Precision.ggml("iq3_s")).any()


@pytest.mark.parametrize("kind", kinds([*ggml_native.NATIVE, "iq4_xs"]))
def test_the_package_reads_what_is_rounded(kind: str, weight: torch.Tensor) -> None:
    precision = Precision.ggml(kind)
    blocks = Nearest().encode(weight, precision)
    assert blocks.data.numel() == precision.bytes(ROWS, COLS)
    assert torch.equal(read(blocks), blocks.decode())
    assert torch.equal(Nearest().round(weight, precision), blocks.decode())


@pytest.mark.parametrize("kind", kinds(lattice.LAYOUTS))
def test_vectors_are_packed_as_they_are_chosen(kind: str, weight: torch.Tensor) -> None:
    found = lattice.encode(weight, kind)
    index, signs, values = [], [], []
    for unit in range(COLS // lattice.UNIT):
        own = slice(unit * lattice.UNIT, (unit + 1) * lattice.UNIT)
        i, s, v = found.nearest(weight[:, own], unit, torch.ones(lattice.UNIT))
        index.append(i)
        signs.append(s)
        values.append(v)
    data = found.pack(torch.stack(index, 1), torch.stack(signs, 1))
    chosen = torch.cat(values, 1)
    assert torch.equal(ggml_native.decode(data, kind, COLS), chosen)
    # the nearest vector is found: no other of the list, with its best signs, is nearer
    unit, listed = 3, lattice.grid(kind)
    x = weight[:, unit * 8 : unit * 8 + lattice.LAYOUTS[kind].length]
    scale = found.scale[:, unit, None, None]
    if not lattice.LAYOUTS[kind].even:
        best = (x.abs()[:, None] - scale * listed).square().sum(2).amin(1)
        first = chosen[:, unit * 8 : unit * 8 + x.shape[1]]
        assert torch.allclose((x - first).square().sum(1), best, atol=1e-9)


@pytest.mark.parametrize("kind", kinds([*lattice.LAYOUTS, "iq4_xs"]))
def test_errors_fed_on_lower_the_loss(
    kind: str, weight: torch.Tensor, hessian: torch.Tensor
) -> None:
    precision = Precision.ggml(kind)

    def loss(blocks: ggml.Blocks) -> float:
        error = blocks.decode() - weight
        return float(((error @ hessian) * error).sum())

    (fed,) = Solver(order="columns").solve([(weight, precision)], hessian)
    assert torch.equal(read(fed), fed.decode())
    assert loss(fed) < 0.4 * loss(Nearest().encode(weight, precision))


@pytest.mark.parametrize("kind", kinds(["iq2_xxs", "iq2_xs", "iq3_s", "iq1_m"]))
def test_importance_is_told_apart(kind: str, weight: torch.Tensor) -> None:
    loud = torch.ones(COLS)
    loud[::8] = 50.0
    plain, guided = (
        ggml_native.decode(ggml_native.encode(weight, kind, v), kind, COLS) - weight
        for v in (None, loud)
    )
    assert (guided.square() * loud).sum() < 0.9 * (plain.square() * loud).sum()


def test_sizes_are_those_of_the_package() -> None:
    import gguf

    for kind, block in GGML.items():
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
        assert sizes == (block.weights, block.size), kind


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor) -> None:
    ggml_native.library.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"mezzotint\[gguf\]"):
        ggml_native.encode(weight, "iq2_s")
    ggml_native.library.cache_clear()
