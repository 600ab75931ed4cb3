"""Mezzotint: make a language model fit a memory budget and keep what it means.

plan = optimizer.optimize("smollm2", budget=optimizer.Budget(bits=4.5), out="run")
optimizer.apply(plan, "packed")
model = optimizer.load("packed")          # a transformers model; model.generate() works
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import MezzotintError
from optimizer.plan import Budget, Plan, Precision

if TYPE_CHECKING:
    import torch

__all__ = ["Budget", "MezzotintError", "Plan", "Precision", "apply", "load", "optimize"]

STORE = "~/.cache/mezzotint"


def optimize(model: str, out: str | Path = "mezzotint-run", **settings: Any) -> Plan:
    """Measure `model`, make the best plan for `budget`, prove it, write both to `out`.

    model: `smollm2`, `minilm`, `stories`, a folder, a .gguf file or a hub id. settings: fields of
    `optimizer.config.Optimize`, e.g. budget=Budget(bits=4.5), data=Data(source="text", path=...).
    Raises MezzotintError.
    """
    config = import_module("optimizer.config")
    pipeline = import_module("optimizer.commands.optimize")
    plan: Plan = pipeline.optimize(config.Optimize(model=model, **settings), Path(out)).plan
    return plan


def apply(
    plan: Plan,
    out: str | Path,
    model: str | None = None,
    overwrite: bool = False,
    store: str = STORE,
) -> Path:
    """Write the packed model that `plan` describes to the folder `out`; returns it.

    model: where the reference is, if no longer where the plan says. Raises MezzotintError.
    """
    deploy = import_module("optimizer.commands.deploy")
    written: Path = deploy.apply(plan, Path(out), store, model, overwrite)
    return written


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    fast: bool = False,
    steady: bool = False,
    unpack: str | None = None,
    share: float | None = None,
    kl: float | None = None,
    refinement: str = "memory",
    wide: bool = False,
) -> Any:
    """A packed folder -> a transformers model in eval mode.

    It unpacks each layer as it runs and computes in fp32: the certificate's own numbers. fast:
    compute in bf16 and, on a CPU, multiply packed weights where PyTorch can, which has a product for
    integers of 4 and 8 bits. wide: beside fast, hold those of 2 to 7 bits in 4 or 8, which is many
    times as fast and takes more memory than the plan says.
    steady: have this process give freed memory back to the system at once (Linux with glibc), so that
    it holds no more than the plan says; off, the process's allocator stays as it is.
    unpack: what is done with a refinement, if the folder has one: `never` (the base alone, the
    refinement isn't opened), `always` (the default), `draft` (the base drafts what the refined model
    checks: its own words, for one sequence at a time) or `hard` (the base, and the planes for tokens
    that it is unsure of: a `share` of them, or as many as keep the mean loss below `kl` nats; by
    default the share that the plan was certified with). refinement: where planes lie: `memory` (on the
    device), `cpu` (in the host's memory) or `disk`. What was done hangs on the model's `unpacking`.
    Raises MezzotintError if a file was changed since it was packed.
    """
    packed = import_module("optimizer.formats.torch.packed")
    modes = import_module("optimizer.formats.torch.modes")
    wanted = modes.Unpacking(unpack, share, kl, refinement)
    return packed.load(folder, dtype, device, fast, steady, wanted, wide)


class _Introducing(MetaPathFinder):
    """Tells transformers of packed folders as soon as it is imported, and not before: importing it
    takes seconds."""

    HOST = "transformers.quantizers.auto"
    READER = "optimizer.formats.torch.from_pretrained"

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        del path, target
        if fullname != self.HOST:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                import_module(self.READER)

            loader.exec_module = exec_module
        return spec


if _Introducing.HOST in sys.modules:
    import_module(_Introducing.READER)
else:
    sys.meta_path.insert(0, _Introducing())
