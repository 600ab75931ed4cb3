"""llama.cpp's own quantizers, as C functions of the library inside the package xllamacpp.

Its IQ types code 4 or 8 weights as one vector of a fixed list (a lattice); finding scales and vectors
for them is some thousand lines of C that everybody's files are made with, so they are called, not
written again. Decoding needs no library: the package gguf reads all types.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optimizer.errors import ConfigError
from optimizer.plan import GGML

PACKAGE = "xllamacpp"
# kinds whose blocks come from here; all others are packed by `optimizer.quantization.ggml`
NATIVE = (
    "iq1_s",
    "iq1_m",
    "tq1_0",
    "tq2_0",
    "iq2_xxs",
    "iq2_xs",
    "iq2_s",
    "iq3_xxs",
    "iq3_s",
)
PORTION = 2**20  # weights that a thread takes at a time
RUN, FAINT = (
    32,
    1e-12,
)  # weights of a block that share a scale; what counts as nothing beside others


@cache
def library() -> Any:
    """Raises ConfigError that names the package if it isn't there."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [f for folder in folders for f in sorted(Path(folder).glob(f"{PACKAGE}*.so"))]
    files += [f for folder in folders for f in sorted(Path(folder).glob(f"{PACKAGE}*.pyd"))]
    if not files:
        raise ConfigError(
            f"llama.cpp's types {NATIVE[0]} to {NATIVE[-1]} are rounded by its own functions, and the "
            f"package {PACKAGE}, which holds them, isn't installed. Run: pip install "
            "'mezzotint[gguf]'; or leave these types out of palette.bits."
        )
    found = ctypes.CDLL(str(files[0]))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    found.ggml_quantize_init.argtypes = [ctypes.c_int]
    return found


def encode(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """W [rows, cols] -> blocks uint8 [rows, bytes of a row]. importance: of the columns [cols], above
    zero; None: all alike. Weights on another device come to the CPU and go back."""
    cols = weight.shape[1]
    column = (
        torch.ones(cols, device="cpu") if importance is None else importance.detach().float().cpu()
    )
    mean = float(column.mean())
    weights = np.ascontiguousarray((column / mean if mean > 0 else column).clamp(min=1e-8).numpy())
    return _encode(weight, kind, weights.ctypes.data)


def encode_plainly(weight: Tensor, kind: str) -> Tensor:
    """As llama-quantize without an importance matrix, for any type; those who need one raise
    ConfigError."""
    if kind in NATIVE and not kind.startswith("tq"):
        raise ConfigError(f"{kind} isn't rounded without an importance matrix.")
    return _encode(weight, kind, None)


def _encode(weight: Tensor, kind: str, weights: int | None) -> Tensor:
    """weights: where the importance of columns lies, as a pointer."""
    rows, cols = weight.shape
    source = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    source = _without_empty_runs(source) if kind == "iq3_s" else source
    target = np.empty((rows, cols // GGML[kind].weights * GGML[kind].size), np.uint8)
    number, lib = _number(kind), library()
    lib.ggml_quantize_init(number)  # makes its tables, once

    def portion(first: int) -> None:
        part, place = source[first : first + step], target[first : first + step]
        lib.ggml_quantize_chunk(
            number, part.ctypes.data, place.ctypes.data, 0, len(part), cols, weights
        )

    step = max(1, PORTION // cols)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, torch.get_num_threads())) as threads:
        list(threads.map(portion, range(0, rows, step)))
    return torch.from_numpy(target).to(weight.device)


def _without_empty_runs(source: np.ndarray) -> np.ndarray:
    """With FAINT instead of runs of RUN zeros that stand beside other weights of their block.
    quantize_row_iq3_s_impl skips such a run without moving on to the place of the next one, so that
    the rest of the block would decode to other numbers, more wrong than leaving it out."""
    runs = source.reshape(-1, GGML["iq3_s"].weights // RUN, RUN)
    empty = (runs == 0).all(2)
    empty &= ~np.all(empty, axis=1, keepdims=True)
    if not empty.any():
        return source
    return np.where(empty[..., None], np.float32(FAINT), runs).reshape(source.shape)


def decode(data: Tensor, kind: str, cols: int) -> Tensor:
    """Blocks uint8 [rows, bytes of a row] -> W' fp32 [rows, cols]."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    found = dequantize(data.cpu().numpy(), GGMLQuantizationType[kind.upper()])
    return torch.from_numpy(np.array(found, np.float32)).view(-1, cols).to(data.device)


def _number(kind: str) -> int:
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[kind.upper()])
