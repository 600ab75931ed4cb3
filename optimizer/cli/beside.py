"""A command among several processes that were started for one job: the first does it, the others only
help `optimize`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from optimizer.cli import compose
from optimizer.errors import ConfigError, MezzotintError
from optimizer.stages import processes


def run(command: str, asked: list[str], job: Callable[[Any], None]) -> list[MezzotintError]:
    """As `compose.run`; a process beside the first one writes nothing but what is kept in the store.
    Raises ConfigError for a sweep among several."""
    here = processes.started()
    if here.of > 1 and {"-m", "--multirun"} & set(asked):
        raise ConfigError(
            f"A sweep starts its jobs itself (hydra/launcher=...), and {here.of} processes were "
            "started for one job. Leave out -m, or torchrun and accelerate launch."
        )
    if here.first:
        return compose.run(command, asked, job)
    if command != "optimize":  # the first does it alone
        return []
    from optimizer.commands import optimize

    def work(settings: Any) -> None:
        with here.joined():
            optimize.assist(settings, here)

    own = [x for x in asked if not x.startswith(("hydra.run.dir=", "hydra.output_subdir="))]
    with tempfile.TemporaryDirectory() as folder:
        own += [f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
        return compose.run(command, own, work)
