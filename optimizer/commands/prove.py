"""The proof: the plan beside the plans it must beat, on text that nobody tuned to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.commands.product import Outcome, plan_of
from optimizer.config import Optimize
from optimizer.errors import ModelError
from optimizer.formats import registry
from optimizer.formats.format import Subject
from optimizer.plan import Plan, Precision
from optimizer.plan.certificate import to_json
from optimizer.quantization.methods import bind
from optimizer.search import Problem
from optimizer.stages import baselines, certify, objective
from optimizer.stages.prepared import Prepared
from optimizer.stages.session import Session
from optimizer.store import write_atomically

if TYPE_CHECKING:
    from optimizer.certificate import comparison

HELD, NOISE = "held-out text", "noise and domains"  # stages, as a person sees them


def prove(
    prepared: Prepared,
    problem: Problem,
    assignment: np.ndarray,
    searched: Mapping[str, np.ndarray],
    outcome: Outcome,
) -> Outcome:
    """Measure the prediction on search documents and the plan on held-out ones. If no uniform
    plan that fits is worse, the best uniform one becomes the plan. searched: plans of other sizes,
    measured on search documents only."""
    from optimizer.certificate import comparison

    session, config, space = prepared.session, prepared.config, prepared.space
    out = outcome.files["plan"].parent
    quantizer = bind(config.quantizer, session)
    session.view.enter(HELD)
    others = baselines.rivals(config, problem)
    plans = {**others, **searched, "plan": assignment}
    rows = baselines.measure(prepared, problem, plans)
    best_random = min(
        (r for r in rows if r.name.startswith("random")), key=baselines.measured_loss, default=None
    )
    held = {k: v for k, v in others.items() if not k.startswith("random")} | {"plan": assignment}
    if best_random is not None:
        held[f"best of {config.proof.random} random"] = others[best_random.name]
    held = {k: v for k, v in held.items() if baselines.worth_measuring(k, v, problem, assignment)}
    found = {}
    for name in session.view.track(list(held), "held-out measurement"):
        choice = space.choice(held[name])
        stored = baselines.tensor_bytes(session.inventory, choice)
        scores = session.score(choice, "heldout", quantizer)
        found[name] = comparison.Candidate(name, stored, problem.sizes(held[name]), scores)
    session.view.enter(NOISE)
    notes = list(outcome.notes)
    uniforms = [c for n, c in found.items() if n in problem.columns]
    fitting = [c for c in uniforms if baselines.may_be(held[c.name], problem)]
    best = min(fitting, key=lambda c: c.scores.mean_kl, default=None)
    winner = "plan"
    whole = np.array_equal(
        assignment, problem.largest
    )  # what seems to keep more does so by chance
    if best is not None and not whole and best.scores.mean_kl <= found["plan"].scores.mean_kl:
        winner = best.name
        if not np.array_equal(held[winner], assignment):
            notes.append(
                f"The searched plan was not better than {winner} everywhere on held-out text (KL "
                f"{found['plan'].scores.mean_kl:.4f} against {best.scores.mean_kl:.4f}), so the "
                f"plan is {winner} everywhere."
            )
            assignment = held[winner]
            outcome = replace(outcome, plan=plan_of(prepared, assignment))
    mine = replace(found[winner], name="plan")
    mixed = [c for n, c in found.items() if n != "plan" and n not in problem.columns]
    mixed += _stock(prepared, outcome.plan)
    kept = certify.certified(session, outcome.plan)
    session.store.arrays("scores", kept, mine.scores.arrays)
    found_to_be = comparison.certify(mine, uniforms, mixed, config.seed)
    weights = weights_of(session, space.choice(assignment), quantizer)
    meaning = certify.judge(session, weights, mine.scores, asked(config))
    plan = replace(outcome.plan, certificate=to_json(replace(found_to_be, meaning=meaning)))
    files = outcome.files | {
        "plan": plan.save(out / "plan.json"),
        "measured": baselines.save(rows, out / "measured.csv"),
    }
    files |= blurred(session, mine.scores.kl, plan, out)
    quality = baselines.quality(rows)
    return replace(outcome, plan=plan, files=files, measured=rows, prediction=quality, notes=notes)


def _stock(prepared: Prepared, plan: Plan) -> list[comparison.Candidate]:
    """The engine's own mixture of at most the plan's bytes, where it has some."""
    session, config, space = prepared.session, prepared.config, prepared.space
    if space.base is None or session.encoder:
        return []
    subject = Subject(session.inventory, session.source.folder, space.base)
    size = registry.check(plan, config.runtime, subject).bytes
    if size is None:
        return []
    from optimizer.stages import stock

    found = stock.measured(session, space, size)
    return [] if found is None else [found]


def asked(config: Optimize) -> certify.Asked:
    wanted = config.proof
    tuned = objective.tuned(config.meaning)["domains"]
    entries = [*wanted.domains, *objective.missing(config.meaning, wanted.domains)]
    return certify.Asked(wanted.tolerance, entries, wanted.generate, config.seed, tuned)


def weights_of(
    session: Session, choice: Mapping[str, Precision], quantizer: Any
) -> certify.Weights:
    """The plan's joint rounding, which is what gets packed, and its cache."""

    @contextmanager
    def hold() -> Iterator[Any]:
        rounder = quantizer.rounder(choice, joint=True)
        with session.model.rounded(rounder, choice):
            yield session.model.net

    real = {name: p.name for name, p in sorted(choice.items()) if p.kind != "none"}
    return certify.Weights([quantizer.key, real], hold, session.cache.kind)


def blurred(session: Session, kl: np.ndarray, plan: Plan, out: Path) -> dict[str, Path]:
    """Held-out text, shaded; nothing where the model has no tokenizer that works, or embeds texts."""
    if session.encoder:
        return {}
    from optimizer.models.tokenizer import load_tokenizer
    from optimizer.reports.html import blur_example

    ids = session.windows("heldout").ids
    try:
        tokenizer = load_tokenizer(session.source.folder)
        page = blur_example.render(ids, kl, tokenizer, f"Plan {plan.id} on held-out text")
    except ModelError:
        return {}
    return {"blur": write_atomically(out / blur_example.FILE, page.encode())}
