"""What stands in a model where a packed layer is: modules that unpack their weights as they run, or
multiply them packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from optimizer.formats.torch import kernels
from optimizer.hardware.memory import MANY_UNPACKED, UNPACKED
from optimizer.models.arithmetic import sized
from optimizer.models.layout import scatter
from optimizer.models.model import places, unmatrix
from optimizer.plan import Layer, Other, Precision
from optimizer.plan.inventory import Place
from optimizer.quantization.uniform import Codes, Nearest, rows_of


def linear(weight: Tensor, precision: Precision, tied: bool, device: str) -> Callable[[], Any]:
    """Makes copies of one layer, as `load(fast=True)` would hold it. weight [rows, cols]; tied: it is
    an embedding, too."""
    rows, cols = weight.shape
    shape = (rows, cols)
    layer = Layer("own", rows, cols, "linear", "own", None, "weight", shape, tied=tied)
    untouched = precision.kind == "none"
    stored = (
        {"own": weight.bfloat16()}
        if untouched
        else {
            f"own.{suffix}": part
            for suffix, part in Nearest().encode(weight, precision).pack().items()
        }
    )

    def make() -> Any:
        module = nn.Linear(cols, rows, bias=False, device="meta")
        if untouched:
            assign(module, "weight", stored["own"].to(device, copy=True))
            return module
        piece = Piece(layer, precision, lambda name: stored[name].clone())
        if multiplies(module, piece, kernels.Target(torch.bfloat16, device)):
            install_product(module, "weight", kernels.Product(piece.stored().to(device)))
        else:
            store = PackedParameter("weight", [piece], weight.shape, torch.bfloat16)
            install(module, "weight", store)
        return module.to(device)

    return make


class Piece(nn.Module):
    """One layer's stored tensors, or a tensor that stays as it is beside packed ones."""

    def __init__(
        self, layer: Layer | Other, precision: Precision, get: Callable[[str], Tensor]
    ) -> None:
        super().__init__()
        self.layer, self.precision = layer, precision
        names = precision.parts(layer.rows, layer.cols) if isinstance(layer, Layer) else ()
        for suffix in names or ("weight",):
            name = layer.name if suffix == "weight" else f"{layer.name}.{suffix}"
            self.register_buffer(suffix, get(name))

    def forward(self) -> Tensor:
        """The tensor in the checkpoint's shape, fp32."""
        parts: dict[str, Tensor] = {k: v for k, v in self._buffers.items() if v is not None}
        if self.precision.kind == "none" or not isinstance(self.layer, Layer):
            return parts["weight"].float()
        # a few rows at a time: what unpacking needs besides its result stays in the cache of the
        # processor, and the allocator is not asked for blocks several times a layer's size
        first = next(iter(parts.values()))
        step = max(1, sized(first.device, UNPACKED, MANY_UNPACKED) // self.layer.cols)
        value = torch.empty(self.layer.rows, self.layer.cols, device=first.device)
        for i in range(0, self.layer.rows, step):
            ids = torch.arange(i, min(i + step, self.layer.rows), device=first.device)
            value[i : i + step] = self._decoded(rows_of(parts, self.precision, ids))
        return unmatrix(value, self.layer)

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of a matrix that the checkpoint stores as it is, fp32."""
        parts: dict[str, Tensor] = {k: v for k, v in self._buffers.items() if v is not None}
        if self.precision.kind == "none":
            return parts["weight"][ids].float()
        return self._decoded(rows_of(parts, self.precision, ids))

    def _decoded(self, parts: dict[str, Tensor]) -> Tensor:
        assert isinstance(self.layer, Layer)
        return Codes.unpack(parts, self.precision, self.layer.cols).decode()

    def stored(self) -> Codes:
        parts: dict[str, Tensor] = {k: v for k, v in self._buffers.items() if v is not None}
        assert isinstance(self.layer, Layer)
        found = Codes.unpack(parts, self.precision, self.layer.cols)
        assert isinstance(found, Codes)
        return found


class PackedParameter(nn.Module):
    """Stands for one live parameter; made of one piece, or of many for fused experts."""

    def __init__(
        self, name: str, pieces: list[Piece], shape: torch.Size, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.name, self.pieces = name, nn.ModuleList(pieces)
        self.shape, self.dtype = shape, dtype

    def forward(self) -> Tensor:
        """The whole parameter, in its own shape and the compute dtype. Contiguous as in the loaded
        model: products of many experts add up in another order where it is a transposed view."""
        first: Any = self.pieces[0]
        if self.whole:
            return cast(Tensor, first().to(self.dtype).view(self.shape).contiguous())
        device = next(first.buffers()).device
        value = torch.empty(self.shape, dtype=self.dtype, device=device)
        for piece in self.pieces:
            part: Any = piece
            scatter(part().to(self.dtype), within(part.layer, self.name), lambda _: value)
        return value

    @property
    def whole(self) -> bool:
        first: Any = self.pieces[0]
        return len(self.pieces) == 1 and not first.layer.places

    def rows(self, ids: Tensor) -> Tensor:
        """ids [...] -> those rows [..., cols]: an embedding unpacks what it looks up."""
        if not self.whole:
            return self()[ids]
        piece: Any = self.pieces[0]
        return piece.rows(ids.flatten()).to(self.dtype).view(*ids.shape, -1)


class Lookup(nn.Module):
    """Stands for an embedding whose matrix the head multiplies packed."""

    def __init__(self, product: kernels.Product) -> None:
        super().__init__()
        self.product = product

    def forward(self) -> Tensor:
        return self.product.weight()

    def rows(self, ids: Tensor) -> Tensor:
        return self.product.lookup(ids)


def install(module: nn.Module, leaf: str, store: PackedParameter | Lookup) -> None:
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


def multiplies(module: nn.Module, piece: Piece, target: kernels.Target) -> bool:
    layer = piece.layer
    return (
        type(module) is nn.Linear
        and isinstance(layer, Layer)
        and kernels.fits(piece.precision, layer.rows, layer.cols, target)
        and (not layer.tied or kernels.looks_up(layer.rows, layer.cols, target.device))
    )


def install_product(module: nn.Module, leaf: str, product: kernels.Product) -> None:
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


def within(tensor: Layer | Other, parameter: str) -> tuple[Place, ...]:
    return tuple(place for place in places(tensor) if place.parameter == parameter)


def assign(net: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = net.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
