"""llama.cpp itself, through ctypes: its quantizer with an importance matrix, and its probabilities.

engine.py quantize IN.gguf OUT.gguf TYPE MATRIX.npz   MATRIX: tensor -> mean squares of its inputs
engine.py types IN.gguf OUT.json MATRIX.npz TYPE...   which type each tensor gets, by its dry run
engine.py score FILE.gguf REQUEST ANSWER.npz          REQUEST: a folder with ids.npy [windows, length]
                                                      and log_p.npy [windows, length - 1, words]
                                                      ANSWER: kl, flip [windows, length - 1]

LIBRARIES is the folder bins/linux-x64 of the npm package @node-llama-cpp/linux-x64, which has
libllama with llama_model_quantize and ggml for every kind of x86; see matrix.sh. Structures are those
of include/llama.h of llama.cpp v0.5.0. Runs in a process of its own, since llama.cpp ends the process
where a file doesn't suit it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from ctypes import c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {  # enum llama_ftype
    "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q4_K_M": 15, "Q6_K": 18, "IQ3_XS": 22, "IQ3_XXS": 23,
    "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30,
}  # fmt: skip
PROCESSORS = ("zen4", "icelake", "cascadelake", "skylakex", "haswell", "x64")  # the best first
SLACK = 256  # bytes for fields of a structure that aren't named here: it is passed by value
THREADS = int(os.environ.get("THREADS", "1"))
CHOSEN = re.compile(r"\] +(\S+) +- \[.*?type = +(\w+).*?-> +[\d.]+ MiB \((\w+)\)")


class Column(ctypes.Structure):
    """llama_model_imatrix_data"""

    _fields_ = [("name", c_char_p), ("data", c_void_p), ("size", c_size_t)]


class Quantize(ctypes.Structure):
    """llama_model_quantize_params"""

    _fields_ = [
        *((n, c_int32) for n in ("threads", "ftype", "output", "embedding")),
        *((n, c_bool) for n in ("requantize", "quantize_output", "copy", "pure", "split", "dry")),
        *((n, c_void_p) for n in ("matrix", "overrides", "types", "prune")),
        ("rest", c_int8 * SLACK),
    ]


class ModelParams(ctypes.Structure):
    """llama_model_params"""

    _fields_ = [
        ("devices", c_void_p), ("buffers", c_void_p), ("gpu_layers", c_int32), ("split", c_int),
        ("main_gpu", c_int32), ("tensor_split", c_void_p), ("progress", c_void_p),
        ("progress_data", c_void_p), ("overrides", c_void_p), ("flags", c_bool * 8),
        ("rest", c_int8 * SLACK),
    ]  # fmt: skip


class ContextParams(ctypes.Structure):
    """llama_context_params, up to its threads; the rest stays as it comes."""

    _fields_ = [
        *((n, c_uint32) for n in ("ctx", "batch", "ubatch", "sequences", "rs", "outputs", "more")),
        ("threads", c_int32), ("threads_batch", c_int32), ("rest", c_int8 * SLACK),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    """llama_batch"""

    _fields_ = [
        ("count", c_int32), ("token", ctypes.POINTER(c_int32)), ("embd", c_void_p),
        ("pos", ctypes.POINTER(c_int32)), ("n_seq", ctypes.POINTER(c_int32)),
        ("seq", ctypes.POINTER(ctypes.POINTER(c_int32))), ("logits", ctypes.POINTER(c_int8)),
    ]  # fmt: skip


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class Engine:
    """The libraries of a folder, loaded once. said: what they log."""

    def __init__(self, folder: Path) -> None:
        self.said: list[str] = []
        (main,) = folder.glob("libllama.v*.so")
        (ggml,) = folder.glob("libggml.v*.so")
        self.lib: Any = ctypes.CDLL(str(main))
        self._log = LOG(
            lambda _level, text, _data: self.said.append(text.decode(errors="replace"))
        )
        self.lib.llama_log_set(self._log, None)
        load = ctypes.CDLL(str(ggml)).ggml_backend_load
        load.restype = c_void_p
        backends = (folder / f"libggml-cpu-{name}.so" for name in PROCESSORS)
        if not any(load(str(file).encode()) for file in backends):
            raise SystemExit(f"No backend in {folder} runs on this processor.")
        self.lib.llama_backend_init()

    def quantize(
        self,
        source: str,
        target: str,
        kind: str,
        matrix: Mapping[str, np.ndarray],
        dry: bool = False,
    ) -> None:
        default = self.lib.llama_model_quantize_default_params
        default.restype = Quantize
        params = default()
        columns = (Column * (len(matrix) + 1))()
        kept = {name: np.ascontiguousarray(x, np.float32) for name, x in matrix.items()}
        for entry, (name, data) in zip(columns, kept.items(), strict=False):
            entry.name, entry.data, entry.size = name.encode(), data.ctypes.data, data.size
        params.threads, params.ftype, params.dry = THREADS, TYPES[kind], dry
        if matrix:
            params.matrix = ctypes.addressof(columns)
        run = self.lib.llama_model_quantize
        run.restype, run.argtypes = c_uint32, [c_char_p, c_char_p, ctypes.POINTER(Quantize)]
        if run(source.encode(), target.encode(), ctypes.byref(params)):
            raise SystemExit("".join(self.said[-20:]))

    def types(self, source: str, kind: str, matrix: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Tensor -> the type that it would get."""
        self.said.clear()
        self.quantize(source, os.devnull, kind, matrix, dry=True)
        lines = "".join(self.said).splitlines()
        return {m[1]: m[3].lower() for line in lines if (m := CHOSEN.search(line))}

    def open(self, file: str, length: int) -> Any:
        """A context that holds `length` tokens."""
        lib = self.lib
        lib.llama_model_default_params.restype = ModelParams
        lib.llama_context_default_params.restype = ContextParams
        lib.llama_model_load_from_file.restype = c_void_p
        lib.llama_model_load_from_file.argtypes = [c_char_p, ModelParams]
        lib.llama_init_from_model.restype = c_void_p
        lib.llama_init_from_model.argtypes = [c_void_p, ContextParams]
        model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        if not model:
            raise SystemExit("".join(self.said[-20:]))
        params = lib.llama_context_default_params()
        params.ctx = params.batch = params.ubatch = length
        params.threads = params.threads_batch = THREADS
        found = lib.llama_init_from_model(model, params)
        if not found:
            raise SystemExit("".join(self.said[-20:]))
        return c_void_p(found)

    def logits(self, context: Any, ids: np.ndarray, words: int) -> np.ndarray:
        """[length, words] fp32 of one window, a view that the next call overwrites."""
        lib = self.lib
        lib.llama_get_memory.restype, lib.llama_get_memory.argtypes = c_void_p, [c_void_p]
        lib.llama_memory_clear.argtypes = [c_void_p, c_bool]
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        lib.llama_batch_init.restype = Batch
        batch = lib.llama_batch_init(len(ids), 0, 1)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq[i] = int(token), i, 1
            batch.seq[i][0], batch.logits[i] = 0, 1
        batch.count = len(ids)
        lib.llama_decode.argtypes = [c_void_p, Batch]
        assert lib.llama_decode(context, batch) == 0
        lib.llama_batch_free.argtypes = [Batch]
        lib.llama_batch_free(batch)
        lib.llama_get_logits.restype = ctypes.POINTER(c_float)
        lib.llama_get_logits.argtypes = [c_void_p]
        return np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), words))


def loss(log_p: np.ndarray, logits: np.ndarray) -> tuple[float, bool]:
    """KL(p || q) in nats, and whether the likeliest word differs, at one position. Both fp32; sums in
    fp64."""
    log_q = logits - logits.max()
    log_q -= np.float32(np.log(np.exp(log_q).sum(dtype=np.float64)))
    terms = np.exp(log_p) * (log_p - log_q)
    return float(terms.sum(dtype=np.float64)), bool(log_p.argmax() != log_q.argmax())


def score(engine: Engine, file: str, request: str, answer: str) -> None:
    ids = np.load(Path(request) / "ids.npy")
    log_p = np.load(Path(request) / "log_p.npy", mmap_mode="r")
    began = time.process_time()
    context = engine.open(file, ids.shape[1])
    kl, flip = np.zeros(log_p.shape[:2]), np.zeros(log_p.shape[:2], bool)
    for row, window in enumerate(ids):
        found = engine.logits(context, window, log_p.shape[2])
        for place in range(log_p.shape[1]):
            kl[row, place], flip[row, place] = loss(log_p[row, place], found[place])
        print(f"{row} {kl[row].mean():.5f} {time.process_time() - began:.0f} s", flush=True)
    np.savez(answer, kl=kl, flip=flip, seconds=time.process_time() - began)


def main(command: str, *rest: str) -> None:
    engine = Engine(Path(os.environ["LIBRARIES"]))
    if command == "score":
        score(engine, *rest)
    elif command == "quantize":
        source, target, kind, matrix = rest
        engine.quantize(source, target, kind, dict(np.load(matrix)))
    else:
        source, target, matrix, *kinds = rest
        columns = dict(np.load(matrix))
        found = {kind: engine.types(source, kind, columns) for kind in kinds}
        Path(target).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
