"""Packed products against unpacked weights, and whole models with them against exact ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import optimizer
from optimizer.formats.torch import kernels, modules, packed
from optimizer.models.model import Model
from optimizer.plan import Inventory, Precision
from optimizer.quantization.uniform import Nearest
from tests.conftest import ARCHITECTURES, build, opened, planned

KINDS = [
    *(Precision("int", b, g) for b, g in ((4, 32), (4, 64), (4, 256), (8, 64), (8, 128))),
    *(Precision("int", b, g, True) for b, g in ((4, None), (4, 96), (8, 32), (8, None))),
    *(Precision("int", b, 64, b % 2 == 0) for b in (2, 3, 5, 6, 7)),
]
TARGET = kernels.Target(torch.bfloat16, "cpu", wide=True)


@pytest.mark.parametrize("precision", KINDS, ids=lambda p: p.name)
def test_a_product_has_the_packed_weights(precision: Precision) -> None:
    torch.manual_seed(1)
    cols = 192 if precision.group_size == 96 else 256
    codes = Nearest().codes(torch.randn(48, cols) * 0.1 + 0.03, precision)
    assert kernels.fits(precision, 48, cols, TARGET)
    product, exact = kernels.Product(codes), codes.decode()
    # scales of 8 bits, results of 8 bits, and in two products each has its own
    allowed = 2.0**-7 * float(exact.abs().max())
    assert float((product.weight().float() - exact).abs().max()) <= allowed
    for count in (1, 5, cols + 3):  # the last is unpacked once
        x = torch.randn(count, cols)
        found, wanted = product(x.bfloat16()).float(), x.bfloat16().float() @ exact.T
        assert float((found - wanted).norm() / wanted.norm()) < 0.01
    size = sum(b.numel() * b.element_size() for b in product.buffers())
    if precision.group_size == 64 and precision.bits in (4, 8):
        assert size <= 1.08 * precision.bytes(48, cols)


@pytest.mark.parametrize(
    ("precision", "rows", "dtype", "device"),
    [
        (Precision("int", 4, 48), 64, torch.bfloat16, "cpu"),
        (Precision("int", 4, 32), 40, torch.bfloat16, "cpu"),
        (Precision("int", 4, 32), 64, torch.float32, "cpu"),
        (Precision("int", 3, 32), 64, torch.bfloat16, "cpu"),
        (Precision("ternary", 2, 64, True), 64, torch.bfloat16, "cpu"),
        (Precision("int", 4, 32), 64, torch.bfloat16, "meta"),
        (Precision.ggml("q4_0"), 64, torch.bfloat16, "cpu"),
        (Precision(), 64, torch.bfloat16, "cpu"),
    ],
)
def test_what_has_no_product(
    precision: Precision, rows: int, dtype: torch.dtype, device: str
) -> None:
    assert not kernels.fits(precision, rows, 96 * 32, kernels.Target(dtype, device))


def mean_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = torch.log_softmax(p.float(), -1), torch.log_softmax(q.float(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_loaded_model_multiplies_packed_and_agrees(
    stories: Model, source: object, tmp_path: Path
) -> None:
    inventory: Inventory = stories.inventory
    kinds = [Precision("int", b, 32) for b in (4, 8, 3, 5)]
    blocks = inventory.scoped(["blocks"])
    plan = planned(inventory, {x.name: kinds[i % 4] for i, x in enumerate(blocks)})
    out = packed.save(plan, stories, source.folder, tmp_path / "out", lambda items, _: items)  # type: ignore[attr-defined]
    ids = torch.arange(3, 67).view(2, 32)
    with torch.inference_mode():
        exact = optimizer.load(out)(ids).logits
        fast_net, plain = optimizer.load(out, fast=True), packed.load(out, torch.bfloat16)
        fast, unpacked = fast_net(ids).logits, plain(ids).logits
        wide_net = optimizer.load(out, fast=True, wide=True)
        assert torch.equal(packed.load(out, once=True)(ids).logits, exact)
        wide, reference = wide_net(ids).logits, stories.net(ids).logits
    all_products = [m for m in wide_net.modules() if isinstance(m, kernels.Product)]
    assert len(all_products) == len(blocks)
    assert mean_kl(exact, wide) < max(2 * mean_kl(exact, unpacked), 1e-5)
    products = [m for m in fast_net.modules() if isinstance(m, kernels.Product)]
    assert len(products) == sum(p.bits in (4, 8) for p in plan.choice.values())
    assert not any(isinstance(m, kernels.Product) for m in plain.modules())
    moved = mean_kl(reference, exact)
    # bf16's own noise on this model; the packed product adds nothing to it
    assert mean_kl(exact, fast) < max(2 * mean_kl(exact, unpacked), 1e-5) < 0.2 * moved
    linear = fast_net.get_submodule(blocks[0].parameter.rpartition(".")[0])
    assert isinstance(linear, nn.Linear) and linear.weight.shape == (
        blocks[0].rows,
        blocks[0].cols,
    )
    text = fast_net.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape == (1, 8)


@pytest.mark.parametrize("precision", KINDS, ids=lambda p: p.name)
def test_rows_of_a_packed_matrix(precision: Precision) -> None:
    """What an embedding looks up is what the head multiplies by; 8 bits round their sum elsewhere."""
    torch.manual_seed(2)
    cols = 192 if precision.group_size == 96 else 256
    codes = Nearest().codes(torch.randn(256, cols) * 0.1 + 0.03, precision)
    product, ids = kernels.Product(codes), torch.tensor([[0, 63, 64], [200, 255, 7]])
    found, whole = product.lookup(ids), product.weight()[ids]
    assert found.shape == (2, 3, cols)
    allowed = 0.0 if precision.bits <= 4 else 2.0**-7 * float(whole.abs().max())
    assert float((found.float() - whole.float()).abs().max()) <= allowed


def test_only_whole_tiles_are_looked_up() -> None:
    assert kernels.looks_up(128, 64, "cpu") and not kernels.looks_up(96, 64, "cpu")
    assert not kernels.looks_up(128, 64, "cuda")  # another layout
    odd = modules.linear(
        torch.ones(128, 33), Precision("int", 4), True, "cpu"
    )()  # no product takes 33
    assert torch.equal(odd(torch.ones(1, 33).bfloat16()), torch.full((1, 128), 33.0).bfloat16())
    place = kernels.places(64)
    assert place is not None
    assert place.flatten().sort().values.equal(torch.arange(kernels.TILE * 64))


@pytest.mark.parametrize("words", [192, 96])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_head_is_multiplied_packed(tmp_path: Path, words: int, bits: int) -> None:
    """Where its rows fill tiles; its embedding then looks up rows of the same codes."""
    kind, dtype = ARCHITECTURES["llama"]
    small = opened("tied", build(tmp_path / "m", "llama", kind | {"vocab_size": words}, dtype))
    plan = planned(
        small.inventory, {x.name: Precision("int", bits, 32) for x in small.inventory.layers}
    )
    out = packed.save(plan, small.model, small.folder, tmp_path / "out", lambda items, _: items)
    net, plain = optimizer.load(out, fast=True), packed.load(out, torch.bfloat16)
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    packed_head = hasattr(head, "weight_packed") and isinstance(
        head.weight_packed, kernels.Product
    )
    assert packed_head == (words % kernels.TILE == 0)
    assert embedding.weight.shape == head.weight.shape == (words, 64)
    ids = torch.arange(3, 67).view(2, 32)
    with torch.inference_mode():
        loaded = optimizer.load(out)
        exact = loaded(ids).logits
        loaded.tie_weights()  # as lm-evaluation-harness does with every model
        assert torch.equal(loaded(ids).logits, exact)
        assert mean_kl(exact, net(ids).logits) < 2 * mean_kl(exact, plain(ids).logits)
