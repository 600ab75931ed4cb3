"""Tokens a second, bytes read and memory of every way of unpacking, each in a process of its own.

    modes.py FOLDER OUT.csv [TOKENS] [ROUNDS]

FOLDER: a packed nested plan. One and two threads, bf16, the same prompt, layers as they are packed
(fast) and held in 4 or 8 bits (wide), which multiplies all of them packed; a run of every mode in
turn, ROUNDS times (2), the fastest kept. Memory: what is resident after loading, MB above a process
that has only imported the libraries.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from experiments.rows import write

PROMPT = "The old lighthouse keeper climbed the stairs every evening, because"
MODES = ("never", "draft", "hard", "always")
WAYS = [*((m, form) for form in ("wide", "packed") for m in MODES), ("reference", "bf16")]

ONE = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
import psutil, torch
import optimizer
from optimizer.formats.torch import packed, modes, planes
from optimizer.models.tokenizer import load_tokenizer
from optimizer.models.model import Model, take_inventory
from optimizer.models.source import locate
from optimizer.plan import Plan
from optimizer.store import Store
from pathlib import Path
folder, mode, form, threads, tokens, prompt = sys.argv[1:7]
torch.set_num_threads(int(threads))
plan = Plan.load(folder)
store = Store.open(os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint"))
source = locate(plan.model["name"], store, plan.model["revision"])
tokenizer = load_tokenizer(source.folder)
packed.steady_memory()
before = psutil.Process().memory_info().rss
if mode == "reference":
    inventory = take_inventory(source.folder)
    net = Model.load(source.folder, inventory).net.to(torch.bfloat16)
else:
    net = optimizer.load(folder, unpack=mode, fast=True, steady=True, wide=form == "wide")
held = psutil.Process().memory_info().rss - before
ids = torch.tensor([tokenizer(prompt)["input_ids"]])

def say(count):
    begun = time.perf_counter()
    with torch.inference_mode():
        said = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
    return said[0, ids.shape[1]:].tolist(), time.perf_counter() - begun

say(4)
state = getattr(net, "unpacking", None)
if state is not None:
    state.reset()
text, seconds = say(int(tokens))
row = {"mode": mode, "form": form, "threads": int(threads)}
row |= {"held": held / 1e6, "per_second": len(text) / seconds}
if state is not None:
    row |= {"base": state.passes["base"] / len(text), "refined": state.passes["refined"] / len(text)}
    row |= {"opened": sum(state.opened(len(text))) / len(text)}
print("ROW" + json.dumps(row))
"""


def main(folder: str, out: str, tokens: str = "96", rounds: str = "2") -> None:
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    for _ in range(int(rounds)):
        for threads in (1, 2):
            for mode, form in WAYS:
                own = [folder, mode, form, str(threads), tokens, PROMPT]
                command = [sys.executable, "-c", ONE, *own]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                line = [x for x in done.stdout.splitlines() if x.startswith("ROW")]
                if not line:
                    raise SystemExit(done.stderr[-2000:])
                row = json.loads(line[0][3:])
                print(row, flush=True)
                old = best.get((mode, form, threads))
                if old is None or row["per_second"] > old["per_second"]:
                    best[mode, form, threads] = row
    write(Path(out), best.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
