"""The main job in stages, each resumable: a killed run goes on where it was, and a new budget on
a measured model costs seconds. No Hydra, no printing.

    source -> inventory -> tokens -> table -> assignment -> plan -> measured -> certificate
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

import numpy as np

from optimizer import search
from optimizer.bench import Bench, Choices, View, choices, make_quantizer, measure_table
from optimizer.config import Optimize
from optimizer.layer import Inventory, Precision
from optimizer.plan import Plan, assemble, digest, stored_bytes
from optimizer.search import Problem, exact
from optimizer.sensitivity import Table
from optimizer.store import write_atomically

FRONT_ROWS = 400


@dataclass(frozen=True)
class Row:
    """A plan that was measured on the search documents."""

    name: str
    id: str
    bits: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class Outcome:
    """What a run made. prediction: how well the table foretold the measured plans."""

    plan: Plan
    files: dict[str, Path]
    measured: list[Row] = field(default_factory=list)
    prediction: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def optimize(config: Optimize, out: Path, view: View | None = None) -> Outcome:
    """The main job: measure, allocate, plan, prove. Writes plan.json, front.csv, measured.csv and
    certificate.json to `out`."""
    begun = time.monotonic()
    view = view or View()
    config.check()
    bench = Bench(config.model, config.revision, config.data, config.store, config.device, view)
    chosen = choices(config, bench.inventory)
    blank = np.zeros((len(chosen.groups), len(chosen.columns)))
    _pose(config, bench.inventory, chosen, blank)  # an impossible budget ends here
    write_atomically(out / "plan.json", b"{}\n")  # an unwritable folder ends here
    (out / "plan.json").unlink()
    table = measure_table(bench, config, chosen)
    problem = _pose(config, bench.inventory, chosen, table.loss)
    notes = _unwatched(config, chosen)
    assignment = _allocate(config, problem, notes)
    plan = _plan(bench, config, chosen, table, assignment)
    files = {"plan": plan.save(out / "plan.json"), "front": _front(problem, out / "front.csv")}
    view.note(f"wrote {files['plan']}")
    outcome = Outcome(plan, files, notes=notes)
    if config.proof.certify:
        outcome = prove(bench, config, chosen, table, problem, assignment, outcome, out)
    return replace(outcome, seconds=time.monotonic() - begun)


def _unwatched(config: Optimize, chosen: Choices) -> list[str]:
    names = [layer.name for layer in chosen.scope if not layer.watchable]
    if not config.quantizer.calibrated or not names:
        return []
    return [
        f"{config.quantizer.name} needs a layer's inputs. {len(names)} of {len(chosen.scope)} layers "
        f"in scope have none that can be watched (embeddings, the head, fused experts: "
        f"{names[0]}); they are rounded to nearest."
    ]


def _pose(config: Optimize, inventory: Inventory, chosen: Choices, loss: np.ndarray) -> Problem:
    return search.pose(
        inventory,
        chosen.scope,
        chosen.groups,
        chosen.columns,
        chosen.fitted,
        loss,
        config.budget,
    )


def _allocate(config: Optimize, problem: Problem, notes: list[str]) -> np.ndarray:
    largest = problem.uniform(int(problem.order[-1]))
    if problem.fits(largest):
        name = problem.columns[int(problem.order[-1])]
        what = "the reference itself" if name == "none" else f"{name} everywhere"
        notes.append(
            f"The budget of {config.budget.text} is above the largest plan of this palette, so "
            f"the plan is {what}."
        )
        return largest
    return exact.solve(problem)


def _plan(
    bench: Bench, config: Optimize, chosen: Choices, table: Table, assignment: np.ndarray
) -> Plan:
    kl, error = table.predict(assignment)
    return assemble(
        bench.inventory,
        chosen.scope,
        chosen.choice(assignment),
        model={
            "name": bench.source.name,
            "revision": bench.source.revision,
            "fingerprint": bench.source.fingerprint,
        },
        runtime=config.runtime.name,
        quantizer=config.quantizer.described(bench.tokens_key),
        predicted={"kl": kl, "stderr": error, "estimator": config.sensitivity.estimator},
        budget={k: v for k, v in asdict(config.budget).items() if v is not None},
        provenance={
            "command": _command(config),
            "seed": config.seed,
            "data": asdict(config.data),
            "versions": versions(),
        },
    )


def _command(config: Optimize) -> str:
    budget = next((f"budget.{k}={v}" for k, v in asdict(config.budget).items() if v), "")
    return f"mezzotint optimize model={config.model} {budget} data={config.data.source}"


def versions() -> dict[str, str]:
    names = ("mezzotint", "torch", "transformers", "numpy", "scipy")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _front(problem: Problem, path: Path) -> Path:
    """The whole front of budgets: size, predicted loss, at most 400 rows."""
    sizes, losses, _ = exact.front(problem)
    keep = np.unique(np.linspace(0, len(sizes) - 1, FRONT_ROWS).round().astype(int))
    scale = problem.weights.sum() / (1 if problem.unit == "code bits" else 8)
    lines = ["bits_per_weight,size,predicted_kl"]
    lines += [f"{sizes[i] / scale:.6f},{sizes[i]:.0f},{losses[i]:.8g}" for i in keep]
    return write_atomically(path, ("\n".join(lines) + "\n").encode())


# ---------------------------------------------------------------- prove


def prove(
    bench: Bench,
    config: Optimize,
    chosen: Choices,
    table: Table,
    problem: Problem,
    assignment: np.ndarray,
    outcome: Outcome,
    out: Path,
) -> Outcome:
    """Measure the prediction on search documents and the plan on held-out ones. If no uniform
    plan that fits is worse, the best uniform one becomes the plan."""
    from optimizer import certificate

    quantizer = make_quantizer(config.quantizer, bench)
    rivals = _rivals(config, problem)
    rows = _check_prediction(bench, config, chosen, table, problem, rivals | {"plan": assignment})
    best_random = min(
        (r for r in rows if r.name.startswith("random")), key=_measured, default=None
    )
    held = {k: v for k, v in rivals.items() if not k.startswith("random")} | {"plan": assignment}
    if best_random is not None:
        held[f"best of {config.proof.random} random"] = rivals[best_random.name]
    held = {k: v for k, v in held.items() if _worth_measuring(k, v, problem, assignment)}
    found = {}
    for name in bench.view.track(list(held), "held-out measurement"):
        choice = chosen.choice(held[name])
        stored = _bytes(bench.inventory, choice)
        scores = bench.score(choice, "heldout", quantizer)
        found[name] = certificate.Candidate(name, stored, scores)
    notes = list(outcome.notes)
    uniforms = [c for n, c in found.items() if n in problem.columns]
    fitting = [c for c in uniforms if problem.fits(held[c.name])]
    best = min(fitting, key=lambda c: c.scores.mean_kl, default=None)
    winner = "plan"
    if best is not None and best.scores.mean_kl <= found["plan"].scores.mean_kl:
        winner = best.name
        if not np.array_equal(held[winner], assignment):
            notes.append(
                f"The searched plan was not better than {winner} everywhere on held-out text (KL "
                f"{found['plan'].scores.mean_kl:.4f} against {best.scores.mean_kl:.4f}), so the "
                f"plan is {winner} everywhere."
            )
            assignment = held[winner]
            outcome = replace(outcome, plan=_plan(bench, config, chosen, table, assignment))
    mine = replace(found[winner], name="plan")
    others = [c for n, c in found.items() if n != "plan" and n not in problem.columns]
    proof = certificate.certify(mine, uniforms, others, config.seed)
    plan = replace(outcome.plan, certificate=proof)
    files = outcome.files | {
        "plan": plan.save(out / "plan.json"),
        "measured": _measured_csv(rows, out / "measured.csv"),
    }
    quality = _quality(rows)
    return replace(outcome, plan=plan, files=files, measured=rows, prediction=quality, notes=notes)


def _rivals(config: Optimize, problem: Problem) -> dict[str, np.ndarray]:
    """Name -> assignment of every plan that the search must beat."""
    rivals = {name: problem.uniform(i) for i, name in enumerate(problem.columns) if name != "none"}
    ends = exact.first_last_high(problem)
    if ends is not None:
        rivals["first and last high"] = ends
    rng = np.random.default_rng([config.seed, 32])
    for i in range(config.proof.random):
        rivals[f"random {i}"] = exact.random_plan(problem, rng)
    return rivals


def _worth_measuring(
    name: str, assignment: np.ndarray, problem: Problem, mine: np.ndarray
) -> bool:
    """Uniform plans of at least the plan's size, and the next smaller one; all other rivals."""
    if name not in problem.columns or problem.sizes(assignment) >= problem.sizes(mine):
        return True
    smaller = [
        problem.sizes(problem.uniform(i))
        for i, column in enumerate(problem.columns)
        if column != "none" and problem.sizes(problem.uniform(i)) < problem.sizes(mine)
    ]
    return problem.sizes(assignment) == max(smaller)


def _bytes(inventory: Inventory, choice: Mapping[str, Precision]) -> int:
    """Tensor bytes; headers, which differ by some bytes, would upset comparisons at equal size."""
    stored = stored_bytes(inventory, choice)
    return stored["quantized"] + stored["untouched"]


def _check_prediction(
    bench: Bench,
    config: Optimize,
    chosen: Choices,
    table: Table,
    problem: Problem,
    plans: Mapping[str, np.ndarray],
) -> list[Row]:
    quantizer = make_quantizer(config.quantizer, bench)
    weights = problem.weights.sum()
    rows = []
    for name in bench.view.track(list(plans), "measuring plans"):
        choice = chosen.choice(plans[name])
        size = sum(choice[x.name].bytes(x.rows, x.cols) for x in chosen.scope)
        measured = bench.score(choice, "search", quantizer).mean_kl
        key = digest(sorted((k, p.name) for k, p in choice.items()))[:12]
        predicted = table.predict(plans[name])[0]
        rows.append(Row(name, key, 8 * size / float(weights), predicted, measured))
    return rows


def _measured(row: Row) -> float:
    return row.measured


def _quality(rows: list[Row]) -> dict[str, float]:
    """Spearman's rank correlation of predicted and measured loss, and measured / predicted: the
    median over the plans, and for the plan itself."""
    from scipy.stats import spearmanr

    predicted = np.array([row.predicted for row in rows])
    measured = np.array([row.measured for row in rows])
    quality = {"plans": float(len(rows))}
    if len(rows) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:
        quality["spearman"] = float(spearmanr(predicted, measured).statistic)
    usable = predicted > 0
    if usable.any():
        quality["calibration"] = float(np.median(measured[usable] / predicted[usable]))
    own = next(row for row in rows if row.name == "plan")
    if own.predicted > 0:
        quality["calibration_plan"] = own.measured / own.predicted
    return quality


def _measured_csv(rows: list[Row], path: Path) -> Path:
    lines = ["name,id,bits_per_weight,predicted_kl,measured_kl"]
    lines += [f"{r.name},{r.id},{r.bits:.6f},{r.predicted:.8g},{r.measured:.8g}" for r in rows]
    return write_atomically(path, ("\n".join(lines) + "\n").encode())
