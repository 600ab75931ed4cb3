"""Makes docs/tutorial.md: every command of it is run, and what it prints is put on the page.

python docs/tutorial.py         # about a minute on one core; the store and all files are temporary
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

PAGE = Path(__file__).with_name("tutorial.md")
WIDTH = "96"
BLOCK = re.compile(r"^```console\n((?:\$ .*\n)+)```\n", re.MULTILINE)
TIMES = re.compile(r"made in [\d.]+ (?:s|min)")
PROGRESS = re.compile(r" \.\.\.$|: \d+ of \d+, \d+ s")
RECORD = re.compile(r"^Recorded for W&B.*\n", re.MULTILINE)

TEXT = """# Ten minutes with Mezzotint

Everything on this page was printed by the commands on it: `python docs/tutorial.py` makes it again. The
model is `stories`, a tiny Llama that the program trains itself in seconds, so that you can follow along
on any machine, without a download. With a model of your own, only `model=` changes.

## A plan

A budget is what the model may take: bytes of a file, a machine's memory, or, as here, bits per weight on
average. `effort=quick` rounds to nearest and reads little text; leave it out to do it properly.
`data=self` lets the model write the text that it is measured on, since this one knows only the words of
its own stories; larger models read the texts that come with the program.

```console
$ mezzotint optimize model=stories budget.bits=3.5 effort=quick data=self wandb=off hydra.run.dir=run
```

The first line says how small the model became. The table compares the plan with rounding every layer
alike in the same budget, on text that nothing was tuned on: **KL** is how far its predictions are from
the reference's, in nats per token (0 is the same model), **flips** is where it finds another next word
the most likely. The sentence below says what the intervals allow to be said, and no more.

## What is in it

The product is `run/plan.json`: which layer is stored how. Layers that cost much meaning keep more bits.

```console
$ mezzotint show run/plan.json
```

`run/report.html` shows the same as a page, with the front of all sizes; open it in a browser.

## The model

`apply` packs it. The folder holds everything that is needed to run it.

```console
$ mezzotint apply run/plan.json out=packed
$ mezzotint evaluate model=packed
```

`evaluate` measured the packed folder itself against the reference, once more. In Python it is a
transformers model:

```python
import optimizer

model = optimizer.load("packed")  # or AutoModelForCausalLM.from_pretrained("packed")
```

and on the command line it writes:

```console
$ mezzotint generate packed "Mia had a red" tokens=24
```

## Another budget

What was measured is kept under what it depends on, so a second budget takes seconds.

```console
$ mezzotint optimize model=stories budget.bits=2.5 effort=quick data=self wandb=off hydra.run.dir=smaller
```

## Another engine

A plan for an engine may only hold what that engine runs. `check` says it before any work:

```console
$ mezzotint check run/plan.json to=vllm
```

So ask for the engine from the beginning, with `runtime=vllm`, and write its files with
`mezzotint export plan.json to=vllm out=DIR`. The README lists all engines.

## On from here

- your own text: `data=text data.path=FILE`; a machine in the place of bits: `budget=rtx3060_12gb`
- [results](results.md) on SmolLM2, beside what else one could do with the same bytes
- [GPUs](gpus.md), [words](glossary.md), [how to add a method or a format](extend.md)
"""


def commands(text: str) -> list[str]:
    """What the page runs, in order."""
    return [line[2:] for block in BLOCK.findall(text) for line in block.splitlines()]


def printed(command: str) -> tuple[int, str]:
    """Exit code, and what a person sees apart from progress."""
    from optimizer.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(shlex.split(command)[1:])
    text = out.getvalue() if code == 0 or out.getvalue().strip() else err.getvalue()
    lines = (s.rstrip() for s in RECORD.sub("", text).splitlines() if not PROGRESS.search(s))
    return code, TIMES.sub("made in a few s", "\n".join(lines)).strip("\n")


def page(text: str) -> str:
    def filled(block: re.Match[str]) -> str:
        lines = []
        for command in block[1].splitlines():
            lines += [command, printed(command[2:])[1]]
        return "```console\n" + "\n".join(lines) + "\n```\n"

    return BLOCK.sub(filled, text)


def make() -> None:
    os.environ |= {"COLUMNS": WIDTH, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        os.environ["MEZZOTINT_STORE"] = str(Path(folder) / "store")
        PAGE.write_text(page(TEXT), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(make())
