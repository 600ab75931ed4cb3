"""The parts of the objective J (`optimizer.metrics.objective`) that are not the mean KL, for the
table. `optimizer.stages.beside` has them for the windows that a search measures.

The table of J is a sum of tables, each kept by itself, so that other weights cost nothing:

    tail      Fisher information of the tokens whose KL lies above the quantile, times 1 / (1 - level):
              dCVaR / dKL of a token
    domain    Fisher information of the worst domain's text, times its weight; with combine=sum, of
              every domain's
    probes    with g = dm / dW, a margin's change is d ~ sum_ij g_ij dW_ij, of mean 0 and variance
              s^2 = sum_ij g_ij^2 dW_ij^2 where rounding errors are independent, so that
              E (d)+ = s / sqrt(2 pi). That is not additive over groups; its tangent at s = c is:
              (s^2 + c^2) / (2 c sqrt(2 pi)), nowhere below it. The constant is left out.

Which tokens and which domain, and c, are those of the smallest uniform plan of at least FOUR code
bits, since the reference itself loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.config import Optimize
from optimizer.data import domains
from optimizer.data import pairs as probes
from optimizer.data.domains import Domain
from optimizer.data.text import Windows
from optimizer.errors import ConfigError, TextError
from optimizer.metrics.objective import Meaning, Objective, shares
from optimizer.models.source import context_length
from optimizer.plan import Precision, digest
from optimizer.quantization.methods import bind
from optimizer.sensitivity import Table, Task
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace
from optimizer.stages.table import Reading, measure_table, read_for, read_part

VERSION = 1  # raised when the same settings give other parts
FOUR = 4  # code bits of the plan at which tangents are taken
SEPARATED = 0.5  # nats; margins that the reference has no more of don't count
ASKED = 16  # pairs of a cell that are asked for
TABLE_PAIRS = 192
TOGETHER = 8  # pairs of a backward pass


def losses(session: Session, config: Optimize, space: SearchSpace, plain: Table) -> np.ndarray:
    """The table of J [groups, precisions]; plain: that of the mean KL. Constants are left out."""
    return np.sum(list(parts(session, config, space, plain).values()), axis=0)


def parts(
    session: Session, config: Optimize, space: SearchSpace, plain: Table
) -> dict[str, np.ndarray]:
    """What `losses` is the sum of, each with its weight, by the words for it."""
    meaning, found = config.meaning, {"mean KL": plain.loss}
    if meaning.cvar:
        tail = measure_table(session, config, space, _tail(session, config, space))
        found[f"CVaR{100 * meaning.level:g}"] = meaning.cvar * tail.loss
    if meaning.domain:
        cuts = cuts_of(session, meaning.domains)
        counted = list(cuts)
        if meaning.combine == "worst":
            counted = [_worst_domain(session, config, space, cuts)]
            session.view.note(f"worst domain at {_uniform(space)[0]}: {counted[0].name}")
        for domain in counted:
            ids = cuts[domain].ids
            reading = Reading(["domain", digest(ids.tolist())], ids)
            own = measure_table(session, config, space, reading)
            found[f"KL in {domain.name}"] = meaning.domain * domain.weight * own.loss
    if meaning.probes:
        found["lost margins"] = meaning.probes * _margins_table(session, config, space)
    return found


def own_head(session: Session, space: SearchSpace) -> bool:
    """Whether the head itself may be quantized, so that teachers need a copy of it."""
    from optimizer.models.head import is_head

    layers = session.model.layers
    return any(is_head(session.model.net, layers[x.name].parameter) for x in space.scope)


def _uniform(space: SearchSpace) -> tuple[str, dict[str, Precision]]:
    """Name and choice of the plan at which tangents are taken."""
    first = space.groups[0][0]
    at = next(
        (c for c in space.columns if space.fitted[first, c].code_bits >= FOUR),
        space.columns[-1],
    )
    return at, {layer.name: space.fitted[layer.name, at] for layer in space.scope}


def _tail(session: Session, config: Optimize, space: SearchSpace) -> Reading:
    """The table's tokens, weighted by dCVaR / dKL."""
    level, ids = config.meaning.level, read_for(session, config).ids

    def weights() -> np.ndarray:
        quantizer = bind(config.quantizer, session)
        kl = session.score(_uniform(space)[1], read_part(config), quantizer).kl[: len(ids)]
        alone = Objective(1.0, level, float(np.quantile(kl, level)))
        found = alone.weights(kl) - 1
        # the last position of a language model's window has no next token
        return found if session.encoder else np.pad(found, ((0, 0), (0, 1)))

    return Reading(["tail", VERSION, level], ids, weights)


# ---------------------------------------------------------------- domains


def cuts_of(session: Session, entries: Sequence[str]) -> dict[Domain, Windows]:
    """The half of each domain's documents that may be tuned on. Raises TextError if no domain has
    enough text that this model can read."""
    found = {}
    for domain in (replace(whole, half=0) for whole in domains.parse(entries)):
        length = session.data.search.length
        key = digest(
            [
                "tuned domain",
                domains.VERSION,
                session.source.fingerprint,
                domain.key(),
                length,
                session.data.key("") if session.data.source == "text" else "",
            ]
        )

        def make(domain: Domain = domain, length: int = length) -> dict[str, np.ndarray]:
            from optimizer.models.tokenizer import load_tokenizer

            cut = domains.cut(domain, load_tokenizer(session.source.folder), length, session.data)
            empty = Windows(np.zeros((0, 2), np.int64), np.zeros(0, np.int64))
            windows = cut.windows or empty
            return {"ids": windows.ids, "documents": windows.documents}

        kept = session.store.arrays("tokens", key, make)
        assert kept is not None
        if len(kept["ids"]):
            found[domain] = Windows(kept["ids"], kept["documents"])
    if not found:
        raise TextError(
            f"None of the domains {', '.join(entries)} has text that this model can read. Name others "
            "with meaning.domains, or set meaning.domain=0."
        )
    return found


def tuned(meaning: Meaning) -> dict[str, Any]:
    """For a plan's provenance, keys of what was tuned on: domains, and the probes' file."""
    return {
        "domains": [domain.key() for domain in domains.parse(meaning.tuned)],
        "pairs": probes.key(meaning.pairs) if meaning.probes else None,
        "choices": probes.key(meaning.choices) if meaning.probes and meaning.choices else None,
    }


def missing(meaning: Meaning, entries: Sequence[str]) -> list[str]:
    """Domains that are tuned on and not yet among those to be certified."""
    known = [domain.key() for domain in domains.parse(entries)]
    own = zip(meaning.tuned, domains.parse(meaning.tuned), strict=True)
    return [entry for entry, domain in own if domain.key() not in known]


def _worst_domain(
    session: Session, config: Optimize, space: SearchSpace, cuts: Mapping[Domain, Windows]
) -> Domain:
    """Of the highest weighted KL at the uniform plan."""
    name, choice = _uniform(space)
    quantizer = bind(config.quantizer, session)
    key = digest(
        [
            "domain losses",
            VERSION,
            session.source.fingerprint,
            quantizer.key,
            name,
            [layer.name for layer in space.scope],
            [cut.ids.tolist() for cut in cuts.values()],
        ]
    )

    def make() -> dict[str, np.ndarray]:
        from optimizer.metrics.divergence import Teacher

        teachers = [
            Teacher(session.model.net, cut, session.model.own_head) for cut in cuts.values()
        ]
        with session.model.rounded(quantizer.rounder(choice), choice):
            return {"kl": np.array([t.score(session.model.net).mean_kl for t in teachers])}

    found = session.store.arrays("scores", key, make)
    assert found is not None
    return worst(list(cuts), found["kl"])


def worst(chosen: Sequence[Domain], kl: np.ndarray) -> Domain:
    """max_d w_d KL_d."""
    return max(zip(chosen, kl, strict=True), key=lambda one: one[0].weight * one[1])[0]


# ---------------------------------------------------------------- probes


def jobs_of(
    session: Session, config: Optimize, most: int
) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """At most `most` pairs to tune on that the reference separates, from all cells in turn; its
    margins, and how much each counts, on average 1."""
    from optimizer.metrics import margins
    from optimizer.models.tokenizer import load_tokenizer

    pairs = _in_turn(_tuned_pairs(config.meaning))
    context = context_length(session.source.folder)
    encoded = margins.encode(pairs, load_tokenizer(session.source.folder), context)
    jobs = [job for job in encoded if not isinstance(job, str)]
    names = [
        p.phenomenon for p, job in zip(pairs, encoded, strict=True) if not isinstance(job, str)
    ]
    key = digest(["asked", VERSION, session.source.fingerprint, [asdict(job) for job in jobs]])

    def make() -> dict[str, np.ndarray]:
        session.view.stage("the reference reads the probes")
        return {"margins": margins.measure(session.model.net, jobs)}

    kept = session.store.arrays("margins", key, make)
    assert kept is not None
    separated = np.flatnonzero(kept["margins"] > SEPARATED)
    if len(separated) < 2:
        raise TextError(
            f"Lost margins need pairs that the reference separates by more than {SEPARATED} nats; of "
            f"{len(pairs)} pairs, {len(separated)} are. Give others with meaning.pairs=FILE, or set "
            "meaning.probes=0."
        )
    use = separated[:most]
    each = _evened([names[i] for i in use], shares(config.meaning.phenomena))
    return [jobs[i] for i in use], kept["margins"][use], each


def _evened(names: Sequence[str], wanted: Mapping[str, float]) -> np.ndarray:
    """Weights of pairs, of mean 1, so that a phenomenon counts as it should however many pairs of it
    there are. Without weights that are wanted, all pairs count alike."""
    if not wanted:
        return np.ones(len(names))
    each = np.array([wanted[name] / names.count(name) for name in names])
    return np.asarray(each * len(each) / each.sum())


def _tuned_pairs(meaning: Meaning) -> list[probes.Pair]:
    """Every second couple of the pairs and choices whose phenomenon counts. Raises ConfigError."""
    pairs = probes.read(Path(meaning.pairs)) if meaning.pairs else probes.built_in()
    pairs += probes.read(Path(meaning.choices)) if meaning.choices else []
    wanted = shares(meaning.phenomena)
    missing = wanted.keys() - {pair.phenomenon for pair in pairs}
    if missing:
        raise ConfigError(
            f"meaning.phenomena names {', '.join(sorted(missing))}, of which there are no pairs; "
            f"there are pairs of {', '.join(sorted({pair.phenomenon for pair in pairs}))}. Correct it."
        )
    return probes.halves([p for p in pairs if not wanted or p.phenomenon in wanted])[0]


def _in_turn(pairs: Sequence[probes.Pair]) -> list[probes.Pair]:
    """ASKED pairs of each cell at most, one of each in turn."""
    numbers: dict[tuple[str, str], int] = {}
    ranked = []
    for i, pair in enumerate(pairs):
        numbers[pair.cell] = numbers.get(pair.cell, 0) + 1
        ranked.append((numbers[pair.cell], i, pair))
    return [pair for turn, _, pair in sorted(ranked, key=lambda one: one[:2]) if turn <= ASKED]


def _margins_table(session: Session, config: Optimize, space: SearchSpace) -> np.ndarray:
    """s^2 / (2 c sqrt(2 pi)) [groups, precisions], nats; see the module."""
    from optimizer.sensitivity import fisher

    jobs, _, each = jobs_of(session, config, TABLE_PAIRS)
    quantizer = bind(config.quantizer, session)
    task = Task(space.groups, space.columns, space.fitted, quantizer)
    fitted = [[space.fitted[g[0], c].name for c in space.columns] for g in space.groups]
    key = digest(
        [
            "margins",
            VERSION,
            session.source.fingerprint,
            [asdict(job) for job in jobs],
            space.groups,
            space.columns,
            fitted,
            quantizer.key,
            config.seed,
            *([] if (each == 1).all() else [each.tolist()]),
        ]
    )

    def make() -> dict[str, np.ndarray]:
        session.view.stage("sensitivity of the probes")
        quantizer.prepare({x: [space.fitted[x, c] for c in task.columns] for x in task.layers})
        rng = np.random.default_rng([config.seed, 91])
        passes = _signed(session.model.net, jobs, rng, each)
        return {"squares": fisher.squared(session.model, task, passes) / len(jobs)}

    kept = session.store.arrays("tables", key, make)
    assert kept is not None
    squares = kept["squares"]
    there = squares[:, space.columns.index(_uniform(space)[0])].sum()
    return np.asarray(squares / (2 * np.sqrt(2 * np.pi * max(there, 1e-30))))


def _signed(
    net: Any, jobs: Sequence[Any], rng: np.random.Generator, each: np.ndarray
) -> Iterator[Callable[[], Any]]:
    """Sums of margins with random signs: the square of such a sum's gradient is, on average, the sum
    of the squares, times the weights `each`, for one backward pass."""
    import torch

    from optimizer.metrics import margins
    from optimizer.models.head import Predictor

    predict = Predictor(net)
    for i in range(0, len(jobs), TOGETHER):
        part = jobs[i : i + TOGETHER]
        chance = rng.integers(0, 2, len(part)) * 2.0 - 1
        signs = torch.from_numpy(chance * np.sqrt(each[i : i + TOGETHER]))

        def scalar(part: Sequence[Any] = part, signs: Any = signs) -> Any:
            found = margins.live(net, predict, part)
            return found @ signs.to(found.device)

        yield scalar
