"""The reference model: load it, know its layers, change weights and put them back.

The only writer of weights. Every layer is seen as a matrix [rows, cols] = [outputs, inputs],
whatever the architecture stores: Linear, Conv1D (transposed), embeddings, slices of fused 3-D
expert parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from optimizer.data.short_texts import TEXTS
from optimizer.errors import ModelError, PlanError
from optimizer.models import embedding
from optimizer.models.source import is_encoder, pooling, quiet
from optimizer.plan import UNTOUCHED, Inventory, Layer, Other, Precision

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
SPELLING = {dtype: name for name, dtype in DTYPES.items()}


class Rounder(Protocol):
    """What the model needs of a quantizer; `layer` is its name."""

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor: ...


# ---------------------------------------------------------------- what a model is made of


def skeleton(folder: Path) -> Any:
    """The model on the meta device: modules and shapes, no weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
        with init_empty_weights(), quiet():
            net = _class(folder).from_config(config)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"{folder} isn't a causal language model or an encoder that transformers can build "
            f"({error}). Give a folder whose config.json names such an architecture."
        ) from None
    _drop_pooler(net, folder)
    net.tie_weights()
    net.eval()
    return net


def _class(folder: Path) -> Any:
    """transformers' factory for what the folder holds: a language model or an encoder."""
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModel if is_encoder(folder) else AutoModelForCausalLM


POOLER = "pooler"


def _drop_pooler(net: Any, folder: Path) -> None:
    """BERT's layer for sentence pairs takes no part in mean or cls pooling, and many checkpoints
    lack it."""
    if is_encoder(folder) and getattr(net, POOLER, None) is not None:
        setattr(net, POOLER, None)


def take_inventory(folder: Path) -> Inventory:
    """Every layer and other tensor of the checkpoint, from its config alone; no weights."""
    net = skeleton(folder)
    dtype = "BF16" if _stored_dtype(folder) == "BF16" else "F16"
    blocks = _blocks(net)
    head = net.get_output_embeddings()
    layers: list[Layer] = []
    others: list[Other] = []
    for parameter, value in net.named_parameters():
        module = net.get_submodule(parameter.rpartition(".")[0])
        kind = _kind(module, value, head)
        if kind is None:
            name = next(iter(_disk_names(net, parameter, value)))
            others.append(Other(name, parameter, dtype, tuple(value.shape)))
        else:
            layers += _layers(net, parameter, value, kind, blocks, tied=_tied(net, module, head))
    for name, value in _persistent_buffers(net):
        others.append(Other(name, name, SPELLING.get(value.dtype, "F32"), tuple(value.shape)))
    return Inventory(tuple(layers), tuple(others), dtype)


def _stored_dtype(folder: Path) -> str:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with _readable(file), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open has no __iter__)
                return str(tensors.get_slice(name).get_dtype())
    raise ModelError(f"The weight files in {folder} hold no tensors.")


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is no whole safetensors file ({error}). Copy or download it again."
        ) from None


def _blocks(net: nn.Module) -> str:
    """Name of the ModuleList of transformer blocks: the longest one, the outermost of equals."""
    lists = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(
            f"A language model has a list of blocks; {type(net).__name__} has none, so there is "
            "nothing to allocate precision over."
        )
    return max(lists, key=lambda item: (len(item[1]), -item[0].count(".")))[0]


def _kind(module: nn.Module, value: Tensor, head: nn.Module | None) -> str | None:
    from transformers.pytorch_utils import Conv1D

    if value.ndim == 3 and "experts" in type(module).__name__.lower():
        return "experts"
    if value.ndim != 2:
        return None
    if isinstance(module, nn.Embedding):
        return "embedding"
    if module is head:
        return "head"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Linear):
        return "linear"
    return None


def _tied(net: Any, module: nn.Module, head: nn.Module | None) -> bool:
    return (
        head is not None and module is net.get_input_embeddings() and module.weight is head.weight
    )


def _layers(
    net: Any, parameter: str, value: Tensor, kind: str, blocks: str, tied: bool
) -> list[Layer]:
    owner, _, leaf = parameter.rpartition(".")
    module = net.get_submodule(owner)
    role = leaf if kind == "experts" else owner.rpartition(".")[2]
    block = None
    if parameter.startswith(blocks + "."):
        inside = owner[len(blocks) + 1 :].split(".", maxsplit=1)
        block = int(inside[0])
        if role == "dense" and net.get_output_embeddings() is None:
            role = inside[-1]  # BERT's three kinds of dense layers
    common: dict[str, Any] = {"kind": kind, "block": block, "parameter": parameter, "tied": tied}
    names = _disk_names(net, parameter, value)
    if kind != "experts":
        transposed = kind == "conv1d"
        rows, cols = reversed(value.shape) if transposed else value.shape
        name = next(iter(names))
        shape = tuple(value.shape)
        return [Layer(name, rows, cols, role=role, shape=shape, transposed=transposed, **common)]
    transposed = bool(getattr(module, "is_transposed", False))
    rows, cols = (value.shape[2], value.shape[1]) if transposed else value.shape[1:]
    if list(names) == [parameter]:  # the checkpoint holds the fused parameter itself
        count, shape = value.shape[0], tuple(value.shape)
        return [
            Layer(
                parameter,
                count * rows,
                cols,
                role=role,
                shape=shape,
                transposed=transposed,
                **common,
            )
        ]
    return [
        Layer(
            name, last - first, cols, role=name.split(".")[-2], shape=(last - first, cols),
            expert=expert, offset=first, **common,
        )
        for name, (expert, first, last) in names.items()
    ]  # fmt: skip


def _disk_names(net: nn.Module, parameter: str, value: Tensor) -> dict[str, Any]:
    """Checkpoint names of one live parameter -> (expert, first row, last row) for fused experts.

    transformers 5 merges experts when it loads and takes them apart when it saves. Its own
    reverse conversion is run on a small marker that has a distinct number in every row, so
    the result tells which rows went where.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if value.ndim != 3:
        return dict.fromkeys(revert_weight_conversion(net, {parameter: torch.zeros(2, 2)}))
    experts, rows = value.shape[:2]
    marker = torch.arange(experts * rows).view(experts, rows, 1).expand(-1, -1, 2).contiguous()
    pieces = revert_weight_conversion(net, {parameter: marker})
    if list(pieces) == [parameter]:
        return {parameter: None}
    names = {}
    for name, piece in pieces.items():
        first, last = int(piece.min()), int(piece.max())
        if piece.ndim != 2 or piece.shape[0] != last - first + 1:
            raise ModelError(
                f"The experts in {parameter} are laid out in a way that this version doesn't "
                f"know (piece {name} of shape {tuple(piece.shape)}). Please report the model."
            )
        names[name] = (first // rows, first % rows, last % rows + 1)
    return names


def _persistent_buffers(net: nn.Module) -> list[tuple[str, Tensor]]:
    parameters = dict(net.named_parameters(remove_duplicate=False))
    return [(name, value) for name, value in net.state_dict().items() if name not in parameters]


def read(value: Tensor, layer: Layer) -> Tensor:
    """A whole parameter-shaped tensor -> the layer's matrix [rows, cols]."""
    if layer.expert is not None:
        return value[layer.expert, layer.offset : layer.offset + layer.rows]
    if value.ndim == 3:
        value = value.transpose(1, 2) if layer.transposed else value
        return value.reshape(layer.rows, layer.cols)
    return value.T if layer.transposed else value


def write(value: Tensor, layer: Layer, weight: Tensor) -> None:
    """The layer's matrix [rows, cols] -> its place in a whole parameter-shaped tensor."""
    target = value
    if layer.expert is not None:
        target = value[layer.expert, layer.offset : layer.offset + layer.rows]
    elif layer.transposed:
        target = value.transpose(-1, -2)
    target.copy_(weight.reshape(target.shape))


# ---------------------------------------------------------------- the reference, loaded


class Model:
    """A loaded reference whose layers can be rounded and restored.

    Weights compute in fp32 but hold 16-bit values (fp32 checkpoints are cast to fp16 once, here:
    the plan's "untouched" is 16 bits), so the stash that restores them bit for bit costs half.
    """

    def __init__(self, net: Any, inventory: Inventory, pooling: str | None = None) -> None:
        """pooling: an encoder's, see `optimizer.metrics.embeddings`; None for a language model."""
        self.net = net
        self.pooling = pooling
        self.inventory = inventory
        self.layers = {layer.name: layer for layer in inventory.layers}
        self._stash: dict[str, Tensor] = {}
        self._now: dict[str, Precision] = {}

    @classmethod
    def load(
        cls, folder: Path, inventory: Inventory, device: str = "cpu", full: bool = True
    ) -> Model:
        """Load and check. Raises ModelError that names the first tensor with NaN or infinity.

        full: compute in fp32; otherwise weights stay 16-bit, enough for reading them.
        """
        from safetensors import SafetensorError

        dtype = torch.float32 if full else DTYPES[inventory.dtype]
        try:
            with quiet():
                net, report = _class(folder).from_pretrained(
                    folder, dtype=dtype, use_safetensors=True, output_loading_info=True
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"{folder} couldn't be loaded ({error}). Copy or download it again."
            ) from None
        _drop_pooler(net, folder)
        missing = sorted(n for n in report["missing_keys"] if not n.startswith(f"{POOLER}."))
        if missing:  # transformers would fill them with random numbers
            raise ModelError(
                f"A checkpoint must hold all of its model's weights; {folder} lacks "
                f"{missing[0]}. Copy or download it again."
            )
        _settle(net.to(device).eval().requires_grad_(False), inventory)
        return cls(net, inventory, pooling(folder) if is_encoder(folder) else None)

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
        """The layer's live matrix [rows, cols]; fp32 if the model was loaded in full."""
        layer = self.layers[name]
        return read(self.net.get_parameter(layer.parameter).detach(), layer)

    def reference(self, name: str) -> Tensor:
        """The layer's own matrix [rows, cols], fp32, also while it is rounded."""
        stashed = self._stash.get(name)
        return self.weight(name) if stashed is None else stashed.float()

    @contextmanager
    def rounded(
        self, quantizer: Rounder, choice: Mapping[str, Precision] | None = None
    ) -> Iterator[Rounding]:
        """Inside, the layers hold rounded weights; afterwards, and after an exception, their
        own again, bit for bit. `set` on the yielded value changes only what differs."""
        rounding = Rounding(self, quantizer)
        try:
            rounding.set(choice or {})
            yield rounding
        finally:
            rounding.set({})
            self._stash.clear()

    def _change(self, name: str, precision: Precision, quantizer: Rounder) -> None:
        layer = self.layers[name]
        value = self.net.get_parameter(layer.parameter).detach()
        if name not in self._stash:
            self._stash[name] = read(value, layer).to(DTYPES[self.inventory.dtype], copy=True)
        weight = self._stash[name].float()
        if precision.kind != "none":
            weight = quantizer.round(weight, precision, name)
        write(value, layer, weight)
        self._now[name] = precision


class Rounding:
    """An open change of weights; see `Model.rounded`."""

    def __init__(self, model: Model, quantizer: Rounder) -> None:
        self._model, self._quantizer = model, quantizer

    def set(self, choice: Mapping[str, Precision]) -> None:
        """Make the model's layers what `choice` says; layers that it doesn't name, untouched."""
        unknown = choice.keys() - self._model.layers.keys()
        if unknown:
            raise PlanError(f"The model has no layer {sorted(unknown)[0]}.")
        now = self._model._now
        for name in {**now, **choice}:
            wanted = choice.get(name, UNTOUCHED)
            if now.get(name, UNTOUCHED) != wanted:
                self._model._change(name, wanted, self._quantizer)


def _settle(net: nn.Module, inventory: Inventory) -> None:
    """Check finiteness and cast to the stored 16-bit values."""
    disk = {layer.parameter: layer.name for layer in inventory.layers}
    disk |= {tensor.parameter: tensor.name for tensor in inventory.others}
    dtype = DTYPES[inventory.dtype]
    for parameter, value in net.named_parameters():
        stored = value.detach().to(dtype)
        if not bool(torch.isfinite(stored).all()):
            bad = int((~torch.isfinite(stored)).sum())
            raise ModelError(
                f"Weights must be finite 16-bit numbers; {disk.get(parameter, parameter)} has {bad} "
                f"that are NaN, infinite, or too large for {str(dtype)[6:]}. The checkpoint is "
                "damaged: get it again, or repair that tensor."
            )
        value.data.copy_(stored)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises ModelError if it has none."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"A text needs a tokenizer, and {folder} has none that can be read ({error}). Save it "
            "there, or take data=self, which needs no text."
        ) from None
