"""Votes, preferences and weights for W&B: tables, and the files themselves as an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimizer.config import Wandb
from optimizer.person.learning import Learned
from optimizer.person.reveal import Result
from optimizer.person.votes import Vote
from optimizer.reports.wandb import Sheets, record_sheets

Table = tuple[list[str], list[list[Any]]]


def comparison(result: Result, votes: Sequence[Vote], file: Path, settings: Wandb) -> list[str]:
    """A judged comparison; returns lines for the person."""
    names = dict.fromkeys(name for duel in result.duels for name in duel.models)
    name = " against ".join(names)
    tables = {"votes": vote_table(votes), "preferences": preference_table(result)}
    return _record(f"judged: {name}", "judge", tables, [file], settings)


def learned(
    found: Learned, votes: Sequence[Vote], files: Sequence[Path], settings: Wandb
) -> list[str]:
    """A learned objective. files: what it was learned from, and what was written."""
    tables = {"votes": vote_table(votes), "preferences": weight_table(found)}
    return _record("learned objective", "learn", tables, files, settings)


def _record(
    name: str, kind: str, tables: dict[str, Table], files: Sequence[Path], settings: Wandb
) -> list[str]:
    if settings.mode == "off":
        return []
    paths = [str(file.absolute()) for file in files]
    return record_sheets(Sheets(name, kind, str(Path.cwd()), tables, paths), settings)


def vote_table(votes: Sequence[Vote]) -> Table:
    """A row per vote, without the texts."""
    columns = [
        "judge",
        "time",
        "prompt",
        "domain",
        "language",
        "phenomenon",
        "first",
        "second",
        "choice",
        "tags",
        "seconds",
        "catch",
    ]
    rows = [
        [
            v.judge,
            v.time,
            v.about.prompt,
            v.about.domain,
            v.about.language,
            v.about.phenomenon,
            *v.about.models,
            v.choice,
            ", ".join(v.tags),
            v.seconds,
            v.about.catch,
        ]
        for v in votes
    ]
    return columns, rows


def preference_table(result: Result) -> Table:
    """A row per pair of models."""
    columns = [
        "first",
        "second",
        "first_bytes",
        "second_bytes",
        "won",
        "lost",
        "alike",
        "both_lost",
        "same",
        "net",
        "net_low",
        "net_high",
        "verdict",
    ]
    rows = [
        [
            *duel.models,
            *duel.bytes,
            duel.tally.won,
            duel.tally.lost,
            duel.tally.alike,
            duel.tally.both_lost,
            duel.same,
            duel.net.value,
            duel.net.low,
            duel.net.high,
            duel.verdict,
        ]
        for duel in result.duels
    ]
    return columns, rows


def weight_table(found: Learned) -> Table:
    """A row per weight."""
    columns = ["part", "weight", "low", "high", "default", "votes", "more"]
    rows: list[list[Any]] = [
        [w.column.title, w.value, w.low, w.high, w.default, w.votes, w.more] for w in found.weights
    ]
    return columns, rows
