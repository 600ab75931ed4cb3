"""An exported folder in its engine: log-probabilities at every position, load time, speed, memory.

engine.py ENGINE FOLDER REQUEST.npz ANSWER.npz, in a process of its own, so that the memory is the
engine's; the interpreter may be another environment's. REQUEST: ids [windows, length], positions.
ENGINE: llamacpp (the xllamacpp wheel, a server inside this process on the loopback address), torch
(`optimizer.load`), torch-exact, reference (the model itself in bf16), transformers (compressed-
tensors' loader, fp32), autoround (transformers with the auto-round package; also reads GPTQ files).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

THREADS, SPEED, REPEATS = int(os.environ.get("THREADS", "2")), 16, 2


@dataclass
class Run:
    """log_q: [windows, positions, vocabulary]; the prediction after each of `positions`."""

    log_q: np.ndarray
    load_seconds: float
    tokens_per_second: float
    peak_mb: int


def run(name: str, folder: Path, ids: np.ndarray, positions: list[int], python: str) -> Run:
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch) / "request.npz", Path(scratch) / "answer.npz"
        np.savez(request, ids=ids, positions=positions)
        subprocess.run(
            [python, __file__, name, str(folder), str(request), str(answer)], check=True
        )
        found = np.load(answer)
        return Run(found["log_q"], float(found["load"]), float(found["rate"]), int(found["peak"]))


def llamacpp(
    folder: Path, ids: np.ndarray, positions: list[int]
) -> tuple[np.ndarray, float, float]:
    import xllamacpp

    file = folder / "model.gguf"
    vocabulary = _vocabulary(file)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = max(256, ids.shape[1] + SPEED + 8), 1
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
    asked = {"prompt": [int(i) for i in ids[0][:8]], "n_predict": SPEED, "temperature": 0,
             "ignore_eos": True}  # fmt: skip
    rates = [_post(server, asked)["timings"]["predicted_per_second"] for _ in range(REPEATS)]
    return log_q, loaded, float(max(rates))


def _post(server: Any, body: dict[str, Any]) -> Any:
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


def load(name: str, folder: Path) -> Any:
    import torch

    if name.startswith("torch"):
        import optimizer

        return optimizer.load(folder, fast=name != "torch-exact")
    import transformers

    settings: dict[str, Any] = {"dtype": torch.float32}
    if name == "reference":
        settings = {"dtype": torch.bfloat16}
    if name == "autoround":
        settings["quantization_config"] = transformers.AutoRoundConfig(backend="auto")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def in_torch(
    name: str, folder: Path, ids: np.ndarray, positions: list[int]
) -> tuple[np.ndarray, float, float]:
    import torch

    torch.set_num_threads(THREADS)
    begun = time.perf_counter()
    net = load(name, folder)
    loaded = time.perf_counter() - begun
    with torch.inference_mode():
        rows = [net(input_ids=torch.from_numpy(row[None])).logits[:, positions] for row in ids]
        log_q = torch.log_softmax(torch.cat(rows).float(), -1).numpy()
        rates = []
        for _ in range(REPEATS):
            begun = time.perf_counter()
            net.generate(
                torch.from_numpy(ids[:1, :8]),
                attention_mask=torch.ones(1, 8, dtype=torch.long),
                min_new_tokens=SPEED,
                max_new_tokens=SPEED,
                do_sample=False,
                pad_token_id=0,
            )
            rates.append(SPEED / (time.perf_counter() - begun))
    return log_q, loaded, max(rates)


def _peak_mb() -> int:
    """VmHWM, which begins at this program. ru_maxrss begins with what the parent had when it forked:
    two engines gave the parent's 1611 MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) // 1024


def main(name: str, folder: str, request: str, answer: str) -> None:
    asked = np.load(request)
    ids, positions = asked["ids"], asked["positions"].tolist()
    if name == "llamacpp":
        log_q, loaded, rate = llamacpp(Path(folder), ids, positions)
    else:
        log_q, loaded, rate = in_torch(name, Path(folder), ids, positions)
    peak = _peak_mb()
    np.savez(answer, log_q=log_q, load=loaded, rate=rate, peak=peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
