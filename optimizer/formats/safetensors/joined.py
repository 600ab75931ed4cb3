"""Which layers an engine loads as one matrix, and so with one precision.

vLLM's are read off its sources (vllm_joined.json, by experiments/05-exports/vllm_joined.py), and it
loads GPTQ and AutoRound files, too. An architecture that vLLM doesn't have runs through its bridge to
transformers, which joins layers of one module that read the same input: there all layers of a module
with as many inputs count as joined, the most that can be. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from optimizer import untrusted
from optimizer.formats.runtime import Runtime
from optimizer.plan import Layer

# engines whose files vLLM loads
IN_VLLM = ("vllm", "autoround", "gptq", "modelopt", "vllm-online")
FILE = "vllm_joined.json"


@dataclass(frozen=True)
class Joined:
    """sets: the joined matrix's name -> the roles that are its parts, within one module; None: all
    layers of a module with as many columns. experts: as Runtime.experts."""

    sets: Mapping[str, Sequence[str]] | None
    experts: str
    notes: tuple[str, ...] = ()

    def groups(self, layers: Sequence[Layer]) -> tuple[tuple[str, ...], ...]:
        """Names of layers that have one precision together."""
        number = {} if self.sets is None else united(list(self.sets.values()))
        found: dict[tuple[object, ...], list[str]] = {}
        for layer in layers:
            found.setdefault(self._key(layer, number), []).append(layer.name)
        return tuple(tuple(names) for names in found.values())

    def _key(self, layer: Layer, number: Mapping[str, int]) -> tuple[object, ...]:
        if layer.kind == "experts":
            shared: dict[str, tuple[object, ...]] = {
                "block": ("experts", layer.block),
                "model": ("experts",),
            }
            return shared.get(self.experts, (layer.parameter,))
        parent, _, role = layer.name.removesuffix(".weight").rpartition(".")
        if self.sets is None and layer.block is not None:
            return ("module", parent, layer.cols)
        if role in number:
            return ("joined", parent, number[role])
        return (layer.parameter,)


def united(sets: Sequence[Sequence[str]]) -> dict[str, int]:
    """Role -> the number of its set, where sets that overlap are one."""
    found: dict[str, int] = {}
    for number, roles in enumerate(sets):
        touched = {found[role] for role in roles if role in found}
        found |= dict.fromkeys(roles, number)
        found = {role: number if own in touched else own for role, own in found.items()}
    return found


def joined(runtime: Runtime, folder: Path | None) -> Joined:
    """folder: the model's; None: what the runtime's own settings say, for any model."""
    own = {"+".join(roles): roles for roles in runtime.fused}
    if runtime.name not in IN_VLLM or folder is None:
        return Joined(own, runtime.experts)
    version, known = declared()
    name = architecture(folder)
    if name in known:
        return Joined(own | known[name], runtime.experts)
    return Joined(
        None,
        runtime.experts,
        (
            f"vLLM {version} has no model of its own for {name}: layers of one module that have as "
            "many inputs get one precision, since its bridge to transformers may join them.",
        ),
    )


@cache
def declared() -> tuple[str, dict[str, dict[str, list[str]]]]:
    """vLLM's version, and its architectures -> joined matrix -> roles of its parts."""
    data = json.loads((files(__package__) / FILE).read_text(encoding="utf-8"))
    return data["vllm"], data["architectures"]


def architecture(folder: Path) -> str:
    """The first of config.json's `architectures`, which engines choose their model by."""
    try:
        config = untrusted.read(folder / "config.json", "keep")
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return "an architecture without a name"
