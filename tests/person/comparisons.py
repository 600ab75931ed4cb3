"""A comparison of two made-up models: pages and statistics are tried without loading one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from starlette.testclient import TestClient

from optimizer.models.source import Source
from optimizer.person import judge_page
from optimizer.person.entrants import Entrant
from optimizer.person.judging import Comparison, Judging, compare
from optimizer.person.prompts import Prompt
from optimizer.person.reveal import Result
from optimizer.person.votes import VoteFile
from optimizer.person.writing import Material, Written

PORT = 8765
TOKEN = "token"
BASE = f"http://127.0.0.1:{PORT}"
DOMAINS = ("prose", "code", "mathematics", "russian")


def entrant(name: str, size: int = 1000) -> Entrant:
    return Entrant(name, Source("model", Path("model"), "sha256:0"), None, None, name, size)


def prompts(count: int) -> list[Prompt]:
    domains = [DOMAINS[i % len(DOMAINS)] for i in range(count)]
    languages = ["ru" if domain == "russian" else "en" for domain in domains]
    return [
        Prompt(f"Prompt {i}, which", d, x)
        for i, (d, x) in enumerate(zip(domains, languages, strict=True))
    ]


def written(given: list[Prompt], name: str, rng: np.random.Generator, same: int = 0) -> Written:
    """The last `same` texts are nobody's own."""
    own = len(given) - same
    texts = {p.id: f" goes on as {name if i < own else 'all'} {i}" for i, p in enumerate(given)}
    features = {
        p.id: {"kl": float(kl), "tail": float(3 * kl), "length": 0.0, "repetition": 0.0}
        for p, kl in zip(given, rng.exponential(0.3, len(given)), strict=True)
    }
    return Written(texts, features)


def material(given: list[Prompt], names: list[str], seed: int = 0, same: int = 0) -> Material:
    rng = np.random.default_rng(seed)
    sides = {name: written(given, name, rng, same) for name in names}
    own, twins = (written(given, name, rng) for name in ("reference", "twin"))
    return Material(given, {}, sides, own, twins, f"key {seed}")


def comparison(
    count: int = 60, limit: int = 40, same: int = 0, catch: float = 0.0, judge: str = "me"
) -> Comparison:
    names = ["sparrow", "heron"]
    both = [entrant("sparrow", 900), entrant("heron", 1000)]
    return compare(both, material(prompts(count), names, same=same), limit, catch, judge)


def judging(folder: Path, **settings: object) -> Judging:
    made = Judging(
        comparison(**settings),  # type: ignore[arg-type]
        VoteFile(folder / "votes.jsonl"),
        str(settings.get("judge", "me")),
    )
    made.begin()
    return made


@dataclass
class Page:
    """The page as a browser without scripts would use it. ended: results that were told."""

    judging: Judging
    client: TestClient
    ended: list[Result]

    def get(self, path: str = "") -> str:
        found = self.client.get(f"/{TOKEN}/{path}")
        assert found.status_code == 200, found.text
        return found.text

    def post(self, path: str, status: int = 200, **fields: object) -> str:
        found = self.client.post(f"/{TOKEN}/{path}", data=fields, headers={"Origin": BASE})
        assert found.status_code == status, found.text
        return found.text


@contextmanager
def opened(judging: Judging) -> Iterator[Page]:
    ended: list[Result] = []
    app = judge_page.application(judging, TOKEN, PORT, ended.append)
    with TestClient(app, base_url=BASE) as client:
        yield Page(judging, client, ended)
