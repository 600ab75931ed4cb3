"""The parts of the objective J (`optimizer.metrics.objective`) that are not the mean KL: for the
table, and for the windows that a search measures.

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
from optimizer.stages.session import Bench, Choices
from optimizer.stages.table import Reading, measure_table, read_for, read_part

VERSION = 1  # raised when the same settings give other parts
FOUR = 4  # code bits of the plan at which tangents are taken
DOMAIN_WINDOWS = 16  # of a domain that a search reads
SEPARATED = 0.5  # nats; margins that the reference has no more of don't count
ASKED = 16  # pairs of a cell that are asked for
TABLE_PAIRS, SEARCH_PAIRS = 192, 96
TOGETHER = 8  # pairs of a backward pass


def losses(bench: Bench, config: Optimize, chosen: Choices, plain: Table) -> np.ndarray:
    """The table of J [groups, precisions]; plain: that of the mean KL. Constants are left out."""
    return np.sum(list(parts(bench, config, chosen, plain).values()), axis=0)


def parts(bench: Bench, config: Optimize, chosen: Choices, plain: Table) -> dict[str, np.ndarray]:
    """What `losses` is the sum of, each with its weight, by the words for it."""
    meaning, found = config.meaning, {"mean KL": plain.loss}
    if meaning.cvar:
        tail = measure_table(bench, config, chosen, _tail(bench, config, chosen))
        found[f"CVaR{100 * meaning.level:g}"] = meaning.cvar * tail.loss
    if meaning.domain:
        cuts = _cuts(bench, meaning.domains)
        counted = list(cuts)
        if meaning.combine == "worst":
            counted = [_worst_domain(bench, config, chosen, cuts)]
            bench.view.note(f"worst domain at {_uniform(chosen)[0]}: {counted[0].name}")
        for domain in counted:
            ids = cuts[domain].ids
            reading = Reading(["domain", digest(ids.tolist())], ids)
            own = measure_table(bench, config, chosen, reading)
            found[f"KL in {domain.name}"] = meaning.domain * domain.weight * own.loss
    if meaning.probes:
        found["lost margins"] = meaning.probes * _margins_table(bench, config, chosen)
    return found


def own_head(bench: Bench, chosen: Choices) -> bool:
    """Whether the head itself may be quantized, so that teachers need a copy of it."""
    from optimizer.models.head import is_head

    layers = bench.model.layers
    return any(is_head(bench.model.net, layers[x.name].parameter) for x in chosen.scope)


def _uniform(chosen: Choices) -> tuple[str, dict[str, Precision]]:
    """Name and choice of the plan at which tangents are taken."""
    first = chosen.groups[0][0]
    at = next(
        (c for c in chosen.columns if chosen.fitted[first, c].code_bits >= FOUR),
        chosen.columns[-1],
    )
    return at, {layer.name: chosen.fitted[layer.name, at] for layer in chosen.scope}


def _tail(bench: Bench, config: Optimize, chosen: Choices) -> Reading:
    """The table's tokens, weighted by dCVaR / dKL."""
    level, ids = config.meaning.level, read_for(bench, config).ids

    def weights() -> np.ndarray:
        quantizer = bind(config.quantizer, bench)
        kl = bench.score(_uniform(chosen)[1], read_part(config), quantizer).kl[: len(ids)]
        alone = Objective(1.0, level, float(np.quantile(kl, level)))
        found = alone.weights(kl) - 1
        # the last position of a language model's window has no next token
        return found if bench.encoder else np.pad(found, ((0, 0), (0, 1)))

    return Reading(["tail", VERSION, level], ids, weights)


# ---------------------------------------------------------------- domains


def _cuts(bench: Bench, entries: Sequence[str]) -> dict[Domain, Windows]:
    """The half of each domain's documents that may be tuned on. Raises TextError if no domain has
    enough text that this model can read."""
    found = {}
    for domain in (replace(whole, half=0) for whole in domains.parse(entries)):
        length = bench.data.search.length
        key = digest(
            [
                "tuned domain",
                domains.VERSION,
                bench.source.fingerprint,
                domain.key(),
                length,
                bench.data.key("") if bench.data.source == "text" else "",
            ]
        )

        def make(domain: Domain = domain, length: int = length) -> dict[str, np.ndarray]:
            from optimizer.models.tokenizer import load_tokenizer

            cut = domains.cut(domain, load_tokenizer(bench.source.folder), length, bench.data)
            empty = Windows(np.zeros((0, 2), np.int64), np.zeros(0, np.int64))
            windows = cut.windows or empty
            return {"ids": windows.ids, "documents": windows.documents}

        kept = bench.store.arrays("tokens", key, make)
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
    bench: Bench, config: Optimize, chosen: Choices, cuts: Mapping[Domain, Windows]
) -> Domain:
    """Of the highest weighted KL at the uniform plan."""
    name, choice = _uniform(chosen)
    quantizer = bind(config.quantizer, bench)
    key = digest(
        [
            "domain losses",
            VERSION,
            bench.source.fingerprint,
            quantizer.key,
            name,
            [layer.name for layer in chosen.scope],
            [cut.ids.tolist() for cut in cuts.values()],
        ]
    )

    def make() -> dict[str, np.ndarray]:
        from optimizer.metrics.divergence import Teacher

        teachers = [Teacher(bench.model.net, cut, own_head=True) for cut in cuts.values()]
        with bench.model.rounded(quantizer.rounder(choice), choice):
            return {"kl": np.array([t.score(bench.model.net).mean_kl for t in teachers])}

    found = bench.store.arrays("scores", key, make)
    assert found is not None
    return worst(list(cuts), found["kl"])


def worst(chosen: Sequence[Domain], kl: np.ndarray) -> Domain:
    """max_d w_d KL_d."""
    return max(zip(chosen, kl, strict=True), key=lambda one: one[0].weight * one[1])[0]


# ---------------------------------------------------------------- probes


def _jobs(bench: Bench, config: Optimize, most: int) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """At most `most` pairs to tune on that the reference separates, from all cells in turn; its
    margins, and how much each counts, on average 1."""
    from optimizer.metrics import margins
    from optimizer.models.tokenizer import load_tokenizer

    pairs = _in_turn(_tuned_pairs(config.meaning))
    context = context_length(bench.source.folder)
    encoded = margins.encode(pairs, load_tokenizer(bench.source.folder), context)
    jobs = [job for job in encoded if not isinstance(job, str)]
    names = [
        p.phenomenon for p, job in zip(pairs, encoded, strict=True) if not isinstance(job, str)
    ]
    key = digest(["asked", VERSION, bench.source.fingerprint, [asdict(job) for job in jobs]])

    def make() -> dict[str, np.ndarray]:
        bench.view.stage("the reference reads the probes")
        return {"margins": margins.measure(bench.model.net, jobs)}

    kept = bench.store.arrays("margins", key, make)
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


def _margins_table(bench: Bench, config: Optimize, chosen: Choices) -> np.ndarray:
    """s^2 / (2 c sqrt(2 pi)) [groups, precisions], nats; see the module."""
    from optimizer.sensitivity import fisher

    jobs, _, each = _jobs(bench, config, TABLE_PAIRS)
    quantizer = bind(config.quantizer, bench)
    task = Task(chosen.groups, chosen.columns, chosen.fitted, quantizer)
    fitted = [[chosen.fitted[g[0], c].name for c in chosen.columns] for g in chosen.groups]
    key = digest(
        [
            "margins",
            VERSION,
            bench.source.fingerprint,
            [asdict(job) for job in jobs],
            chosen.groups,
            chosen.columns,
            fitted,
            quantizer.key,
            config.seed,
            *([] if (each == 1).all() else [each.tolist()]),
        ]
    )

    def make() -> dict[str, np.ndarray]:
        bench.view.stage("sensitivity of the probes")
        quantizer.prepare({x: [chosen.fitted[x, c] for c in task.columns] for x in task.layers})
        rng = np.random.default_rng([config.seed, 91])
        passes = _signed(bench.model.net, jobs, rng, each)
        return {"squares": fisher.squared(bench.model, task, passes) / len(jobs)}

    kept = bench.store.arrays("tables", key, make)
    assert kept is not None
    squares = kept["squares"]
    there = squares[:, chosen.columns.index(_uniform(chosen)[0])].sum()
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


# ---------------------------------------------------------------- the search


def confirming(used: int, windows: int) -> range:
    """Search windows that nothing reads before the choice, which they confirm. Trials read the first
    `used`; slopes all windows but these."""
    return range(max(used, windows - used), windows)


class Beside:
    """What J adds to the loss of a search window: the KL of one window of the worst domain, or of one
    of each domain where they are summed, and the lost margins of some probes, so that the mean over
    the trials' windows has a domain's whole KL and the mean over the probes. The windows that confirm
    a choice get other documents and other probes.

    Made while the model holds its own weights. Cost of a window: `tokens`.
    """

    def __init__(self, bench: Bench, config: Optimize, chosen: Choices, used: int) -> None:
        from optimizer.metrics.divergence import Teacher
        from optimizer.models.head import Predictor

        self.meaning, self.net, self.used = config.meaning, bench.model.net, used
        self.rest = confirming(used, len(bench.windows("search").ids))
        self.teachers: dict[Domain, Teacher] = {}
        if self.meaning.domain:
            for domain, cut in _cuts(bench, self.meaning.domains).items():
                some = Windows(*(x[_spread(len(x))] for x in (cut.ids, cut.documents)))
                self.teachers[domain] = Teacher(self.net, some, own_head(bench, chosen))
        self.domain: Domain | None = None
        self.aim(0)
        self.jobs: list[Any] = []
        self.margins, self.each = np.zeros(0), np.zeros(0)
        if self.meaning.probes:
            self.jobs, self.margins, self.each = _jobs(bench, config, SEARCH_PAIRS)
            self.predict = Predictor(self.net)

    @property
    def key(self) -> list[Any]:
        """What two workers must agree on."""
        texts = [[d.name, d.weight, t.windows.ids.tolist()] for d, t in self.teachers.items()]
        counted = [] if (self.each == 1).all() else [self.each.tolist()]
        combined = [] if self.meaning.combine == "worst" else [self.meaning.combine]
        return [texts, [asdict(job) for job in self.jobs], *counted, *combined]

    @property
    def tokens(self) -> int:
        """Of one window, on average."""
        text = sum(self.teachers[domain].windows.ids.shape[1] for domain in self.counted)
        words = sum(len(job.good) + len(job.bad) for job in self.jobs) / 2
        return text + round(words / self.used)

    @property
    def counted(self) -> list[Domain]:
        """The domains whose KL is part of J now."""
        if self.meaning.combine == "sum":
            return list(self.teachers)
        return [] if self.domain is None else [self.domain]

    def choose(self) -> int:
        """The number of the domain that is worst with the weights that the model holds now."""
        if not self.teachers:
            return 0
        kl = [
            np.mean([t.window(self.net, i) for i in self._windows(t, True)])
            for t in self.teachers.values()
        ]
        return list(self.teachers).index(worst(list(self.teachers), np.array(kl)))

    def aim(self, number: int) -> None:
        """Let this one count as the worst."""
        self.domain = list(self.teachers)[number] if self.teachers else None

    @property
    def live(self) -> Callable[[int], Any] | None:
        """For slopes; None if there is nothing that has one."""
        return self.of if self.teachers or self.jobs else None

    def loss(self, window: int) -> float:
        """With the weights that the model holds now, nats."""
        import torch

        with torch.inference_mode():
            return float(self.of(window))

    def of(self, window: int) -> Any:
        """The same, as a scalar with a gradient if those are on."""
        import torch

        from optimizer.metrics import margins

        total: Any = torch.zeros(())
        trial = window < self.rest.start
        turn = (window if trial else window - self.rest.start) % self.used
        for domain in self.counted:
            teacher = self.teachers[domain]
            own = self._windows(teacher, trial)
            kl = teacher.divergence(self.net, own[turn % len(own)]).mean()
            total = total + self.meaning.domain * domain.weight * kl
        mine = list(range(0 if trial else 1, len(self.jobs), 2))
        some = mine[turn :: self.used]
        if some:
            now = margins.live(self.net, self.predict, [self.jobs[i] for i in some])
            lost = (torch.from_numpy(self.margins[some]).to(now.device) - now).clamp(min=0)
            each = torch.from_numpy(self.each[some]).to(now.device)
            share = self.used / self.each[mine].sum()
            total = total + self.meaning.probes * share * (each * lost).sum()
        return total

    def _windows(self, teacher: Any, trial: bool) -> range:
        count = len(teacher.windows.ids)
        return range(count - count // 2) if trial else range(count - count // 2, count)


def _spread(windows: int) -> np.ndarray:
    """DOMAIN_WINDOWS of them at most, from all documents."""
    return np.unique(np.linspace(0, windows - 1, min(windows, DOMAIN_WINDOWS)).round().astype(int))
