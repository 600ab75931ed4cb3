"""No tensor is made without the device of the tensor beside it: what works here works on a GPU.

Everything that rounds, packs or folds runs under a guard that raises where a tensor is made without a
device, which would lie on the CPU; the tests marked gpu run the same on one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from optimizer.formats.safetensors import checkpoint, compressed_tensors
from optimizer.formats.safetensors import gptq as gptq_format
from optimizer.plan import FLOATS, GGML, Layer, Precision
from optimizer.quantization import awq, ggml, gptq, gptq_kernel
from optimizer.quantization.uniform import Codes, Nearest, pack, unpack

MAKERS = {torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.tensor,
          torch.linspace, torch.rand, torch.randn}  # fmt: skip
INTEGERS = [
    *(Precision("int", bits, 32, symmetric) for bits in range(2, 9) for symmetric in (True, False)),
    Precision("int", 1, 32, True), Precision("ternary", 2, 32, True), Precision("int", 4, None, True),
]  # fmt: skip
FLOATING = [Precision.floating(kind) for kind in FLOATS]
BLOCKS = [Precision.ggml(kind) for kind in GGML if kind in ggml.LAYOUTS]
SYMMETRIC = [p for p in INTEGERS if p.kind == "int" and p.symmetric and p.bits > 1]


class Placed(TorchFunctionMode):
    """Raises where a tensor is made without a device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in MAKERS and kwargs.get("device") is None:
            raise AssertionError(f"torch.{func.__name__} without a device")
        return func(*args, **kwargs)


def everything(device: str) -> dict[str, torch.Tensor]:
    """All results, on the CPU."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(32, 256, generator=rng, device="cpu").to(device)
    x = torch.randn(300, 256, generator=rng, device="cpu").to(device)
    hessian = x.T @ x
    found = {}
    with Placed():
        for precision in [*INTEGERS, *FLOATING, *BLOCKS]:
            coded = Nearest().encode(w, precision)
            found[f"rtn {precision.name}"] = coded.decode()
            parts = coded.pack()
            back = Codes.unpack(parts, precision, 256)
            assert torch.equal(back.decode(), coded.decode())
        for order in ("none", "columns", "groups"):
            method = gptq.Solver(order=order, clip=order == "none")
            own = (INTEGERS[2], INTEGERS[3], *FLOATING, *BLOCKS[:1], *BLOCKS[-2:])
            jobs = [(w, p) for p in own]
            for (_, p), codes in zip(jobs, method.solve(jobs, hessian), strict=True):
                found[f"gptq {order} {p.name}"] = codes.decode()
        r = awq.loudness(hessian)
        s = awq.search([(w, INTEGERS[2])], hessian, r)
        scaled = awq.scale(w, INTEGERS[2], s)
        found["awq"] = scaled.decode()
        found["awq divided"] = scaled.divided(torch.full_like(w[:, 0], 2.0)).decode()
        for precision in SYMMETRIC:
            found |= written(w, precision)
    return {name: value.cpu() for name, value in found.items()}


def written(w: torch.Tensor, precision: Precision) -> dict[str, torch.Tensor]:
    layer = Layer("l.weight", 32, 256, "linear", "l", 0, "l.weight", (32, 256))
    codes = Nearest().codes(w, precision)
    stored = {f"l.weight.{suffix}": part for suffix, part in codes.pack().items()}
    parts = compressed_tensors._compressed(layer, precision, stored)
    parts |= gptq_format.tensors(layer, precision, stored)
    words = parts["l.weight_packed"]
    assert torch.equal(
        checkpoint.unstream(words, precision.bits, 256).to(torch.uint8), codes.codes
    )
    assert torch.equal(unpack(pack(codes.codes, precision), precision, 256), codes.codes)
    return {f"{precision.name} {name}": part for name, part in parts.items()}


def test_every_tensor_is_made_where_its_neighbours_are() -> None:
    assert all(torch.isfinite(value.float()).all() for value in everything("cpu").values())


def test_the_guard_sees_a_tensor_without_a_device() -> None:
    with Placed(), pytest.raises(AssertionError, match="arange"):
        torch.arange(3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_cpus_codes() -> None:
    own, other = everything("cpu"), everything("cuda")
    assert own.keys() == other.keys()
    for name, value in own.items():
        if name.startswith("rtn") or "l." in name:
            assert torch.equal(value, other[name]), name
        else:  # sums in another order may choose another code
            assert float((value - other[name]).abs().mean()) < 0.01, name


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="TRITON_INTERPRET=1 isn't set")
@pytest.mark.parametrize("group", [32, 64, None])
def test_the_kernel_of_gptq_gives_the_loops_codes(
    group: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, by Triton's interpreter. No environment of ours has it: `pip install triton`."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(500, 192, generator=rng) @ torch.randn(192, 192, generator=rng)
    jobs = [(torch.randn(70, 192, generator=rng), Precision("int", 4, group))]
    [own] = gptq.Solver().solve(jobs, x.T @ x)
    monkeypatch.setattr(gptq_kernel, "serves", lambda _levels, _w: True)
    [other] = gptq.Solver().solve(jobs, x.T @ x)
    assert float((own.decode() == other.decode()).float().mean()) > 0.999
