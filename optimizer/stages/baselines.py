"""The plans that a searched plan must beat, and how well the table foretold what they lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from optimizer.config import Optimize
from optimizer.plan import Inventory, Precision, identity, stored_bytes
from optimizer.quantization.methods import bind
from optimizer.search import Problem, exact
from optimizer.stages.prepared import Prepared
from optimizer.store import write_atomically


@dataclass(frozen=True)
class Row:
    """A plan that was measured on the search documents."""

    name: str
    id: str
    bits: float
    predicted: float
    measured: float
    measures: dict[str, dict[str, float]]
    assignment: np.ndarray


def may_be(assignment: np.ndarray, problem: Problem) -> bool:
    return problem.fits(assignment) and problem.allows(assignment)


def rivals(config: Optimize, problem: Problem) -> dict[str, np.ndarray]:
    """Name -> assignment of every plan that the search must beat. Without random plans that is the
    largest uniform plan that fits, or where none does, the smallest."""
    if not config.proof.random:
        return _nearest(problem)
    found = {name: problem.uniform(i) for i, name in enumerate(problem.columns) if name != "none"}
    ends = exact.first_last_high(problem)
    if ends is not None:
        found["first and last high"] = ends
    rng = np.random.default_rng([config.seed, 32])
    for i in range(config.proof.random):
        found[f"random {i}"] = exact.random_plan(problem, rng)
    return found


def _nearest(problem: Problem) -> dict[str, np.ndarray]:
    uniform = {n: problem.uniform(i) for i, n in enumerate(problem.columns) if n != "none"}
    fitting = {name: x for name, x in uniform.items() if may_be(x, problem)}
    if fitting:
        name = max(fitting, key=lambda n: problem.sizes(fitting[n]))
    elif uniform:
        name = min(uniform, key=lambda n: problem.sizes(uniform[n]))
    else:
        return {}
    return {name: uniform[name]}


def worth_measuring(name: str, assignment: np.ndarray, problem: Problem, mine: np.ndarray) -> bool:
    """Uniform plans of at least the plan's size, and the next smaller one; all other rivals."""
    if name not in problem.columns or problem.sizes(assignment) >= problem.sizes(mine):
        return True
    smaller = [
        problem.sizes(problem.uniform(i))
        for i, column in enumerate(problem.columns)
        if column != "none" and problem.sizes(problem.uniform(i)) < problem.sizes(mine)
    ]
    return problem.sizes(assignment) == max(smaller)


def tensor_bytes(inventory: Inventory, choice: Mapping[str, Precision]) -> int:
    """Tensor bytes; headers, which differ by some bytes, would upset comparisons at equal size."""
    stored = stored_bytes(inventory, choice)
    return stored["quantized"] + stored["untouched"]


def measure(prepared: Prepared, problem: Problem, plans: Mapping[str, np.ndarray]) -> list[Row]:
    """Each plan beside what the table foretold: on search documents, or where there are no random
    plans, on the held-out ones, which are scored anyway."""
    from optimizer.certificate import comparison
    from optimizer.metrics import bootstrap

    session, config, space = prepared.session, prepared.config, prepared.space
    quantizer = bind(config.quantizer, session)
    described = config.quantizer.described(session.calibration_key)
    weights = problem.weights.sum()
    rows = []
    part = "check" if config.proof.random else "heldout"
    session.ready([space.choice(x) for x in plans.values()], part, quantizer)
    for name in session.view.track(list(plans), "measuring plans"):
        choice = space.choice(plans[name])
        size = sum(x.bytes(choice[x.name]) for x in space.scope)
        scores = session.score(choice, part, quantizer)
        counts = bootstrap.resamples(scores.documents, np.random.default_rng([config.seed, 78]))
        measures = {k: asdict(v) for k, v in comparison.describe(scores, counts).items()}
        layers = {x.name: "none" for x in session.inventory.layers}
        layers |= {k: precision.name for k, precision in choice.items()}
        key = identity(session.source.fingerprint, described, layers)
        predicted, measured = prepared.table.predict(plans[name])[0], scores.mean_kl
        bits = 8 * size / float(weights)
        rows.append(Row(name, key, bits, predicted, measured, measures, plans[name]))
    return rows


def measured_loss(row: Row) -> float:
    return row.measured


def quality(rows: list[Row]) -> dict[str, float]:
    """Spearman's rank correlation of predicted and measured loss, and measured / predicted: the
    median over the plans, and for the plan itself."""
    from scipy.stats import spearmanr

    predicted = np.array([row.predicted for row in rows])
    measured = np.array([row.measured for row in rows])
    found = {"plans": float(len(rows))}
    if len(rows) > 2 and np.ptp(predicted) > 0 and np.ptp(measured) > 0:
        found["spearman"] = float(spearmanr(predicted, measured).statistic)
    usable = predicted > 0
    if usable.any():
        found["calibration"] = float(np.median(measured[usable] / predicted[usable]))
    own = next(row for row in rows if row.name == "plan")
    if own.predicted > 0:
        found["calibration_plan"] = own.measured / own.predicted
    return found


def save(rows: list[Row], path: Path) -> Path:
    lines = ["name,id,bits_per_weight,predicted_kl,measured_kl"]
    lines += [f"{r.name},{r.id},{r.bits:.6f},{r.predicted:.8g},{r.measured:.8g}" for r in rows]
    return write_atomically(path, ("\n".join(lines) + "\n").encode())
