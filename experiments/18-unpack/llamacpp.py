"""Does the draft pay in llama.cpp? Tokens a second of the target with and without it.

    llamacpp.py PAIR OUT.csv [TOKENS]

PAIR: what `export to=gguf nested=true` wrote. llama.cpp is the xllamacpp package, on one thread and
two, greedy, from three prompts; a server of its own for every row, since it keeps what it read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

from experiments.rows import write

PROMPTS = (
    "The old lighthouse keeper climbed the stairs every evening, because",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on high mountains. The reason is",
)


def one(pair: str, draft: str, threads: str, tokens: str) -> None:
    """In a process of its own: what the server says of three texts."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = f"{pair}/target/model.gguf", 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.warmup, params.verbosity = False, 0
    if int(draft):
        params.speculative.types = [
            xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE
        ]
        params.speculative.draft.mparams.path = f"{pair}/draft/model.gguf"
        params.speculative.draft.n_max = int(draft)
        own = params.speculative.draft
        own.cpuparams.n_threads = own.cpuparams_batch.n_threads = int(threads)
    server = xllamacpp.Server(params)
    said = {"predicted_n": 0, "predicted_ms": 0.0, "draft_n": 0, "draft_n_accepted": 0, "text": ""}
    for prompt in PROMPTS:
        body = {"prompt": prompt, "n_predict": int(tokens), "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found = json.loads(answer.read())
        said["text"] += found["content"]
        for key in ("predicted_n", "predicted_ms", "draft_n", "draft_n_accepted"):
            said[key] += found["timings"].get(key, 0)
    print("ROW" + json.dumps(said), flush=True)


def main(pair: str, out: str, tokens: str = "96") -> None:
    rows, texts = [], set()
    for threads in ("1", "2"):
        for draft in ("0", "4", "8"):
            command = [sys.executable, __file__, "one", pair, draft, threads, tokens]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            line = [x for x in done.stdout.splitlines() if x.startswith("ROW")]
            if not line:
                raise SystemExit(done.stderr[-2000:])
            found = json.loads(line[0][3:])
            texts.add(found["text"])
            rows.append(
                {
                    "threads": threads,
                    "drafted at once": draft,
                    "tokens a second": 1000 * found["predicted_n"] / found["predicted_ms"],
                    "accepted": found["draft_n_accepted"] / max(1, found["draft_n"]),
                }
            )
            print(rows[-1], flush=True)
    print("the same text every time" if len(texts) == 1 else f"{len(texts)} different texts")
    write(Path(out), rows)


if __name__ == "__main__":
    one(*sys.argv[2:]) if sys.argv[1] == "one" else main(*sys.argv[1:])
