"""What can be set: a dataclass behind every command and every group of conf/, which checks itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer.certificate.tolerance import Tolerance
from optimizer.data import domains as texts
from optimizer.data.domains import BUILT_IN
from optimizer.data.text import Data, check_seed
from optimizer.errors import ConfigError
from optimizer.formats.format import format_of
from optimizer.formats.runtime import Runtime
from optimizer.metrics.objective import Meaning
from optimizer.models.residence import Residence
from optimizer.plan import Budget, Palette, Policy, parse_size
from optimizer.quantization.methods import Auto
from optimizer.search import Search
from optimizer.sensitivity import AutoEstimator

AUTO = "auto"  # decided by `effort` and the kind of model, see optimizer.commands.effort


@dataclass(kw_only=True)
class Proof:
    """What is measured after the plan is made. certify: on held-out documents. random: random
    plans measured on search documents, with all uniform ones, as an experiment's baseline and to
    check the prediction; 0: only the best uniform plan that fits is measured. tolerance:
    what may be called lossless. domains: see `optimizer.data.domains.parse`. generate: tokens of
    greedy text that are compared, 0 = none."""

    certify: bool = True
    random: int = 0
    tolerance: Tolerance = field(default_factory=Tolerance)
    domains: list[str] = field(default_factory=lambda: list(BUILT_IN))
    generate: int = 0

    def check(self) -> None:
        if self.random < 0:
            raise ConfigError(f"proof.random is a number of plans, not {self.random}.")
        if self.generate < 0:
            raise ConfigError(f"proof.generate is a number of tokens, not {self.generate}.")
        self.tolerance.check()
        texts.parse(self.domains)


def _check_rate(rate: float | None) -> None:
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"hourly_rate is an amount above 0, not {rate}.")


@dataclass(kw_only=True)
class Nested:
    """A second budget: planes of further bits beside the plan, see `optimizer.stages.nested`.

    size: of the plan's file and the refinement's together; None: no refinement. bits: of planes, each
    with symmetric groups of the palette's size. weight: how much a hundredth of the refined
    model's loss counts beside a hundredth of the base's. signal: by which unpack=hard finds the
    tokens that need the planes, probe, entropy or margin; share: of them, checked on held-out text.
    separate: measure two plans of the same sizes that know nothing of each other, too.
    """

    size: str | None = None
    bits: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5, 6])
    weight: float = 0.03
    signal: str = "probe"
    share: float = 0.2
    separate: bool = True

    def check(self, config: Optimize) -> None:
        if self.size is None:
            return
        if config.budget.size is None:
            raise ConfigError(
                f"nested.size={self.size} is what base and refinement take together, beside "
                "budget.size=SIZE for the base alone. Give both."
            )
        if parse_size(self.size) <= parse_size(config.budget.size):
            raise ConfigError(
                f"Base and refinement together need more room than the base alone: nested.size="
                f"{self.size} is not above budget.size={config.budget.size}. Raise it."
            )
        if not self.bits or not all(isinstance(b, int) and 1 <= b <= 8 for b in self.bits):
            raise ConfigError(f"nested.bits is a list of whole numbers 1 to 8, not {self.bits}.")
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"nested.weight is a number above 0, not {self.weight}.")
        if self.signal not in ("probe", "entropy", "margin"):
            raise ConfigError(f"nested.signal is probe, entropy or margin, not {self.signal!r}.")
        if not 0 < self.share < 1:
            raise ConfigError(f"nested.share is a share of tokens in (0, 1), not {self.share}.")
        self._check_rest(config)

    def _check_rest(self, config: Optimize) -> None:
        """What a refinement can't be combined with."""
        if config.runtime.name != "torch":
            raise ConfigError(
                f"Only runtime=torch adds planes to a base as it runs, not {config.runtime.name}. "
                "Leave nested.size out, or take runtime=torch."
            )
        if config.quantizer.name == "awq":
            raise ConfigError(
                "quantizer=awq folds scales into other layers, and a refinement would need its own. "
                "Take quantizer=gptq or rtn with nested.size."
            )
        if config.search.space not in (AUTO, "exact"):
            raise ConfigError(
                "Base and refinement are chosen by one exact program: with nested.size take "
                f"search=exact, not {config.search.space}."
            )
        if config.meaning != Meaning():
            raise ConfigError(
                "Base and refinement are chosen for the mean loss: leave meaning= out beside "
                "nested.size."
            )


@dataclass(kw_only=True)
class Wandb:
    """Where a run is recorded besides its folder. mode: `offline` (files that `wandb sync` sends
    later), `online` or `off`. group: None puts the jobs of a sweep together."""

    mode: str = "offline"
    project: str = "mezzotint"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)

    def check(self) -> None:
        if self.mode not in ("offline", "online", "off"):
            raise ConfigError(f"wandb.mode is offline, online or off, not {self.mode!r}.")


@dataclass(kw_only=True)
class Optimize:
    """`mezzotint optimize`. effort: quick, standard or thorough, see `optimizer.commands.effort`."""

    model: str
    revision: str | None = None
    gguf: str | None = None
    effort: str = "standard"
    scope: Any = field(default_factory=lambda: ["all"])
    budget: Budget = field(default_factory=Budget)
    palette: Palette = field(default_factory=Palette)
    policy: Policy = field(default_factory=Policy)
    runtime: Runtime = field(default_factory=Runtime)
    quantizer: Any = field(default_factory=Auto)  # a `quantization.methods.Quantizer`
    data: Data = field(default_factory=Data)
    meaning: Meaning = field(default_factory=Meaning)
    sensitivity: Any = field(default_factory=AutoEstimator)  # a `sensitivity.Estimator`
    search: Search = field(default_factory=lambda: Search(space=AUTO))
    proof: Proof = field(default_factory=Proof)
    nested: Nested = field(default_factory=Nested)
    wandb: Wandb = field(default_factory=Wandb)
    seed: int = 0
    device: str = "cpu"
    offload: str = "auto"
    memory: str | None = None
    store: str = "~/.cache/mezzotint"

    @property
    def residence(self) -> Residence:
        """Where the model's weights shall be while it runs."""
        return Residence(self.offload, self.memory)

    @property
    def scopes(self) -> list[str]:
        found = self.scope if isinstance(self.scope, list) else [self.scope]
        if not found or not all(isinstance(pattern, str) for pattern in found):
            raise ConfigError(f"scope is a pattern or a list of patterns, not {self.scope!r}.")
        return list(found)

    def check(self) -> None:
        """What can be wrong before anything is loaded."""
        check_seed("seed", self.seed)
        self.residence.check()
        if self.budget.given:  # else one is proposed, see optimizer.commands.advise
            self.budget.check()
        self.runtime.check(self.palette.precisions())
        self.policy.check()
        self.quantizer.check()
        self.quantizer.check_palette(self.palette.precisions())
        self.meaning.check(self.sensitivity.estimator, self.sensitivity.by_token)
        if any(d.name == texts.LONG and d.path is None for d in texts.parse(self.meaning.domains)):
            raise ConfigError(
                f"{texts.LONG} is sampled for the certificate alone, and meaning.domains holds it. "
                "Take it out, or give a file: 'long = FILE'."
            )
        self.search.check()
        self.proof.check()
        self.nested.check(self)
        self.wandb.check()
        self.sensitivity.check(self.data.calibration.sequences)
        if self.sensitivity.estimator == "gain" and self.quantizer.name not in (AUTO, "gptq"):
            raise ConfigError(
                "sensitivity=gain foretells what GPTQ leaves of a loss; with quantizer="
                f"{self.quantizer.name} take sensitivity=fisher or tokenwise."
            )
        if self.quantizer.calibrated and self.data.search.sequences < 2:
            raise ConfigError(
                f"The table of quantizer={self.quantizer.name} reads at least two search windows; "
                f"data.search.sequences is {self.data.search.sequences}. Raise it."
            )
        self.data.check(None)
        _ = self.scopes

    def check_encoder(self) -> None:
        """What only a language model has. Raises ConfigError."""
        if self.budget.memory is not None or self.budget.caches != [16]:
            raise ConfigError(
                f"{self.model} is an encoder: it keeps no cache, and its memory beside the weights is "
                "not modelled. Give budget.bits, budget.code_bits or budget.size, without budget.kv."
            )
        if self.quantizer.calibrated:
            raise ConfigError(
                f"quantizer={self.quantizer.name} runs a language model block by block and doesn't "
                f"know the padded batches of an encoder such as {self.model}. Take quantizer=rtn."
            )
        if self.meaning.domain or self.meaning.probes:
            raise ConfigError(
                f"Domains and probes are measured by next tokens, and {self.model} is an encoder. Set "
                "meaning.domain=0 and meaning.probes=0; meaning=tail counts its worst texts."
            )
        if self.nested.size is not None:
            raise ConfigError(
                f"A refinement is unpacked while tokens are written, and {self.model} is an encoder, "
                "which writes none. Leave nested.size out."
            )
        if self.search.third is not None:
            raise ConfigError(
                f"A third objective counts what writing a token takes, and {self.model} is an "
                "encoder, which writes none. Leave search.third out."
            )


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
    memory: str | None = None
    store: str = "~/.cache/mezzotint"

    @property
    def residence(self) -> Residence:
        """Where the model's weights shall be while it runs."""
        return Residence(self.offload, self.memory)

    @property
    def task_names(self) -> list[str]:
        found = self.tasks if isinstance(self.tasks, list) else str(self.tasks).split(",")
        if not all(isinstance(name, str) and name.strip() for name in found):
            raise ConfigError(f"tasks is a name or a list of names, not {self.tasks!r}.")
        return [name.strip() for name in found]

    def check(self) -> None:
        Proof(tolerance=self.tolerance, domains=self.domains, generate=self.generate).check()
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


# ---------------------------------------------------------------- where conf/ lies

INSIDE, BESIDE = Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf"


def conf_folder() -> Path:
    """In a wheel conf/ lies inside the package, in a checkout beside it."""
    return INSIDE if INSIDE.is_dir() else BESIDE


def profile(name: str) -> Runtime:
    """The rules of an engine from conf/runtime/, or its format's own. Raises ConfigError."""
    from omegaconf import OmegaConf

    if not (conf_folder() / "runtime" / f"{name}.yaml").is_file():
        return format_of(name).runtime()
    values: Any = OmegaConf.to_container(
        OmegaConf.load(conf_folder() / "runtime" / f"{name}.yaml")
    )
    return Runtime(**values.get("runtime", values))
