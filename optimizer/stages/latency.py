"""How long a model takes for each new token, layer by layer: what makes time an objective.

    seconds of a step = outside + sum over layers of t[layer, precision]

t is measured on layers as `optimizer.load(folder, fast=True)` makes them, alone, with weights that no
cache of the processor holds; outside is a step of the model whose layers in scope do nothing. What
the sum misses are effects of layers on each other. Measured once and kept in the store, so that all
runs on a machine weigh the same numbers.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.errors import ConfigError
from optimizer.formats.torch import modules
from optimizer.models.model import skeleton
from optimizer.plan import Layer, Precision, digest
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace

VERSION = 2
ROUNDS = 5  # turns of everything that is measured; the fastest counts
AROUND = 32 * 2**20  # bytes of copies of a layer, so that each is read from memory
COPIES = 32  # of a layer at most
STEPS = 8  # of the rest of the model, each turn
KINDS = ("linear", "conv1d", "head", "embedding")

Kind = tuple[int, int, bool, str]  # rows, cols, tied, precision


@dataclass(frozen=True)
class Times:
    """Seconds per new token, all sequences of a batch together: each [G, P] of the groups, outside
    of everything else."""

    each: np.ndarray
    outside: float


def check(space: SearchSpace, runtime: str) -> None:
    """Raise ConfigError where time can't be measured, before anything is."""
    if runtime != "torch":
        raise ConfigError(
            f"Time is measured in the runtime itself, and of these only torch runs here, not {runtime}"
            ". Take search.third=read, which is arithmetic, or runtime=torch."
        )
    other = [layer for layer in space.scope if layer.kind not in KINDS]
    if other:
        raise ConfigError(
            f"Layers are timed one by one, and {len(other)} of {len(space.scope)} in scope are "
            f"experts of a fused parameter ({other[0].name}). Take search.third=read."
        )


def times(session: Session, space: SearchSpace, batch: int) -> Times:
    """Cost: a few seconds per precision of the palette, the first time."""
    kinds = _kinds(space)
    todo = list(dict.fromkeys(kinds.values()))
    key = digest(
        [
            "times",
            VERSION,
            session.source.fingerprint,
            torch.__version__,
            platform.node(),
            os.cpu_count(),
            torch.get_num_threads(),
            session.device,
            batch,
            [layer.name for layer in space.scope],
            todo,
        ]
    )

    def make() -> dict[str, np.ndarray]:
        return _measure(session, space, todo, batch)

    found = session.store.arrays("times", key, make)
    assert found is not None
    seconds = dict(zip(todo, found["layers"], strict=True))
    each = [
        [
            sum(seconds[kinds[name, c]] if (name, c) in kinds else 0.0 for name in group)
            for c in space.columns
        ]
        for group in space.groups
    ]
    return Times(np.array(each) / batch, found["outside"].item() / batch)


def _kinds(space: SearchSpace) -> dict[tuple[str, str], Kind]:
    """What takes time, by layer and column. An embedding that is no head only looks up rows."""
    return {
        (x.name, c): (x.rows, x.cols, x.tied, space.fitted[x.name, c].name)
        for x in space.scope
        for c in space.columns
        if x.kind != "embedding" or x.tied
    }


def _measure(
    session: Session, space: SearchSpace, todo: list[Kind], batch: int
) -> dict[str, np.ndarray]:
    """Seconds of one step: layers [kinds], outside []. In turns, and of each its fastest: what else
    the machine does only ever adds."""
    precisions = {p.name: p for p in space.fitted.values()}
    rest = Rest(session.source.folder, space.scope, batch, session.device)
    every: list[Callable[[], float]] = [
        Alone(kind, precisions[kind[3]], batch, session.device) for kind in todo
    ]
    every.append(rest)
    taken = np.zeros((ROUNDS + 1, len(every)))
    for turn in session.view.track(range(ROUNDS + 1), "timing layers"):
        taken[turn] = [step() for step in every]
    fastest = taken[1:].min(axis=0)  # the first turn warms up
    return {"layers": fastest[:-1], "outside": fastest[-1]}


class Alone:
    """Copies of one packed layer. Called: seconds of one step of one of them."""

    def __init__(self, kind: Kind, precision: Precision, batch: int, device: str) -> None:
        rows, cols, tied, _ = kind
        weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        count = int(np.clip(AROUND // precision.bytes(rows, cols), 1, COPIES))
        make = modules.linear(weight, precision, tied, device)
        self.copies = [make() for _ in range(count)]
        self.x = torch.ones(batch, 1, cols, dtype=torch.bfloat16, device=device)

    def __call__(self) -> float:
        with torch.inference_mode():
            begun = time.perf_counter()
            for layer in self.copies:
                y = layer(self.x)
            float(y.flatten()[0])  # a GPU is done only now
        return (time.perf_counter() - begun) / len(self.copies)


class Rest:
    """The model without its layers in scope, in bf16. Its weights are zeros: only their bytes count.
    Called: seconds of one step."""

    def __init__(self, folder: Path, scope: Iterable[Layer], batch: int, device: str) -> None:
        self.net: Any = skeleton(folder)
        for layer in scope:
            if layer.kind != "embedding" or layer.tied:
                self._silence(layer)
        for name, value in dict(self.net.named_parameters()).items():
            owner, _, leaf = name.rpartition(".")
            zeros = torch.zeros(value.shape, dtype=torch.bfloat16)
            self.net.get_submodule(owner)._parameters[leaf] = nn.Parameter(zeros, False)
        self.net.tie_weights()
        self.net.to(device)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def _silence(self, layer: Layer) -> None:
        owner = layer.parameter.rpartition(".")[0]
        module = self.net.get_output_embeddings() if layer.tied else self.net.get_submodule(owner)
        module.__class__ = type("Silent", (nn.Module,), {"forward": _nothing})
        module._parameters.clear()
        module.rows = layer.rows

    def __call__(self) -> float:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.net.config)
        with torch.inference_mode():
            begun = time.perf_counter()
            for _ in range(STEPS):
                found = self.net(input_ids=self.ids, past_key_values=cache, use_cache=True)
            float(found.logits.flatten()[0])
        return (time.perf_counter() - begun) / STEPS


def _nothing(self: Any, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], self.rows)
