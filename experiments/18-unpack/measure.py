"""What nesting costs, and what unpacking only some tokens leaves of the base's loss.

    measure.py MODEL QUANTIZER BASE_SIZE BOTH_SIZES_TOGETHER OUT.csv [KEY=VALUE ...]

Held-out KL to the reference, 95 % over documents, of: base and refined model, two separate plans
of the same sizes, and the base with the planes opened for a share of the tokens, chosen by a
signal: probe, entropy, margin, norm (of the planes' contribution to every layer's output, relative,
which reads the planes: an upper bound for cheap versions), random (what any signal must beat) and
oracle (the base's true KL).
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.rows import write
from optimizer.commands.optimize import optimize
from optimizer.config import Nested, Optimize, Proof
from optimizer.data.text import Data, Part
from optimizer.metrics import bootstrap
from optimizer.models import planes
from optimizer.plan import Budget, Palette, Plan
from optimizer.quantization.methods import bind, method
from optimizer.quantization.residual import Refining
from optimizer.search import Search
from optimizer.stages.session import Session
from optimizer.stages.unpacking import Unpacked
from optimizer.stages.view import View

SHARES = {"entropy": (0.1, 0.2, 0.3, 0.5), "random": (0.1, 0.3, 0.5), "oracle": (0.1, 0.3, 0.5)}
SHARES |= {"probe": (0.1, 0.2, 0.3, 0.5), "margin": (0.3,), "norm": (0.3,)}


class Said(View):
    def stage(self, text: str) -> None:
        print("   ", text, flush=True)


def settings(argv: list[str]) -> Optimize:
    model, quantizer, size, both = argv[:4]
    more = dict(word.split("=") for word in argv[5:])
    data = Data(
        source=more.get("data", "bundled"),
        search=Part(sequences=8, length=128),
        heldout=Part(sequences=int(more.get("windows", 12)), length=192),
    )
    return Optimize(
        model=model,
        budget=Budget(size=size),
        nested=Nested(size=both, weight=float(more.get("weight", 0.03))),
        palette=Palette(bits=[2, 3, 4, 5, 6, 8, 16], fit=more.get("fit", "untouched")),
        quantizer=method(quantizer)(),
        search=Search(space="exact"),
        proof=Proof(certify=False),
        data=data,
        store=more.get("store", os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")),
    )


def planned(config: Optimize, **changed: Any) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        return optimize(Optimize(**{**vars(config), **changed}), Path(folder), Said()).plan


def norms(view: Unpacked, windows: Any) -> np.ndarray:
    """Sum over layers of |R' x| / |B' x + R' x| [windows, length - 1]."""
    session, choice = view.session, view.plan.choice
    assert view.plan.refinement is not None
    stacked = view._refining.rounder(choice)
    names = [n for n in view.plan.refinement.layers if session.model.layers[n].block is not None]
    dense = {n: planes.Dense(stacked.rest(session.model.weight(n), n)) for n in names}
    modules = planes.modules_of(session.model.net, [session.model.layers[n] for n in names])
    rounder = view._quantizer.rounder(choice)
    total: list[Any] = []

    def hook(plane: planes.Dense) -> Any:
        def add(_module: Any, args: Any, output: Any) -> None:
            part = plane.product(args[0]).norm(dim=-1) / output.norm(dim=-1).clamp(min=1e-9)
            total[-1] = total[-1] + part[0, :-1]

        return add

    handles = [m.register_forward_hook(hook(dense[n])) for n in names for m in modules[n]]
    try:
        with session.model.rounded(rounder, choice), torch.inference_mode():
            for ids in windows.ids:
                total.append(torch.zeros(len(ids) - 1))
                session.model.net(input_ids=torch.from_numpy(ids)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(total).numpy()


def main(argv: list[str]) -> None:
    config = settings(argv)
    plan = planned(config)
    section = plan.refinement
    assert section is not None
    session = Session.open(config.model, config.data, config.store, Said())
    quantizer = bind(config.quantizer, session)
    refining = Refining(quantizer, section.planes, config.quantizer, session)
    windows = session.windows("heldout")
    counts = bootstrap.resamples(windows.documents, np.random.default_rng(0))
    rows: list[dict[str, Any]] = []

    def row(what: str, share: float, size: int, kl: np.ndarray) -> None:
        found = asdict(bootstrap.mean(kl, counts))
        known = {"model": Path(config.model).name, "quantizer": config.quantizer.name}
        known |= {"base_size": str(config.budget.size), "both": str(config.nested.size)}
        rows.append(known | {"what": what, "share": round(share, 4), "bytes": size, **found})
        print(rows[-1], flush=True)
        write(Path(argv[4]), rows, config, what)

    base = session.score(plan.choice, "heldout", quantizer).kl
    refined = session.score(plan.choice, "heldout", refining).kl
    total = plan.bytes["total"] + section.bytes["total"]
    row("base", 0, plan.bytes["total"], base)
    row("refined", 1, total, refined)
    for name, size in (
        ("separate base", config.budget.size),
        ("separate refined", config.nested.size),
    ):
        other = planned(config, budget=Budget(size=size), nested=Nested())
        row(name, 1, other.bytes["total"], session.score(other.choice, "heldout", quantizer).kl)
    view = Unpacked(session, plan, quantizer, refining)
    row("acceptance (EAR of base and refined)", 0, total, view.acceptance())
    signals = {
        **{k: view.signals(windows, "heldout", view.signal(k)) for k in planes.SIGNALS},
        "random": np.random.default_rng(0).random(base.shape),
        "oracle": base,
    }
    for name, shares in SHARES.items():
        found = norms(view, windows) if name == "norm" else signals[name]
        for share in shares:
            mask = found > np.quantile(found, 1 - share)
            kl = view.read(windows, "heldout", mask, ["experiment", name, share]).kl
            row(name, float(mask.mean()), total, kl)


if __name__ == "__main__":
    main(sys.argv[1:])
