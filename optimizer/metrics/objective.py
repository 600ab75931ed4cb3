"""What "loses least" means: the mean of the token losses, and what else counts. Standard library
only. Every part is in nats; weights have no unit.

    J = mean KL  +  cvar * CVaR_level(KL)  +  domain * max_d w_d KL_d  +  probes * mean (m - m')+

    mean KL   of the text of data.path (or sampled), per token
    CVaR      of the same tokens: the mean of the worst 1 - level of them
    KL_d      mean KL per token of domain d, w_d its weight: the worst domain counts
    m, m'     margins of a probe with the reference's weights and the plan's; a margin that grew
              doesn't make up for one that shrank. Informative pairs only

    CVaR_a(X) = min_t  t + E[(X - t)+] / (1 - a)              (Rockafellar and Uryasev 2000, eq. 4)
With t held fixed, and with it the domain that counts as the worst, J is a mean over windows, so
that windows add, differences stay paired and slopes exist. Then t gives an upper bound that touches
J where t is the quantile, and the domain a lower bound that touches J where it is the worst. Both
are those of the plan that a search starts from. `optimizer.stages.objective` makes the table
and the windows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optimizer.errors import ConfigError

BY_TOKEN = (
    "fisher",
    "gain",
    "directional",
    "tokenwise",
)  # estimators that can weigh single tokens


@dataclass(kw_only=True)
class Meaning:
    """`meaning=`. cvar, domain, probes: weights of the tail, of the worst domain and of the lost
    margins; all 0 = the mean alone. level: 0.99 = the worst 1 % of the tokens. domains: as
    proof.domains. pairs: a probe file of one's own, else the built-in ones."""

    cvar: float = 0.0
    level: float = 0.99
    domain: float = 0.0
    domains: list[str] = field(default_factory=list)
    probes: float = 0.0
    pairs: str | None = None

    def check(self, estimator: str, by_token: bool) -> None:
        """Raises ConfigError. by_token: whether the estimator of that name can weigh tokens."""
        for key in ("cvar", "domain", "probes"):
            value = getattr(self, key)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"meaning.{key} is a weight of 0 or more, not {value}.")
        if self.domain and not self.domains:
            raise ConfigError(
                "A weight for the worst domain needs domains: meaning.domain is above 0, and "
                "meaning.domains is empty. Name some: meaning.domains=[code,'law = law.txt * 2']."
            )
        if not 0 < self.level < 1:
            raise ConfigError(
                f"meaning.level is a share of the tokens between 0 and 1, such as 0.99, not "
                f"{self.level}."
            )
        if self.cvar and not by_token:
            raise ConfigError(
                "Only Fisher information weighs single tokens: meaning.cvar above 0 needs "
                f"sensitivity={', '.join(BY_TOKEN[:-1])} or {BY_TOKEN[-1]}, not {estimator}."
            )

    @property
    def name(self) -> str:
        """Of J, with its weights."""
        parts = {
            f"CVaR{100 * self.level:g}": self.cvar,
            "worst domain": self.domain,
            "lost margin": self.probes,
        }
        return " + ".join(["KL", *(f"{w:g} {name}" for name, w in parts.items() if w)])

    @property
    def tuned(self) -> list[str]:
        """Domains that are tuned on; the certificate then takes their other documents."""
        return self.domains if self.domain else []


@dataclass(frozen=True)
class Objective:
    """The parts of J that single tokens of one text have, with the threshold t in nats."""

    cvar: float = 0.0
    level: float = 0.99
    threshold: float = 0.0

    def of(self, kl: Any) -> Any:
        """KL of tokens (a tensor or an array) -> what each contributes to J."""
        if not self.cvar:
            return kl
        beyond = (kl - self.threshold).clip(min=0)
        return kl + self.cvar * (self.threshold + beyond / (1 - self.level))

    def weights(self, kl: Any) -> Any:
        """dJ / dKL of each token."""
        return 1 + self.cvar * (kl > self.threshold) / (1 - self.level)
