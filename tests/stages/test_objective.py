"""The worst domain and the probes in the table and in the search, against their definitions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.commands import inspect, optimize, prove
from optimizer.config import Optimize, Probe
from optimizer.data import pairs as probes
from optimizer.data.text import Part
from optimizer.errors import ConfigError, TextError
from optimizer.metrics import margins
from optimizer.metrics.divergence import Teacher
from optimizer.metrics.objective import Meaning
from optimizer.models.head import Predictor
from optimizer.models.source import Source
from optimizer.models.stories import corpus
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Budget
from optimizer.quantization.methods import bind
from optimizer.search import Search
from optimizer.sensitivity import Task, fisher, slope
from optimizer.stages import certify, objective
from optimizer.stages.beside import Beside
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace, search_space
from optimizer.stages.table import measure_table
from tests.commands.test_optimize import settings
from tests.commands.test_probe import story_pairs

USED = 4


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains and some probes that the stories model can read."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(3)
    told = corpus(12, seed=9)
    odd = [" ".join(rng.permutation(text.split())) for text in told]
    for name, documents in (("told", told), ("odd", odd)):
        (folder / f"{name}.txt").write_text("\n---\n".join(documents), encoding="utf-8")
    ends = (" cup", " key", " pen")  # three couples
    pairs = [{**pair, "bad": ends[i % 3]} for i, pair in enumerate(story_pairs())]
    lines = [json.dumps(pair) for pair in pairs]
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def asked(source: Source, store: Path, texts: Path, **weights: Any) -> Optimize:
    meaning = Meaning(
        domains=[f"told = {texts / 'told.txt'}", f"odd = {texts / 'odd.txt'}"],
        pairs=str(texts / "pairs.jsonl"),
        **weights,
    )
    search = Search(tokens=9000)
    config = settings(source, store, budget=Budget(bits=3.6), meaning=meaning, search=search)
    config.data.search = Part(sequences=2 * USED, length=32)
    config.proof.domains = []
    return config


def opened(config: Optimize) -> tuple[Session, SearchSpace]:
    made = Session.open(config.model, config.data, config.store)
    return made, search_space(config, made.inventory)


def low(space: SearchSpace, bits: int = 3) -> dict[str, Any]:
    column = space.columns.index(f"int{bits}_g64")
    return space.choice(np.full(len(space.groups), column))


def test_margins_with_a_gradient_are_the_measured_ones(
    source: Source, texts: Path, tmp_path: Path
) -> None:
    made, space = opened(asked(source, tmp_path / "s", texts))
    pairs = probes.read(texts / "pairs.jsonl")
    jobs: list[Any] = margins.encode(pairs, load_tokenizer(source.folder), 256)
    net = made.model.net
    found = margins.live(net, Predictor(net), jobs)
    assert found.detach().numpy() == pytest.approx(margins.measure(net, jobs), abs=1e-4)
    parameter = net.get_parameter(made.model.layers[space.groups[3][0]].parameter)
    parameter.requires_grad_(True)
    try:
        margins.live(net, Predictor(net), jobs[:2]).sum().backward()
        slope, step = parameter.grad.clone(), 1e-3
        way = torch.randn_like(parameter)
        with torch.no_grad():
            before = parameter.clone()
            values = [parameter.copy_(before + s * step * way) is None or
                      margins.measure(net, jobs[:2]).sum() for s in (1, -1)]  # fmt: skip
            parameter.copy_(before)
    finally:
        parameter.requires_grad_(False).grad = None
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(
        float((slope * way).sum()), rel=0.02
    )


@pytest.mark.slow
def test_the_probes_table_is_the_mean_square_of_a_margins_change(
    source: Source, texts: Path, tmp_path: Path
) -> None:
    """Against the changes that random errors of the same size really cause."""
    config = asked(source, tmp_path / "s", texts, probes=1.0)
    made, space = opened(config)
    jobs, _, each = objective.jobs_of(made, config, objective.TABLE_PAIRS)
    group, column = 5, space.columns.index("int8_g64")
    (name,) = space.groups[group]
    quantizer = bind(config.quantizer, made)
    one = replace(space, groups=(space.groups[group],), columns=("int8_g64",))
    task = Task(one.groups, one.columns, one.fitted, quantizer)
    draws = [
        objective._signed(made.model.net, jobs, np.random.default_rng(i), each) for i in range(40)
    ]
    squares = np.mean([fisher.squared(made.model, task, passes) for passes in draws])
    weight = made.model.weight(name).clone()
    error = quantizer.round(weight, space.fitted[name, space.columns[column]], name) - weight
    before, changes = margins.measure(made.model.net, jobs), []
    live = made.model.net.get_parameter(made.model.layers[name].parameter)
    for i in range(200):
        signs = (
            torch.randint(0, 2, error.shape, generator=torch.Generator().manual_seed(i)) * 2 - 1
        )
        with torch.no_grad():
            live.copy_(weight + signs * error)
        changes.append(((margins.measure(made.model.net, jobs) - before) ** 2).sum())
    with torch.no_grad():
        live.copy_(weight)
    assert squares == pytest.approx(np.mean(changes), rel=0.25)
    found = objective.losses(made, config, space, table := measure_table(made, config, space))
    half = replace(config, meaning=replace(config.meaning, probes=0.5))
    assert found - table.loss == pytest.approx(
        2 * (objective.losses(made, half, space, table) - table.loss)
    )
    # its tangent: at the uniform plan, s^2 / (2 c sqrt(2 pi)) with s = c
    four = space.columns.index("int4_g64")
    passes = objective._signed(
        made.model.net, jobs, np.random.default_rng([config.seed, 91]), each
    )
    task = Task(space.groups, space.columns, space.fitted, quantizer)
    there = fisher.squared(made.model, task, passes)[:, four].sum() / len(jobs)
    assert (found - table.loss)[:, four].sum() == pytest.approx(
        np.sqrt(there / (8 * np.pi)), rel=1e-3
    )


def test_parts_of_the_table_add_up(source: Source, texts: Path, tmp_path: Path) -> None:
    config = asked(source, tmp_path / "s", texts)
    made, space = opened(config)
    plain = measure_table(made, config, space)

    def table(**weights: float) -> np.ndarray:
        own = replace(config, meaning=replace(config.meaning, **weights))
        return objective.losses(made, own, space, plain) - plain.loss

    assert (table() == 0).all()
    parts = [table(cvar=0.2), table(domain=0.5), table(probes=2.0)]
    assert all(part.sum() > 0 for part in parts)
    assert table(cvar=0.2, domain=0.5, probes=2.0) == pytest.approx(sum(parts))
    # the domain's part is an ordinary table of the text on which the uniform plan loses most
    cuts = objective.cuts_of(made, config.meaning.domains)
    worst = objective._worst_domain(made, config, space, cuts)
    heavy = {replace(d, weight=1 if d.name == worst.name else 1e6): cut for d, cut in cuts.items()}
    assert objective._worst_domain(made, config, space, heavy).name != worst.name


def test_what_is_beside_the_windows_adds_up_to_the_objective(
    source: Source, texts: Path, tmp_path: Path
) -> None:
    config = asked(source, tmp_path / "s", texts, domain=0.7, probes=40.0)
    config.meaning.domains[1] += " * 3"
    made, space = opened(config)
    beside = Beside(made, config, space, USED)
    beside.margins += 5  # as if the reference were surer: every margin is lost in part
    jobs, reference = beside.jobs, beside.margins
    teachers = {d.name: t for d, t in beside.teachers.items()}
    beside.aim(1)
    odd = teachers["odd"]
    count = len(odd.windows.ids)
    first = -(-count // 2)
    with made.model.rounded(bind(config.quantizer, made), low(space, 2)):
        now = margins.measure(made.model.net, jobs)
        kl = np.array([odd.window(made.model.net, i) for i in range(count)])
        trials = [beside.loss(i) for i in range(USED)]
        confirmed = [beside.loss(i) for i in range(USED, 2 * USED)]
        turns = np.arange(USED)
        for found, own, part in (
            (trials, kl[:first][turns % first], slice(0, None, 2)),
            (confirmed, kl[first:][turns % (count - first)], slice(1, None, 2)),
        ):
            lost = np.clip(reference - now, 0, None)[part].mean()
            assert np.mean(found) == pytest.approx(0.7 * 3 * own.mean() + 40 * lost, rel=1e-3)
            assert lost > 0
        losses = {n: np.mean([t.window(made.model.net, i) for i in range(-(-len(t.windows.ids) // 2))])
                  for n, t in teachers.items()}  # fmt: skip
        assert list(teachers)[beside.choose()] == (
            "odd" if 3 * losses["odd"] > losses["told"] else "told"
        )
    beside.margins -= 5
    assert [beside.loss(i) for i in range(2)] == pytest.approx([0, 0], abs=1e-3)


def test_the_slope_knows_what_is_beside(source: Source, texts: Path, tmp_path: Path) -> None:
    config = asked(source, tmp_path / "s", texts, domain=2.0, probes=2.0)
    made, space = opened(config)
    quantizer = bind(config.quantizer, made)
    task = Task(space.groups, space.columns, space.fitted, quantizer)
    beside = Beside(made, config, space, USED)
    teacher = Teacher(made.model.net, made.windows("search"))
    low_column, high = (space.columns.index(f"int{b}_g64") for b in (3, 8))
    windows, group = np.arange(USED), 5
    (name,) = space.groups[group]
    weight = made.model.weight(name).clone()
    with made.model.rounded(quantizer, low(space)):
        plain = slope.slopes(made.model, task, teacher, [windows])[0]
        found = slope.slopes(made.model, task, teacher, [windows], beside.live)[0] - plain
        live = made.model.net.get_parameter(made.model.layers[name].parameter)
        before, step, values = live.detach().clone(), 1e-2, []
        goal = quantizer.round(weight, space.fitted[name, space.columns[high]], name)
        for sign in (1, -1):
            with torch.no_grad():
                live.copy_(before + sign * step * (goal - before))
            values.append(np.mean([beside.loss(int(w)) for w in windows]))
        with torch.no_grad():
            live.copy_(before)
    expected = (values[0] - values[1]) / (2 * step)
    assert found[group, high] - found[group, low_column] == pytest.approx(
        expected, rel=0.1, abs=1e-4
    )


@pytest.mark.slow
def test_the_search_lowers_the_objective_and_goes_on_where_it_was(
    source: Source, texts: Path, tmp_path: Path
) -> None:
    config = asked(source, tmp_path / "s", texts, cvar=0.1, domain=0.5, probes=0.5)
    found = optimize.optimize(config, tmp_path / "r")
    said = "KL + 0.1 CVaR99 + 0.5 worst domain + 0.5 lost margin went from"
    assert any(said in note for note in found.notes)
    assert optimize.optimize(config, tmp_path / "again").plan == found.plan
    judged = found.plan.certificate["meaning"]["texts"]
    assert [row["name"] for row in judged] == ["held-out", "told", "odd"]
    assert [row["documents"] for row in judged[1:]] == [6, 6]  # the other half
    plan, file = str(tmp_path / "r" / "plan.json"), str(texts / "pairs.jsonl")
    probed = inspect.probe(Probe(plan=plan, probes=file, threshold=0, store=config.store))
    assert probed.skipped == {inspect.TUNED: 12}
    assert sum(cell.count.pairs for cell in probed.cells) == 6


def test_no_document_is_tuned_on_and_certified(
    texts: Path, source: Source, tmp_path: Path
) -> None:
    config = asked(source, tmp_path / "s", texts, domain=1.0)
    made, _ = opened(config)
    config.proof.domains = ["prose", config.meaning.domains[0]]
    judged = prove.asked(config).texts
    assert [(d.name, d.half) for d in judged] == [("prose", None), ("told", 1), ("odd", 1)]
    tuned = objective.cuts_of(made, config.meaning.domains)
    for domain, own in tuned.items():
        other = certify._cut(made, next(d for d in judged if d.name == domain.name))[0]
        assert other is not None
        rows = {tuple(row[:16]) for row in own.ids.tolist()}
        assert rows and not rows & {tuple(row[:16]) for row in other.ids.tolist()}
    one, two = probes.halves(probes.built_in())
    ends = [{(p.cell, frozenset((p.good, p.bad))) for p in half} for half in (one, two)]
    assert not ends[0] & ends[1]
    assert abs(len(one) - len(two)) < 0.2 * len(one)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"domain": -1.0}, "meaning.domain is a weight"),
        ({"probes": float("nan")}, "meaning.probes is a weight"),
        ({"domain": 1.0, "domains": []}, "meaning.domains is empty"),
        ({"domain": 1.0, "domains": ["long"]}, "sampled for the certificate"),
        ({"domain": 1.0, "domains": ["poems"]}, "A domain is one of"),
    ],
)
def test_settings_that_mean_nothing_are_refused(weights: dict[str, Any], said: str) -> None:
    config = Optimize(model="x", budget=Budget(bits=4), meaning=Meaning(**weights))
    with pytest.raises(ConfigError, match=said):
        config.check()


def test_texts_that_say_nothing_are_refused(source: Source, texts: Path, tmp_path: Path) -> None:
    config = asked(source, tmp_path / "s", texts, domain=1.0)
    made, space = opened(config)
    with pytest.raises(TextError, match="None of the domains russian"):
        objective.cuts_of(made, ["russian"])
    weak = tmp_path / "weak.jsonl"
    pair = {"prefix": "Mia had a", "good": " red cup", "bad": " cup red"}
    weak.write_text(
        json.dumps({**pair, "good": pair["bad"], "bad": pair["good"]}), encoding="utf-8"
    )
    config.meaning = replace(config.meaning, pairs=str(weak))
    with pytest.raises(TextError, match="of 1 pairs, 0 are"):
        objective.jobs_of(made, config, objective.TABLE_PAIRS)
    config.meaning = Meaning()
    assert Beside(made, config, space, USED).live is None


def test_summed_domains_all_count_in_the_table_and_in_the_search(
    source: Source, texts: Path, tmp_path: Path
) -> None:
    config = asked(source, tmp_path / "s", texts, domain=0.7, combine="sum")
    config.meaning.domains[1] += " * 3"
    made, space = opened(config)
    plain = measure_table(made, config, space)
    found = objective.parts(made, config, space, plain)
    assert list(found) == ["mean KL", "KL in told", "KL in odd"]
    assert objective.losses(made, config, space, plain) == pytest.approx(sum(found.values()))
    alone = replace(config.meaning, combine="worst", domains=config.meaning.domains[1:])
    other = objective.parts(made, replace(config, meaning=alone), space, plain)
    assert found["KL in odd"] == pytest.approx(other["KL in odd"])
    beside = Beside(made, config, space, USED)
    assert [domain.name for domain in beside.counted] == ["told", "odd"]
    with made.model.rounded(bind(config.quantizer, made), low(space, 2)):
        kl = [
            teacher.window(made.model.net, 0) * domain.weight
            for domain, teacher in beside.teachers.items()
        ]
        assert beside.loss(0) == pytest.approx(0.7 * sum(kl), rel=1e-4)
    worst = Beside(made, replace(config, meaning=alone), space, USED)
    assert beside.key != worst.key and beside.tokens > worst.tokens


def test_phenomena_count_as_asked_however_many_pairs_they_have() -> None:
    found = objective._evened(["a", "a", "a", "b"], {"a": 0.25, "b": 0.75})
    assert found.mean() == pytest.approx(1)
    assert found[:3].sum() / found.sum() == pytest.approx(0.25)
    assert (objective._evened(["a", "b"], {}) == 1).all()


def test_only_phenomena_that_count_are_asked_and_choices_join(texts: Path, tmp_path: Path) -> None:
    row = {"prefix": "Mia had a", "good": " cup", "bad": " key", "phenomenon": "choice"}
    lines = [json.dumps(row | {"good": f" cup {i}"}) for i in range(4)]
    (tmp_path / "choices.jsonl").write_text("\n".join(lines))
    meaning = Meaning(
        probes=1.0, pairs=str(texts / "pairs.jsonl"), choices=str(tmp_path / "choices.jsonl")
    )
    every = objective._tuned_pairs(meaning)
    some = objective._tuned_pairs(replace(meaning, phenomena=["choice"]))
    assert {pair.phenomenon for pair in some} == {"choice"}
    assert len(some) == 2 and len(every) > len(some)
    with pytest.raises(ConfigError, match=r"phenomena names mood, of which there are no pairs"):
        objective._tuned_pairs(replace(meaning, phenomena=["mood"]))
    assert objective.tuned(meaning)["choices"] == probes.key(meaning.choices)
