"""The parts of the objective J (`optimizer.metrics.objective`) that are not the mean KL: for the
table, and for the windows that a search measures.

The table of J is a sum of tables, each kept by itself, so that other weights cost nothing:

    tail      Fisher information of the tokens whose KL lies above the quantile, times 1 / (1 - level):
              dCVaR / dKL of a token
    domain    Fisher information of the worst domain's text, times its weight
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
from optimizer.errors import TextError
from optimizer.metrics.objective import Meaning, Objective
from optimizer.models.source import context_length
from optimizer.plan import Precision, digest
from optimizer.quantization.methods import bind
from optimizer.sensitivity import Table, Task
from optimizer.stages.session import (
    Bench,
    Choices,
    Reading,
    measure_table,
    read_for,
    read_part,
)

VERSION = 1  # raised when the same settings give other parts
FOUR = 4  # code bits of the plan at which tangents are taken
DOMAIN_WINDOWS = 16  # of a domain that a search reads
SEPARATED = 0.5  # nats; margins that the reference has no more of don't count
ASKED = 16  # pairs of a cell that are asked for
TABLE_PAIRS, SEARCH_PAIRS = 192, 96
TOGETHER = 8  # pairs of a backward pass


def losses(bench: Bench, config: Optimize, chosen: Choices, plain: Table) -> np.ndarray:
    """The table of J [groups, precisions]; plain: that of the mean KL. Constants are left out."""
    meaning, found = config.meaning, plain.loss
    if meaning.cvar:
        tail = measure_table(bench, config, chosen, _tail(bench, config, chosen))
        found = found + meaning.cvar * tail.loss
    if meaning.domain:
        cuts = _cuts(bench, meaning.domains)
        worst = _worst_domain(bench, config, chosen, cuts)
        bench.view.note(f"worst domain at {_uniform(chosen)[0]}: {worst.name}")
        ids = cuts[worst].ids
        own = measure_table(bench, config, chosen, Reading(["domain", digest(ids.tolist())], ids))
        found = found + meaning.domain * worst.weight * own.loss
    if meaning.probes:
        found = found + meaning.probes * _margins_table(bench, config, chosen)
    return found


def own_head(bench: Bench, chosen: Choices) -> bool:
    """Whether the head itself may be quantized, so that teachers need a copy of it."""
    from optimizer.models.head import is_head

    layers = bench.model.layers
    return any(is_head(bench.model.net, layers[x.name].parameter) for x in chosen.scope)


def _uniform(chosen: Choices) -> tuple[str, dict[str, Precision]]:
    """Name and choice of the plan at which tangents are taken."""
    first = chosen.groups[0][0]
    at = next((c for c in chosen.columns if chosen.fitted[first, c].code_bits >= FOUR),
              chosen.columns[-1])  # fmt: skip
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
        key = digest(["tuned domain", domains.VERSION, bench.source.fingerprint, domain.key(), length,
                      bench.data.key("") if bench.data.source == "text" else ""])  # fmt: skip

        def make(domain: Domain = domain, length: int = length) -> dict[str, np.ndarray]:
            from optimizer.models.model import load_tokenizer

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
    key = digest(["domain losses", VERSION, bench.source.fingerprint, quantizer.key, name,
                  [layer.name for layer in chosen.scope],
                  [cut.ids.tolist() for cut in cuts.values()]])  # fmt: skip

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


def _jobs(bench: Bench, config: Optimize) -> tuple[list[Any], np.ndarray]:
    """Pairs to tune on that the reference separates, from all cells in turn, and its margins."""
    from optimizer.metrics import margins
    from optimizer.models.model import load_tokenizer

    file = config.meaning.pairs
    pairs = probes.halves(probes.read(Path(file)) if file else probes.built_in())[0]
    context = context_length(bench.source.folder)
    encoded = margins.encode(_in_turn(pairs), load_tokenizer(bench.source.folder), context)
    jobs = [job for job in encoded if not isinstance(job, str)]
    key = digest(["asked", VERSION, bench.source.fingerprint, [asdict(job) for job in jobs]])

    def make() -> dict[str, np.ndarray]:
        bench.view.stage("the reference reads the probes")
        return {"margins": margins.measure(bench.model.net, jobs)}

    kept = bench.store.arrays("margins", key, make)
    assert kept is not None
    use = np.flatnonzero(kept["margins"] > SEPARATED)
    if len(use) < 2:
        raise TextError(
            f"Lost margins need pairs that the reference separates by more than {SEPARATED} nats; of "
            f"{len(pairs)} pairs, {len(use)} are. Give others with meaning.pairs=FILE, or set "
            "meaning.probes=0."
        )
    return [jobs[i] for i in use], kept["margins"][use]


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

    jobs = _jobs(bench, config)[0][:TABLE_PAIRS]
    quantizer = bind(config.quantizer, bench)
    task = Task(chosen.groups, chosen.columns, chosen.fitted, quantizer)
    fitted = [[chosen.fitted[g[0], c].name for c in chosen.columns] for g in chosen.groups]
    key = digest(["margins", VERSION, bench.source.fingerprint, [asdict(job) for job in jobs],
                  chosen.groups, chosen.columns, fitted, quantizer.key, config.seed])  # fmt: skip

    def make() -> dict[str, np.ndarray]:
        bench.view.stage("sensitivity of the probes")
        quantizer.prepare({x: [chosen.fitted[x, c] for c in task.columns] for x in task.layers})
        passes = _signed(bench.model.net, jobs, np.random.default_rng([config.seed, 91]))
        return {"squares": fisher.squared(bench.model, task, passes) / len(jobs)}

    kept = bench.store.arrays("tables", key, make)
    assert kept is not None
    squares = kept["squares"]
    there = squares[:, chosen.columns.index(_uniform(chosen)[0])].sum()
    return np.asarray(squares / (2 * np.sqrt(2 * np.pi * max(there, 1e-30))))


def _signed(
    net: Any, jobs: Sequence[Any], rng: np.random.Generator
) -> Iterator[Callable[[], Any]]:
    """Sums of margins with random signs: the square of such a sum's gradient is, on average, the sum
    of the squares, for one backward pass."""
    import torch

    from optimizer.metrics import margins
    from optimizer.models.head import Predictor

    predict = Predictor(net)
    for i in range(0, len(jobs), TOGETHER):
        part = jobs[i : i + TOGETHER]
        signs = torch.from_numpy(rng.integers(0, 2, len(part)) * 2.0 - 1)

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
    """What J adds to the loss of a search window: the KL of one window of the worst domain, and the
    lost margins of some probes, so that the mean over the trials' windows has the whole domain's and
    the mean over the probes. The windows that confirm a choice get other documents and other probes.

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
        self.jobs, self.margins = ([], np.zeros(0))
        if self.meaning.probes:
            jobs, margins = _jobs(bench, config)
            self.jobs, self.margins = jobs[:SEARCH_PAIRS], margins[:SEARCH_PAIRS]
            self.predict = Predictor(self.net)

    @property
    def key(self) -> list[Any]:
        """What two workers must agree on."""
        texts = [[d.name, d.weight, t.windows.ids.tolist()] for d, t in self.teachers.items()]
        return [texts, [asdict(job) for job in self.jobs]]

    @property
    def tokens(self) -> int:
        """Of one window, on average."""
        text = 0 if self.domain is None else self.teachers[self.domain].windows.ids.shape[1]
        words = sum(len(job.good) + len(job.bad) for job in self.jobs) / 2
        return text + round(words / self.used)

    def choose(self) -> int:
        """The number of the domain that is worst with the weights that the model holds now."""
        if not self.teachers:
            return 0
        kl = [np.mean([t.window(self.net, i) for i in self._windows(t, True)])
              for t in self.teachers.values()]  # fmt: skip
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
        if self.domain is not None:
            teacher = self.teachers[self.domain]
            own = self._windows(teacher, trial)
            kl = teacher.divergence(self.net, own[turn % len(own)]).mean()
            total = self.meaning.domain * self.domain.weight * kl
        mine = list(range(0 if trial else 1, len(self.jobs), 2))
        some = mine[turn :: self.used]
        if some:
            now = margins.live(self.net, self.predict, [self.jobs[i] for i in some])
            lost = (torch.from_numpy(self.margins[some]).to(now.device) - now).clamp(min=0).sum()
            total = total + self.meaning.probes * self.used / len(mine) * lost
        return total

    def _windows(self, teacher: Any, trial: bool) -> range:
        count = len(teacher.windows.ids)
        return range(count - count // 2) if trial else range(count - count // 2, count)


def _spread(windows: int) -> np.ndarray:
    """DOMAIN_WINDOWS of them at most, from all documents."""
    return np.unique(np.linspace(0, windows - 1, min(windows, DOMAIN_WINDOWS)).round().astype(int))
