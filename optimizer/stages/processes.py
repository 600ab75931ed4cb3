"""Several processes that make one table together, as `torchrun` and `accelerate launch` start them.

All run the same command. The first does the job: it writes, prints and talks to W&B. The others check
what it checks, measure their chunks of each table and leave. What they tell each other is finished
rows of a table, some kilobytes in host memory, so that gloo serves for GPUs, too; a chunk is summed up
by one process, so that no sum depends on how many there are.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np

from optimizer.errors import MezzotintError, ProcessError

T = TypeVar("T")
JOINING = timedelta(minutes=10)  # for all processes to be there
PATIENCE = timedelta(hours=1)  # of one that is done with its share
POLLED = 0.05  # seconds between two looks; a wait inside of torch would hear no signal
NUMBERS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_NUMBERS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
LOCAL_COUNTS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
OWN = (
    "model",
    "data",
    "device",
    "store",
    "wandb",
)  # settings that may differ; contents are compared


@dataclass(frozen=True)
class Processes:
    """number: this one's, from 0. of: how many there are; local_number, local_of: on this machine."""

    number: int = 0
    of: int = 1
    local_number: int = 0
    local_of: int = 1

    @property
    def first(self) -> bool:
        return self.number == 0

    def device(self, name: str) -> str:
        """The GPU of this process, where a kind of device is named and no single one."""
        return f"{name}:{self.local_number}" if self.of > 1 and name == "cuda" else name

    def share(self, items: int) -> range:
        """This process's of so many items: neighbours, and always the same for as many processes."""
        edges = np.linspace(0, items, self.of + 1).round().astype(int)
        return range(int(edges[self.number]), int(edges[self.number + 1]))

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Inside, all are there. Raises ProcessError."""
        if self.of == 1:
            yield
            return
        self._asked(lambda: _group(self.number, self.of))
        try:
            yield
        finally:
            _group.cache_clear()

    def agree(self, make: Callable[[], T], facts: Callable[[T], Mapping[str, Any]]) -> T:
        """What `make` returns here, once every process has made it. Raises ProcessError where facts
        of what was made differ, or where another process couldn't make it."""
        if self.of == 1:
            return make()
        made: list[T] = []

        def tell() -> bytes:
            made.append(make())
            return json.dumps(facts(made[0]), default=str).encode()

        found = [json.loads(told) for told in self._shared(tell)]
        for number, other in enumerate(found):
            unlike = [x for x in {**found[0], **other} if found[0].get(x) != other.get(x)]
            if unlike:
                named = ", ".join(_named(x, other.get(x), found[0].get(x)) for x in unlike[:5])
                raise self._for_the_first(
                    f"All processes of a job measure the same thing; process {number} of {self.of} "
                    f"has another {named}. Start them with one command on the same files."
                )
        return made[0]

    def everyones(self, rows: Callable[[], np.ndarray]) -> list[np.ndarray]:
        """What `rows` returns on each process [n, ...], fp64, in their order. All but n agree. Raises
        ProcessError where another process couldn't, or is gone."""

        def tell() -> bytes:
            own = np.ascontiguousarray(rows(), np.float64)
            return json.dumps(own.shape).encode() + b"\n" + own.tobytes()

        found = []
        for told in self._shared(tell):
            shape, _, numbers = told.partition(b"\n")
            found.append(np.frombuffer(numbers, np.float64).reshape(json.loads(shape)))
        return found

    def _shared(self, tell: Callable[[], bytes]) -> list[bytes]:
        """What each process tells, in their order; mistakes are told, too."""
        own: MezzotintError | None = None
        try:
            told = b"+" + tell()
        except MezzotintError as error:
            own, told = error, b"-" + str(error).encode()
        found: list[bytes] = self._asked(lambda: self._gather(told))
        failed = [i for i, told in enumerate(found) if not told.startswith(b"+")]
        if not failed:
            return [told[1:] for told in found]
        if own is not None and self.first:
            raise own
        said = found[failed[0]][1:].decode()
        raise self._for_the_first(f"Process {failed[0]} of {self.of} had to stop: {said}")

    def _for_the_first(self, text: str) -> ProcessError:
        """Only one process says what all of them know."""
        return ProcessError(text if self.first else "")

    def _asked(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except (RuntimeError, ValueError, KeyError) as error:  # torch's own are RuntimeErrors
            raise ProcessError(
                f"Process {self.number} of {self.of} doesn't reach the others ({_reason(error)}). One "
                "of them was stopped, or failed with a message of its own. What is measured is kept, "
                "block by block: the same command goes on from there."
            ) from None

    def _gather(self, own: bytes) -> list[bytes]:
        """Everyone's bytes, in the order of the processes."""
        import torch

        sizes = self._all(torch.tensor([len(own)]))
        most = max(int(size) for size in sizes)
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        found = self._all(padded)
        return [x[: int(size)].numpy().tobytes() for x, size in zip(found, sizes, strict=True)]

    def _all(self, own: Any) -> Sequence[Any]:
        import torch

        found = [torch.empty_like(own) for _ in range(self.of)]
        patient = _c10d().AllgatherOptions()
        patient.timeout = PATIENCE
        work = _group(self.number, self.of).allgather([found], [own], patient)
        while not work.is_completed():
            time.sleep(POLLED)
        work.wait()
        return found


@cache
def _group(number: int, of: int) -> Any:
    """The processes as torch knows them, once all are there. It is no default group: with one,
    transformers' save_pretrained writes nothing but on the first process."""
    c10d = _c10d()
    store, _, _ = next(c10d.rendezvous("env://", number, of, timeout=JOINING))
    return c10d.ProcessGroupGloo(c10d.PrefixStore("mezzotint", store), number, of, JOINING)


def _c10d() -> Any:
    """torch's own names for what processes tell each other."""
    return import_module("torch.distributed.distributed_c10d")


ALONE = Processes()


def started() -> Processes:
    """As the environment says it; alone if it says nothing."""
    of = _number(COUNTS, 1)
    if of <= 1 or "MASTER_ADDR" not in os.environ:
        return ALONE
    return Processes(_number(NUMBERS, 0), of, _number(LOCAL_NUMBERS, 0), _number(LOCAL_COUNTS, 1))


def said(here: Processes) -> list[str]:
    """What a person should know of the processes."""
    if here.of > 1:
        return [f"{here.of} processes measure the table; the first does the rest."]
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ:
        return [
            "accelerate launch --cpu started a single process, as it does without MPI. Several on "
            "CPUs: torchrun --nproc-per-node 2 -m optimizer optimize ..."
        ]
    return []


def facts(settings: Mapping[str, Any], model: str, text: str) -> dict[str, Any]:
    """What must be the same on all processes."""
    versions = {
        f"version of {x}": version(x) for x in ("mezzotint", "torch", "transformers", "numpy")
    }
    same = {k: v for k, v in settings.items() if k not in OWN}
    return {**versions, "model": model, "text": text, **json.loads(json.dumps(same, default=str))}


def _number(names: Sequence[str], otherwise: int) -> int:
    found = next((os.environ[name] for name in names if name in os.environ), "")
    return int(found) if found.isdigit() else otherwise


def _reason(error: Exception) -> str:
    """What torch says first, without the place in its source."""
    said = re.sub(r"^(\[[^]]*\] ?)+", "", str(error)) or type(error).__name__
    return re.split(r"[.!] |\n", said)[0][:200].rstrip(".")


def _named(name: str, here: Any, there: Any) -> str:
    """The name of a fact, with both values where they are short."""
    values = [str(here), str(there)]
    return f"{name} ({values[0]}, not {values[1]})" if max(map(len, values)) < 40 else name
