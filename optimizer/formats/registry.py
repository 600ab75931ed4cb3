"""The engines that a plan may be made for: who writes their files, and what they can't hold.

`offered` says it of every layer and precision before a search, so that no plan is made that
`mezzotint check` would refuse; `base_of` says it of a whole architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.errors import ConfigError
from optimizer.formats import rules
from optimizer.formats.format import Subject, format_of
from optimizer.formats.rules import Demands, Verdict
from optimizer.formats.runtime import Runtime
from optimizer.formats.safetensors.joined import joined
from optimizer.models.source import Source
from optimizer.plan import Choices, Inventory, Layer, Plan, Precision, Rule, assemble
from optimizer.store import Store


def base_of(
    runtime: Runtime, source: Source, inventory: Inventory, store: Store, given: str | None
) -> Any:
    """What the engine's file is made from, where it isn't made from the plan alone: llama.cpp's.
    given: the user's own file. Raises ModelError where the engine can't hold this model."""
    return format_of(runtime.name).base(source, inventory, store, given)


def demands(
    runtime: Runtime, inventory: Inventory, folder: Path | None = None, base: Any = None
) -> Demands:
    """What the engine asks of plans for this model. folder: the model's; None: what it asks of any.
    base: see `base_of`."""
    found = format_of(runtime.name)
    if folder is None:
        return Demands(runtime, joined(runtime, None).groups, found.holds)
    return found.demands(runtime, Subject(inventory, folder, base))


def rounded(
    demands: Demands,
    layers: Sequence[Layer],
    columns: Sequence[str],
    fitted: Mapping[tuple[str, str], Precision],
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """The layers without those that the engine can't hold rounded in any column, joined as it joins
    them; and for a person which those are. Bits are averaged over what can be rounded. All of the
    layers where nothing would be left."""
    reasons: dict[str, list[str]] = {}
    named = {layer.name: layer for layer in layers}
    real = [c for c in columns if any(fitted[name, c].kind != "none" for name in named)]
    for group in demands.groups(layers):
        why = [
            next((w for n in group if (w := demands.refusal(named[n], fitted[n, c]))), None)
            for c in real
        ]
        if real and all(why):
            reasons.setdefault(str(why[0]), []).extend(group)
    gone = {name for names in reasons.values() for name in names}
    if len(gone) == len(named):
        return tuple(layers), ()
    notes = (
        f"{demands.profile.name} holds {rules.listed(names)} untouched, out of scope: {why}."
        for why, names in reasons.items()
    )
    return tuple(layer for layer in layers if layer.name not in gone), tuple(notes)


def offered(
    demands: Demands,
    inventory: Inventory,
    choices: Choices,
) -> list[Rule]:
    """What the engine leaves to layers that it can't hold in every precision: a rule for each
    reason. Raises ConfigError where it leaves a layer nothing, or nothing to quantize at all."""
    runtime, scope, columns = demands.profile, choices.scope, choices.columns
    apart = _apart(demands, inventory, scope)
    uneven = _uneven(demands, choices)
    left = np.ones((len(scope), len(columns)), dtype=bool)
    reasons: dict[str, dict[int, None]] = {}  # rows in order
    for i, layer in enumerate(scope):
        for j, column in enumerate(columns):
            precision = choices.fitted[layer.name, column]
            reason = demands.refusal(layer, precision)
            if reason is None and precision.kind != "none":
                reason = apart.get(layer.name)
            if reason is None:
                reason = uneven.get((layer.name, column))
            if reason is not None:
                left[i, j] = False
                reasons.setdefault(reason, {})[i] = None
    if reasons:
        _some(runtime.name, choices, left, reasons)
    return [
        Rule(
            f"runtime={runtime.name} ({reason})",
            frozenset(scope[i].name for i in rows if (left[i] == own).all()),
            own,
        )
        for reason, rows in reasons.items()
        for own in np.unique(left[list(rows)], axis=0)
    ]


def _apart(demands: Demands, inventory: Inventory, scope: Sequence[Layer]) -> dict[str, str]:
    """Layers of the scope that the engine joins with others that are out of it, and why they then stay
    as they are."""
    names = {layer.name for layer in scope}
    alone = names | demands.beside
    found: dict[str, str] = {}
    for group in demands.groups(inventory.layers):
        out = [name for name in group if name not in alone]
        if out and len(out) < len(group):
            why = f"it loads them with {rules.listed(out)}, which scope leaves out, as one"
            found |= dict.fromkeys(names.intersection(group), why)
    return found


def _uneven(demands: Demands, choices: Choices) -> dict[tuple[str, str], str]:
    """Joined layers that a column would give different precisions, since their columns differ."""
    found: dict[tuple[str, str], str] = {}
    for group in demands.groups(choices.scope):
        for column in choices.columns:
            given = [(name, choices.fitted[name, column]) for name in group]
            if len({p for x, p in given if p.kind != "none" or x not in demands.beside}) > 1:
                why = f"it loads them with one precision, and {column} doesn't fit all of them"
                found |= {(name, column): why for name in group}
    return found


def _some(
    engine: str,
    choices: Choices,
    left: np.ndarray,
    reasons: Mapping[str, Mapping[int, None]],
) -> None:
    """Raises ConfigError where a layer has no column left, or all have only `none`."""
    scope, fitted = choices.scope, choices.fitted
    bare = [i for i in range(len(scope)) if not left[i].any()]
    real = np.array([[fitted[x.name, c].kind != "none" for c in choices.columns] for x in scope])
    if (left & real).any() and not bare:
        return
    rows = bare or range(len(scope))
    why = "; ".join(reason for reason, own in reasons.items() if own.keys() & set(rows))
    named = rules.listed([scope[i].name for i in rows])
    remedy = "Leave them out of scope, or add 16 (untouched) to palette.bits."
    if not bare or len(bare) == len(scope):
        remedy = "Nothing would be quantized; take another runtime or scope."
    raise ConfigError(f"{engine} can't hold {named} quantized: {why}. {remedy}")


def told(runtime: Runtime, found: Sequence[Rule]) -> tuple[str, ...]:
    """For a person: which layers the engine restricts, and why."""
    texts = []
    for rule in found:
        left = int(rule.columns.sum())
        how = "untouched" if left == 1 else f"in {left} of {len(rule.columns)} precisions only"
        why = rule.text.partition(" (")[2][:-1]
        texts.append(f"{runtime.name} holds {rules.listed(sorted(rule.layers))} {how}: {why}.")
    return tuple(texts)


def check(plan: Plan, runtime: Runtime, subject: Subject) -> Verdict:
    """Whether the engine would load and run the plan, and its file's exact bytes."""
    return format_of(runtime.name).checker(runtime, subject)(plan)


def overhead(
    runtime: Runtime, subject: Subject, choices: Iterable[Mapping[str, Precision]]
) -> int:
    """The most bytes by which the engine's file exceeds our packed one in any of these choices: its
    vocabulary, indices, wider scales."""
    engine = format_of(runtime.name)
    if not engine.larger:
        return 0
    most, verdict, inventory = 0, engine.checker(runtime, subject), subject.inventory
    for choice in choices:
        plan = assemble(
            inventory,
            [x for x in inventory.layers if x.name in choice],
            choice,
            model={"name": str(subject.folder), "fingerprint": ""},
            runtime=runtime.name,
            quantizer={"name": "rtn"},
            predicted={"kl": 0.0, "stderr": 0.0},
        )
        size = verdict(plan).bytes
        most = max(most, 0 if size is None else size - plan.bytes["total"])
    return most
