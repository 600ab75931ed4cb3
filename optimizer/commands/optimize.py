"""The main job in stages, each resumable: a killed run goes on where it was, and a new budget on
a measured model costs seconds. No Hydra, no printing.

    source -> inventory -> tokens -> table -> assignment -> plan -> measured -> certificate
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer import search
from optimizer.commands import advise, effort
from optimizer.commands import notes as remarks
from optimizer.commands.product import Outcome, plan_of
from optimizer.commands.prove import HELD, NOISE, asked, prove
from optimizer.config import Optimize
from optimizer.formats import registry
from optimizer.formats.format import Subject
from optimizer.plan import Budget, Inventory, Plan, Precision
from optimizer.reports import html as page
from optimizer.reports.run import (
    FRONT_ROWS,
    Run,
    Scale,
    chosen_point,
    run_key,
    save_front,
    save_history,
    save_pictures,
)
from optimizer.search import Problem, exact
from optimizer.stages import certify, kv_budget, nested, objective
from optimizer.stages.prepared import Prepared
from optimizer.stages.processes import ALONE, Processes, facts
from optimizer.stages.session import Session, unchained
from optimizer.stages.space import SearchSpace, search_space
from optimizer.stages.table import measure_table
from optimizer.stages.view import View
from optimizer.store import root, unwritable, write_atomically

if TYPE_CHECKING:
    from optimizer.stages.refine import Refined

TABLE, SEARCH, NEST = "table", "search", "base and refinement"  # stages, as a person sees them
FRONT_SHOWN = 100  # plans, while a search works


def optimize(
    config: Optimize, out: Path, view: View | None = None, processes: Processes | None = None
) -> Outcome:
    """The main job: measure, allocate, plan, prove. Writes plan.json, front.csv, measured.csv,
    run.json and report.html to `out`. processes: this is the first of them; the others `assist`."""
    begun = time.monotonic()
    view, several = view or View(), processes or ALONE
    ready = several.agree(lambda: _ready(config, out, view, several), _facts)
    config, session, space, rooms = ready.config, ready.session, ready.space, ready.rooms
    _announce(view, config, session)
    table = measure_table(session, config, space)  # KL, for promises
    parts = objective.parts(session, config, space, table)
    aimed = np.sum(list(parts.values()), axis=0)
    notes = [*space.notes, *remarks.unwatched(config, space)]

    def solve(budget: Budget) -> tuple[Problem, np.ndarray]:
        posed = _pose(replace(config, budget=budget), session.inventory, space, aimed)
        return posed, _allocate(posed)

    settled = kv_budget.settle(config, session, space, rooms, solve)
    session = settled.session
    nest = nested.choose(session, config, space, settled.problem, table)
    problem, assignment = settled.problem, settled.assignment if nest is None else nest.columns
    scale = _scale(session, config, space)
    notes += remarks.aim(problem, config.meaning.name, parts)
    problem = replace(problem, third=_third(config, scale))
    notes += remarks.ample(config, problem)
    if session.cache.tried:
        notes.append(
            kv_budget.told(session.cache.tried, session.cache.kind.bits, session.cache.kind.keep)
        )
    prepared = Prepared(session, config, space, table)
    plan = plan_of(prepared, assignment)
    plan.save(out / "plan.json")  # within seconds on a measured model; what follows improves it
    view.note(f"wrote {out / 'plan.json'}: the table's optimum")
    _show_front(view, config, scale, replace(problem, loss=table.loss))
    view.enter(SEARCH)
    refined = _refine(prepared, problem, assignment)
    searched: dict[str, np.ndarray] = {}
    if refined is not None:
        notes.append(remarks.gain(refined, config.meaning.name))
        assignment = refined.assignment
        searched = {f"searched {i}": x for i, x in enumerate(refined.front)}
        notes += _save_front(prepared, searched, out / "front")
    problem = replace(problem, loss=table.loss)  # from here on for showing: KL
    notes += remarks.price_of_policy(config, space, problem, assignment)
    plan = plan_of(prepared, assignment)
    notes += remarks.file(config, session, space, plan)
    files = _files(plan, problem, refined, out)
    outcome = Outcome(plan, files, notes=notes)
    if config.proof.certify:
        outcome = prove(prepared, problem, assignment, searched, outcome)
    found = _nested(prepared, nest, outcome)
    outcome = replace(found, seconds=time.monotonic() - begun)
    return _publish(prepared, problem, scale, outcome)


def assist(config: Optimize, processes: Processes) -> None:
    """What a process beside the first one does: its share of the tables. Probes aren't spread."""
    ready = processes.agree(lambda: _ready(config, None, View(), processes), _facts)
    session, space, alone = ready.session, ready.space, ready.config
    table = measure_table(session, alone, space)
    config = replace(alone, meaning=replace(alone.meaning, probes=0))
    objective.parts(session, config, space, table)


@dataclass(frozen=True)
class Ready:
    """What is meant, with all that can be wrong found before the work. rooms: budgets, one a cache."""

    asked: Optimize
    config: Optimize
    session: Session
    space: SearchSpace
    rooms: list[kv_budget.Room]


def _ready(config: Optimize, out: Path | None, view: View, several: Processes) -> Ready:
    """out: where the run writes; None for a process that doesn't."""
    asked = config
    config, session, space = _checked(config, view, several)
    blank = np.zeros((len(space.groups), len(space.columns)))
    rooms = kv_budget.rooms(config, session, space)
    for one in rooms:
        view.note(one.text) if one.text else None
        _pose(replace(config, budget=one.budget), session.inventory, space, blank)
    # an impossible budget ended here
    if out is not None:
        write_atomically(out / ".writable", b"").unlink()  # an unwritable folder ends here
    return Ready(asked, config, session, space, rooms)


def _facts(ready: Ready) -> dict[str, Any]:
    """What must be the same on all processes."""
    session = ready.session
    return facts(asdict(ready.asked), session.source.fingerprint, session.tokens_key)


def _announce(view: View, config: Optimize, session: Session) -> None:
    """What is asked is settled, and the work begins."""
    settings = asdict(config)
    view.begin(run_key(settings, session.source.fingerprint), session.source.name, settings)
    view.expect(_stages(config))
    view.enter(TABLE)


def _show_front(view: View, config: Optimize, scale: Scale, problem: Problem) -> None:
    """What the table foretells for all sizes, before a search's trials come beside it."""
    if config.search.space != "exact":
        front = scale.front(problem, FRONT_SHOWN)
        view.plans({"predicted front": [(p.bytes, p.predicted) for p in front]})


def _files(plan: Plan, problem: Problem, refined: Refined | None, out: Path) -> dict[str, Path]:
    found = {"plan": plan.save(out / "plan.json"), "front": save_front(problem, out / "front.csv")}
    if refined is not None:
        found["search"] = save_history(refined.history, out / "search.csv")
        save_pictures(refined.pictures, out)
    return found


def _third(config: Optimize, scale: Scale) -> search.Third | None:
    third = config.search.third
    return None if third is None else scale.third(third, config.search.hourly_rate)


def _nested(prepared: Prepared, nest: nested.Nest | None, outcome: Outcome) -> Outcome:
    """With planes for the plan's own layers, measured unless nothing is to be certified."""
    if nest is None:
        return outcome
    session, config, space = prepared.session, prepared.config, prepared.space
    plan = nested.refined(session, config, space, nest, outcome.plan)
    if config.proof.certify:
        from optimizer.stages import unpacking

        session.view.enter(NEST)
        plan = unpacking.measure(session, config, space, nest, plan)
    plan.save(outcome.files["plan"])
    return replace(outcome, plan=plan)


def _stages(config: Optimize) -> dict[str, float]:
    """The stages of a run with their costs, in forward passes of a token."""
    parts = config.data.parts
    tokens = {name: part.sequences * part.length for name, part in parts.items()}
    calibrated = config.quantizer.calibrated
    passes = {"tokenwise": 8}.get(config.sensitivity.estimator, 4)
    every = parts["calibration"].sequences
    share = min(config.sensitivity.windows or every, every) / every
    gains = 2 if config.sensitivity.estimator == "gain" else 0  # of all windows' Hessians
    found = {TABLE: float((passes * share + gains) * tokens["calibration"])}
    if config.search.space != "exact":
        found[SEARCH] = float(config.search.tokens)
    if config.proof.certify:
        plans = 2 + config.proof.random + (4 if config.proof.random else 0)
        rounding = 3 * tokens["calibration"] if calibrated else 0
        found[HELD] = float(plans * (rounding + 1.5 * tokens["heldout"]))
        found[NOISE] = 3.0 * tokens["heldout"]
    if config.nested.size is not None and config.proof.certify:
        rounding = 6 * tokens["calibration"] if calibrated else 0
        found[NEST] = float(rounding + 16 * tokens["search"] + 10 * tokens["heldout"])
    return found


def _checked(
    config: Optimize, view: View, several: Processes
) -> tuple[Optimize, Session, SearchSpace]:
    """The settings with every `auto` replaced, the model and what may be chosen. Most mistakes of a
    user are found here."""
    config.check()
    effort.check(config)
    config = effort.reading(config)
    _reach_storage(config, root(config.store))
    session = Session.open(
        config.model,
        config.data,
        config.store,
        view,
        revision=config.revision,
        device=config.device,
        residence=config.residence,
        processes=several,
    )
    _ = config.residence.settled(session.inventory)  # a cap that is too small ends here
    config, said = advise.propose(config, session.source.folder)
    config.budget.check()
    for line in said:
        view.note(line)
    if session.encoder:
        config.check_encoder()
    folder = session.source.folder
    base = registry.base_of(
        config.runtime, session.source, session.inventory, session.store, config.gguf
    )
    space = search_space(config, session.inventory, folder, base)
    if config.budget.size is not None:
        every = _uniform(space)
        over = registry.overhead(config.runtime, Subject(session.inventory, folder, base), every)
        space = replace(space, overhead=over)
    if config.proof.certify:
        certify.check(session, asked(config))
    if config.search.third in ("time", "price"):
        from optimizer.stages import latency

        latency.check(space, config.runtime.name)
    if config.nested.size is not None:
        config = replace(config, search=replace(config.search, space="exact"))
    config, said = effort.settle(config, session.encoder, lambda: unchained(session))
    for line in said:
        view.note(line)
    return config, session, replace(space, notes=(*space.notes, *said))


def _uniform(space: SearchSpace) -> Iterator[dict[str, Precision]]:
    """For each column the choice that has it wherever it is allowed; other layers are left out."""
    assert space.allowed is not None
    for column in np.flatnonzero(space.allowed.any(0)):
        rows = np.flatnonzero(space.allowed[:, column])
        names = [name for row in rows for name in space.groups[row]]
        yield {name: space.fitted[name, space.columns[column]] for name in names}


def _reach_storage(config: Optimize, store: Path) -> None:
    """A database that can't be used ends here, before a model is loaded."""
    if config.search.space != "exact" and config.search.storage is not None:
        from optimizer.search.storage import open_storage

        open_storage(config.search.storage, store, config.search.heartbeat)


def _scale(session: Session, config: Optimize, space: SearchSpace) -> Scale:
    """With times, measured now or kept, if they are an objective."""
    scale = Scale.of(
        session.inventory,
        space,
        session.source.fingerprint,
        config.quantizer.described(session.calibration_key),
        kv_budget.traffic(config, session),
    )
    if config.search.third not in ("time", "price"):
        return scale
    from optimizer.stages import latency

    found = latency.times(session, space, scale.traffic.batch)
    return replace(scale, times=search.Third("time", found.each, found.outside))


def _save_front(prepared: Prepared, searched: Mapping[str, np.ndarray], folder: Path) -> list[str]:
    """Each plan of a searched front as a file of its own, so that any of them can be applied."""
    for name, assignment in searched.items():
        path = folder / f"{name.replace(' ', '-')}.json"
        plan_of(prepared, assignment).save(path)
    return [f"The plans of the front are in {folder}, without certificates."] if searched else []


def _publish(prepared: Prepared, problem: Problem, scale: Scale, outcome: Outcome) -> Outcome:
    """What a person looks at afterwards: run.json, and the page that is made from it."""
    session, config, space = prepared.session, prepared.config, prepared.space
    out = outcome.files["plan"].parent
    fingerprint, settings = session.source.fingerprint, asdict(config)
    measured = tuple(
        scale.point(
            row.name, row.assignment, row.predicted, measured=row.measured, measures=row.measures
        )
        for row in outcome.measured
    )
    run = Run(
        model=session.source.name,
        key=run_key(settings, fingerprint),
        columns=_palette(space),
        groups=space.groups,
        chosen=chosen_point(scale, outcome.plan, measured),
        front=scale.front(problem, FRONT_ROWS),
        measured=measured,
        prediction=outcome.prediction,
        notes=tuple(outcome.notes),
        config=settings,
        seconds=outcome.seconds,
        unit="text" if session.encoder else "token",
    )
    files = outcome.files | {"run": run.save(out), "report": page.write(out)}
    return replace(outcome, files=files, run=run)


def _palette(space: SearchSpace) -> dict[str, Precision]:
    """Column name -> the precision as most layers have it (`fit=nearest` adapts some)."""
    return {column: space.fitted[space.groups[0][0], column] for column in space.columns}


def _pose(config: Optimize, inventory: Inventory, space: SearchSpace, loss: np.ndarray) -> Problem:
    return search.pose(inventory, space, loss, config.budget, space.overhead)


def _allocate(problem: Problem) -> np.ndarray:
    return problem.largest if problem.fits(problem.largest) else exact.solve(problem)


def _refine(prepared: Prepared, problem: Problem, start: np.ndarray) -> Refined | None:
    """The searched plan, or None where there is nothing to search."""
    session, config = prepared.session, prepared.config
    if config.search.space == "exact" or problem.fits(problem.largest):
        return None
    from optimizer.stages.refine import refine

    journal = session.store.root / "studies" / f"{session.part_key('search')[:40]}.journal"
    try:
        with session.cached():
            return refine(prepared, problem, start, journal)
    except OSError as error:  # Optuna's, writing the journal
        raise unwritable(Path(error.filename or journal), error) from None
