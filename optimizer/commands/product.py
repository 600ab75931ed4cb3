"""A run's product: the plan with where it came from, and what lies around it."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from optimizer.plan import Plan, assemble
from optimizer.reports.run import Run, overrides
from optimizer.stages import baselines, kv_budget, objective
from optimizer.stages.prepared import Prepared


@dataclass(frozen=True)
class Outcome:
    """What a run made. prediction: how well the table foretold the measured plans."""

    plan: Plan
    files: dict[str, Path]
    measured: list[baselines.Row] = field(default_factory=list)
    prediction: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    run: Run | None = None


def plan_of(prepared: Prepared, assignment: np.ndarray) -> Plan:
    """The plan that gives each group its column, with what the table foretells of it."""
    session, config, space = prepared.session, prepared.config, prepared.space
    kl, error = prepared.table.predict(assignment)
    return assemble(
        session.inventory,
        space.scope,
        space.choice(assignment),
        model={
            "name": session.source.name,
            "revision": session.source.revision,
            "fingerprint": session.source.fingerprint,
        },
        runtime=config.runtime.name,
        quantizer=config.quantizer.described(session.calibration_key),
        predicted={"kl": kl, "stderr": error, "estimator": config.sensitivity.estimator}
        | ({"unit": "text"} if session.encoder else {}),
        kv=session.cache.kind.bits,
        keep=session.cache.kind.keep,
        budget=config.budget.asked,
        provenance={
            "command": shlex.join(["mezzotint", "optimize", *overrides(asdict(config))]),
            "seed": config.seed,
            "data": asdict(config.data),
            "tuned": objective.tuned(config.meaning),
            "geometry": session.geometry(),
            "caches": list(session.cache.tried),
            "read": kv_budget.traffic(config, session).weights(
                session.inventory, space.choice(assignment)
            ),
            "versions": versions(),
        },
    )


def versions() -> dict[str, str]:
    names = ("mezzotint", "torch", "transformers", "numpy", "scipy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
