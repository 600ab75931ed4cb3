"""Whether an engine would load and execute a plan, said before any work. No torch.

The rules of each engine were read from its sources: vLLM 0.33, transformers 5.23, llama.cpp of
October 2026, GPTQModel 7, AutoRound 0.16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from optimizer.errors import PlanError
from optimizer.formats.runtime import Runtime
from optimizer.formats.safetensors.joined import joined
from optimizer.plan import Inventory, Layer, Plan, Precision

SHOWN = 3  # names in a message; the rest is counted


@dataclass(frozen=True)
class Verdict:
    """errors: each the rule, the value and the remedy; empty = it would run. notes: what differs
    without failing. stored: precision of the plan -> what the engine stores. bytes: of the weight
    file, exact. readers: who read the written file back."""

    engine: str
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stored: dict[str, str] = field(default_factory=dict)
    bytes: int | None = None
    readers: tuple[str, ...] = ()

    def require(self) -> None:
        if self.errors:
            more = f" ({len(self.errors) - 1} more: mezzotint check)" * (len(self.errors) > 1)
            raise PlanError(self.errors[0] + more)


Groups = tuple[tuple[str, ...], ...]


def anything(_layer: Layer, _precision: Precision) -> str | None:
    return None


def singly(layers: Sequence[Layer]) -> Groups:
    return tuple((layer.name,) for layer in layers)


@dataclass(frozen=True)
class Demands:
    """What an engine asks of the plans for one model. groups: layers -> those that have one precision
    together; holds: a layer and a precision that isn't `none` -> None, or why the engine can't hold
    it; agreed: a plan -> layers that must have one precision in it, where that differs from `groups`
    of all layers; beside: layers that may stay untouched where others of their group don't; notes:
    for a person."""

    profile: Runtime
    groups: Callable[[Sequence[Layer]], Groups] = singly
    holds: Callable[[Layer, Precision], str | None] = anything
    agreed: Callable[[Plan], Groups] | None = None
    beside: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        """Why the engine can't hold the layer in that precision; None where it can."""
        if precision.kind == "none":
            return None
        if not self.profile.runs(precision):
            name = self.profile.name
            return f"{name} doesn't execute {precision.name}, which its {layer.cols} columns take"
        return self.holds(layer, precision)

    def errors(self, plan: Plan, inventory: Inventory) -> list[str]:
        """All that speaks against a plan: the rule, the value and the remedy."""
        groups = self.groups(inventory.layers) if self.agreed is None else self.agreed(plan)
        name = self.profile.name
        return [
            *executed(plan, self.profile),
            *disagreeing(plan, groups, name),
            *kinds(plan, inventory, name, self.holds),
        ]


def noted(verdict: Verdict, notes: tuple[str, ...]) -> Verdict:
    return replace(verdict, notes=verdict.notes + notes)


def packed(plan: Plan, profile: Runtime) -> Verdict:
    """Of our own folder, which holds every precision in the bytes that the plan promises."""
    return Verdict(profile.name, tuple(executed(plan, profile)), bytes=plan.bytes["total"])


def quantized(plan: Plan, inventory: Inventory) -> list[Layer]:
    return [layer for layer in inventory.layers if plan.choice[layer.name].kind != "none"]


def executed(plan: Plan, profile: Runtime) -> list[str]:
    """Precisions that the engine doesn't run."""
    wrong = {name for name, p in plan.palette.items() if not profile.runs(p)}
    layers = [layer for layer, name in plan.layers.items() if name in wrong]
    if not layers:
        return []
    used = sorted({plan.layers[layer] for layer in layers})
    return [
        f"{profile.name} executes {', '.join(profile.executes)}, and not {', '.join(used)}, which the "
        f"plan gives to {listed(layers)}. Make the plan with runtime={profile.name}."
    ]


def agreed(plan: Plan, inventory: Inventory, profile: Runtime) -> list[str]:
    """Layers that the engine joins in every model, but that have different precisions."""
    return disagreeing(plan, joined(profile, None).groups(inventory.layers), profile.name)


def disagreeing(plan: Plan, groups: Groups, engine: str) -> list[str]:
    """Layers that the engine joins, but that have different precisions."""
    errors = []
    for group in groups:
        names = {plan.layers[name] for name in group}
        if len(names) > 1:
            found = ", ".join(f"{name} {plan.layers[name]}" for name in group[:SHOWN])
            more = f" and {len(group) - SHOWN} more" * (len(group) > SHOWN)
            errors.append(
                f"{engine} loads these with one precision, and they have: {found}"
                f"{more}. Make the plan with runtime={engine}."
            )
    return errors


def kinds(
    plan: Plan,
    inventory: Inventory,
    engine: str,
    holds: Callable[[Layer, Precision], str | None],
) -> list[str]:
    """`holds`: a quantized layer and its precision -> None, or why the format can't hold it."""
    reasons: dict[str, list[str]] = {}
    for layer in quantized(plan, inventory):
        reason = holds(layer, plan.choice[layer.name])
        if reason is not None:
            reasons.setdefault(reason, []).append(layer.name)
    return [
        f"{engine} can't hold {listed(names)} quantized: {reason}. Leave "
        f"{'it' if len(names) == 1 else 'them'} untouched with scope=[...], or export to another "
        "engine."
        for reason, names in reasons.items()
    ]


def linear_only(layer: Layer, _precision: Precision) -> str | None:
    """The rule of all safetensors formats: 2-D matrices of Linear modules, experts one by one."""
    if layer.kind == "experts":
        if layer.expert is None:
            return "its checkpoint holds all experts in one fused tensor"
        if layer.role not in ("gate_proj", "up_proj", "down_proj"):
            return f"experts must be named gate_proj, up_proj and down_proj, not {layer.role}"
        return None
    if layer.kind == "head" and not layer.tied:
        return None
    return None if layer.kind == "linear" else f"it takes Linear layers, and this is {layer.kind}"


def listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
