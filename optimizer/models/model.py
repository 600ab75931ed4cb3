"""The reference model: load it, know its layers, change weights and put them back.

The only writer of weights. Every layer is seen as a matrix [rows, cols] = [outputs, inputs],
whatever the checkpoint stores and wherever the architecture holds it: Linear, Conv1D (transposed),
embeddings, slices of fused 3-D expert parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from optimizer.data.short_texts import TEXTS
from optimizer.errors import ModelError, PlanError
from optimizer.models import embedding
from optimizer.models.checkpoint import Checkpoint, open_checkpoint
from optimizer.models.head import OwnHead, final_transform
from optimizer.models.inventory import POOLER, architecture, drop_pooler, skeleton, take_inventory
from optimizer.models.layout import gather, scatter
from optimizer.models.offload import offloaded, places
from optimizer.models.opening import opened as opened_on_disk
from optimizer.models.opening import spread
from optimizer.models.published import lacking
from optimizer.models.residence import Residence, card_rooms, least_work
from optimizer.models.source import is_encoder, pooling, quiet
from optimizer.plan import BY_ROW, UNTOUCHED, Inventory, Layer, Precision

__all__ = ["DTYPES", "Model", "places", "read", "skeleton", "take_inventory", "write"]

PIECE = 2**22  # numbers that are looked at together
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def _homes(folder: Path, inventory: Inventory, device: str, offload: str) -> Mapping[str, str]:
    """Tensor -> the device that keeps it; those that stay where the model runs may be left out."""
    if offload == "cpu":
        return dict.fromkeys((x.name for x in inventory.held), "cpu")
    if offload == "devices":
        return spread(folder, inventory, card_rooms(device, least_work(inventory)))
    return {}


class Rounder(Protocol):
    """What the model needs of a quantizer; `layer` is its name."""

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor: ...


def matrix(value: Tensor, layer: Layer) -> Tensor:
    """The layer's tensor as the checkpoint has it -> the matrix [rows, cols]."""
    return (value.transpose(-1, -2) if layer.transposed else value).reshape(layer.rows, layer.cols)


def unmatrix(weight: Tensor, layer: Layer) -> Tensor:
    """The matrix [rows, cols] -> the tensor as the checkpoint has it."""
    if not layer.transposed:
        return weight.reshape(layer.shape)
    turned = (*layer.shape[:-2], layer.shape[-1], layer.shape[-2])
    return weight.reshape(turned).transpose(-1, -2)


def read(get: Callable[[str], Tensor], layer: Layer) -> Tensor:
    """The layer's matrix [rows, cols] from the live parameters; a view where it can be one. get:
    parameter -> its value, or another of its shape, such as a gradient."""
    return matrix(gather(layer.shape, places(layer), get), layer)


def write(get: Callable[[str], Tensor], layer: Layer, weight: Tensor) -> None:
    """The layer's matrix [rows, cols] -> its place in the live parameters."""
    scatter(unmatrix(weight, layer), places(layer), get)


# ---------------------------------------------------------------- the reference, loaded


class Model:
    """A loaded reference whose layers can be rounded and restored.

    Weights compute in fp32 and hold the checkpoint's own values, so that the stash that restores
    them bit for bit has each tensor's stored dtype.
    """

    def __init__(
        self,
        net: Any,
        inventory: Inventory,
        checkpoint: Checkpoint,
        pooling: str | None = None,
    ) -> None:
        """net: None if only weights are to be read. pooling: an encoder's, see
        `optimizer.models.embedding`; None for a language model."""
        self.net = net
        self.pooling = pooling
        self.inventory = inventory
        self.checkpoint = checkpoint
        self.layers = {layer.name: layer for layer in inventory.layers}
        self._rounding: Rounding | None = None  # the one change of weights that may be open
        self._disk = None if net is None else offloaded(net)
        if self._disk is not None:
            self._disk.value, self._disk.some = self._now, self._some

    @classmethod
    def load(
        cls,
        folder: Path,
        inventory: Inventory,
        device: str = "cpu",
        full: bool = True,
        offload: str | None = None,
    ) -> Model:
        """Load and check. Raises ModelError that names the first tensor with NaN or infinity.

        full: run in fp32; otherwise weights are only read, one at a time from the files. offload:
        `none`, or where the blocks' weights stay as they are stored, `device`, `devices`, `cpu` or
        `disk`, see `optimizer.models.offload`; None: what fits.
        """
        checkpoint = open_checkpoint(folder)
        if not full:
            return cls(None, inventory, checkpoint)
        offload = offload or Residence(device=device).settled(inventory)
        if offload != "none":
            checkpoint = replace(checkpoint, device=device)
            if offload != "disk":
                checkpoint = checkpoint.keeping(_homes(folder, inventory, device, offload))
            for name, value in checkpoint.several([x.name for x in inventory.held]):
                finite(name, value)
            net = opened_on_disk(folder, inventory, checkpoint, device)
        else:
            net = _loaded(folder).to(device).eval().requires_grad_(False)
            for value in net.parameters():
                value.data = value.data.contiguous()
            _compare(net, inventory, checkpoint)
        if is_encoder(folder):
            return cls(net, inventory, checkpoint, pooling(folder))
        final_transform(net)  # refuses early what can't be measured
        return cls(net, inventory, checkpoint)

    @cached_property
    def own_head(self) -> OwnHead:
        """The reference's output head, for when the live one is rounded. Asked for first while the
        model holds its own weights."""
        if self.is_rounded:
            raise RuntimeError("The head is copied while the model holds its own weights.")
        return OwnHead(self.net)

    def logits(self, window: Tensor) -> Tensor:
        """ids [1, l] of a window -> logits [predictions, choices] with a gradient: of the next token
        at every position, or, for an encoder, of each text's neighbours."""
        if self.pooling is not None:
            return embedding.logits(self.net, window[0], self.pooling)
        found: Tensor = self.net(input_ids=window, use_cache=False).logits[0].float()
        return found

    def predictions(self, ids: np.ndarray) -> int:
        """How many rows `logits` has for all windows: tokens, or texts."""
        return len(ids) * TEXTS if self.pooling is not None else int(ids.size)

    def weight(self, name: str) -> Tensor:
        """The layer's live matrix [rows, cols] fp32; the stored one if the model wasn't loaded."""
        layer = self.layers[name]
        if self.net is None:
            return matrix(finite(name, self.checkpoint.read(name)), layer)
        return read(self.parameter, layer)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of the layer's own matrix, fp32, without the others where its weights lie on disk.
        The model must hold its own weights."""
        if self._disk is not None and self._disk.holds(name):
            layer = self.layers[name]
            if layer.shape == (layer.rows, layer.cols) and not layer.transposed:
                return self.checkpoint.read(name, rows).float()
            return matrix(self.checkpoint.read(name), layer)[rows].float()
        return self.weight(name)[rows]

    def parameter(self, name: str) -> Tensor:
        """A live parameter's values."""
        if self._disk is not None:
            self._disk.bring(name)
        value: Tensor = self.net.get_parameter(name).detach()
        return value

    def reference(self, name: str) -> Tensor:
        """The layer's own matrix [rows, cols], fp32, also while it is rounded."""
        return self.weight(name) if self._rounding is None else self._rounding.original(name)

    def _now(self, name: str, stored: Tensor) -> Tensor:
        """A block's tensor as it comes from disk -> as the model holds it now."""
        return stored if self._rounding is None else self._rounding.now(name, stored)

    def _some(self, name: str, rows: slice | Tensor) -> Tensor | None:
        """Some rows of what `_now` gives; None where only the whole can be had."""
        if self._rounding is None:
            return self.checkpoint.read(name, rows)
        return self._rounding.some(name, rows)

    @property
    def is_rounded(self) -> bool:
        """Whether any layer holds other weights than its own now."""
        return self._rounding is not None and self._rounding.active

    @contextmanager
    def rounded(
        self, quantizer: Rounder, choice: Mapping[str, Precision] | None = None
    ) -> Iterator[Rounding]:
        """Inside, the layers hold rounded weights; afterwards, and after an exception, their
        own again, bit for bit. `set` on the yielded value changes only what differs."""
        if self._rounding is not None:
            raise RuntimeError(
                "The model's weights are rounded already. Close that change before another begins, or "
                "`set` other precisions on it."
            )
        self._rounding = rounding = Rounding(self, quantizer)
        try:
            rounding.set(choice or {})
            yield rounding
        finally:
            rounding.set({})
            self._rounding = None


class Rounding:
    """An open change of weights; see `Model.rounded`. It keeps the weights that it replaced."""

    def __init__(self, model: Model, quantizer: Rounder) -> None:
        self._parameter, self._layers, self._quantizer = model.parameter, model.layers, quantizer
        self._disk, self._checkpoint = model._disk, model.checkpoint
        self._stash: dict[str, Tensor] = {}
        self._now: dict[str, Precision] = {}

    @property
    def active(self) -> bool:
        """Whether any layer is rounded."""
        return any(precision.kind != "none" for precision in self._now.values())

    def original(self, name: str) -> Tensor:
        """The layer's own matrix [rows, cols], fp32."""
        if name in self._stash:
            return self._stash[name].float()
        if self._disk is not None and self._disk.holds(name):
            return matrix(self._checkpoint.read(name), self._layers[name]).float()
        return read(self._parameter, self._layers[name])

    def some(self, name: str, rows: slice | Tensor) -> Tensor | None:
        """Some rows of `now`; None where the quantizer gives whole layers only."""
        precision = self._now.get(name, UNTOUCHED)
        if precision.kind == "none":
            return self._checkpoint.read(name, rows)

        def own() -> Tensor:
            return self._checkpoint.read(name, rows).float()

        if getattr(self._quantizer, "by_row", False) and precision.kind in BY_ROW:
            if isinstance(rows, slice):  # the same at every pass, and kept where it is dear
                return self._quantizer.round(own(), precision, name)
            of_rows = getattr(self._quantizer, "of_rows", None)
            rounder = self._quantizer if of_rows is None else of_rows(name)
            return rounder.round(own(), precision, "")
        find = getattr(self._quantizer, "some", None)
        return None if find is None else find(name, precision, rows, own)

    def now(self, name: str, stored: Tensor) -> Tensor:
        """A block's tensor as it comes from disk -> as the choice says; layers only are rounded."""
        precision = self._now.get(name, UNTOUCHED)
        if precision.kind == "none":
            return stored
        layer = self._layers[name]
        weight = matrix(stored, layer)
        if not getattr(self._quantizer, "as_stored", False):
            weight = weight.float()
        return unmatrix(self._quantizer.round(weight, precision, name), layer)

    def set(self, choice: Mapping[str, Precision]) -> None:
        """Make the model's layers what `choice` says; layers that it doesn't name, untouched."""
        unknown = choice.keys() - self._layers.keys()
        if unknown:
            raise PlanError(f"The model has no layer {sorted(unknown)[0]}.")
        for name in {**self._now, **choice}:
            wanted = choice.get(name, UNTOUCHED)
            if self._now.get(name, UNTOUCHED) != wanted:
                self._change(name, wanted)

    def _change(self, name: str, precision: Precision) -> None:
        layer = self._layers[name]
        if self._disk is not None and self._disk.holds(name):  # rounded whenever it is brought
            self._now[name] = precision
            self._disk.renew(name)
            return
        if name not in self._stash:
            self._stash[name] = read(self._parameter, layer).to(DTYPES[layer.dtype], copy=True)
        weight = self._stash[name].float()
        if precision.kind != "none":
            weight = self._quantizer.round(weight, precision, name)
        write(self._parameter, layer, weight)
        self._now[name] = precision


def _loaded(folder: Path) -> Any:
    """As transformers loads it, in fp32, whole. Raises ModelError."""
    found, config = architecture(folder)
    try:
        with quiet():
            net, report = found.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # noqa: BLE001  what transformers, safetensors and each model's own code raise
        raise ModelError(
            f"{folder} couldn't be loaded ({' '.join(str(error).split())}). Copy or download it "
            "again."
        ) from None
    drop_pooler(net, folder)
    missing = {n for n in report["missing_keys"] if not n.startswith(f"{POOLER}.")}
    own = [n for n in missing if net.all_tied_weights_keys.get(n) not in missing]
    if own:  # transformers would fill them with random numbers
        raise lacking(folder, open_checkpoint(folder), min(own))
    return net


def _compare(net: Any, inventory: Inventory, checkpoint: Checkpoint) -> None:
    """Every tensor of the checkpoint against the live numbers that are said to be its own. Raises
    ModelError for one that differs or isn't finite."""
    state = net.state_dict()
    for tensor in inventory.held:
        stored = finite(tensor.name, checkpoint.read(tensor.name))
        live = gather(tensor.shape, places(tensor), state.__getitem__)
        if not torch.equal(stored.to(live), live):
            raise ModelError(_unlike(tensor.name, stored.to(live), live))


def _unlike(name: str, stored: Tensor, live: Tensor) -> str:
    """Why a model whose loaded numbers aren't the checkpoint's is refused."""
    rows = ((stored != live).flatten(1) if stored.ndim > 1 else stored != live).nonzero()[:, 0]
    changed = rows.unique().tolist()
    where = f"{len(changed)} of its {len(stored)} rows differ, the first is row {changed[0]}"
    if len(changed) < len(stored) and not bool(live[changed].any()):
        return (
            f"transformers sets numbers of {name} to zero while it loads them ({where}): this class "
            "does so with the padding token's row. Engines that read the file itself would compute "
            "another model, so it can't be the reference. Set that row to zero in the checkpoint, or "
            "pad_token_id to null in config.json, which keeps it."
        )
    return (
        f"transformers loads {name} as other numbers than the checkpoint holds ({where}), so that "
        "what is rounded couldn't be put where it belongs. This architecture isn't supported; take "
        "one that the documentation's support matrix lists."
    )


def finite(name: str, value: Tensor) -> Tensor:
    """The value. Raises ModelError if one of its numbers is none."""
    pieces = value.flatten().split(PIECE) if value.is_floating_point() else ()
    bad = sum(len(x) - int(torch.isfinite(x.float()).sum()) for x in pieces)
    if bad:
        raise ModelError(
            f"Weights must be finite numbers; {name} has {bad} that are NaN or infinite. The "
            "checkpoint is damaged: get it again, or repair that tensor."
        )
    return value
