"""llama.cpp's side, in a process of its own: the cyllama wheel, which has llama_model_quantize.

mixture.py quantize IN.gguf OUT.gguf TYPE     TYPE: a name of TYPES; 16-bit weights to its mixture
mixture.py score FILE.gguf REQUEST.npz ANSWER.npz
    REQUEST: ids [windows, length] and log_p [windows, length - 1, words], the reference's;
    ANSWER: kl and flip [windows, positions] of what llama.cpp computes, at every EVERY-th position
"""

from __future__ import annotations

import os
import sys
import time

import cyllama.llama.llama_cpp as cpp
import numpy as np

cpp.disable_logging()

TYPES = {"Q4_0": 2, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # llama.h
THREADS = int(os.environ.get("THREADS", "2"))
EVERY = 3  # the wheel hands logits over as lists, which takes longer than computing them


def quantize(source: str, target: str, kind: str) -> None:
    params = cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = TYPES[kind], THREADS
    cpp.model_quantize(source, target, params)


def score(file: str, request: str, answer: str) -> None:
    asked = np.load(request)
    ids, log_p = asked["ids"], asked["log_p"]
    begun = time.perf_counter()
    model_params, params = cpp.LlamaModelParams(), cpp.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = ids.shape[1]
    params.n_threads = params.n_threads_batch = THREADS
    # cyllama 0.2.18's get_logits_ith reads n_vocab of its model, which has none
    kind = type("Model", (cpp.LlamaModel,), {"n_vocab": log_p.shape[2]})
    model = kind(file, model_params)
    context = cpp.LlamaContext(model, params)
    places = range(EVERY - 1, log_p.shape[1], EVERY)
    kl = np.zeros((len(ids), len(places)))
    flip = np.zeros(kl.shape, bool)
    for row, window in enumerate(ids):
        context.kv_cache_clear()
        batch = cpp.LlamaBatch(n_tokens=len(window), embd=0, n_seq_max=1)
        for place, token in enumerate(window):
            batch.add(int(token), place, [0], place in places)
        assert context.decode(batch) == 0
        for column, place in enumerate(places):
            logits = np.array(context.get_logits_ith(place), np.float64)
            log_q = logits - logits.max()
            log_q -= np.log(np.exp(log_q).sum())
            p = log_p[row, place].astype(np.float64)
            kl[row, column] = (np.exp(p) * (p - log_q)).sum()
            flip[row, column] = log_q.argmax() != p.argmax()
    np.savez(answer, kl=kl, flip=flip, seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    {"quantize": quantize, "score": score}[sys.argv[1]](*sys.argv[2:])
