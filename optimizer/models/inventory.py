"""What a checkpoint is made of: each of its tensors, what it is to the loaded model, and whether it
may be quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.checkpoint import Checkpoint, open_checkpoint
from optimizer.models.layout import Layout, lay_out, whole
from optimizer.models.published import CODED, quantized
from optimizer.models.source import is_encoder, quiet
from optimizer.models.text_path import blocks, reached
from optimizer.plan import Inventory, Layer, Other, Place

FLOATS = ("F16", "BF16", "F32")  # what a layer may be stored in
ROUTER = re.compile(r"(^|\.)(gate|gating|router|wg|shared_expert_gate|classifier)(\.|$)")
COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_experts_per_layer",
)
# experts that multiply x W instead of x W', and have no attribute that says so
UNSAID = ("Llama4TextExperts",)

UNREACHED = (
    "a text doesn't run through them (they are for images or sound, or for no input at all)"
)
ROUTES = "they choose the experts, and every engine keeps them in 16 bits"
NO_MATRIX = "they are no matrices of a linear layer, an embedding or experts"
UNUSUAL = "their numbers are stored as {}, which isn't rounded"


def architecture(folder: Path) -> tuple[Any, Any]:
    """transformers' class for what the folder holds, and its config. A class that config.json names
    and that reads text comes first, so that a multimodal model is whole. Raises ModelError."""
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto import modeling_auto as auto

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder)
        if is_encoder(folder):
            return AutoModel._model_mapping[type(config)], config
        readers = {
            name
            for mapping in (
                auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
                auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
            )
            for entry in mapping.values()
            for name in ([entry] if isinstance(entry, str) else entry)
        }
        named = [str(name) for name in config.architectures or []]
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{', '.join(named) or config.model_type} has an encoder and a decoder"
            )
        for name in named:
            found = getattr(transformers, name, None)
            if name in readers and getattr(found, "config_class", None) is type(config):
                return found, config
        found = AutoModelForCausalLM._model_mapping[type(config)]
        return found, config if found.config_class is type(config) else config.get_text_config()
    except Exception as error:  # noqa: BLE001  configs are checked by each model's own code, with its own errors
        raise _unbuildable(folder, error) from None


def _unbuildable(folder: Path, error: Exception) -> ModelError:
    text = " ".join(str(error).split()) or type(error).__name__
    return ModelError(
        f"{folder} isn't a causal language model or an encoder that transformers can build "
        f"({text[:300]}). Give a folder whose config.json names such an architecture."
    )


POOLER = "pooler"


def skeleton(folder: Path) -> Any:
    """The model on the meta device, in fp32 and eval mode: modules and shapes, no weights, nothing
    tied. What isn't in checkpoints (positions, scales) is computed, as from_pretrained does it."""
    found, config = architecture(folder)
    try:
        with quiet(), _blank(found):
            net = found(config)
        for value in net.state_dict(keep_vars=True).values():
            value._is_hf_initialized = True
        net._move_missing_keys_from_meta_to_device(set(), None, None, None)
        with quiet():
            net._initialize_missing_keys(False)
    except Exception as error:  # noqa: BLE001  what each architecture raises
        raise _unbuildable(folder, error) from None
    drop_pooler(net, folder)
    return net.eval().requires_grad_(False)


def _blank(found: Any) -> Any:
    from transformers.utils.generic import ContextManagers

    return ContextManagers(found.get_init_context(torch.float32, False, False, False))


def drop_pooler(net: Any, folder: Path) -> None:
    """BERT's layer for sentence pairs takes no part in mean or cls pooling, and many checkpoints
    lack it."""
    if is_encoder(folder) and getattr(net, POOLER, None) is not None:
        setattr(net, POOLER, None)


def tie(net: Any, present: frozenset[str]) -> None:
    """Let parameters be one where the architecture says so and the checkpoint has only one of them.
    present: the model's names that it has numbers for."""
    with quiet():
        net.tie_weights(missing_keys=set(net.state_dict()) - present, recompute_mapping=False)
    for target, source in list(net.all_tied_weights_keys.items()):
        if target in present and source in present:
            del net.all_tied_weights_keys[target]


def take_inventory(folder: Path) -> Inventory:
    """Every tensor of the checkpoint; reads headers and config, and a tensor's values only where two
    names may mean the same. Cost: a forward pass of a few tokens on weights of nothing."""
    checkpoint = open_checkpoint(folder)
    net = skeleton(folder)
    layout = lay_out(net, checkpoint.tensors)
    doubled = _doubled(net, layout, checkpoint)
    for name in doubled:
        del layout.places[name]
    tie(net, frozenset(p.parameter for own in layout.places.values() for p in own))
    return _Taking(folder, net, checkpoint, layout, doubled).inventory()


def _doubled(net: Any, layout: Layout, checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors whose numbers are those of another one that the model is tied to -> that one's name."""
    by_parameter: dict[str, list[str]] = {}
    for name, places in layout.places.items():
        for place in places:
            by_parameter.setdefault(place.parameter, []).append(name)
    found: dict[str, str] = {}
    for target, source in net.all_tied_weights_keys.items():
        pairs = list(zip(by_parameter.get(target, ()), by_parameter.get(source, ()), strict=False))
        if pairs and all(_equal(checkpoint, a, b) for a, b in pairs if a != b):
            found |= {a: b for a, b in pairs if a != b}
    return found


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    if checkpoint.tensors[a].shape != checkpoint.tensors[b].shape:
        return False
    return torch.equal(checkpoint.read(a).float(), checkpoint.read(b).float())


@dataclass
class _Taking:
    """One inventory in the making."""

    folder: Path
    net: Any
    checkpoint: Checkpoint
    layout: Layout
    doubled: Mapping[str, str]

    def inventory(self) -> Inventory:
        self.state: dict[str, Tensor] = self.net.state_dict(keep_vars=True)
        self.first = {id(p): name for name, p in self.net.named_parameters()}
        self.order = {name: i for i, name in enumerate(self.first.values())}
        self.head = None if is_encoder(self.folder) else self.net.get_output_embeddings()
        self.encoder = is_encoder(self.folder)
        self.routed = any(getattr(self.net.config.get_text_config(), c, None) for c in COUNTS)
        self.reached = reached(self.net, self.encoder)
        self.blocks = blocks(self.net, self.reached or self.order)
        if self.blocks is None:
            raise ModelError(
                f"A language model has a list of blocks; {type(self.net).__name__} has none, so "
                "there is nothing to allocate precision over."
            )
        layers: list[Layer] = []
        others: list[Other] = []
        for name in sorted(self.layout.places, key=self._rank):
            found = self._tensor(name)
            if isinstance(found, Layer):
                layers.append(found)
            else:
                others.append(found)
        others += [self._unused(name, reason) for name, reason in self.layout.unused.items()]
        left_out = [
            (a, f"its numbers are those of {b}, to which it is tied")
            for a, b in self.doubled.items()
        ]
        left_out += [
            (file, "the model's index doesn't name this file") for file in self.checkpoint.beside
        ]
        return Inventory(tuple(layers), tuple(others), self._dtype(), tuple(left_out))

    def _rank(self, name: str) -> tuple[int, int, str]:
        place = self.layout.places[name][0]
        own = self.first.get(id(self.state[place.parameter]), "")
        return self.order.get(own, len(self.order)), place.at_live, name

    def _dtype(self) -> str:
        weights = dict.fromkeys(FLOATS, 0)
        for tensor in self.checkpoint.tensors.values():
            if tensor.dtype in weights:
                weights[tensor.dtype] += prod(tensor.shape)
        return max(weights, key=lambda dtype: weights[dtype])

    def _unused(self, name: str, reason: str) -> Other:
        stored = self.checkpoint.tensors[name]
        return Other(name, "", stored.dtype, stored.shape, reason)

    def _tensor(self, name: str) -> Layer | Other:
        stored = self.checkpoint.tensors[name]
        places = tuple(self._canonical(place) for place in self.layout.places[name])
        if stored.dtype in CODED and any(
            self.state[x.parameter].is_floating_point() for x in places
        ):
            raise quantized(str(self.folder), f"{name} holds codes")
        reason = self._reason(places, stored.dtype)
        if reason is not None:
            kept = () if self._whole(places, stored.shape) else places
            return Other(name, places[0].parameter, stored.dtype, stored.shape, reason, kept)
        return self._layer(name, places)

    def _canonical(self, place: Place) -> Place:
        """With the first of its names for a parameter that has several."""
        value = self.state[place.parameter]
        name = self.first.get(id(value), place.parameter)
        return Place(name, place.extents, place.stored, place.live, place.at_stored, place.at_live)

    def _whole(self, places: tuple[Place, ...], shape: tuple[int, ...]) -> bool:
        first = places[0]
        alone = len(places) == 1 and self.state[first.parameter].numel() == prod(shape)
        return alone and first == whole(first.parameter, shape)

    def _module(self, parameter: str) -> nn.Module:
        module: nn.Module = self.net.get_submodule(parameter.rpartition(".")[0])
        return module

    def _reason(self, places: tuple[Place, ...], dtype: str) -> str | None:
        """Why the tensor is kept; empty where nobody expects otherwise; None if it is a layer."""
        values = [self.state[place.parameter] for place in places]
        if all(value.ndim < 2 for value in values):
            return ""
        if any(place.parameter not in self.order for place in places):
            return ""  # a buffer
        if any(self._kind(place.parameter) is None for place in places):
            return NO_MATRIX
        if any(self._routes(place.parameter) for place in places):
            return ROUTES
        if self.reached is not None and not any(x.parameter in self.reached for x in places):
            return UNREACHED
        if dtype not in FLOATS:
            return UNUSUAL.format(dtype)
        if self._transposed(places) is None:
            return NO_MATRIX
        return None

    def _kind(self, parameter: str) -> str | None:
        from transformers.pytorch_utils import Conv1D

        module, value = self._module(parameter), self.state[parameter]
        if value.ndim == 3:
            return "experts" if "experts" in type(module).__name__.lower() else None
        if value.ndim != 2 or not parameter.endswith(".weight"):
            return None
        if isinstance(module, nn.Embedding):
            return "embedding"
        if module is self.head:
            return "head"
        if isinstance(module, Conv1D):
            return "conv1d"
        return "linear" if isinstance(module, nn.Linear) else None

    def _routes(self, parameter: str) -> bool:
        """Whether the parameter chooses among experts: a part of a module that is called a router, by
        its class or its name, or a gate of a model with experts."""
        parts = parameter.split(".")[:-1]
        owners = [".".join(parts[: i + 1]) for i in range(len(parts))]
        classes = (type(self.net.get_submodule(owner)).__name__ for owner in owners)
        if any(re.search("router|topk", kind, re.IGNORECASE) for kind in classes):
            return True
        return "router" in parts[-1] or (self.routed and bool(ROUTER.search(owners[-1])))

    def _inputs(self, parameter: str) -> int:
        """How far apart a row's neighbours lie in the live parameter: 1, or the outputs' number."""
        module, value = self._module(parameter), self.state[parameter]
        turned = self._kind(parameter) == "conv1d"
        if value.ndim == 3:
            turned = bool(getattr(module, "is_transposed", type(module).__name__ in UNSAID))
        return int(value.shape[-1]) if turned else 1

    def _transposed(self, places: tuple[Place, ...]) -> bool | None:
        """Whether the checkpoint stores [inputs, outputs]; None if its inputs are no axis."""
        found = set()
        for place in places:
            step = self._inputs(place.parameter)
            if place.stored == place.live == (1,):
                found.add(step != 1)
            elif step in place.live:
                found.add(place.stored[place.live.index(step)] != 1)
            else:
                return None
        return found.pop() if len(found) == 1 else None

    def _layer(self, name: str, places: tuple[Place, ...]) -> Layer:
        stored, first = self.checkpoint.tensors[name], places[0]
        kind = self._kind(first.parameter) or ""
        live, shape = self.state[first.parameter], stored.shape
        transposed = bool(self._transposed(places))
        cols = shape[-2] if transposed else shape[-1]
        expert = None
        if kind == "experts" and len(shape) == 2:
            expert = first.at_live // (live.shape[1] * live.shape[2])
        owner = first.parameter.rpartition(".")[0]
        block = self._block(owner)
        return Layer(
            name=name,
            rows=prod(shape) // cols,
            cols=cols,
            kind=kind,
            role=self._role(name, owner, block),
            block=block,
            parameter=first.parameter,
            shape=shape,
            expert=expert,
            transposed=transposed,
            tied=self._tied(first.parameter),
            dtype=stored.dtype,
            places=() if self._whole(places, shape) else places,
        )

    def _block(self, owner: str) -> int | None:
        inside = owner[len(self.blocks or "") + 1 :].split(".", maxsplit=1)[0]
        if owner.startswith(f"{self.blocks}.") and inside.isdigit():
            return int(inside)
        return None

    def _role(self, name: str, owner: str, block: int | None) -> str:
        parts = name.removesuffix(".weight").split(".")
        if block is not None and parts[-1] == "dense" and self.encoder:
            return owner[len(self.blocks or "") + 1 :].split(".", 1)[-1]  # BERT has three kinds
        return parts[-1]

    def _tied(self, parameter: str) -> bool:
        if self.head is None or getattr(self.head, "weight", None) is None:
            return False
        embedding = self.net.get_input_embeddings()
        own = getattr(embedding, "weight", None)
        return own is self.head.weight and self.state[parameter] is own
