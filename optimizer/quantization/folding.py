"""`quantizer=awq` on a model: which scales go where, block by block. See `awq` for the arithmetic.

The model in memory is never folded: a layer's rounded weights are shown as t Q(W S) / s, which does in
the unfolded model what the folded weights do in the folded one. Folding happens when the plan is
packed: codes of W S, and the norms' new weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optimizer.plan import Inventory, Layer, Precision
from optimizer.quantization import awq
from optimizer.quantization.awq import Scaled
from optimizer.quantization.calibrated import Calibrated, Parts
from optimizer.quantization.material import Material
from optimizer.quantization.methods import Awq, Gptq
from optimizer.quantization.uniform import Encoded, Given

if TYPE_CHECKING:
    from optimizer.models.blockwise import Stream
    from optimizer.models.model import Model, Rounder, Rounding

UNMOVED = 1e-3  # a block's output may move by this share of itself when 1/s is folded
NORMS = {
    ("k_proj", "q_proj", "v_proj"): ("input_layernorm",),
    ("gate_proj", "up_proj"): ("pre_feedforward_layernorm", "post_attention_layernorm"),
}
BEFORE = {("down_proj",): "up_proj", ("o_proj",): "v_proj"}


@dataclass(frozen=True)
class Feeder:
    """Where the 1/s of some readers goes. norm: the name of a norm's weight; or layer: the name of
    the layer before, whose every row serves `repeats` columns in runs of `width`."""

    norm: str | None = None
    layer: str | None = None
    repeats: int = 1
    width: int = 1

    def shared(self, r: Tensor) -> Tensor:
        """Per column [cols] -> per row of the layer before [cols / repeats]: the mean of those
        columns that one row serves."""
        return r.view(-1, self.repeats, self.width).mean(1).flatten()

    def spread(self, t: Tensor) -> Tensor:
        """The inverse: [rows] -> [cols]."""
        return t.view(-1, 1, self.width).expand(-1, self.repeats, -1).flatten()


def norm_of(inventory: Inventory, layer: Layer) -> str | None:
    """The norm whose weights could take a layer's 1/s, if its architecture names things as Llama
    does. A norm with a bias is none: the bias would have to be divided and rounded, too."""
    if layer.block is None or layer.kind != "linear":
        return None
    stem = layer.name.split(f".{layer.block}.")[0] + f".{layer.block}"
    names = {x.name for x in inventory.others}
    for roles, norms in NORMS.items():
        if layer.role in roles:
            found = (f"{stem}.{n}" for n in norms)
            return next(
                (
                    f"{n}.weight"
                    for n in found
                    if f"{n}.weight" in names and f"{n}.bias" not in names
                ),
                None,
            )
    return None


def feeder(model: Model, names: Sequence[str]) -> Feeder | None:
    """What feeds these layers, which are all that read one tensor; None if nothing is known that
    takes their scales. A guess from names: `holds` tries it."""
    first = model.layers[names[0]]
    roles = tuple(sorted({model.layers[name].role for name in names}))
    if roles in NORMS:
        norm = norm_of(model.inventory, first)
        return None if norm is None else Feeder(norm=norm)
    if roles not in BEFORE:
        return None
    name = f"{first.name.rsplit('.', 2)[0]}.{BEFORE[roles]}.weight"
    biased = {x.name for x in model.inventory.others}
    before = model.layers.get(name)
    if before is None or name.replace(".weight", ".bias") in biased:
        return None
    return _rows(model, before, first)


def _rows(model: Model, before: Layer, after: Layer) -> Feeder | None:
    if before.kind != "linear" or after.kind != "linear" or after.cols % before.rows:
        return None
    width, config = before.rows, model.net.config
    if after.role == "o_proj":
        heads = int(config.num_attention_heads)
        width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if before.rows % width:
        return None
    return Feeder(layer=before.name, repeats=after.cols // before.rows, width=width)


def holds(model: Model, stream: Stream, names: Sequence[str], found: Feeder, s: Tensor) -> bool:
    """Whether the block computes the same with S in the readers and 1/s in the feeder: the
    architecture is tried, not trusted."""
    first = model.layers[names[0]]
    parameters = {model.layers[n].parameter: model.weight(n) * s for n in names}
    if found.norm is not None:
        norm = _parameter(model, found.norm)
        parameters[norm] = model.parameter(norm) / s
    else:
        before = model.layers[str(found.layer)]
        rows = found.shared(s).unsqueeze(1)
        parameters[before.parameter] = model.weight(before.name) / rows
    return stream.moved(first.block or 0, parameters) < UNMOVED


def _parameter(model: Model, name: str) -> str:
    return next(x.parameter for x in model.inventory.others if x.name == name)


def held(model: Model, found: Feeder, s: Tensor) -> Tensor:
    """s as the feeder holds it: for a norm g / g', g' = g / s in the norm's own dtype."""
    from optimizer.models.model import DTYPES

    if found.norm is None:
        return s
    norm = next(x for x in model.inventory.others if x.name == found.norm)
    g = model.parameter(norm.parameter).float()
    rounded = (g / s).to(DTYPES[norm.dtype]).float()
    usable = (rounded != 0) & torch.isfinite(rounded)
    return torch.where(usable, g / torch.where(usable, rounded, 1.0), 1.0)


class Folded(Given):
    """A choice's codes as they are packed, and the norms that belong to them."""

    def __init__(
        self,
        find: Callable[[str, Precision], Any],
        parts: Mapping[str, Parts],
        inventory: Inventory,
    ) -> None:
        super().__init__(find)
        self._parts, self._inventory = parts, inventory

    def encode(self, weight: Tensor, precision: Precision, layer: str = "") -> Encoded:
        scaled: Any = self._find(layer, precision)
        return self._other.encode(weight, precision) if scaled is None else scaled.codes

    def changed(self, name: str, value: Tensor) -> Tensor:
        reader = self._readers.get(name)
        if reader is None:
            return value
        return (value.float() / self._parts[reader]["inputs"]).to(value.dtype)

    @cached_property
    def _readers(self) -> dict[str, str]:
        """Norm -> one of the layers that it feeds, where those were scaled."""
        pairs = {
            norm_of(self._inventory, x): x.name
            for x in self._inventory.layers
            if x.name in self._parts and not bool((self._parts[x.name]["inputs"] == 1).all())
        }
        return {norm: name for norm, name in pairs.items() if norm is not None}


class ActivationAware(Calibrated):
    """`quantizer=awq`. A layer by itself has the scales that are best for it alone; in a whole
    choice all layers that read one tensor share theirs."""

    name = "awq"

    def __init__(self, settings: Awq, material: Material) -> None:
        super().__init__(Gptq(weighting="alike", inputs="rounded", head=False), material)
        self._settings = settings

    def _unpacked(self, parts: Parts, precision: Precision, cols: int) -> Any:
        return Scaled.unpack(parts, precision, cols)

    def _plain(self, weight: Tensor, precision: Precision) -> Scaled:
        return awq.scale(weight, precision, torch.ones(weight.shape[1], device=weight.device))

    def _given(self, find: Callable[[str, Precision], Any], parts: Mapping[str, Parts]) -> Rounder:
        return Folded(find, parts, self._material.inventory)

    def _solved(
        self,
        model: Model,
        stream: Stream,
        block: int,
        sets: Sequence[Sequence[str]],
        wanted: Mapping[str, Sequence[Precision]],
    ) -> Iterable[tuple[str, Precision, Any]]:
        sets = [names for names in sets if names]
        if not sets:
            return
        for names, hessian in zip(sets, stream.hessians(block, sets), strict=True):
            together = next(found for found in stream.inputs(block) if names[0] in found)
            fed, r = self._loud(model, stream, together, hessian)
            for name in names:
                for precision in wanted[name]:
                    job = (model.weight(name), precision)
                    yield (
                        name,
                        precision,
                        awq.scale(*job, self._best(model, [job], hessian, fed, r)),
                    )

    def _loud(
        self, model: Model, stream: Stream, names: Sequence[str], hessian: Tensor
    ) -> tuple[Feeder | None, Tensor]:
        """What takes the scales of these layers, None if nothing does, and how loud their inputs
        are; columns that the feeder can't tell apart are equally loud."""
        r, found = awq.loudness(hessian), feeder(model, names)
        if found is not None and found.layer is not None:
            r = found.spread(found.shared(r))
        if found is not None and not holds(model, stream, names, found, awq.powered(r, 0.5)):
            found = None
        return found, r

    def _best(
        self,
        model: Model,
        jobs: Sequence[tuple[Tensor, Precision]],
        hessian: Tensor,
        fed: Feeder | None,
        r: Tensor,
    ) -> Tensor:
        if fed is None:
            return torch.ones_like(r)
        return held(model, fed, awq.search(jobs, hessian, r))

    def _round_block(
        self,
        stream: Stream,
        block: int,
        own: Mapping[str, Precision],
        parts: dict[str, Parts],
        rounding: Rounding,
        before: Mapping[str, Precision],
    ) -> None:
        done, model = dict(before), self._material.model
        for names in stream.inputs(block):
            mine = [name for name in names if name in own]
            if mine:
                [hessian] = stream.hessians(block, [mine])
                fed, r = self._loud(model, stream, names, hessian)
                if len(mine) < len(names) or (fed and fed.layer and fed.layer not in own):
                    fed = None  # 16-bit weights would be rounded by the scales
                jobs = [(model.weight(name), own[name]) for name in mine]
                s = self._best(model, jobs, hessian, fed, r)
                for name, job in zip(mine, jobs, strict=True):
                    parts[name] = awq.scale(*job, s).pack()
                if fed is not None and fed.layer is not None:
                    cols = self._cols[fed.layer]
                    scaled = Scaled.unpack(parts[fed.layer], own[fed.layer], cols)
                    parts[fed.layer] = scaled.divided(
                        fed.shared(s), model.reference(fed.layer)
                    ).pack()
                    rounding.set({k: v for k, v in done.items() if k != fed.layer})
                done |= {name: own[name] for name in mine}
            rounding.set(done)
