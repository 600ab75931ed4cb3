"""compare.py's runs in several processes of one thread each, from one table in one store.

Usage: sweep.py MODEL TEXT OUT_FOLDER [--workers N] [--seconds S] [--heldout N] [--seeds 0,1,2]
[--methods "moves tpe,exact"] TERMS:TOKENS:BUDGET,BUDGET...
e.g. sweep.py smollm2 wiki.txt out --workers 4 blocks:160000:3,2.5,3.5,4 all:40000:60,75

The most important terms first: runs begin in this order, seed by seed, and those whose file exists are
skipped. After S seconds no run begins; those under way go on for a quarter of S at most, and what has
not ended then leaves nothing behind. The same command goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import queue
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, here and in the workers

from compare import SEEDS, Job, Race, jobs, measure, methods, without_pictures

GRACE = 0.25  # of the seconds


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out", type=Path)
    parser.add_argument("terms", nargs="+")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--heldout", type=int, default=24)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--methods", default=",".join(" ".join(m).strip() for m in methods()))
    return parser.parse_args(words)


def asked(given: argparse.Namespace) -> list[Job]:
    """The runs in the order of their importance."""
    seeds = [int(seed) for seed in given.seeds.split(",")]
    wanted = given.methods.split(",")
    found = chain.from_iterable(
        jobs(terms, int(tokens), [float(b) for b in budgets.split(",")], seeds)
        for terms, tokens, budgets in (text.split(":") for text in given.terms)
    )
    return [job for job in found if job.name in wanted]


def work(given: argparse.Namespace, waiting: Any, until: float) -> None:
    """Take runs until there are none, or it is too late."""
    import torch

    torch.set_num_threads(1)
    without_pictures()
    races: dict[str, Race] = {}
    while time.time() < until:
        try:
            job = waiting.get(timeout=1)
        except queue.Empty:
            return
        if job.terms not in races:
            races[job.terms] = Race(given.model, given.text, job.terms, given.heldout)
        measure(races[job.terms], job, given.out)


def main(given: argparse.Namespace) -> None:
    begun = time.time()
    todo = [job for job in asked(given) if not job.file(given.out).exists()]
    print(f"{len(todo)} runs", flush=True)
    for terms in dict.fromkeys(job.terms for job in todo):
        Race(given.model, given.text, terms, given.heldout)  # text and table once, for all workers
        print(f"{terms}: the table is there after {time.time() - begun:.0f} s", flush=True)
    context = mp.get_context("spawn")
    waiting = context.Queue()
    for job in todo:
        waiting.put(job)
    until = begun + given.seconds
    workers = [
        context.Process(target=work, args=(given, waiting, until)) for _ in range(given.workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        late = until + GRACE * given.seconds - time.time()
        worker.join(None if late == float("inf") else max(late, 0.1))
    for worker in workers:
        worker.terminate()
    waiting.cancel_join_thread()
    done = sum(job.file(given.out).exists() for job in todo)
    print(f"{done} of {len(todo)} runs in {time.time() - begun:.0f} s", flush=True)
    failed = [worker.exitcode for worker in workers if (worker.exitcode or 0) > 0]
    sys.exit(f"{len(failed)} workers failed; see above" if failed else 0)


if __name__ == "__main__":
    main(arguments(sys.argv[1:]))
