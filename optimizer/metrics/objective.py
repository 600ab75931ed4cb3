"""What "loses least" means: the mean of the token losses, and what else counts. Standard library
only, but for reading a file. Every part is in nats; weights have no unit.

    J = mean KL  +  cvar * CVaR_level(KL)  +  domain * max_d w_d KL_d  +  probes * mean (m - m')+
        (with combine=sum: domain * sum_d w_d KL_d; with phenomena: the mean of each, weighted)

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

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimizer.errors import ConfigError

SHARE = re.compile(r"\s*([\w -]*\w)\s*(?:\*\s*(\S+)\s*)?$")
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
    proof.domains. combine: `worst` or `sum` of the domains. pairs: a probe file of one's own, else the
    built-in ones. phenomena: 'NAME * WEIGHT' of those that count; empty = all alike. choices: a file
    of pairs that a person chose, which join them."""

    cvar: float = 0.0
    level: float = 0.99
    domain: float = 0.0
    domains: list[str] = field(default_factory=list)
    combine: str = "worst"
    probes: float = 0.0
    pairs: str | None = None
    phenomena: list[str] = field(default_factory=list)
    choices: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> Meaning:
        """From a YAML file such as `mezzotint learn` writes, whose paths are relative to its folder.
        Raises ConfigError that names what is wrong with it."""
        import yaml

        file = Path(path)
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            raise ConfigError(
                f"{file} can't be read as an objective ({reason}). Make it with mezzotint learn."
            ) from None
        if not isinstance(found, dict):
            raise ConfigError(f"{file} holds no objective: it is no mapping of names to values.")
        for key, value in found.items():
            _check_value(f"{file}: {key}", key, value)
        return cls(**_placed(found, file.parent))

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
        if self.combine not in ("worst", "sum"):
            raise ConfigError(f"meaning.combine is worst or sum, not {self.combine!r}.")
        shares(self.phenomena)
        if self.choices is not None and not Path(self.choices).is_file():
            raise ConfigError(
                f"There are no choices at {self.choices}. Correct meaning.choices, or leave it out."
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
            f"{'worst domain' if self.combine == 'worst' else 'domains'}": self.domain,
            "lost margin": self.probes,
        }
        return " + ".join(["KL", *(f"{w:g} {name}" for name, w in parts.items() if w)])

    @property
    def tuned(self) -> list[str]:
        """Domains that are tuned on; the certificate then takes their other documents."""
        return self.domains if self.domain else []


NUMBERS, LISTS = ("cvar", "level", "domain", "probes"), ("domains", "phenomena")
TEXTS = ("combine", "pairs", "choices")


def _check_value(where: str, key: Any, value: Any) -> None:
    """Raise ConfigError unless a file's entry is one of Meaning's and of its type."""
    known = (*NUMBERS, *LISTS, *TEXTS)
    if key not in known:
        raise ConfigError(f"{where} is no part of an objective; those are {', '.join(known)}.")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        "a number": key in NUMBERS and number,
        "a list of texts": key in LISTS
        and isinstance(value, list)
        and all(isinstance(one, str) for one in value),
        "a text": key in TEXTS
        and (isinstance(value, str) or (value is None and key != "combine")),
    }
    wanted = {**dict.fromkeys(NUMBERS, "a number"), **dict.fromkeys(LISTS, "a list of texts")}
    if not any(right.values()):
        raise ConfigError(f"{where} is {wanted.get(key, 'a text')}, not {value!r}. Correct it.")


def _placed(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With its files as seen from here."""
    placed = dict(found)
    for key in ("pairs", "choices"):
        if found.get(key) is not None:
            placed[key] = str(folder / found[key])
    if "domains" in found:
        placed["domains"] = [_placed_entry(entry, folder) for entry in found["domains"]]
    return placed


def _placed_entry(entry: str, folder: Path) -> str:
    name, is_file, rest = entry.partition("=")
    if not is_file:
        return entry
    path, times, weight = rest.rpartition("*") if "*" in rest else (rest, "", "")
    return f"{name.strip()} = {folder / path.strip()}{' * ' if times else ''}{weight.strip()}"


def shares(entries: Sequence[str]) -> dict[str, float]:
    """'NAME * WEIGHT' with an optional weight -> weights that add up to 1. Raises ConfigError."""
    found: dict[str, float] = {}
    for entry in entries:
        match = SHARE.fullmatch(str(entry))
        try:
            value = float(match[2] or 1) if match else 0.0
        except ValueError:
            value = 0.0
        if match is None or not 0 < value < float("inf"):
            raise ConfigError(
                f"meaning.phenomena holds names with '* WEIGHT' above 0 if wanted, such as "
                f"'negation * 2', not {entry!r}."
            )
        if match[1] in found:
            raise ConfigError(f"meaning.phenomena names {match[1]} twice. Name it once.")
        found[match[1]] = value
    total = sum(found.values())
    return {name: value / total for name, value in found.items()}


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
