"""What transformers does to each layer when it loads a compressed-tensors folder.

Asked of the installed transformers, not remembered: its own renamings and converters say where a
checkpoint's tensor ends, and its own initialization of weights says which modules must not lie packed.
A layer is one of

    plain    a Linear module that lies packed until the model first runs, with a scheme of its own
    bare     a Linear module whose weight the model's class touches while it is loaded (Falcon,
             Mamba): unpacked at once (`dequantize`), and then all dense layers have one scheme
    merged   part of a tensor that transformers puts together while it loads (experts): unpacked at
             once, all of them by one scheme
    refused  nothing that transformers unpacks, with the reason
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.plan import Inventory, Layer, Plan

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("weight_packed", "weight_scale", "weight_shape")
MERGED = "merged"


@dataclass(frozen=True)
class Loading:
    """modules: layer -> the loaded model's module; merged, bare: names of layers; refused: layer ->
    why; split: layers with all experts in one tensor, of which transformers expects each by itself."""

    modules: Mapping[str, str]
    merged: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    split: frozenset[str] = frozenset()

    def halves(self, plan: Plan) -> bool:
        """Whether transformers unpacks some layers of the plan at once, and so to 16 bits."""
        at_once = self.bare | self.merged
        return any(plan.choice[name].kind != "none" for name in at_once)

    def reason(self, layer: Layer) -> str | None:
        """Why the layer can't be quantized; None where it can."""
        return self.refused.get(layer.name)


def loading(folder: Path, inventory: Inventory) -> Loading:
    """Costs a model without weights."""
    from optimizer.models.model import skeleton

    net = skeleton(folder)
    modules: dict[str, str] = {}
    merged: set[str] = set()
    refused: dict[str, str] = {}
    split = {x.name for x in inventory.layers if _is_split(net, x)}
    ends = _Ends(net)
    for layer in inventory.layers:
        why = _unfit(layer)
        place = None if why else ends.of(layer.name)
        if why is not None:
            refused[layer.name] = why
        elif place == MERGED:
            merged.add(layer.name)
        elif place is None or not _linear(net, place):
            refused[layer.name] = (
                "transformers unpacks Linear modules and experts that it merges itself, and this is "
                "neither"
            )
        else:
            modules[layer.name] = place
    bare = _bare(net, set(modules.values()))
    return Loading(
        modules,
        frozenset(merged),
        frozenset(name for name, module in modules.items() if module in bare),
        refused,
        frozenset(split),
    )


def _unfit(layer: Layer) -> str | None:
    if layer.kind == "experts":
        return (
            None if layer.expert is not None else "its checkpoint holds all experts in one tensor"
        )
    if layer.kind == "linear" or (layer.kind == "head" and not layer.tied):
        return None
    return f"it takes Linear layers, and this is {layer.kind}"


def _linear(net: Any, place: str) -> bool:
    from torch import nn

    try:
        return isinstance(net.get_submodule(place), nn.Linear)
    except AttributeError:
        return False


class _Ends:
    """Where a checkpoint's tensors end in the model, by transformers' own mapping."""

    def __init__(self, net: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        found = get_model_conversion_mapping(net)
        self._renamings = [x for x in found if isinstance(x, WeightRenaming)]
        self._converters = [x for x in found if isinstance(x, WeightConverter)]
        self._prefix, self._meta = net.base_model_prefix, net.state_dict()

    def of(self, name: str) -> str | None:
        """The module of a layer, MERGED, or None: it ends nowhere that can be unpacked."""
        stem = name.removesuffix(".weight")
        target, pattern = self._renamed(name)
        if pattern is not None:
            return MERGED if self._unpacks(pattern) else None
        place = target.removesuffix(".weight")
        for part in PARTS:
            packed, pattern = self._renamed(f"{stem}.{part}", f"{place}.{part}")
            if pattern is not None or packed != f"{place}.{part}":
                return None
        return place if target in self._meta else None

    def _renamed(self, name: str, as_if: str | None = None) -> tuple[str, str | None]:
        """as_if: a name that the model has once it is compressed."""
        from transformers.core_model_loading import rename_source_key

        meta = self._meta if as_if is None else {**self._meta, as_if: self._meta}
        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, meta
        )
        if target not in meta and name in meta:
            return name, None
        return target, pattern

    def _unpacks(self, pattern: str) -> bool:
        """Whether compressed-tensors' converter can stand before this one: it hands on stacks of
        whole weights (quantizers/base.py, update_weight_conversions)."""
        found = next(x for x in self._converters if pattern in x.source_patterns)
        stacks = type(found.operations[0]).__name__ == "MergeModulelist"
        sources = found._original_source_patterns
        return stacks and all(source.endswith(".weight") for source in sources)


def _bare(net: Any, places: set[str]) -> set[str]:
    """Modules whose weight is touched when transformers initializes what a checkpoint lacks, which
    it does for every model class in its own way. Empties the skeleton's modules."""
    import torch

    held = {place: net.get_submodule(place) for place in places}
    weights = {place: module._parameters.pop("weight") for place, module in held.items()}
    names = {id(module): place for place, module in held.items()}
    for module in net.modules():
        module._is_hf_initialized = False
    bare: set[str] = set()
    while len(bare) < len(held):
        try:
            with torch.no_grad():
                net.initialize_weights()
        except AttributeError as error:
            touched = names.get(id(error.obj))
            if touched is None or touched in bare:
                break
            role, kind = touched.rpartition(".")[2], type(held[touched])
            alike = {p for p in held if p.rpartition(".")[2] == role and type(held[p]) is kind}
            for place in alike:
                held[place]._parameters["weight"] = weights[place]
            bare |= alike
        except (RuntimeError, NotImplementedError, ValueError):
            break  # it computes with numbers, which a skeleton doesn't have
        else:
            break
    return bare


# ---------------------------------------------------------------- experts that are taken apart


def _is_split(net: Any, layer: Layer) -> bool:
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION as PATCHED

    if layer.kind != "experts" or layer.expert is not None:
        return False
    owner = net.get_submodule(layer.parameter.rpartition(".")[0])
    methods = PATCHED.get(type(owner).__name__, {}).get("quantization_methods", [])
    return any(str(getattr(m, "value", m)) == "compressed-tensors" for m in methods)


@dataclass(frozen=True)
class Piece:
    """Columns [first, last) of one expert of a tensor [experts, inputs, outputs]."""

    expert: int
    first: int
    last: int

    def take(self, value: Tensor) -> Tensor:
        """[outputs, inputs], as a Linear holds it."""
        return value[self.expert, :, self.first : self.last].T.contiguous()


def pieces(layer: Layer) -> dict[str, Piece]:
    """The tensors that stand for a split layer, each [outputs, inputs]."""
    experts, _, outputs = layer.shape
    stem, _, role = layer.name.rpartition(".")
    halves = {"gate_proj": (0, outputs // 2), "up_proj": (outputs // 2, outputs)}
    parts = halves if role == "gate_up_proj" else {role: (0, outputs)}
    return {
        f"{stem}.{n}.{name}.weight": Piece(n, first, last)
        for n in range(experts)
        for name, (first, last) in parts.items()
    }
