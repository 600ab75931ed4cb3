"""What a person has decided before the search: which groups may take which columns.

A pin is `GLOB = PRECISION`, `GLOB >= BITS` or `GLOB <= BITS`; a precision is a column's name
(int4_g64), a number of bits, `ternary`, or 16 (untouched). For pins in an engine's names,
see `pins`. `policy=hybrid` pins embeddings, the head and the blocks at both ends to 16: lossless
at the inputs and outputs, quantized inside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optimizer.errors import ConfigError
from optimizer.plan.choices import Choices
from optimizer.plan.inventory import Layer, glob
from optimizer.plan.precision import REFERENCE_BITS, Precision

if TYPE_CHECKING:
    import numpy as np

PIN = re.compile(r"\s*(\S.*?)\s*(>=|<=|=)\s*(\S+)\s*")


@dataclass(kw_only=True)
class Policy:
    """name: free or hybrid. ends: blocks at each end that hybrid leaves untouched."""

    name: str = "free"
    ends: int = 1
    pins: Any = field(default_factory=list)

    @property
    def listed(self) -> list[str]:
        """The pins, also where one is given without a list: `policy.pins=@FILE`."""
        found = self.pins if isinstance(self.pins, list) else [self.pins]
        if not all(isinstance(pin, str) for pin in found):
            raise ConfigError(f"policy.pins is a list of texts, not {self.pins!r}.")
        return list(found)

    def check(self) -> None:
        if self.name not in ("free", "hybrid"):
            raise ConfigError(f"policy.name is free or hybrid, not {self.name!r}.")
        if self.ends < 0:
            raise ConfigError(f"policy.ends is a number of blocks, not {self.ends}.")
        for pin in self.listed:
            if not pin.startswith("@"):
                parsed(pin)


@dataclass(frozen=True)
class Rule:
    """One restriction: what to call it, which layers it holds for, which columns it leaves."""

    text: str
    layers: frozenset[str]
    columns: np.ndarray


def allowed(policy: Policy, choices: Choices, engine: Sequence[Rule] = ()) -> np.ndarray:
    """bool [G, P] of all the choices. engine: rules that hold anyway. Raises ConfigError for pins that
    match nothing or leave nothing, naming those that contradict each other."""
    scope, columns = choices.scope, choices.columns
    precisions = [choices.fitted[scope[0].name, column] for column in columns]
    pins = [_rule(pin, scope, columns, precisions) for pin in policy.listed]
    rules = [*engine, *_hybrid(policy, scope, precisions), *pins]
    import numpy as np  # here: a plan is read without it

    found = np.ones((len(choices.groups), len(columns)), dtype=bool)
    for i, group in enumerate(choices.groups):
        own = [rule for rule in rules if rule.layers.intersection(group)]
        for rule in own:
            found[i] &= rule.columns
        if not found[i].any():
            raise ConfigError(_contradiction(own, group))
    return found


def _hybrid(policy: Policy, scope: Sequence[Layer], precisions: Sequence[Precision]) -> list[Rule]:
    if policy.name != "hybrid":
        return []
    import numpy as np

    untouched = np.array([p.kind == "none" for p in precisions])
    if not untouched.any():
        raise ConfigError(
            "policy=hybrid leaves layers untouched, and palette.bits doesn't have 16. Add it: "
            "palette.bits=[2,3,4,5,6,8,16]."
        )
    blocks = sorted({layer.block for layer in scope if layer.block is not None})
    ends = set(blocks[: policy.ends]) | set(blocks[len(blocks) - policy.ends :])
    outer = [layer.name for layer in scope if layer.block is None or layer.block in ends]
    if len(outer) == len(scope):
        raise ConfigError(
            f"policy=hybrid with policy.ends={policy.ends} leaves nothing to quantize in a model of "
            f"{len(blocks)} blocks. Lower policy.ends."
        )
    text = f"policy=hybrid (policy.ends={policy.ends})"
    return [Rule(text, frozenset(outer), untouched)]


def parsed(pin: str) -> tuple[str, str, str]:
    match = PIN.fullmatch(pin)
    if match is None:
        raise ConfigError(
            f"A pin is GLOB = PRECISION, GLOB >= BITS or GLOB <= BITS, not {pin!r}. For example: "
            "policy.pins=['*.down_proj >= 5','*.v_proj = 8']"
        )
    name, sign, value = match.groups()
    return name, sign, value


def _rule(
    pin: str, scope: Sequence[Layer], columns: Sequence[str], precisions: Sequence[Precision]
) -> Rule:
    pattern, sign, value = parsed(pin)
    layers = frozenset(layer.name for layer in scope if glob(pattern).fullmatch(layer.name))
    if not layers:
        raise ConfigError(
            f"Every pin must match a layer in scope; {pin!r} matches none (for example "
            f"{scope[0].name}). Correct the glob or widen scope."
        )
    import numpy as np

    left = np.array([_holds(c, p, sign, value) for c, p in zip(columns, precisions, strict=True)])
    if not left.any():
        raise ConfigError(
            f"A pin must leave a precision of the palette; {pin!r} leaves none of "
            f"{', '.join(columns)}. Change the pin or palette.bits."
        )
    return Rule(repr(pin), layers, left)


def _holds(column: str, precision: Precision, sign: str, value: str) -> bool:
    if sign == "=" and value in (column, precision.kind):
        return True
    try:
        bits = float(value)
    except ValueError:
        if sign == "=":
            return False
        raise ConfigError(
            f"A floor or a ceiling is a number of bits, such as {sign} 6, not {value!r}."
        ) from None
    own = REFERENCE_BITS if precision.kind == "none" else float(precision.code_bits)
    if sign == "=":
        return own == bits and precision.kind != "ternary"
    return own >= bits if sign == ">=" else own <= bits


def _contradiction(rules: Sequence[Rule], group: Sequence[str]) -> str:
    """Two rules that exclude each other, where two suffice; else all of them."""
    pairs = [
        (a, b)
        for i, a in enumerate(rules)
        for b in rules[i + 1 :]
        if not (a.columns & b.columns).any()
    ]
    named = " and ".join(rule.text for rule in (pairs[0] if pairs else rules))
    together = "" if len(group) == 1 else f" (one precision for {len(group)} layers together)"
    return (
        f"Pins and the engine must agree; {named} leave no precision for {group[0]}{together}. "
        "Change or remove one of them."
    )
