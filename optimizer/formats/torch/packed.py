"""The torch backend: codes packed densely on disk; in memory multiplied packed where PyTorch has a
product for them (see `kernels`), else unpacked when a layer runs.

A packed folder holds config.json, the tokenizer, plan.json, packed.safetensors, README.md (what it is
and what was lost) and manifest.json (sha256 of the others). In packed.safetensors a quantized layer
NAME is NAME.codes, NAME.scales and, if asymmetric, NAME.zeros; everything else has its checkpoint
name and 16 bits.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from optimizer.errors import PlanError
from optimizer.formats import rules
from optimizer.formats.folder import (
    check_target,
    copy_beside,
    manifest,
    publish,
    save_tensors,
    seal,
)
from optimizer.formats.model_card import card
from optimizer.formats.runtime import Runtime
from optimizer.formats.torch import kernels
from optimizer.formats.torch.reader import Tensors, tensors
from optimizer.hardware.memory import UNPACKED
from optimizer.models.model import DTYPES, Model, read, skeleton, take_inventory, write
from optimizer.models.source import PACKED_FILE, POOLING, is_encoder, pooling
from optimizer.plan import Inventory, Layer, Plan, Precision
from optimizer.quantization.ggml import Blocks
from optimizer.quantization.uniform import Codes, Rtn

__all__ = ["check_target", "load", "pack", "save", "verify"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
OWN_BLOCK = 256 * 2**10  # bytes from which a block is the system's own
KEPT_FREE = 16 * 2**20  # bytes that the heap may keep at its end

Track = Callable[..., Iterable[Any]]


class Encoder(Protocol):
    """What packing needs of a quantizer; `layer` is its name. changed: what a tensor that isn't
    quantized becomes beside these codes."""

    def encode(self, weight: Tensor, precision: Precision, layer: str = "") -> Codes | Blocks: ...
    def changed(self, name: str, value: Tensor) -> Tensor: ...


def save(
    plan: Plan, model: Model, folder: Path, out: Path, track: Track, encoder: Encoder | None = None
) -> Path:
    """Pack `model` as `plan` says and write it to `out`, with what `folder` says beside weights.
    encoder: gives the codes; rounding to nearest if none is given. Appears whole or not at all.
    Memory: the packed model."""
    tensors = pack(plan, model, track, encoder)
    return publish(out, lambda draft: put(tensors, plan, folder, draft))


def pack(
    plan: Plan, model: Model, track: Track, encoder: Encoder | None = None
) -> dict[str, Tensor]:
    """The plan's stored tensors by name, as packed.safetensors holds them."""
    encoder = encoder or Rtn()
    choice, inventory = plan.choice, model.inventory
    dtype = DTYPES[inventory.dtype]
    tensors: dict[str, Tensor] = {}
    for layer in track(inventory.layers, "packing layers"):
        weight, precision = model.weight(layer.name), choice[layer.name]
        if precision.kind == "none":
            whole = torch.empty(layer.shape, dtype=dtype)
            target = whole.transpose(-1, -2) if layer.transposed else whole
            target.copy_(weight.reshape(target.shape))
            tensors[layer.name] = whole
            continue
        for suffix, part in encoder.encode(weight, precision, layer.name).pack().items():
            tensors[f"{layer.name}.{suffix}"] = part.contiguous()
    state = model.net.state_dict()
    for tensor in inventory.others:
        value = encoder.changed(tensor.name, state[tensor.parameter])
        tensors[tensor.name] = value.to(DTYPES[tensor.dtype]).contiguous()
    return tensors


def put(parts: dict[str, Tensor], plan: Plan, folder: Path, out: Path) -> None:
    """Fill `out` and read the weights back. Raises PlanError if the file isn't what was promised."""
    save_tensors(parts, out / PACKED_FILE)
    size = (out / PACKED_FILE).stat().st_size
    if size != plan.bytes["total"]:
        raise PlanError(
            f"The plan promises {plan.bytes['total']} bytes and the file has {size}. The plan was "
            "made for another version or another checkpoint; make it again."
        )
    with tensors(out / PACKED_FILE) as file:
        for name, value in parts.items():
            if not torch.equal(file.get(name, value.dtype), value):
                raise PlanError(f"Read back, {name} is not what was written. Is the disk sound?")
    copy_beside(folder, out)
    if is_encoder(folder):  # its own file may lie in a folder below, which isn't copied
        text = json.dumps({"pooling": pooling(folder)})
        (out / POOLING).write_text(text + "\n", encoding="utf-8")
    text = card(plan, rules.packed(plan, Runtime()))
    (out / "README.md").write_text(text, encoding="utf-8")
    seal(plan, out, {"engine": "torch"})


# ---------------------------------------------------------------- read back


def verify(folder: Path) -> Plan:
    """The folder's plan, after all files were compared with the manifest. Raises PlanError."""
    hashes = manifest(folder)["sha256"]
    if PACKED_FILE not in hashes or "plan.json" not in hashes:
        raise PlanError(f"The manifest of {folder} lists no {PACKED_FILE}. Make it again.")
    return Plan.load(folder / "plan.json")


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    fast: bool = False,
) -> Any:
    """A packed folder -> a working transformers model in eval mode, `generate()` included.

    Weights stay packed in memory, are unpacked for each use and compute in fp32, which gives the
    certificate's own numbers. fast: compute in bf16 and, on a CPU, multiply packed where PyTorch
    can. dtype: another arithmetic; only bf16 multiplies packed.
    Raises PlanError if anything in the folder was changed.
    """
    folder = Path(folder)
    dtype = dtype or (torch.bfloat16 if fast else torch.float32)
    plan = verify(folder)
    if torch.device(device).type == "cpu":
        steady_memory()
    net: Any = skeleton(folder)
    inventory = take_inventory(folder)
    if {layer.name for layer in inventory.layers} != set(plan.layers):
        raise PlanError(f"The plan in {folder} and its config.json name different layers.")
    with tensors(folder / PACKED_FILE) as file:
        _fill(net, inventory, plan.choice, file, dtype, device if fast else None)
    if hasattr(net, "generation_config"):
        with suppress(OSError):
            from transformers import GenerationConfig

            net.generation_config = GenerationConfig.from_pretrained(folder)
    return net.to(device).eval()


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


def _fill(
    net: Any,
    inventory: Inventory,
    choice: Mapping[str, Precision],
    stored: Tensors,
    dtype: torch.dtype,
    fast: str | None,
) -> None:
    """fast: the device that packed products are for; None: unpack everything."""
    for tensor in inventory.others:
        _assign(net, tensor.parameter, stored.get(tensor.name, dtype))
    by_parameter: dict[str, list[Layer]] = {}
    for layer in inventory.layers:
        by_parameter.setdefault(layer.parameter, []).append(layer)
    for parameter, layers in by_parameter.items():
        owner, _, leaf = parameter.rpartition(".")
        module = net.get_submodule(owner)
        shape = module.get_parameter(leaf).shape
        if all(layer.kind != "experts" and choice[layer.name].kind == "none" for layer in layers):
            _assign(net, parameter, stored.get(layers[0].name, dtype))
            continue
        pieces = [Piece(layer, choice[layer.name], stored.get) for layer in layers]
        tied = layers[0].tied
        multiplied = net.get_output_embeddings() if tied else module
        if fast is not None and _multiplies(multiplied, pieces[0], dtype, fast):
            product = kernels.Product(pieces[0].stored())
            _install_product(multiplied, leaf, product)
            if tied:
                _install(module, leaf, Lookup(product))
            continue
        store = PackedParameter(pieces, shape, dtype)
        _install(module, leaf, store)
        if tied:
            _install(net.get_output_embeddings(), leaf, store)
    net.tie_weights() if not any(layer.tied for layer in inventory.layers) else _tie(net)


def _tie(net: Any) -> None:
    """Untouched tied embeddings: the head's parameter is the embedding's. Packed ones share
    their store already."""
    embedding, head = net.get_input_embeddings(), net.get_output_embeddings()
    if "weight" in embedding._parameters:
        head.weight = embedding.weight


def _assign(net: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = net.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def linear(weight: Tensor, precision: Precision, tied: bool, device: str) -> Callable[[], Any]:
    """Makes copies of one layer, as `load(fast=True)` would hold it. weight [rows, cols]; tied: it is
    an embedding, too."""
    rows, cols = weight.shape
    layer = Layer("own", rows, cols, "linear", "own", None, "weight", (rows, cols), tied=tied)
    untouched = precision.kind == "none"
    stored = {"own": weight.bfloat16()} if untouched else {
        f"own.{suffix}": part for suffix, part in Rtn().encode(weight, precision).pack().items()
    }  # fmt: skip

    def make() -> Any:
        module = nn.Linear(cols, rows, bias=False, device="meta")
        if untouched:
            _assign(module, "weight", stored["own"].to(device, copy=True))
            return module
        piece = Piece(layer, precision, lambda name: stored[name].clone())
        if _multiplies(module, piece, torch.bfloat16, device):
            _install_product(module, "weight", kernels.Product(piece.stored()))
        else:
            _install(module, "weight", PackedParameter([piece], weight.shape, torch.bfloat16))
        return module.to(device)

    return make


class Piece(nn.Module):
    """One layer's stored tensors."""

    def __init__(self, layer: Layer, precision: Precision, get: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.layer, self.precision = layer, precision
        names = precision.parts(layer.rows, layer.cols)
        for suffix in names or ("weight",):
            name = layer.name if suffix == "weight" else f"{layer.name}.{suffix}"
            self.register_buffer(suffix, get(name))

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """The layer's matrix [rows, cols] fp32, or only some of its rows."""
        parts: dict[str, Tensor] = {k: v for k, v in self._buffers.items() if v is not None}
        if self.precision.kind == "none":
            weight = read(parts["weight"], _alone(self.layer))
            return (weight if rows is None else weight[rows]).float()
        if rows is not None:
            return self._decoded({suffix: part[rows] for suffix, part in parts.items()})
        # a few rows at a time: what unpacking needs besides its result stays in the cache of the
        # processor, and the allocator is not asked for blocks several times a layer's size
        step = max(1, UNPACKED // self.layer.cols)
        first = next(iter(parts.values()))
        value = torch.empty(self.layer.rows, self.layer.cols, device=first.device)
        for i in range(0, self.layer.rows, step):
            piece = {suffix: part[i : i + step] for suffix, part in parts.items()}
            value[i : i + step] = self._decoded(piece)
        return value

    def _decoded(self, parts: dict[str, Tensor]) -> Tensor:
        return Codes.unpack(parts, self.precision, self.layer.cols).decode()

    def stored(self) -> Codes:
        parts: dict[str, Tensor] = {k: v for k, v in self._buffers.items() if v is not None}
        found = Codes.unpack(parts, self.precision, self.layer.cols)
        assert isinstance(found, Codes)
        return found


def _alone(layer: Layer) -> Layer:
    """The layer as it lies in the checkpoint: not a slice of a fused parameter."""
    from dataclasses import replace

    return replace(layer, expert=None, offset=0)


class PackedParameter(nn.Module):
    """Stands for one live parameter; made of one piece, or of many for fused experts."""

    def __init__(self, pieces: list[Piece], shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.shape, self.dtype = shape, dtype

    def forward(self) -> Tensor:
        """The whole parameter, in its own shape and the compute dtype."""
        first: Any = self.pieces[0]
        if len(self.pieces) == 1 and not first.layer.transposed and first.layer.expert is None:
            return first().to(self.dtype).view(self.shape)
        device = next(first.buffers()).device
        value = torch.empty(self.shape, dtype=self.dtype, device=device)
        for piece in self.pieces:
            write(value, piece.layer, piece().to(self.dtype))  # type: ignore[arg-type]
        return value

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> those rows [..., cols]: an embedding unpacks what it looks up."""
        piece: Any = self.pieces[0]
        return piece(ids.flatten()).to(self.dtype).view(*ids.shape, -1)


class Lookup(nn.Module):
    """Stands for an embedding whose matrix the head multiplies packed."""

    def __init__(self, product: kernels.Product) -> None:
        super().__init__()
        self.product = product

    def forward(self) -> Tensor:
        return self.product.weight()

    def rows(self, ids: Tensor) -> Tensor:
        return self.product.lookup(ids)


def _install(module: nn.Module, leaf: str, store: PackedParameter | Lookup) -> None:
    """Replace module.leaf by a property that unpacks it. A property, not a new module type, so
    that every architecture's own forward (Linear, Conv1D, fused experts) runs unchanged."""
    attribute = f"{leaf}_packed"
    del module._parameters[leaf]
    kind = type(module)
    members: dict[str, Any] = {leaf: property(lambda self: getattr(self, attribute)())}
    if kind is nn.Embedding:
        members["forward"] = lambda self, ids: getattr(self, attribute).rows(ids)
    module.__class__ = type(kind.__name__, (kind,), members)
    module.add_module(attribute, store)


def _multiplies(module: nn.Module, piece: Piece, dtype: torch.dtype, device: str) -> bool:
    layer = piece.layer
    return (
        type(module) is nn.Linear
        and kernels.fits(piece.precision, layer.rows, layer.cols, dtype, device)
        and (not layer.tied or kernels.looks_up(layer.rows, layer.cols))
    )


def _install_product(module: nn.Module, leaf: str, product: kernels.Product) -> None:
    """The Linear's forward is the packed product; who reads its weight gets it unpacked."""

    def forward(self: Any, x: Tensor) -> Tensor:
        found: Tensor = self.weight_packed(x)
        return found if self.bias is None else found + self.bias

    del module._parameters[leaf]
    members: dict[str, Any] = {
        leaf: property(lambda self: self.weight_packed.weight()),
        "forward": forward,
    }
    module.__class__ = type("Linear", (nn.Linear,), members)
    module.add_module("weight_packed", product)
