"""What can be set for `judge`, `overlay` and `learn`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer.config import Wandb
from optimizer.errors import ConfigError

DOMAINS = ["prose", "dialogue", "code", "mathematics", "russian"]
PHENOMENA = ["negation", "numbers", "idiom", "word_sense", "register", "causal_direction"]
LAST_PORT = 65535


def _names(key: str, value: Any) -> list[str]:
    found = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) and one.strip() for one in found):
        raise ConfigError(f"{key} is a name or a list of names, not {value!r}.")
    return list(found)


def _check_port(port: int) -> None:
    if not 1024 <= port <= LAST_PORT:
        raise ConfigError(f"port is a number from 1024 to {LAST_PORT}, not {port}.")


def _check_out(key: str, file: str) -> None:
    if not file or Path(file).is_dir():
        raise ConfigError(f"{key} is a file; {file!r} is a folder or empty. Name a file.")


@dataclass(kw_only=True)
class Judge:
    """`mezzotint judge A B [C ...]`. models: plans, packed folders, models, `reference`. votes: the
    file that answers are added to. judge: your name in it. prompts: a file of your own, else passages
    of the built-in `domains` and prefixes of the probes' `phenomena`. questions: at most. stop: as
    soon as the preference is clear or can't be. pool: prompts that are continued. tokens: of a text.
    catch: share of questions that are the reference against itself. chat: put prompts by the model's
    chat template. model: as Apply.model."""

    models: Any
    votes: str = "votes.jsonl"
    judge: str = "me"
    prompts: str | None = None
    domains: list[str] = field(default_factory=lambda: list(DOMAINS))
    phenomena: list[str] = field(default_factory=lambda: list(PHENOMENA))
    questions: int = 40
    stop: bool = True
    pool: int = 96
    tokens: int = 40
    catch: float = 0.1
    chat: bool = False
    port: int = 8765
    open: bool = True
    model: str | None = None
    wandb: Wandb = field(default_factory=lambda: Wandb(mode="off"))
    device: str = "cpu"
    store: str = "~/.cache/mezzotint"

    @property
    def entrants(self) -> list[str]:
        return _names("models", self.models)

    def check(self) -> None:
        if len(self.entrants) < 2:
            raise ConfigError(
                "A comparison needs two models or more. For example: mezzotint judge plan.json "
                "reference, or: mezzotint judge packed-a packed-b"
            )
        for key, least in (("questions", 1), ("pool", 1), ("tokens", 2)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} is {least} or more, not {getattr(self, key)}.")
        if not 0 <= self.catch <= 0.5:
            raise ConfigError(f"catch is a share of the questions, 0 to 0.5, not {self.catch}.")
        if not self.judge.strip() or len(self.judge) > 400:
            raise ConfigError("judge is a name of 1 to 400 characters. For example judge=anna")
        _check_out("votes", self.votes)
        _check_port(self.port)
        self.wandb.check()


@dataclass(kw_only=True)
class Overlay:
    """`mezzotint overlay DIR`. model: a packed folder, a plan or a model. choices: the file that
    choices are added to. text: a file to begin with. offers: continuations that are offered. words:
    tokens of each. stretch: tokens that are written before the page is shown again, at most. share: of
    the tokens at which it stops; null: as many as the plan's predicted loss may change."""

    model: str
    choices: str = "choices.jsonl"
    text: str | None = None
    language: str = "-"
    offers: int = 4
    words: int = 4
    stretch: int = 60
    share: float | None = None
    port: int = 8766
    open: bool = True
    reference: str | None = None
    device: str = "cpu"
    store: str = "~/.cache/mezzotint"

    def check(self) -> None:
        for key, least in (("offers", 2), ("words", 1), ("stretch", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} is {least} or more, not {getattr(self, key)}.")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ConfigError(f"share is a share of the tokens, 0 to 1, not {self.share}.")
        if not self.language.strip():
            raise ConfigError('language is a tag such as en, or "-" for none.')
        _check_out("choices", self.choices)
        _check_port(self.port)


@dataclass(kw_only=True)
class Learn:
    """`mezzotint learn votes.jsonl [...] [choices.jsonl] out=meaning.yaml`. files: of votes and of
    choices; of which kind one is, its lines say. strength: what the learned parts weigh together,
    beside the mean of 1. texts: 'NAME = FILE' for the domains of your own prompts."""

    files: Any
    out: str = "meaning.yaml"
    strength: float = 1.0
    texts: list[str] = field(default_factory=list)
    wandb: Wandb = field(default_factory=lambda: Wandb(mode="off"))
    seed: int = 0
    overwrite: bool = False
    store: str = "~/.cache/mezzotint"

    @property
    def inputs(self) -> list[str]:
        return _names("files", self.files)

    def check(self) -> None:
        if not 0 < self.strength < float("inf"):
            raise ConfigError(f"strength is a weight above 0, not {self.strength}.")
        if not self.inputs:
            raise ConfigError("Give a file of votes: mezzotint learn votes.jsonl out=meaning.yaml")
        _check_out("out", self.out)
        if any(Path(self.out).resolve() == Path(file).resolve() for file in self.inputs):
            raise ConfigError(f"out={self.out} would overwrite what is read. Name another file.")
        self.wandb.check()
