"""The command line. Composes the configuration with Hydra and calls the pipeline.

Exit codes: 0 done, 2 a mistake that the user can correct, 130 interrupted (Ctrl-C or SIGTERM), 141
nobody read the output any more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from optimizer.cli import streams
from optimizer.errors import ConfigError, MezzotintError

USAGE = """\
Mezzotint: make a language model fit a memory budget and keep what it means.

  mezzotint optimize model=smollm2 budget.size=100MB    measure, allocate, prove; writes plan.json
  mezzotint show plan.json                              heat map, bytes, promise, certificate
  mezzotint apply plan.json out=DIR                     write the packed model
  mezzotint check plan.json to=ENGINE                   would the engine load it, and in what size
  mezzotint export plan.json to=ENGINE out=DIR          write it for vllm, llamacpp, ...
  mezzotint evaluate model=DIR                          packed model against its reference
  mezzotint advise model=X                              what fits where: machine x context x bits
  mezzotint fit DIR budget=rtx3060_12gb                 memory, longest context, smallest machine
  mezzotint report DIR                                  make a run's report.html again
  mezzotint compare multirun/DAY/TIME                   the runs of a sweep in one table and page
  mezzotint store [prune 30d]                           what is kept; remove what is unused for 30 days
  mezzotint probe plan.json                             which distinctions of meaning it lost
  mezzotint blur plan.json text.txt out=blur.html       where in a text it changed what is said
  mezzotint generate DIR "prompt" unpack=hard           its text, where it was unpacked, and how fast
  mezzotint judge A B [C ...]                           judge plans, packed folders, models blind
  mezzotint overlay DIR                                 write with a model, choose where it is unsure
  mezzotint learn votes.jsonl out=meaning.yaml          votes and choices -> an objective

model=   smollm2, minilm, stories, a folder, a .gguf file, or a hub id
budget.  size=80MB (whole file), bits=4.5 (per weight, scales counted), code_bits=4 (codes alone)
budget=  a machine (rtx3060_12gb, m2_16gb, pi_zero2w ...) with budget.context, .batch and .kv
         none: what fits this machine
effort=  quick, standard (default) or thorough
data=    bundled (default), self (sampled from the model), text data.path=FILE, hub data.path=ID

`mezzotint optimize --cfg job` prints every setting, `-m` sweeps over comma-separated values,
`--config-dir DIR` adds a folder of your own settings. Results: hydra.run.dir=DIR chooses where.
"""
COMMANDS = (
    "optimize",
    "show",
    "apply",
    "check",
    "export",
    "evaluate",
    "probe",
    "blur",
    "fit",
    "advise",
    "report",
    "compare",
    "store",
    "generate",
    "judge",
    "overlay",
    "learn",
)
POSITIONAL = {
    "apply": ["plan"],
    "check": ["plan"],
    "export": ["plan"],
    "fit": ["plan"],
    "probe": ["plan"],
    "blur": ["plan", "text"],
    "overlay": ["model"],
    "generate": ["model", "prompt"],
}
MANY = {"judge": "models", "learn": "files"}  # all words before the settings, as a list


def main(arguments: list[str] | None = None) -> int:
    """The exit code. For what it is when nobody reads the output, see `streams`."""
    with streams.terminable(), streams.outlet() as out:
        code = _code(sys.argv[1:] if arguments is None else arguments)
    if out.failure is None:
        return code
    if isinstance(out.failure, BrokenPipeError):
        return code or streams.CLOSED_PIPE
    streams.complain(
        f"mezzotint: this output couldn't be written to stdout ({out.failure.strerror}); the work "
        "itself was done. Send it to a terminal, or to a file on a disk that has room."
    )
    return code or 2


def _code(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"mezzotint {version('mezzotint')}")
        return 0
    try:
        _dispatch(argv[0], argv[1:])
    except MezzotintError as error:
        if str(error):  # else another process of the job says it
            streams.complain(_paragraph(error))
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be loaded
            raise
        streams.complain(
            "mezzotint: the device ran out of memory, and this work can't be done in smaller pieces. "
            "Take offload=cpu or disk, shorter windows, or device=cpu; the same command goes on."
        )
        return 2
    except KeyboardInterrupt:
        streams.complain(
            "\nmezzotint: stopped. What is finished is kept; the same command goes on."
        )
        return 130
    return 0


def _console() -> Any:
    from optimizer.cli import screen

    return screen.console()


def _paragraph(error: Exception) -> str:
    """Reasons quoted from a library may have many lines."""
    from optimizer import untrusted
    from optimizer.search import credentials

    return f"mezzotint: {untrusted.printable(' '.join(credentials.clean(str(error)).split()))}"


def _dispatch(command: str, rest: list[str]) -> None:
    if command not in COMMANDS:
        raise ConfigError(
            f"There is no command {command[:60]!r}; there are {', '.join(COMMANDS)}."
        )
    plain = {"show": _show, "report": _report, "compare": _compare, "store": _store}
    if command in plain:
        plain[command](rest)
        return
    jobs: dict[str, Callable[[Any], None]] = {
        "optimize": _optimize,
        "apply": _apply,
        "check": _check,
        "export": _export,
        "evaluate": _evaluate,
        "fit": _fit,
        "advise": _advise,
        "probe": _probe,
        "blur": _blur,
        "generate": _generate,
        "judge": _judge,
        "overlay": _overlay,
        "learn": _learn,
    }
    from optimizer.cli import beside, compose, words

    keys = compose.keys(command)
    if command in MANY:
        asked = words.listed(rest, MANY[command], keys)
    else:
        asked = words.placed(rest, POSITIONAL.get(command, []), keys)
    if command == "optimize":
        asked = compose.objective(asked)
    failures = beside.run(command, asked, jobs[command])
    for failure in failures[:-1]:  # of a sweep, which goes on after one
        streams.complain(_paragraph(failure))
    if failures:
        raise failures[-1]


def _optimize(settings: Any) -> None:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from optimizer.cli import progress, summary
    from optimizer.commands import optimize
    from optimizer.reports import wandb
    from optimizer.stages import processes

    out = _console()
    folder = Path(HydraConfig.get().runtime.output_dir)
    here = Path.cwd()
    folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
    view = progress.Terminal(out)
    several = processes.started()
    for word in processes.said(several):
        view.note(word)
    with wandb.follow(settings.wandb, folder, _sweep(), view) as live:
        with several.joined():
            outcome = optimize.optimize(settings, folder, live.view, several)
        summary.outcome(out, outcome)
        for line in live.finish(outcome.plan):
            view.note(line)


def _sweep() -> str | None:
    """The name of the sweep that this job belongs to."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return None
    return "/".join(Path(hydra.sweep.dir).parts[-2:])


def _apply(settings: Any) -> None:
    from pathlib import Path

    from optimizer.cli import progress
    from optimizer.commands import deploy
    from optimizer.plan import Plan

    out = _console()
    plan = Plan.load(settings.plan)
    folder = deploy.apply(
        plan,
        Path(settings.out),
        settings.store,
        settings.model,
        settings.overwrite,
        progress.Terminal(out),
    )
    out.print(
        f"Wrote {folder}: {plan.bytes['total']} bytes of weights, as promised. Measure it with: "
        f"mezzotint evaluate model={folder}",
        soft_wrap=True,
        markup=False,
    )


def _check(settings: Any) -> None:
    from optimizer.cli import terminal
    from optimizer.commands import export
    from optimizer.errors import PlanError
    from optimizer.plan import Plan

    verdict = export.check(
        Plan.load(settings.plan), settings.to, settings.store, settings.model, settings.gguf
    )
    terminal.verdict(_console(), verdict)
    if verdict.errors:
        raise PlanError(f"{verdict.engine} would not run this plan; the reasons are above.")


def _export(settings: Any) -> None:
    from pathlib import Path

    from optimizer.cli import progress, terminal
    from optimizer.commands import export, speculative
    from optimizer.models.source import packed_file
    from optimizer.plan import Plan

    out = _console()
    given, folder = Path(settings.plan), Path(settings.out)
    view, rest = progress.Terminal(out), (settings.store, settings.model, settings.overwrite)
    if settings.nested:
        verdict = speculative.export_pair(Plan.load(given), settings, view)
    else:
        packed = given if packed_file(given) is not None else None
        verdict = export.export(
            Plan.load(given),
            settings.to,
            folder,
            *rest,
            packed,
            view,
            settings.gguf,
            settings.activations,
        )
    terminal.verdict(out, verdict)
    out.print(f"Wrote {folder}. Its README.md says how it was made.", soft_wrap=True, markup=False)


def _evaluate(settings: Any) -> None:
    from optimizer.cli import progress, terminal
    from optimizer.commands import deploy

    out = _console()
    terminal.evaluation(out, deploy.evaluate(settings, progress.Terminal(out)))


def _fit(settings: Any) -> None:
    from optimizer.cli import terminal
    from optimizer.commands import capacity

    terminal.fitting(_console(), capacity.answer(settings))


def _advise(settings: Any) -> None:
    from optimizer.cli import terminal
    from optimizer.commands import advise

    terminal.advice(_console(), advise.advise(settings))


def _probe(settings: Any) -> None:
    from optimizer.cli import progress, tables
    from optimizer.commands import inspect

    out = _console()
    tables.probes(out, inspect.probe(settings, progress.Terminal(out)))
    if settings.out is not None:
        out.print(f"Wrote {settings.out}.", soft_wrap=True, markup=False)


def _blur(settings: Any) -> None:
    from optimizer.cli import progress, tables
    from optimizer.commands import inspect

    out = _console()
    found = inspect.blur(settings, progress.Terminal(out))
    tables.blur(out, found, settings.passages, whole=settings.to == "terminal")
    if settings.to == "html":
        out.print(f"Wrote {settings.out}. Open it in a browser.", soft_wrap=True, markup=False)


def _generate(settings: Any) -> None:
    from optimizer.cli import nested, progress
    from optimizer.commands import generate

    out = _console()
    nested.answer(out, settings.prompt, generate.generate(settings, progress.Terminal(out)))


def _judge(settings: Any) -> None:
    from optimizer import person
    from optimizer.cli import progress

    person.require()
    from optimizer.cli import person as tables
    from optimizer.person import commands

    out = _console()
    commands.judge(settings, progress.Terminal(out), lambda found: tables.result(out, found))


def _overlay(settings: Any) -> None:
    from optimizer import person
    from optimizer.cli import progress

    person.require()
    from optimizer.person import commands

    commands.overlay(settings, progress.Terminal(_console()))


def _learn(settings: Any) -> None:
    from optimizer import person
    from optimizer.cli import progress

    person.require()
    from optimizer.cli import person as tables
    from optimizer.person import commands

    out = _console()
    tables.learned(out, commands.learn(settings, progress.Terminal(out)))


def _show(rest: list[str]) -> None:
    from optimizer.cli import terminal
    from optimizer.plan import Plan

    if len(rest) != 1:
        raise ConfigError("Give one plan: mezzotint show plan.json")
    terminal.show(_console(), Plan.load(rest[0]))


def _store(rest: list[str]) -> None:
    from optimizer.cli import terminal
    from optimizer.commands import store
    from optimizer.errors import ConfigError
    from optimizer.store import Store

    place = os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")
    kept = Store.open(place)
    if not rest:
        terminal.kept(_console(), kept.root, store.kinds(kept))
    elif len(rest) == 2 and rest[0] == "prune":
        done = store.prune(kept, store.seconds(rest[1]))
        terminal.pruned(_console(), kept.root, done)
    else:
        raise ConfigError(
            "Use `mezzotint store`, or `mezzotint store prune 30d` to remove what was not used for 30 "
            "days. MEZZOTINT_STORE says where the store is."
        )


def _report(rest: list[str]) -> None:
    from pathlib import Path

    from optimizer.reports import html

    if len(rest) != 1:
        raise ConfigError("Give one run's folder: mezzotint report outputs/DAY/TIME")
    print(f"Wrote {html.write(Path(rest[0]))}.")


def _compare(rest: list[str]) -> None:
    from pathlib import Path

    from optimizer.cli import terminal
    from optimizer.reports.html import compare

    if len(rest) != 1:
        raise ConfigError("Give one sweep's folder: mezzotint compare multirun/DAY/TIME")
    folder = Path(rest[0])
    terminal.sweep(_console(), compare.gather(folder), compare.write(folder))


if __name__ == "__main__":
    sys.exit(main())
