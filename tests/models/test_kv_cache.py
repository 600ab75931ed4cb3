"""The cache of few bits: its numbers against llama.cpp's own, its bytes, and a model that uses it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from optimizer.hardware import memory
from optimizer.hardware.geometry import geometry
from optimizer.models import kv_cache
from optimizer.plan import Budget


@pytest.mark.parametrize(("bits", "kind"), [(8, Kind.Q8_0), (4, Kind.Q4_0)])
def test_it_holds_what_llama_cpp_would(bits, kind):
    rows = torch.randn(50, 96, generator=torch.Generator().manual_seed(1)) * 3
    rows[3, :32] = 0
    stored = gguf.quants.quantize(rows.numpy(), kind)
    mine = kv_cache.encode(rows, bits)
    assert mine.shape[-1] * 8 / 96 == {8: 8.5, 4: 4.5}[bits]
    theirs = gguf.quants.dequantize(stored, kind)
    np.testing.assert_array_equal(kv_cache.decode(mine, bits, 96, torch.float32).numpy(), theirs)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("length", [16, 24, 80, 2])
def test_short_heads_have_short_blocks(bits, length):
    x = torch.randn(2, 3, 5, length, generator=torch.Generator().manual_seed(2))
    stored = kv_cache.encode(x, bits)
    assert stored.shape[-1] * 8 == length * (bits + 16 / memory.block_of(length))
    back = kv_cache.decode(stored, bits, length, torch.float32)
    blocks = x.unflatten(-1, (-1, memory.block_of(length)))
    step = blocks.abs().amax(-1, keepdim=True) / (127 if bits == 8 else 8)
    error = (back - x).unflatten(-1, (-1, memory.block_of(length))).abs()
    assert (error <= step * (0.57 if bits == 8 else 1.01)).all()


def read(net, ids, kept):
    with torch.inference_mode():
        return net(input_ids=ids, past_key_values=kept, use_cache=True).logits


def test_bytes_are_those_of_the_memory_model(stories):
    ids = torch.arange(40).repeat(2, 1) % 90
    shape = geometry(stories.net.config.to_dict())
    for bits in (8, 4):
        kept = kv_cache.Cache(stories.net.config, bits)
        read(stories.net, ids, kept)
        found = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
        stored = memory.stored_bits(shape, "torch", bits)
        assert found == memory.cache_bytes(shape, 40, 2, stored)
        budget = Budget(memory="1GiB", context=40, batch=2, kv=bits)
        assert memory.use(shape, "torch", budget, 0).cache == found


def test_pieces_read_as_one(stories):
    ids = torch.arange(60)[None] % 90
    whole = read(stories.net, ids, kv_cache.Cache(stories.net.config, 4))
    kept = kv_cache.Cache(stories.net.config, 4)
    parts = [read(stories.net, ids[:, i : i + 20], kept) for i in range(0, 60, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_can_use_it(small):
    ids = torch.arange(24)[None] % 90
    with torch.inference_mode():
        exact = small.model.net(input_ids=ids, use_cache=False).logits
        found = {}
        for bits in (8, 4):
            with kv_cache.rounded(small.model.net, bits):
                rough = small.model.net(input_ids=ids, use_cache=False).logits
            found[bits] = float((rough - exact).norm() / exact.norm())
        again = small.model.net(input_ids=ids, use_cache=False).logits
    assert 0 < 2 * found[8] < found[4] < 0.5
    assert torch.equal(again, exact)


def test_floats_as_vllm_stores_them(stories):
    x = torch.tensor([[0.1, -3.3, 500.0, 1e-9]])
    kept = kv_cache.Cache(stories.net.config, 8, floating=True)
    keys, _ = kept.update(x.view(1, 1, 1, 4), x.view(1, 1, 1, 4), 0)
    assert keys.flatten().tolist() == [0.1015625, -3.25, 448.0, 0.0]


def test_gradients_are_those_of_the_rounded_model_straight_through(stories, monkeypatch):
    """The forward pass is the rounded one's; where rounding changes nothing, gradients are the
    plain model's."""
    net, ids = stories.net, torch.arange(24)[None] % 90
    weight = net.get_parameter("model.layers.1.self_attn.k_proj.weight")

    def pass_over(bits):
        with kv_cache.rounded(net, bits):
            logits = net(input_ids=ids, use_cache=False).logits
        return logits, torch.autograd.grad(logits.square().mean(), weight)[0]

    before = weight.requires_grad
    weight.requires_grad_(True)
    try:
        plain, slope = pass_over(16)
        rough, rough_slope = pass_over(4)
        with torch.inference_mode(), kv_cache.rounded(net, 4):
            read_only = net(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(rough, read_only)
        assert not torch.allclose(rough, plain, rtol=1e-3, atol=1e-3)
        gap = float((rough_slope - slope).norm() / slope.norm())
        assert 1e-3 < gap < 0.9
        monkeypatch.setattr(kv_cache.Cache, "_in", lambda _self, x: x)
        monkeypatch.setattr(kv_cache.Cache, "_out", lambda _self, x, _like: x)
        torch.testing.assert_close(pass_over(4)[1], slope)
    finally:
        weight.requires_grad_(before)
