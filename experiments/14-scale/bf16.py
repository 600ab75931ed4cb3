"""Does bf16 pay on this CPU? Processor time on one thread of the two products that a table consists
of: outputs x W', and gradients d' x."""

from __future__ import annotations

import time

import torch
from torch import Tensor

TIMES = 7
SIZES = ((1024, 2048), (128, 2048))  # tokens, width


def seconds(a: Tensor, b: Tensor) -> list[float]:
    """Of TIMES products after one, in order of size."""
    _ = a @ b
    found = []
    for _ in range(TIMES):
        begun = time.process_time()
        _ = a @ b
        found.append(time.process_time() - begun)
    return sorted(found)


def main() -> None:
    torch.set_num_threads(1)
    print("tokens,width,product,fp32 s,bf16 s,ratio,least,most")
    for tokens, width in SIZES:
        x, d, w = torch.randn(tokens, width), torch.randn(tokens, width), torch.randn(width, width)
        for name, a, b in (("x W'", x, w.T), ("d' x", d.T, x)):
            wide, narrow = seconds(a, b), seconds(a.bfloat16(), b.bfloat16())
            middle = TIMES // 2
            ratios = [narrow[middle] / wide[middle], narrow[0] / wide[-1], narrow[-1] / wide[0]]
            row = [wide[middle], narrow[middle], *ratios]
            print(f"{tokens},{width},{name}," + ",".join(f"{value:.3f}" for value in row))


if __name__ == "__main__":
    main()
