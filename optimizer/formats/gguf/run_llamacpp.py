"""llama.cpp on one GGUF file, in a process that is started with this file.

run_llamacpp.py FILE CONTEXT ASKED.json ANSWER.json
    ASKED: [[path, body], ...] of llama.cpp's own server; ANSWER: what it replied, in that order.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path


def main(file: str, context: str, asked: str, answer: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel = int(context), 1
    params.n_batch = params.n_ubatch = int(context)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup, params.verbosity = False, 0
    server = xllamacpp.Server(params)
    replies = []
    for path, body in json.loads(Path(asked).read_text(encoding="utf-8")):
        request = urllib.request.Request(  # noqa: S310  (its own loopback server)
            server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:  # noqa: S310
            replies.append(json.loads(reply.read()))
    Path(answer).write_text(json.dumps(replies), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
