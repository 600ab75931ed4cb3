"""The torch backend: codes packed densely on disk; in memory multiplied packed where PyTorch has a
product for them (see `kernels`), else unpacked when a layer runs.

A packed folder holds config.json, the tokenizer, plan.json, packed.safetensors, inventory.json (where
each tensor belongs in the model), README.md (what it is and what was lost) and manifest.json (sha256
of the others). In packed.safetensors a quantized layer NAME is NAME.codes, NAME.scales and, if
asymmetric, NAME.zeros; everything else is the checkpoint's own, under its name and in its dtype.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optimizer import untrusted
from optimizer.errors import PlanError
from optimizer.formats import rules
from optimizer.formats.folder import (
    check_target,
    copy_beside,
    manifest,
    publish,
    seal,
)
from optimizer.formats.format import Torch
from optimizer.formats.model_card import card
from optimizer.formats.runtime import Runtime
from optimizer.formats.torch import kernels, modes, planes
from optimizer.formats.torch.modes import Unpacking
from optimizer.formats.torch.modules import (
    Lookup,
    PackedParameter,
    Piece,
    install,
    install_product,
    multiplies,
    within,
)
from optimizer.formats.torch.reader import Tensors, tensors
from optimizer.formats.torch.writer import REMADE, write
from optimizer.models.inventory import tie
from optimizer.models.layout import holders, scatter
from optimizer.models.model import Model, finite, places, skeleton
from optimizer.models.planes import modules_of
from optimizer.models.source import (
    BASE_FILE,
    METHOD,
    PACKED_FILE,
    POOLING,
    is_encoder,
    pooling,
)
from optimizer.plan import UNTOUCHED, Inventory, Layer, Other, Plan, Precision, container_bytes
from optimizer.plan.container import stored_entries
from optimizer.plan.refinement import REFINEMENT_FILE
from optimizer.quantization.residual import PlaneCodes
from optimizer.quantization.uniform import Encoded, Nearest

__all__ = ["check_target", "load", "pack", "save", "verify"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
OWN_BLOCK = 256 * 2**10  # bytes from which a block is the system's own
INVENTORY = "inventory.json"
KEPT_FREE = 16 * 2**20  # bytes that the heap may keep at its end

Track = Callable[..., Iterable[Any]]


class Encoder(Protocol):
    """What packing needs of a quantizer; `layer` is its name. changed: what a tensor that isn't
    quantized becomes beside these codes."""

    def encode(self, weight: Tensor, precision: Precision, layer: str = "") -> Encoded: ...
    def changed(self, name: str, value: Tensor) -> Tensor: ...


class Refiner(Protocol):
    """What packing needs of a refinement; see `quantization.residual.Stacked`."""

    def plane(self, weight: Tensor, layer: str) -> PlaneCodes: ...


def save(
    plan: Plan,
    model: Model,
    folder: Path,
    out: Path,
    track: Track,
    encoder: Encoder | None = None,
    refining: Refiner | None = None,
) -> Path:
    """Pack `model` as `plan` says and write it to `out`, with what `folder` says beside weights.
    encoder: gives the codes; rounding to nearest if none is given. refining: gives the planes of a
    plan with a refinement, which is left out without. Appears whole or not at all. Memory: a layer,
    and a refinement's planes."""
    parts = packing(plan, model, track, encoder)
    more: dict[str, Tensor] = {}
    if plan.refinement is not None and refining is not None:
        for name in track(plan.refinement.layers, "packing planes"):
            for suffix, part in refining.plane(model.weight(name), name).pack().items():
                more[f"{name}.{suffix}"] = part.contiguous()
    return publish(out, lambda draft: put(parts, plan, model.inventory, folder, draft, more))


def pack(
    plan: Plan, model: Model, track: Track, encoder: Encoder | None = None
) -> dict[str, Tensor]:
    """The plan's stored tensors by name, as packed.safetensors holds them, all at once."""
    return dict(packing(plan, model, track, encoder))


def packing(
    plan: Plan, model: Model, track: Track, encoder: Encoder | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The plan's stored tensors, one at a time; what isn't quantized is the checkpoint's own, bit for
    bit, but for what the codes' scales went into."""
    encoder = encoder or Nearest()
    choice, inventory = plan.choice, model.inventory
    for layer in track(inventory.layers, "packing layers"):
        precision = choice[layer.name]
        if precision.kind == "none":
            yield layer.name, finite(layer.name, model.checkpoint.read(layer.name)).contiguous()
            continue
        weight = model.weight(layer.name)
        for suffix, part in encoder.encode(weight, precision, layer.name).pack().items():
            yield f"{layer.name}.{suffix}", part.contiguous()
    for tensor in inventory.others:
        stored = finite(tensor.name, model.checkpoint.read(tensor.name))
        changed = encoder.changed(tensor.name, stored).to(stored.dtype)
        yield tensor.name, changed.contiguous()


def put(
    parts: Iterable[tuple[str, Tensor]],
    plan: Plan,
    inventory: Inventory,
    folder: Path,
    out: Path,
    more: dict[str, Tensor] | None = None,
) -> None:
    """Fill `out` and read the weights back. more: the refinement's planes; without, the base is packed
    as a plan of its own. Raises PlanError if a file isn't what was promised."""
    plan = plan if more else replace(plan, refinement=None)
    file = out / (BASE_FILE if more else PACKED_FILE)
    entries = stored_entries(inventory, plan.choice)
    size = sum(entry[3] for entry in entries) + container_bytes(entries)
    if size != plan.bytes["total"]:
        raise PlanError(
            f"The plan promises {plan.bytes['total']} bytes and the file has {size}. {REMADE}"
        )
    write(file, entries, parts)
    if more:
        planes.put(more, plan, out)
    copy_beside(folder, out)
    _announce(out / "config.json", file.name)
    if is_encoder(folder):  # its own file may lie in a folder below, which isn't copied
        text = json.dumps({"pooling": pooling(folder)})
        (out / POOLING).write_text(text + "\n", encoding="utf-8")
    text = json.dumps(inventory.to_json()) + "\n"
    (out / INVENTORY).write_text(text, encoding="utf-8")
    text = card(plan, rules.packed(plan, Runtime()), Torch.run)
    (out / "README.md").write_text(text, encoding="utf-8")
    seal(plan, out, {"engine": "torch"})


def _announce(config: Path, weights: str) -> None:
    """Say in config.json who reads the folder, see `from_pretrained`."""
    found = untrusted.read(config, "keep")
    found |= {"quantization_config": {"quant_method": METHOD}, "transformers_weights": weights}
    config.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- read back


def verify(folder: Path, whole: bool = True) -> Plan:
    """The folder's plan, after all files were compared with the manifest; unless `whole`, all but a
    refinement, which isn't opened. Raises PlanError."""
    hashes = manifest(folder, without=(REFINEMENT_FILE,))["sha256"]
    if not {PACKED_FILE, BASE_FILE} & hashes.keys() or "plan.json" not in hashes:
        raise PlanError(f"The manifest of {folder} lists no {PACKED_FILE}. Make it again.")
    plan = Plan.load(folder / "plan.json")
    if whole and plan.refinement is not None:
        planes.check(folder, hashes)
    return plan


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    fast: bool = False,
    steady: bool = False,
    unpacking: Unpacking | None = None,
    wide: bool = False,
    once: bool = False,
) -> Any:
    """A packed folder -> a working transformers model in eval mode, `generate()` included.

    Weights stay packed in memory, are unpacked for each use and compute in fp32, which gives the
    certificate's own numbers. fast: compute in bf16 and, on a CPU, multiply packed where PyTorch
    can. wide: beside fast, hold codes of 2 to 7 bits in 4 or 8, so that they can, too: more memory
    than the plan says. dtype: another arithmetic; only bf16 multiplies packed. unpacking: what is done
    with a refinement; by default it is used for every token. once: unpack each layer now and never
    again: the same numbers, in the memory of a model that isn't quantized.
    steady: on a CPU, see `steady_memory`, which holds for the whole process.
    Raises PlanError if anything in the folder was changed.
    """
    folder = Path(folder)
    dtype = dtype or (torch.bfloat16 if fast else torch.float32)
    wanted = unpacking or Unpacking()
    wanted.check()
    plan = verify(folder, whole=wanted.mode != "never")
    mode = wanted.settle(plan, folder)
    if steady and torch.device(device).type == "cpu":
        steady_memory()
    net: Any = skeleton(folder)
    inventory = read_inventory(folder)
    if {layer.name for layer in inventory.layers} != set(plan.layers):
        raise PlanError(f"The plan in {folder} and its {INVENTORY} name different layers.")
    named = {layer.name: layer for layer in inventory.layers}
    refined = () if mode == "never" or plan.refinement is None else tuple(plan.refinement.layers)
    with tensors(folder / (PACKED_FILE if plan.refinement is None else BASE_FILE)) as file:
        stored = _Scales(file, {f"{name}.scales" for name in refined})
        quick = kernels.Target(dtype, device, wide) if fast else None
        filling = Filling(net, inventory, plan.choice, stored, dtype, quick, once)
        filling.fill([named[name] for name in refined])
    if hasattr(net, "generation_config"):
        with suppress(OSError):
            from transformers import GenerationConfig

            net.generation_config = GenerationConfig.from_pretrained(folder)
    net.tie_weights = already_tied
    net = net.to(device).eval()
    if not refined:
        return net
    own = planes.read(folder, plan, named, stored.kept, wanted.refinement, quick, device)
    return modes.unpacked(net, filling.refined, own, plan, mode, wanted)


def already_tied(*_args: Any, **_kwargs: Any) -> None:
    """In the place of the model's own, which would look for weights: what is tied is one module."""


class _Scales:
    """An open file whose tensors of those names are kept: planes use their base's scales."""

    def __init__(self, file: Tensors, names: set[str]) -> None:
        self._file, self._names = file, names
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._names:
            return self._file.get(name, dtype)
        if name not in self._kept:
            self._kept[name] = self._file.get(name)
        return self._kept[name]

    def kept(self, layer: str) -> Tensor:
        return self._kept[f"{layer}.scales"]


def steady_memory() -> None:
    """Have glibc give large blocks back to the system when they are freed; elsewhere nothing.

    By itself it raises its threshold for that up to 32 MiB and cuts weights, activations and what a
    cache keeps from one heap, whose holes took 31 to 159 MB on SmolLM2. Holds for the process.
    """
    with suppress(OSError, AttributeError, ValueError):
        if (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, OWN_BLOCK)
            libc.mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


def read_inventory(folder: Path) -> Inventory:
    """The packed folder's own. Raises PlanError."""
    if not (folder / INVENTORY).is_file():
        raise PlanError(
            f"{folder} was packed by an earlier version, which didn't write down where each tensor "
            f"belongs ({INVENTORY}). Its plan is still good: mezzotint apply {folder / 'plan.json'} "
            "out=NEW model=MODEL packs it again."
        )
    try:
        return Inventory.from_json(untrusted.read(folder / INVENTORY))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PlanError(
            f"A packed folder holds {INVENTORY}, which says where each tensor belongs; that of "
            f"{folder} can't be read ({type(error).__name__}: {error}). Make the folder again with "
            "`mezzotint apply`."
        ) from None


@dataclass
class Filling:
    """A skeleton that gets its numbers. fast: what packed products are for; None: unpack everything,
    as it is used or all at once."""

    net: Any
    inventory: Inventory
    choice: Mapping[str, Precision]
    stored: Tensors | _Scales
    dtype: torch.dtype
    fast: kernels.Target | None
    once: bool = False

    def fill(self, refined: Iterable[Layer] = ()) -> None:
        """refined: layers whose modules are kept in `refined`. Raises PlanError where tensors and
        model don't belong together."""
        used = self.inventory.held
        self._check(used)
        tie(self.net, frozenset(p.parameter for x in used for p in places(x)))
        self.holders = holders(self.net)
        self.refined = modules_of(self.net, refined)
        by_parameter: dict[str, list[Layer | Other]] = {}
        for tensor in used:
            for parameter in dict.fromkeys(p.parameter for p in places(tensor)):
                by_parameter.setdefault(parameter, []).append(tensor)
        for parameter, parts in by_parameter.items():
            if any(self._packed(x) for x in parts):
                self._install(parameter, parts)
            else:
                self._assign(parameter, parts)
        left = [n for n, p in self.net.named_parameters() if p.device.type == "meta"]
        left += [n for n, b in self.net.named_buffers() if b.device.type == "meta"]
        if left:
            raise PlanError(f"The folder has no numbers for {left[0]}. Make it again.")

    def _check(self, used: Iterable[Layer | Other]) -> None:
        sizes = {name: value.numel() for name, value in self.net.state_dict().items()}
        for tensor in used:
            for place in places(tensor):
                inside = place.fits(math.prod(tensor.shape), sizes.get(place.parameter, 0))
                if not inside or (not tensor.places and not self._shaped(tensor)):
                    raise PlanError(
                        f"{INVENTORY} says that {place.parameter} of the model holds {tensor.name}, "
                        "and config.json describes a model where it can't. They don't belong "
                        "together: make the folder again."
                    )

    def _shaped(self, tensor: Layer | Other) -> bool:
        found: bool = self.net.state_dict()[tensor.parameter].shape == tensor.shape
        return found

    def _packed(self, tensor: Layer | Other) -> bool:
        return isinstance(tensor, Layer) and self.choice[tensor.name].kind != "none"

    def _assign(self, parameter: str, parts: list[Layer | Other]) -> None:
        """A parameter of which nothing is packed."""
        value = self.net.state_dict(keep_vars=True)[parameter]
        dtype = self.dtype if value.is_floating_point() else value.dtype
        if len(parts) == 1 and not parts[0].places:
            whole = self.stored.get(parts[0].name, dtype)
        else:
            whole = torch.empty(value.shape, dtype=dtype)
            for tensor in parts:
                stored = self.stored.get(tensor.name, dtype)
                scatter(stored, within(tensor, parameter), {parameter: whole}.__getitem__)
        owner, _, leaf = parameter.rpartition(".")
        module = self.net.get_submodule(owner)
        if leaf not in module._parameters:
            module._buffers[leaf] = whole
            return
        self._hold(value, whole)

    def _hold(self, value: Tensor, whole: Tensor) -> None:
        for holder, name in self.holders[id(value)]:
            holder._parameters[name] = nn.Parameter(whole, requires_grad=False)

    def _install(self, parameter: str, parts: list[Layer | Other]) -> None:
        """A parameter of which something is packed."""
        value = self.net.get_parameter(parameter)
        pieces = [Piece(x, self._precision(x), self.stored.get) for x in parts]
        if self.fast and len(pieces) == 1 and self._multiplied(value, pieces[0], self.fast):
            return
        store = PackedParameter(parameter, pieces, value.shape, self.dtype)
        if self.once:
            self._hold(value, store())
            return
        for module, leaf in self.holders[id(value)]:
            install(module, leaf, store)

    def _precision(self, tensor: Layer | Other) -> Precision:
        return self.choice[tensor.name] if isinstance(tensor, Layer) else UNTOUCHED

    def _multiplied(self, value: Tensor, piece: Piece, target: kernels.Target) -> bool:
        """Let Linears that hold the parameter multiply packed; whether they all can."""
        held = self.holders[id(value)]
        linears = [module for module, _ in held if type(module) is nn.Linear]
        others = [(module, leaf) for module, leaf in held if type(module) is not nn.Linear]
        lookups = all(type(module) is nn.Embedding for module, _ in others)
        whole = isinstance(piece.layer, Layer) and not piece.layer.places
        if not (whole and linears and lookups):
            return False
        if not multiplies(linears[0], piece, target):
            return False
        product = kernels.Product(piece.stored().to(target.device))
        for linear in linears:
            install_product(linear, "weight", product)
        for module, leaf in others:
            install(module, leaf, Lookup(product))
        return True
