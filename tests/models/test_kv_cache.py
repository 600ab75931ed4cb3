"""The cache of few bits: its numbers against llama.cpp's own, its bytes, and a model that uses it."""

from __future__ import annotations

import copy

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from optimizer.errors import ConfigError
from optimizer.hardware import memory
from optimizer.hardware.geometry import geometry
from optimizer.models import kv_cache
from optimizer.plan import Budget
from optimizer.plan.cache import CacheKind


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
        kept = kv_cache.Cache(stories.net.config, CacheKind(bits))
        read(stories.net, ids, kept)
        found = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
        stored = memory.stored_bits(shape, "torch", bits)
        assert found == memory.cache_bytes(shape, 40, 2, stored)
        budget = Budget(memory="1GiB", context=40, batch=2, kv=bits)
        assert memory.use(shape, "torch", budget, 0).cache == found


def test_pieces_read_as_one(stories):
    ids = torch.arange(60)[None] % 90
    whole = read(stories.net, ids, kv_cache.Cache(stories.net.config, CacheKind(4)))
    kept = kv_cache.Cache(stories.net.config, CacheKind(4))
    parts = [read(stories.net, ids[:, i : i + 20], kept) for i in range(0, 60, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_can_use_it(small):
    ids = torch.arange(24)[None] % 90
    with torch.inference_mode():
        exact = small.model.net(input_ids=ids, use_cache=False).logits
        found = {}
        for bits in (8, 4):
            with kv_cache.rounded(small.model.net, CacheKind(bits)):
                rough = small.model.net(input_ids=ids, use_cache=False).logits
            found[bits] = float((rough - exact).norm() / exact.norm())
        again = small.model.net(input_ids=ids, use_cache=False).logits
    assert 0 < 2 * found[8] < found[4] < 0.5
    assert torch.equal(again, exact)


def test_floats_as_vllm_stores_them(stories):
    x = torch.tensor([[0.1, -3.3, 500.0, 1e-9]])
    kept = kv_cache.Cache(stories.net.config, CacheKind(8, floating=True))
    keys, _ = kept.update(x.view(1, 1, 1, 4), x.view(1, 1, 1, 4), 0)
    assert keys.flatten().tolist() == [0.1015625, -3.25, 448.0, 0.0]


def test_gradients_are_those_of_the_rounded_model_straight_through(stories, monkeypatch):
    """The forward pass is the rounded one's; where rounding changes nothing, gradients are the
    plain model's."""
    net, ids = stories.net, torch.arange(24)[None] % 90
    weight = net.get_parameter("model.layers.1.self_attn.k_proj.weight")

    def pass_over(bits):
        with kv_cache.rounded(net, CacheKind(bits)):
            logits = net(input_ids=ids, use_cache=False).logits
        return logits, torch.autograd.grad(logits.square().mean(), weight)[0]

    before = weight.requires_grad
    weight.requires_grad_(True)
    try:
        plain, slope = pass_over(16)
        rough, rough_slope = pass_over(4)
        with torch.inference_mode(), kv_cache.rounded(net, CacheKind(4)):
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


# ---------------------------------------------------------------- tokens that are kept whole


@pytest.mark.parametrize(("first", "last"), [(4, 8), (0, 8), (4, 0), (100, 100)])
def test_a_whole_text_is_read_as_if_written_word_by_word(small, first, last):
    net, kind = small.model.net, CacheKind(4, False, first, last)
    ids = torch.arange(30).repeat(2, 1) % 90
    try:
        kv_cache.check_sees_all(net.config)
    except ConfigError:
        with pytest.raises(ConfigError, match="sees all tokens"), kv_cache.rounded(net, kind):
            pass
        return
    with torch.inference_mode():
        with kv_cache.rounded(net, kind):
            whole = net(input_ids=ids, use_cache=False).logits
        kept, steps = kv_cache.Cache(net.config, kind), []
        for i in range(ids.shape[1]):
            found = net(input_ids=ids[:, i : i + 1], past_key_values=kept, use_cache=True)
            steps.append(found.logits)
            assert kept.get_seq_length() == i + 1
        exact = net(input_ids=ids, use_cache=False).logits
        with kv_cache.rounded(net, CacheKind(4)):
            rough = net(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(whole, torch.cat(steps, 1), rtol=1e-3, atol=1e-3)
    if first + last > 30:
        torch.testing.assert_close(whole, exact, rtol=1e-3, atol=1e-3)
    else:
        assert 0 < (whole - exact).norm() < (rough - exact).norm()


def test_bytes_of_what_is_kept_are_the_memory_models(stories):
    kind = CacheKind(4, False, 4, 8)
    kept = kv_cache.Cache(stories.net.config, kind)
    net16 = copy.deepcopy(stories.net).to(torch.bfloat16)  # the others' stays as it is
    read(net16, torch.arange(40).repeat(2, 1) % 90, kept)
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    found += sum(x.nbytes for pairs in kept.exact.values() for pair in pairs for x in pair)
    shape = geometry(stories.net.config.to_dict())
    budget = Budget(memory="1GiB", context=40, batch=2, kv=4, keep="4+8")
    assert memory.use(shape, "torch", budget, 0).cache == found
    everything = memory.use(shape, "torch", Budget(memory="1GiB", context=10, kv=4, keep="4+8"), 0)
    assert everything.cache == memory.cache_bytes(shape, 10, 1, 16), "a short text is kept whole"


def test_the_newest_tokens_can_be_forgotten(stories):
    kind, ids = CacheKind(4, False, 4, 8), torch.arange(40)[None] % 90
    kept = kv_cache.Cache(stories.net.config, kind)
    read(stories.net, ids[:, :30], kept)
    kept.crop(-5)
    assert kept.get_seq_length() == 25
    again = read(stories.net, ids[:, 25:30], kept)
    whole = kv_cache.Cache(stories.net.config, kind)
    read(stories.net, ids[:, :25], whole)
    torch.testing.assert_close(again, read(stories.net, ids[:, 25:30], whole), rtol=0.05, atol=0.3)
    for length in (20, 10, 2):
        kept.crop(length - kept.get_seq_length())
        assert kept.get_seq_length() == length
