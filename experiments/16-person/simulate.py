"""Simulated judges with known weights, through the real page over HTTP.

simulate.py FOLDER [SEEDS] [VOTES] [drawn]: FOLDER holds even.json and odd.json (plans.py); with drawn
the two models' texts and losses are drawn instead, so that no model runs. Writes FOLDER/judges.csv
(a row per judge and seed: cosine of learned and true weights, p of noise, milliseconds a vote) and
FOLDER/JUDGE.jsonl, FOLDER/JUDGE.yaml of the first seed.

simulate.py FOLDER itself SESSIONS: random judges on the reference against itself, also drawn; writes
FOLDER/itself.csv, how often a preference was called clear.
"""

from __future__ import annotations

import html
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from experiments.rows import write
from optimizer.models.source import Source
from optimizer.person import commands, judge_page, learning, meaning_file, statistics, web
from optimizer.person.entrants import Entrant
from optimizer.person.judging import Judging, Question, compare
from optimizer.person.learning import Column
from optimizer.person.prompts import gather, in_turn
from optimizer.person.settings import DOMAINS, Judge
from optimizer.person.votes import About, VoteFile, standing
from optimizer.person.writing import Material, Written
from optimizer.stages.view import View

SURE = 8.0  # cost of a typical difference
TIE = 2.0  # log of the weight of "alike": 79 % where nothing that is minded differs
MINDS: dict[str, dict[Column, float]] = {
    "russian": {Column("kl", "russian"): 1.0},
    "negation and numbers": {Column("margin", "negation"): 1.0, Column("margin", "numbers"): 1.0},
    "fluency": {Column("repetition"): 1.0, Column("length"): 1.0},
    "random": {},
}


class Out(View):
    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    stage = note


def costs(about: About) -> dict[Column, float]:
    """The second text's features minus the first's, by column."""
    first, second = about.features
    names = {"kl": about.domain, "margin": about.phenomenon or ""}
    return {
        Column(f, names.get(f, "")): learning._cost(second, f) - learning._cost(first, f)
        for f in learning.FAMILIES
        if f in first and f in second
    }


def scales(questions: Sequence[Question]) -> dict[str, float]:
    rows = [costs(q.about) for q in questions if not q.about.catch]
    found: dict[str, list[float]] = {}
    for row in rows:
        for column, value in row.items():
            found.setdefault(column.family, []).append(value)
    return {
        f: float(np.sqrt(np.mean(np.square([v for v in x if v] or [1])))) for f, x in found.items()
    }


def vote_all(address: str, made: Judging, minds: dict[Column, float], seed: int) -> list[float]:
    """Answer what the page shows until it shows no question; seconds of each answer."""
    rng, unit, spent = np.random.default_rng(seed), scales(made.comparison.questions), []
    origin = "/".join(address.split("/")[:3])
    with httpx.Client(
        base_url=address, headers={"Origin": origin}, follow_redirects=True
    ) as client:
        text = client.get("").text
        while found := re.search(r'name="question" value="([^"]+)"', text):
            question = made.question(found[1])
            assert question is not None
            shown = html.unescape(re.sub(r"<[^>]*>", "", text))
            assert all(t.strip() in shown for t in question.texts), question.texts
            row = costs(question.about)
            u = SURE * sum(w * row.get(c, 0.0) / unit[c.family] for c, w in minds.items())
            p = np.exp(statistics.log_p(np.array([u]), TIE))[0] if minds else np.full(3, 1 / 3)
            choice = ("second", "alike", "first")[rng.choice(3, p=p / p.sum())]
            begun = time.perf_counter()
            text = client.post("vote", data={"question": found[1], "choice": choice}).text
            spent.append(time.perf_counter() - begun)
    return spent


def drawn(seed: int, names: Sequence[str], domains: Sequence[str] = DOMAINS) -> Material:
    """Texts that differ, with losses as skewed as real ones: KL exponential, its tail 2 to 5 times."""
    rng = np.random.default_rng([seed, 16])
    given = in_turn(gather(None, list(domains), ["negation", "numbers", "idiom"]), 72)

    def side(name: str) -> Written:
        texts = {p.id: f" {name} goes on, {i}" for i, p in enumerate(given)}
        features = {}
        for p in given:
            kl = float(rng.exponential(0.4))
            features[p.id] = {
                "kl": kl,
                "tail": kl * float(rng.uniform(2, 5)),
                "length": float(rng.normal(0, 0.2)),
                "repetition": float(rng.beta(1, 6)),
            }
            if p.pair is not None:
                features[p.id]["margin"] = float(rng.exponential(1.0)) * (rng.random() < 0.8)
        return Written(texts, features)

    sides = {name: side(name) for name in names}
    return Material(given, {}, sides, side("reference"), side("twin"), f"drawn {seed}")


def prepared(folder: Path, file: Path, who: str, seed: int, votes: int, real: bool) -> Judging:
    """A session that can be served."""
    config = Judge(
        models=[str(folder / "even.json"), str(folder / "odd.json")], votes=str(file), judge=who,
        questions=votes, stop=False, pool=72, tokens=16,
        phenomena=["negation", "numbers", "idiom"], open=False, store=store(),
    )  # fmt: skip
    if real:
        return commands.prepare(config, Out()).judging
    both = [made_up("even"), made_up("odd")]
    found = compare(both, drawn(seed, ["even", "odd"]), votes, config.catch, who)
    judging = Judging(found, VoteFile(file), who, stop=False)
    judging.begin()
    return judging


def made_up(name: str) -> Entrant:
    return Entrant(name, Source("model", Path("model"), "drawn"), None, None, name, 10**8)


@contextmanager
def served(made: Judging) -> Iterator[str]:
    """The address of the page, by a server of its own."""
    sock = web.bind(8900, lambda _: None)
    port, token = sock.getsockname()[1], web.new_token()
    app = judge_page.application(made, token, port, lambda _: None)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/{token}/"
    finally:
        server.should_exit = True
        thread.join()


def judged(
    folder: Path, name: str, seed: int, votes: int, minds: dict[Column, float], real: bool
) -> dict[str, Any]:
    file = folder / (f"{name}.jsonl" if seed == 0 else f"{name}-{seed}.jsonl")
    begun = time.perf_counter()
    made = prepared(folder, file, f"{name} {seed}", seed, votes, real)
    first = time.perf_counter() - begun
    with served(made) as address:
        spent = vote_all(address, made, minds, seed)
    read = VoteFile(file)
    read.refresh()
    found = learning.learn(standing(read.lines), learning.Settings(seed=seed))
    if seed == 0:
        text = meaning_file.text(found, file.name, folder)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    row = {"judge": name, "seed": seed, "votes": found.votes, "cosine": cosine(found, minds),
           "p_noise": found.noise_p, "warm_start_s": first,
           "vote_ms_median": 1000 * float(np.median(spent)) if spent else float("nan"),
           "objective": found.meaning.name}  # fmt: skip
    print(row, flush=True)
    return row


def cosine(found: learning.Learned, minds: dict[Column, float]) -> float:
    """Of learned and true standardised weights."""
    value = np.array([w.value for w in found.weights])
    true = np.array([minds.get(w.column, 0.0) for w in found.weights])
    length = np.linalg.norm(value) * np.linalg.norm(true)
    return float(value @ true / length) if length else float("nan")


def store() -> str:
    return os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint")


def itself(folder: Path, sessions: int) -> None:
    """How often random judges of 40 votes are told that they prefer the reference to itself."""
    rows = []
    for seed in range(sessions):
        one = replace(made_up("reference"), name="reference")
        material = drawn(seed, ["reference"])
        both = [one, replace(one, name="reference, number 2")]
        sides = {each.name: material.reference for each in both}
        found = compare(both, replace(material, written=sides), 40, 0.1, str(seed))
        made = Judging(found, VoteFile(folder / "itself.jsonl"), str(seed))
        made.begin()
        rng = np.random.default_rng(seed)
        first, tie = float(rng.choice([0.5, 0.8])), float(rng.choice([0.0, 0.3]))
        with served(made) as address:
            origin = "/".join(address.split("/")[:3])
            options = {"headers": {"Origin": origin}, "follow_redirects": True}
            with httpx.Client(base_url=address, **options) as client:  # type: ignore[arg-type]
                text = client.get("").text
                while match := re.search(r'name="question" value="([^"]+)"', text):
                    right = ("second", "first")[int(rng.random() < first)]
                    choice = "alike" if rng.random() < tie else right
                    text = client.post("vote", data={"question": match[1], "choice": choice}).text
        (tally,) = made.tallies
        wrong = statistics.clear(tally.won, tally.lost, made.alpha)
        rows.append(
            {
                "seed": seed,
                "first": first,
                "tie": tie,
                "votes": len(made.votes),
                "clear": int(wrong),
            }
        )
    write(folder / "itself.csv", rows)
    print(f"{sum(row['clear'] for row in rows)} of {sessions} sessions called a preference")


def main(out: str, seeds: str = "3", votes: str = "67", source: str = "models") -> None:
    folder = Path(out)
    if seeds == "itself":
        itself(folder, int(votes))
        return
    rows = [
        judged(folder, name, seed, int(votes), minds, source == "models")
        for seed in range(int(seeds))
        for name, minds in MINDS.items()
    ]
    write(folder / "judges.csv", rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
