"""What all other commands can be told; each checks itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optimizer.certificate.tolerance import Tolerance
from optimizer.config.optimize import Proof
from optimizer.data.domains import BUILT_IN
from optimizer.data.text import Data
from optimizer.errors import ConfigError
from optimizer.models.residence import Residence
from optimizer.plan import Budget, parse_size


def _check_rate(rate: float | None) -> None:
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"hourly_rate is an amount above 0, not {rate}.")


@dataclass(kw_only=True)
class Apply:
    """`mezzotint apply`. model: where the reference is, if no longer where the plan says."""

    plan: str
    out: str
    model: str | None = None
    overwrite: bool = False
    store: str = "~/.cache/mezzotint"


@dataclass(kw_only=True)
class Export:
    """`mezzotint export`. to: the engine or format. plan: a plan, or a folder that `apply` wrote,
    whose rounded weights are then taken as they are. gguf: a 16-bit GGUF file of the model, for
    to=gguf, instead of the one that llama.cpp's converter makes. nested: to=gguf writes a plan with a
    refinement as a draft and a target, see `optimizer.commands.speculative`. activations: to=vllm
    rounds the inputs of floats' layers, too, as the model runs. Others as Apply."""

    plan: str
    to: str
    out: str
    nested: bool = False
    activations: bool = False
    model: str | None = None
    gguf: str | None = None
    overwrite: bool = False
    store: str = "~/.cache/mezzotint"


@dataclass(kw_only=True)
class Check:
    """`mezzotint check`. As Export, without a folder."""

    plan: str
    to: str
    model: str | None = None
    gguf: str | None = None
    store: str = "~/.cache/mezzotint"


@dataclass(kw_only=True)
class Evaluate:
    """`mezzotint evaluate`. model: a packed folder. reference: as Apply.model. tolerance, domains,
    generate: as in Proof. again: measure everything, even if the store has the plan's scores and
    the packed model agrees with them on some windows. speed: tokens to decode with both models for
    their tokens per second, 0: none. hourly_rate: what the machine costs, for the price of a
    million tokens. unpack: never, always or hard, what is done with a refinement, see
    `optimizer.load`; None: always where there is one. share: of the tokens that unpack=hard
    unpacks. tasks: names of lm-evaluation-harness's, asked of both models; limit: questions of a
    task at most. refusals: ask both models sixty prompts, and which they refuse."""

    model: str
    reference: str | None = None
    unpack: str | None = None
    share: float | None = None
    again: bool = False
    tasks: Any = field(default_factory=list)
    limit: int | None = None
    refusals: bool = False
    speed: int = 0
    hourly_rate: float | None = None
    data: Data = field(default_factory=Data)
    tolerance: Tolerance = field(default_factory=Tolerance)
    domains: list[str] = field(default_factory=lambda: list(BUILT_IN))
    generate: int = 0
    device: str = "cpu"
    offload: str = "auto"
    arithmetic: str = "auto"
    memory: str | None = None
    store: str = "~/.cache/mezzotint"

    @property
    def residence(self) -> Residence:
        """Where the model's weights shall be while it runs."""
        return Residence(self.offload, self.memory, arithmetic=self.arithmetic)

    @property
    def task_names(self) -> list[str]:
        found = self.tasks if isinstance(self.tasks, list) else str(self.tasks).split(",")
        if not all(isinstance(name, str) and name.strip() for name in found):
            raise ConfigError(f"tasks is a name or a list of names, not {self.tasks!r}.")
        return [name.strip() for name in found]

    def check(self) -> None:
        Proof(tolerance=self.tolerance, domains=self.domains, generate=self.generate).check()
        self.residence.check()
        _ = self.task_names
        if self.unpack not in (None, "never", "always", "hard"):
            raise ConfigError(
                f"unpack is never, always or hard, not {self.unpack!r}; unpack=draft writes "
                f"what always "
                "writes, so that evaluating always evaluates it."
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is a number of questions above 0, not {self.limit}.")
        if self.speed < 0:
            raise ConfigError(f"speed is a number of tokens, 0 for none, not {self.speed}.")
        _check_rate(self.hourly_rate)
        if self.hourly_rate is not None and not self.speed:
            raise ConfigError("A price follows from a measured speed. Add speed=64, in tokens.")


@dataclass(kw_only=True)
class Advise:
    """`mezzotint advise`. contexts: tokens, at most the model's own; kv: bits of the cache;
    runtime: an engine, whose own memory counts."""

    model: str
    revision: str | None = None
    contexts: list[int] = field(default_factory=lambda: [4096, 8192, 32768])
    kv: int = 16
    runtime: str = "torch"
    store: str = "~/.cache/mezzotint"

    def check(self) -> None:
        if not self.contexts or min(self.contexts) < 1:
            raise ConfigError(f"contexts is a list of numbers of tokens, not {self.contexts}.")


@dataclass(kw_only=True)
class Fit:
    """`mezzotint fit`. plan: a plan.json or a run's folder. budget: a machine, and the context,
    batch and cache precision (kv=auto: the plan's) that are meant. loss: look for the smallest plan
    of the front with at most this KL. more: memory whose worth is asked for. bandwidth: of the
    machine's memory per second, e.g. 360GB, which bounds its speed; hourly_rate: what it costs."""

    plan: str
    budget: Budget = field(default_factory=lambda: Budget(kv="auto"))
    loss: float | None = None
    more: str | None = "1GiB"
    bandwidth: str | None = None
    hourly_rate: float | None = None

    def check(self) -> None:
        if self.bandwidth is not None and parse_size(self.bandwidth) == 0:
            raise ConfigError(f"bandwidth is bytes per second above 0, not {self.bandwidth}.")
        _check_rate(self.hourly_rate)
        if self.hourly_rate is not None and self.bandwidth is None:
            raise ConfigError(
                "A price follows from a speed. Add bandwidth=..., such as 360GB, for the bound that "
                "memory sets, or measure it: mezzotint evaluate speed=64 hourly_rate=..."
            )
        if self.budget.memory is not None:
            self.budget.check()
        elif self.budget.given:
            raise ConfigError(
                "`mezzotint fit` asks about machines: give budget=NAME or budget.memory=12GiB, not "
                f"budget.{next(iter(self.budget.given))}."
            )
        if self.loss is not None and not self.loss >= 0:
            raise ConfigError(f"loss is a KL in nats per token, 0 or more, not {self.loss}.")


@dataclass(kw_only=True)
class Probe:
    """`mezzotint probe`. probes: a JSONL file of one's own, else the built-in pairs in `languages`.
    threshold: pairs whose margin in the reference is not above it, in nats, don't count. out: a
    file for the result as JSON. model: as Apply.model."""

    plan: str
    probes: str | None = None
    languages: Any = field(default_factory=lambda: ["en", "ru"])
    threshold: float = 0.5
    out: str | None = None
    model: str | None = None
    device: str = "cpu"
    store: str = "~/.cache/mezzotint"

    @property
    def language_list(self) -> list[str]:
        found = self.languages if isinstance(self.languages, list) else [self.languages]
        if not found or not all(isinstance(language, str) for language in found):
            raise ConfigError(f"languages is en, ru or [en,ru], not {self.languages!r}.")
        return list(dict.fromkeys(found))

    def check(self) -> None:
        if not 0 <= self.threshold < float("inf"):
            raise ConfigError(f"threshold is a margin in nats, 0 or more, not {self.threshold}.")
        _ = self.language_list


@dataclass(kw_only=True)
class Blur:
    """`mezzotint blur`. to: html (the page `out`) or terminal. context: tokens that one prediction
    may look back on, at most. tokens: of the text that are read, at most. top: words shown per
    prediction. passages: how many are listed as the worst. unpack: hard shows where a packed folder's
    planes are opened, for `share` of the tokens, and what that saves. model: as Apply.model."""

    plan: str
    text: str
    unpack: str | None = None
    share: float | None = None
    to: str = "html"
    out: str = "blur.html"
    context: int = 1024
    tokens: int = 8192
    top: int = 5
    passages: int = 8
    model: str | None = None
    device: str = "cpu"
    store: str = "~/.cache/mezzotint"

    def check(self) -> None:
        if self.to not in ("html", "terminal"):
            raise ConfigError(f"to is html or terminal, not {self.to!r}.")
        if self.unpack not in (None, "hard"):
            raise ConfigError(f"unpack is hard or null, not {self.unpack!r}.")
        for name, least in (("context", 8), ("tokens", 8), ("top", 1), ("passages", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {least} or more, not {getattr(self, name)}.")
