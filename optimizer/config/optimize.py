"""What `optimize` can be told: the groups of conf/, each of which checks itself, and the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optimizer.certificate.tolerance import Tolerance
from optimizer.data import domains as texts
from optimizer.data.domains import BUILT_IN
from optimizer.data.text import Data, check_seed
from optimizer.errors import ConfigError
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
        if config.budget.caches != [16]:
            raise ConfigError(
                f"Base and refinement are measured with a cache of 16 bits, not budget.kv="
                f"{config.budget.kv}. Leave it out beside nested.size."
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
    arithmetic: str = "auto"
    memory: str | None = None
    store: str = "~/.cache/mezzotint"

    @property
    def residence(self) -> Residence:
        """Where the model's weights shall be while it runs."""
        few = self.device == "cpu" and self._plain
        return Residence(self.offload, self.memory, few, arithmetic=self.arithmetic)

    @property
    def _plain(self) -> bool:
        """Whether the job reads the model's blocks a few times in all: a table block by block, its
        optimum, a certificate for which no text is written."""
        proved = [] if not self.proof.certify else texts.parse(self.proof.domains)
        written = self.data.source == "self" or self.proof.generate > 0
        return (
            self.quantizer.name in (AUTO, "rtn", "gptq", "importance")
            and self.sensitivity.estimator in (AUTO, "fisher", "gain")
            and not self.sensitivity.measured.groups
            and self.effort != "thorough"
            and self.search.space in (AUTO, "exact")
            and not written
            and not any(d.name == texts.LONG and d.path is None for d in proved)
            and not (self.meaning.cvar or self.meaning.domain or self.meaning.probes)
            and self.budget.caches == [16]
            and self.nested.size is None
        )

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
