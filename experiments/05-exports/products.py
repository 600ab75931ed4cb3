"""Microseconds of one layer: packed products against a dense bf16 Linear and against unpacking, in
turns, one thread, least of nine rounds. Shapes are SmolLM2's."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from optimizer.formats.torch.kernels import Product
from optimizer.plan import Precision
from optimizer.quantization.uniform import Codes, Nearest

ROUNDS = 9
Way = Callable[[torch.Tensor], torch.Tensor]


def unpacked(parts: dict[str, torch.Tensor], precision: Precision, cols: int) -> Way:
    def run(x: torch.Tensor) -> torch.Tensor:
        weight = Codes.unpack(parts, precision, cols).decode().bfloat16()
        return torch.nn.functional.linear(x, weight)

    return run


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("rows,cols,tokens,dense bf16,int4 packed,int8 packed,int4 unpacked,int8 unpacked")
    for rows, cols in ((576, 576), (1536, 576), (576, 1536)):
        weight = torch.randn(rows, cols) * 0.05
        dense = weight.bfloat16()
        ways: list[Way] = [partial(torch.nn.functional.linear, weight=dense)]
        found = [Nearest().codes(weight, Precision("int", bits, 64)) for bits in (4, 8)]
        ways += [Product(codes) for codes in found]
        ways += [unpacked(codes.pack(), codes.precision, cols) for codes in found]
        for tokens in (1, 8, 64):
            x, best = torch.randn(tokens, cols).bfloat16(), [float("inf")] * len(ways)
            with torch.inference_mode():
                for _ in range(ROUNDS):
                    for i, way in enumerate(ways):
                        repeats = 1 if i > 2 or tokens > 8 else 20
                        begun = time.perf_counter()
                        for _ in range(repeats):
                            way(x)
                        best[i] = min(best[i], (time.perf_counter() - begun) / repeats * 1e6)
            print(rows, cols, tokens, *(f"{b:.0f}" for b in best), sep=",", flush=True)


if __name__ == "__main__":
    main()
