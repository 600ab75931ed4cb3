"""What "loses least" means: the mean of the token losses, or also their tail. Standard library only.

    J = mean KL + cvar * CVaR_level(KL),   CVaR_a(X) = min_t  t + E[(X - t)+] / (1 - a)
(Rockafellar and Uryasev 2000, eq. 4: the mean of the worst 1 - a of the tokens). With t held fixed
J is a mean over tokens, so that windows add, differences stay paired and slopes exist; it is then
an upper bound that touches J where t is the quantile. t is the quantile of the plan that a search
starts from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optimizer.errors import ConfigError


@dataclass(kw_only=True)
class Meaning:
    """`meaning=`. cvar: weight of the tail; 0 = the mean alone. level: 0.99 = the worst 1 % of the
    tokens. Both KL in nats per token."""

    cvar: float = 0.0
    level: float = 0.99

    def check(self, estimator: str) -> None:
        if not 0 <= self.cvar < float("inf"):
            raise ConfigError(f"meaning.cvar is a weight of 0 or more, not {self.cvar}.")
        if not 0 < self.level < 1:
            raise ConfigError(
                f"meaning.level is a share of the tokens between 0 and 1, such as 0.99, not "
                f"{self.level}."
            )
        if self.cvar and estimator not in ("fisher", "directional"):
            raise ConfigError(
                "Only Fisher information weighs single tokens: meaning.cvar above 0 needs "
                f"sensitivity=fisher or directional, not {estimator}."
            )

    @property
    def name(self) -> str:
        return "KL" if not self.cvar else f"KL + {self.cvar:g} CVaR{100 * self.level:g}"


@dataclass(frozen=True)
class Objective:
    """J of single tokens, with its threshold t in nats."""

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
