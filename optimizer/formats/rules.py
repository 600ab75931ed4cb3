"""Whether an engine would load and execute a plan, said before any work. No torch.

The rules of each engine were read from its sources: vLLM 0.33, transformers 5.23, llama.cpp of
October 2026, GPTQModel 7, AutoRound 0.16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from optimizer.errors import PlanError
from optimizer.formats.runtime import Runtime
from optimizer.plan import Inventory, Layer, Plan, Precision, fuse

SHOWN = 3  # names in a message; the rest is counted


@dataclass(frozen=True)
class Verdict:
    """errors: each the rule, the value and the remedy; empty = it would run. notes: what differs
    without failing. stored: precision of the plan -> what the engine stores. bytes: of the weight
    file, exact."""

    engine: str
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stored: dict[str, str] = field(default_factory=dict)
    bytes: int | None = None

    def require(self) -> None:
        if self.errors:
            more = f" ({len(self.errors) - 1} more: mezzotint check)" * (len(self.errors) > 1)
            raise PlanError(self.errors[0] + more)


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
    """Layers that the engine joins, but that have different precisions."""
    errors = []
    for group in fuse(inventory.layers, profile.fused, profile.experts):
        names = {plan.layers[name] for name in group}
        if len(names) > 1:
            found = ", ".join(f"{name} {plan.layers[name]}" for name in group[:SHOWN])
            more = f" and {len(group) - SHOWN} more" * (len(group) > SHOWN)
            errors.append(
                f"{profile.name} loads these with one precision, and they have: {found}"
                f"{more}. Make the plan with runtime={profile.name}."
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
