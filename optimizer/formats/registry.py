"""The engines that a plan may be made for: who writes their files, and what they can't hold.

`offered` says it of every layer and precision before a search, so that no plan is made that
`mezzotint check` would refuse; `check_model` says it of a whole architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.errors import ConfigError
from optimizer.formats import rules
from optimizer.formats.gguf import writer
from optimizer.formats.rules import Verdict
from optimizer.formats.runtime import Runtime
from optimizer.formats.safetensors import autoround, compressed_tensors, gptq
from optimizer.plan import Inventory, Layer, Plan, Precision, Rule, assemble

# the engines that load safetensors -> the module that writes their format
CHECKPOINTS: dict[str, Any] = {
    "vllm": compressed_tensors,
    "transformers": compressed_tensors,
    "autoround": autoround,
    "gptq": gptq,
}
# a layer and what it would become -> None, or why the engine can't hold it; torch holds everything
HOLDS: dict[str, Callable[[Layer, Precision], str | None]] = {
    "vllm": rules.linear_only,
    "transformers": rules.linear_only,
    "autoround": gptq.shaped,
    "gptq": gptq.shaped,
    "llamacpp": writer.holds,
}


def refusal(engine: str, layer: Layer, precision: Precision) -> str | None:
    """Why the engine can't hold the layer in that precision; None where it can."""
    if precision.kind == "none" or engine not in HOLDS:
        return None
    return HOLDS[engine](layer, precision)


def offered(
    runtime: Runtime,
    scope: Sequence[Layer],
    columns: Sequence[str],
    fitted: Mapping[tuple[str, str], Precision],
) -> list[Rule]:
    """What the engine leaves to layers that it can't hold in every precision: a rule for each
    reason. Raises ConfigError where it leaves a layer nothing, or nothing to quantize at all."""
    left = np.ones((len(scope), len(columns)), dtype=bool)
    reasons: dict[str, dict[int, None]] = {}  # rows in order
    for i, layer in enumerate(scope):
        for j, column in enumerate(columns):
            reason = refusal(runtime.name, layer, fitted[layer.name, column])
            if reason is not None:
                left[i, j] = False
                reasons.setdefault(reason, {})[i] = None
    if reasons:
        _some(runtime.name, scope, columns, fitted, left, reasons)
    return [
        Rule(
            f"runtime={runtime.name} ({reason})",
            frozenset(scope[i].name for i in rows if (left[i] == own).all()),
            own,
        )
        for reason, rows in reasons.items()
        for own in np.unique(left[list(rows)], axis=0)
    ]


def _some(
    engine: str,
    scope: Sequence[Layer],
    columns: Sequence[str],
    fitted: Mapping[tuple[str, str], Precision],
    left: np.ndarray,
    reasons: Mapping[str, Mapping[int, None]],
) -> None:
    """Raises ConfigError where a layer has no column left, or all have only `none`."""
    bare = [i for i in range(len(scope)) if not left[i].any()]
    real = np.array([fitted[scope[0].name, c].kind != "none" for c in columns])
    if left[:, real].any() and not bare:
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


def check_model(engine: str, folder: Path, origin: Path | None) -> None:
    """Raises ModelError where the engine's files can't hold this architecture."""
    if engine == "llamacpp":
        writer.check_model(folder, origin)


def check(
    plan: Plan, inventory: Inventory, runtime: Runtime, folder: Path, origin: Path | None
) -> Verdict:
    """Whether the engine would load and run the plan, and its file's exact bytes. folder: the
    reference's; origin: the GGUF that it came from, if any."""
    if runtime.name == "llamacpp":
        return writer.check(plan, inventory, runtime, folder, origin)
    if runtime.name not in CHECKPOINTS:
        return rules.packed(plan, runtime)
    found: Verdict = CHECKPOINTS[runtime.name].check(plan, inventory, runtime)
    return found


def overhead(
    inventory: Inventory,
    runtime: Runtime,
    choices: Iterable[Mapping[str, Precision]],
    folder: Path,
    origin: Path | None,
) -> int:
    """The most bytes by which the engine's file exceeds our packed one in any of these choices: its
    vocabulary, indices, wider scales."""
    if runtime.name not in HOLDS:
        return 0
    most = 0
    for choice in choices:
        plan = assemble(
            inventory, [x for x in inventory.layers if x.name in choice], choice,
            model={"name": str(folder), "fingerprint": ""}, runtime=runtime.name,
            quantizer={"name": "rtn"}, predicted={"kl": 0.0, "stderr": 0.0},
        )  # fmt: skip
        size = check(plan, inventory, runtime, folder, origin).bytes
        most = max(most, 0 if size is None else size - plan.bytes["total"])
    return most
