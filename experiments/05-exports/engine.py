"""An exported folder in its engine: log-probabilities at every position, load time, speed.

llama.cpp runs as the xllamacpp wheel, a server inside this process on the loopback address;
transformers through its compressed-tensors loader.
"""

from __future__ import annotations

import json
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

THREADS = 2


@dataclass
class Run:
    """log_q: [windows, positions, vocabulary]; the prediction after each of `positions`."""

    log_q: np.ndarray
    load_seconds: float
    tokens_per_second: float


def llamacpp(file: Path, ids: np.ndarray, positions: list[int], speed: int = 64) -> Run:
    import xllamacpp

    vocabulary = _vocabulary(file)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = max(256, ids.shape[1] + speed + 8), 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.warmup, params.verbosity = False, 0
    begun = time.perf_counter()
    server = xllamacpp.Server(params)
    loaded = time.perf_counter() - begun
    log_q = np.full((len(ids), len(positions), vocabulary), -np.inf, np.float32)
    for row, window in enumerate(ids):
        for column, end in enumerate(positions):
            prompt = [int(i) for i in window[: end + 1]]
            asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0,
                     "cache_prompt": True}  # fmt: skip
            for token in _post(server, asked)["completion_probabilities"][0]["top_logprobs"]:
                log_q[row, column, token["id"]] = token["logprob"]
    asked = {"prompt": [int(i) for i in ids[0][:8]], "n_predict": speed, "temperature": 0,
             "ignore_eos": True}  # fmt: skip
    rate = _post(server, asked)["timings"]["predicted_per_second"]
    return Run(log_q, loaded, float(rate))


def _post(server: object, body: dict) -> dict:
    request = urllib.request.Request(
        f"{server.listening_address}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def _vocabulary(file: Path) -> int:
    from gguf import GGUFReader

    return next(int(t.shape[1]) for t in GGUFReader(file).tensors if t.name == "token_embd.weight")


def transformers(
    folder: Path, ids: np.ndarray, positions: list[int], dtype: torch.dtype, speed: int = 64
) -> Run:
    from transformers import AutoModelForCausalLM

    begun = time.perf_counter()
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    loaded = time.perf_counter() - begun
    with torch.inference_mode():
        logits = net(input_ids=torch.from_numpy(ids)).logits[:, positions].float()
        begun = time.perf_counter()
        net.generate(
            torch.from_numpy(ids[:1, :8]),
            attention_mask=torch.ones(1, 8, dtype=torch.long),
            min_new_tokens=speed,
            max_new_tokens=speed,
            do_sample=False,
            pad_token_id=0,
        )
        rate = speed / (time.perf_counter() - begun)
    return Run(torch.log_softmax(logits, -1).numpy(), loaded, rate)
