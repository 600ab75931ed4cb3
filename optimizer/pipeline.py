"""The stages of the main job, each kept under a content key, so that a killed run goes on where
it was and a new budget on a measured model costs seconds. No Hydra, no printing.

    source -> inventory -> tokens -> table -> assignment -> plan -> measured -> certificate
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer import search, sensitivity
from optimizer.config import Evaluate, Optimize
from optimizer.data import Data, Tokens, Windows
from optimizer.errors import ConfigError, PlanError
from optimizer.plan import Inventory, Layer, Plan, Precision, assemble, digest, glob
from optimizer.search import Problem, exact
from optimizer.sensitivity import Table, Task
from optimizer.source import Source, locate
from optimizer.store import Store, write_atomically

if TYPE_CHECKING:
    from optimizer.meaning import Scores, Teacher
    from optimizer.model import Model

VERSION = 3  # raised when a stage's numbers change
FRONT_ROWS = 400


class View:
    """What a person sees while it runs; this one shows nothing."""

    def stage(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        return items


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


class Bench:
    """One model with its store: everything that doesn't depend on a budget."""

    def __init__(
        self, name: str, revision: str | None, data: Data, store: str, device: str, view: View
    ) -> None:
        self.store = Store(Path(store).expanduser())
        self.view, self.data, self.device = view, data, device
        view.stage(f"finding {name}")
        self.source: Source = locate(name, self.store, revision)
        data.check(self._context())

    def _context(self) -> int | None:
        config = json.loads((self.source.folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(config.get(key), int):
                return int(config[key])
        return None

    @cached_property
    def inventory(self) -> Inventory:
        def take() -> dict[str, Any]:
            from optimizer.model import take_inventory

            return take_inventory(self.source.folder).to_json()

        key = digest(["inventory", VERSION, self.source.fingerprint])
        return Inventory.from_json(self.store.json("inventories", key, take))

    @cached_property
    def model(self) -> Model:
        from optimizer.model import Model

        self.view.stage("loading the reference")
        return Model.load(self.source.folder, self.inventory, self.device)

    @cached_property
    def tokens_key(self) -> str:
        return digest(self.data.key(self.source.fingerprint))

    @cached_property
    def tokens(self) -> Tokens:
        from optimizer import data as texts

        if self.data.source != "self":
            from optimizer.model import load_tokenizer

            return texts.cut(self.data, load_tokenizer(self.source.folder))

        def keep(name: str, make: Any) -> dict[str, np.ndarray]:
            found = self.store.arrays("tokens", digest([self.tokens_key, name]), make)
            assert found is not None
            return found

        return texts.sample(self.data, LazyModel(self), keep, self.view.track)

    def windows(self, part: str) -> Windows:
        return self.tokens[part]

    @cached_property
    def teachers(self) -> dict[str, Teacher]:
        return {}

    def score(
        self, choice: Mapping[str, Precision], part: str, quantizer: Any, rounding: Any = None
    ) -> Scores:
        """The plan's scores on a part of the tokens; kept by content."""
        from optimizer.meaning import Scores, Teacher

        real = {name: p.name for name, p in sorted(choice.items()) if p.kind != "none"}
        key = digest(["scores", VERSION, self.tokens_key, part, quantizer.name, real])
        found = self.store.arrays("scores", key)
        if found is None:
            if part not in self.teachers:
                self.teachers[part] = Teacher(self.model.net, self.windows(part), own_head=True)
            with self.model.rounded(quantizer, choice):
                scores = self.teachers[part].score(self.model.net)
            found = self.store.arrays("scores", key, scores.arrays)
        assert found is not None
        return Scores(**found)


class LazyModel:
    """Stands for the bench's model, loaded at the first use: stored batches don't need it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    @property
    def net(self) -> Any:
        return self._bench.model.net


@dataclass(frozen=True)
class Choices:
    """The table's rows and columns: what may be chosen for what."""

    scope: tuple[Layer, ...]
    groups: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    fitted: dict[tuple[str, str], Precision]

    def choice(self, assignment: np.ndarray) -> dict[str, Precision]:
        """Column index per group -> precision per layer."""
        return {
            name: self.fitted[name, self.columns[column]]
            for group, column in zip(self.groups, assignment, strict=True)
            for name in group
        }


def choices(config: Optimize, inventory: Inventory) -> Choices:
    from optimizer.plan import fuse

    scope = inventory.scoped(config.scopes)
    palette = config.palette.precisions()
    fitted = sensitivity.palette_columns(scope, palette, config.palette.fit == "nearest")
    if config.runtime.experts not in ("tensor", "block"):
        raise ConfigError(f"runtime.experts is tensor or block, not {config.runtime.experts!r}.")
    groups = fuse(scope, config.runtime.fused, config.runtime.experts)
    return Choices(scope, groups, tuple(p.name for p in palette), fitted)


# ---------------------------------------------------------------- optimize


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
    notes: list[str] = []
    assignment = _allocate(config, problem, notes)
    plan = _plan(bench, config, chosen, table, assignment)
    files = {"plan": plan.save(out / "plan.json"), "front": _front(problem, out / "front.csv")}
    view.note(f"wrote {files['plan']}")
    outcome = Outcome(plan, files, notes=notes)
    if config.proof.certify:
        outcome = prove(bench, config, chosen, table, problem, assignment, outcome, out)
    return replace(outcome, seconds=time.monotonic() - begun)


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


def _quantizer(config: Optimize) -> Any:
    from optimizer.quantizer import Rtn

    return Rtn()


def measure_table(bench: Bench, config: Optimize, chosen: Choices) -> Table:
    """The sensitivity table, chunk by chunk from the store or made now."""
    settings = config.sensitivity
    fitted = [[chosen.fitted[g[0], c].name for c in chosen.columns] for g in chosen.groups]
    estimator = [settings.estimator, settings.chunks, settings.probes]
    key = digest(
        ["table", VERSION, bench.tokens_key, estimator, chosen.groups, chosen.columns, fitted,
         config.quantizer.name, config.seed]
    )  # fmt: skip
    task = Task(chosen.groups, chosen.columns, chosen.fitted, _Later(lambda: _quantizer(config)))
    runs = sensitivity.chunks(config.data.calibration.sequences, settings.chunks)
    samples = []
    todo = [i for i in range(len(runs)) if bench.store.arrays("tables", _part(key, i)) is None]
    if todo:
        _ = bench.windows("calibration").ids
    for i in bench.view.track(range(len(runs)), "sensitivity") if todo else range(len(runs)):

        def make(i: int = i) -> dict[str, np.ndarray]:
            ids = bench.windows("calibration").ids[runs[i]]
            seed = [config.seed, runs[i].start]
            return {"loss": settings.score(bench.model, task, ids, seed)}

        found = bench.store.arrays("tables", _part(key, i), make)
        assert found is not None
        samples.append(found["loss"])
    table = Table.from_samples(task, np.array(samples))
    return _measured_rows(bench, config, task, table, key)


def _part(key: str, index: Any) -> str:
    return digest([key, index])


class _Later:
    """A quantizer made at its first use: a finished table doesn't need torch."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def round(self, weight: Any, precision: Precision) -> Any:
        return self._made.round(weight, precision)

    @cached_property
    def _made(self) -> Any:
        return self._make()

    @property
    def name(self) -> str:
        return str(self._made.name)


def _measured_rows(
    bench: Bench, config: Optimize, task: Task, table: Table, key: str
) -> Table:
    settings = config.sensitivity.measured
    if not settings.groups:
        return table
    if settings.at != "reference" and settings.at not in task.columns:
        raise ConfigError(
            "sensitivity.measured.at is reference or a precision of the palette "
            f"({', '.join(task.columns)}), not {settings.at!r}."
        )
    wanted = [
        i
        for i, group in enumerate(task.groups)
        if any(glob(p).fullmatch(name) for p in settings.groups for name in group)
    ]
    if not wanted:
        raise ConfigError(f"sensitivity.measured.groups={settings.groups} matches no layer.")
    rows = {}
    for i in bench.view.track(wanted, "measuring single groups"):

        def make(i: int = i) -> dict[str, np.ndarray]:
            from optimizer.sensitivity import measured

            windows = bench.windows("calibration")
            return measured.measure(bench.model, task, windows, task.groups[i], settings.at)

        found = bench.store.arrays("tables", _part(key, ["measured", settings.at, i]), make)
        assert found is not None
        rows[i] = (found["loss"], found["stderr"])
    return table.with_rows(rows)


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
        quantizer=asdict(config.quantizer),
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

    quantizer = _quantizer(config)
    rivals = _rivals(config, problem, chosen)
    rows = _check_prediction(bench, config, chosen, table, problem, rivals | {"plan": assignment})
    best_random = min((r for r in rows if r.name.startswith("random")), key=_measured, default=None)
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
                f"{found['plan'].scores.mean_kl:.4f} against {best.scores.mean_kl:.4f}), so the plan "
                f"is {winner} everywhere."
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


def _rivals(config: Optimize, problem: Problem, chosen: Choices) -> dict[str, np.ndarray]:
    """Name -> assignment of every plan that the search must beat."""
    rivals = {
        name: problem.uniform(i) for i, name in enumerate(problem.columns) if name != "none"
    }
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
    from optimizer.plan import stored_bytes

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
    quantizer = _quantizer(config)
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


# ---------------------------------------------------------------- apply and evaluate


def apply(
    plan: Plan,
    out: Path,
    store: str,
    model: str | None = None,
    overwrite: bool = False,
    view: View | None = None,
) -> Path:
    """Pack the plan's model into the folder `out`. Raises before any work if it can't be done.

    model: where the reference is, if no longer where the plan says.
    """
    from optimizer.backends import packed
    from optimizer.model import Model

    view = view or View()
    packed.check_target(out, overwrite)
    source, inventory = reference_of(plan, model, Store(Path(store).expanduser()))
    check_names(plan, inventory)
    view.stage("loading the reference")
    reference = Model.load(source.folder, inventory, full=False)
    packed.save(plan, reference, source.folder, out, view.track)
    return out


def reference_of(plan: Plan, name: str | None, store: Store) -> tuple[Source, Inventory]:
    """The model that the plan was made for. Raises PlanError if another one is given."""
    from optimizer.model import take_inventory

    wanted = plan.model.get("fingerprint")
    source = locate(name or str(plan.model["name"]), store, plan.model.get("revision"))
    if wanted and source.fingerprint != wanted:
        raise PlanError(
            f"A plan fits one model only. This one was made for {plan.model['name']} "
            f"({str(wanted)[:19]}), and {source.name} is another ({source.fingerprint[:19]}). Give "
            "the model that it was made for, or make a plan for this one."
        )
    return source, take_inventory(source.folder)


def check_names(plan: Plan, inventory: Inventory) -> None:
    """Raise PlanError unless plan and model name the same layers in the same shapes."""
    have = {layer.name: (layer.rows, layer.cols) for layer in inventory.layers}
    for name in plan.layers:
        if name not in have:
            raise PlanError(
                f"The plan names the layer {name}, which the model doesn't have. Correct the name "
                "or make the plan again."
            )
    for name, shape in have.items():
        if name not in plan.layers:
            raise PlanError(f"The plan says nothing about the layer {name}. Make it again.")
        if plan.shapes and plan.shapes.get(name) != shape:
            raise PlanError(f"The plan has another shape for {name} than the model's {shape}.")
        if not plan.choice[name].fits(shape[1]):
            raise PlanError(
                f"{plan.layers[name]} doesn't divide the {shape[1]} columns of {name}. Choose "
                "another precision for it."
            )


def evaluate(config: Evaluate, view: View | None = None) -> dict[str, Any]:
    """Reference against packed, on held-out windows of the given text. Returns the certificate's
    row for the packed model."""
    from optimizer import certificate
    from optimizer.backends import packed
    from optimizer.meaning import Teacher

    view = view or View()
    folder = Path(config.model)
    plan = packed.verify(folder)
    bench = Bench(
        config.reference or str(plan.model["name"]),
        plan.model.get("revision"),
        config.data,
        config.store,
        config.device,
        view,
    )
    if bench.source.fingerprint != plan.model.get("fingerprint", bench.source.fingerprint):
        reference_of(plan, config.reference, bench.store)
    windows = bench.windows("heldout")
    view.stage("the reference reads")
    teacher = Teacher(bench.model.net, windows)
    view.stage("the packed model reads")
    scores = teacher.score(packed.load(folder, device=config.device))
    counts = certificate.resamples(scores.documents, np.random.default_rng(0))
    found = certificate.describe(scores, counts)
    return {
        "plan": plan,
        "bytes": (folder / packed.PACKED_FILE).stat().st_size,
        "documents": len(np.unique(scores.documents)),
        "tokens": int(scores.kl.size),
        "row": {key: asdict(value) for key, value in found.items()},
    }
