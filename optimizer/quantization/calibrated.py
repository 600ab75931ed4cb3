"""Which codes a plan's layers get: GPTQ bound to a model, its calibration tokens and the store.

A layer by itself is rounded with the Hessian of the reference's inputs; all plans share those
codes, so the sensitivity table and the search are cheap. A whole choice is rounded jointly, block
by block, each layer with the inputs that the layers before it, already rounded, send: that is what
is certified and packed. All codes are kept by content, so whoever asks again, also in another
process, gets the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from optimizer.models.arithmetic import sized
from optimizer.models.blockwise import Stream
from optimizer.plan import BY_ROW, FLOATS, Precision, digest
from optimizer.quantization.gain import gain
from optimizer.quantization.gptq import Solver
from optimizer.quantization.material import Material, token_shares
from optimizer.quantization.methods import Gptq, Quantizer
from optimizer.quantization.uniform import Codes, Encoded, Given, Nearest, rows_of

if TYPE_CHECKING:
    from optimizer.models.model import Model, Rounder, Rounding

GAINS = 3  # raised when the foretold gains change
CHAINED = 4  # bits a weight below which layers see what those before them, rounded, send
TOGETHER = 2**22  # weights of a head that are solved at a time
MANY = 2**27  # on a GPU
Parts = dict[str, Tensor]  # a layer's packed tensors by suffix


ONE_TENSOR = "they lie in one tensor, whose inputs can't be watched one by one."
UNVISITED = (
    "they are experts that no calibration token visited, or that the model uses in a way that can't "
    "be watched. More calibration text may."
)
UNREACHED = "no calibration token reached their input. More calibration text may."


class Calibrated:
    """`quantizer=gptq`, bound to a model."""

    name = "gptq"

    def __init__(self, settings: Gptq, material: Material) -> None:
        self._settings: Quantizer = settings
        self._method = Solver(settings.damping, settings.order, settings.clip)
        self._inputs, self._weighting = settings.inputs, settings.weighting
        self._material, self._nearest = material, Nearest()
        self._told: set[str] = set()  # layers that a person was told of
        self._last: tuple[str, Precision | None, Parts | None] = ("", None, None)

    def _unpacked(self, parts: Parts, precision: Precision, cols: int) -> Encoded:
        return Codes.unpack(parts, precision, cols)

    def _plain(self, weight: Tensor, precision: Precision) -> Any:
        """What a layer gets whose inputs were never seen."""
        return self._nearest.encode(weight, precision)

    def _given(self, find: Callable[[str, Precision], Any], parts: Mapping[str, Parts]) -> Rounder:
        """What rounds a whole choice. find: a layer's codes, or None; parts: filled meanwhile."""

        def some(layer: str, precision: Precision, rows: slice | Tensor) -> Encoded | None:
            return self._of_rows(parts.get(layer), layer, precision, rows)

        return Given(find, some)

    def _of_rows(
        self, parts: Parts | None, layer: str, precision: Precision, rows: slice | Tensor
    ) -> Encoded | None:
        """The codes of some rows of a layer; parts: its own."""
        if parts is None:
            return None
        every = torch.arange(self._material.model.layers[layer].rows)
        own = rows_of(parts, precision, every[rows] if isinstance(rows, slice) else rows.cpu())
        return self._unpacked(own, precision, self._cols[layer])

    @cached_property
    def key(self) -> Any:
        """What determines the codes, besides weights and precisions."""
        return self._settings.key(self._material.calibration_key)

    @cached_property
    def _weights(self) -> dict[str, np.ndarray] | None:
        """Of every watchable layer's tokens, at the reference; None: all count alike. The model
        must hold its own weights when they are made."""
        return token_shares(self._material, self._weighting)

    def rounder(self, choice: Mapping[str, Precision], joint: bool = True) -> Rounder:
        """What rounds the layers of `choice`. Costs about three passes over the calibration
        tokens if joint and new, else one; nothing if the store has the codes."""
        layers, real = (
            self._material.inventory.layers,
            {n for n, p in choice.items() if p.kind != "none"},
        )
        experts = {x.name for x in layers if x.kind == "experts" and x.name in real}
        self._tell(experts - self._cols.keys(), ONE_TENSOR)
        if joint and self._chained(choice):
            return self._jointly(choice)
        self.prepare({name: [precision] for name, precision in choice.items()})
        return self

    def ready(self, choices: Sequence[Mapping[str, Precision]]) -> None:
        """Make the codes of several whole choices in one pass, where layers are rounded alone."""
        wanted: dict[str, list[Precision]] = {}
        for choice in choices:
            for name, precision in {} if self._chained(choice) else choice.items():
                wanted.setdefault(name, []).append(precision)
        self.prepare(wanted)

    def _chained(self, choice: Mapping[str, Precision]) -> bool:
        """Whether a whole choice is rounded with inputs from layers that are rounded already."""
        if self._inputs != "auto":
            return self._inputs == "rounded"
        sizes = {x.name: x for x in self._material.inventory.layers}
        real = [(sizes[name], p) for name, p in choice.items() if p.kind != "none"]
        bits = 8 * sum(layer.bytes(p) for layer, p in real)
        return bits < CHAINED * sum(layer.weights for layer, _ in real)

    def gains(self, names: Sequence[str]) -> dict[str, float]:
        """What this method leaves of the loss of rounding to nearest, layer by layer, see
        `quantization.gain`; 1 for layers whose inputs can't be watched. Costs a pass over the
        calibration tokens and their Hessians if new. The model must hold its own weights."""
        material = self._material

        def make() -> dict[str, float]:
            model = material.model
            stream = Stream(model, material.calibration(), frozen=True, experts=True)
            found: dict[str, float] = {}
            for block in material.track(range(len(stream.blocks)), "what gptq gains"):
                for sets in stream.portions(stream.inputs(block)):
                    hessians = stream.hessians(block, sets)
                    for own, hessian in zip(sets, hessians, strict=True):
                        order = self._method.order_of(hessian.diagonal())
                        found |= dict.fromkeys(own, gain(hessian, self._method.damping, order))
                stream.advance(block)
            head = stream.head_hessian() if self._settings.reads_head else None
            if head is not None:
                order = self._method.order_of(head.diagonal())
                own = [x.name for x in material.inventory.layers if x.predicts]
                found |= dict.fromkeys(own, gain(head, self._method.damping, order))
            return found

        settings: list[Any] = [self._method.damping, self._method.order]
        if any(x.fused for x in material.inventory.layers):
            settings.append("experts")
        key = digest(["gains", GAINS, material.calibration_key, *settings])
        kept = material.store.json("gains", key, make)
        return {name: float(kept.get(name, 1.0)) for name in names}

    # ------------------------------------------------------------ each layer by itself

    def round(self, weight: Tensor, precision: Precision, layer: str = "") -> Tensor:
        if precision.kind == "none":
            return weight.float()
        return self.encode(weight, precision, layer).decode().to(weight.device)

    def encode(self, weight: Tensor, precision: Precision, layer: str = "") -> Encoded:
        """Raises KeyError for a layer that has inputs and wasn't prepared."""
        if layer not in self._cols:
            return self._nearest.encode(weight, precision)
        found = self._material.store.arrays("codes", self._alone(layer, precision))
        if found is None:
            raise KeyError(f"{layer} at {precision.name} was not prepared")
        return self._unpacked(_tensors(found), precision, self._cols[layer])

    def some(
        self,
        layer: str,
        precision: Precision,
        rows: slice | Tensor,
        own: Callable[[], Tensor],
    ) -> Tensor | None:
        """Some rows of what `round` gives; None where they can't be had alone. own: gives the
        weight's."""
        if layer not in self._cols:
            near = precision.kind in BY_ROW
            return self._nearest.round(own(), precision) if near else None
        if self._last[:2] != (layer, precision):  # a head's pieces come one after the other
            found = self._material.store.arrays("codes", self._alone(layer, precision))
            self._last = (layer, precision, None if found is None else _tensors(found))
        codes = self._of_rows(self._last[2], layer, precision, rows)
        return None if codes is None else codes.decode()

    def changed(self, name: str, value: Tensor) -> Tensor:  # noqa: ARG002
        return value

    def prepare(self, wanted: Mapping[str, Sequence[Precision]]) -> None:
        """Make the codes of layers by themselves, at all given precisions, that the store hasn't.
        The model must hold its own weights. All precisions of a layer share one Hessian."""
        store = self._material.store
        missing = {
            name: [
                p
                for p in dict.fromkeys(precisions)
                if p.kind != "none" and store.arrays("codes", self._alone(name, p)) is None
            ]
            for name, precisions in wanted.items()
            if name in self._cols
        }
        missing = {name: precisions for name, precisions in missing.items() if precisions}
        if not missing:
            return
        ids, model = self._material.calibration(), self._material.model
        stream = Stream(model, ids, frozen=True, experts=self._settings.reads_experts)
        heads = [name for name in missing if model.layers[name].predicts]
        last = max(model.layers[name].block or 0 for name in missing)
        last = len(stream.blocks) - 1 if heads else last
        for block in self._material.track(range(last + 1), f"{self.name}, layers by themselves"):
            own = [n for n in missing if model.layers[n].block == block]
            sets = [[n for n in names if n in own] for names in stream.inputs(block)]
            for name, precision, codes in self._solved(model, stream, block, sets, missing):
                self._keep(name, precision, codes.pack())
            unreached = set(own) - {n for names in sets for n in names}
            self._tell(unreached)
            for name in unreached:
                for p in missing[name]:
                    self._keep(name, p, self._plain(model.weight(name), p).pack())
            if block < last or heads:
                stream.advance(block)
        for name in heads:
            self._round_head(name, stream.head_hessian(), missing[name])

    def _round_head(
        self, name: str, hessian: Tensor | None, precisions: Sequence[Precision]
    ) -> None:
        """Some rows at a time: a vocabulary is long. The rows that a tied embedding looks up get the
        same codes, though they are read there without any inputs: damping keeps them near."""
        weight = self._material.model.weight(name)
        rows = max(1, sized(weight.device, TOGETHER, MANY) // weight.shape[1])
        for precision in precisions:
            floating = precision.kind in FLOATS  # one scale of the whole; the solver cuts it
            packed = []
            for part in weight.split(len(weight) if floating else rows):
                codes = (
                    self._plain(part, precision)
                    if hessian is None
                    else self._method.solve([(part, precision)], hessian)[0]
                )
                packed.append(codes.pack())
            whole = {key: torch.cat([part[key] for part in packed]) for key in packed[0]}
            self._keep(name, precision, whole)

    def _keep(self, layer: str, precision: Precision, parts: Parts) -> None:
        key = self._alone(layer, precision)
        self._material.store.arrays("codes", key, lambda: _arrays(parts))

    def _solved(
        self,
        model: Model,
        stream: Stream,
        block: int,
        sets: Sequence[Sequence[str]],
        wanted: Mapping[str, Sequence[Precision]],
    ) -> Iterable[tuple[str, Precision, Encoded]]:
        sets = [names for names in sets if names]
        if not sets:
            return
        if self._weights is not None:  # layers that share an input weigh its tokens differently
            sets = [[name] for names in sets for name in names]
        for some in stream.portions(sets):
            hessians = stream.hessians(block, some, self._weights)
            for names, hessian in zip(some, hessians, strict=True):
                what = [(name, precision) for name in names for precision in wanted[name]]
                jobs = [(model.weight(name), precision) for name, precision in what]
                for (name, precision), codes in zip(
                    what, self._method.solve(jobs, hessian), strict=True
                ):
                    yield name, precision, codes

    @cached_property
    def _fused(self) -> set[str]:
        """Experts that lie in one tensor."""
        return {x.name for x in self._material.inventory.layers if x.fused}

    @cached_property
    def _cols(self) -> dict[str, int]:
        """Columns of the layers whose inputs are seen; all others are rounded to nearest."""
        layers = self._material.inventory.layers
        heads = [x for x in layers if x.predicts] if self._settings.reads_head else []
        fused = [x for x in layers if x.fused] if self._settings.reads_experts else []
        return {x.name: x.cols for x in [*(x for x in layers if x.watchable), *fused, *heads]}

    def _alone(self, layer: str, precision: Precision) -> str:
        settings = self._settings  # a layer by itself has the reference's inputs anyway
        if isinstance(settings, Gptq):
            settings = replace(settings, inputs="reference")
        key = settings.key(self._material.calibration_key)
        return digest([key, "alone", layer, precision.name])

    # ------------------------------------------------------------ a whole choice

    def _jointly(self, choice: Mapping[str, Precision]) -> Rounder:
        parts: dict[str, Parts] = {}

        def find(layer: str, precision: Precision) -> Encoded | None:
            if layer not in parts:
                return None
            return self._unpacked(parts[layer], precision, self._cols[layer])

        rounder = self._given(find, parts)
        real = {name: p for name, p in choice.items() if p.kind != "none"}
        parts |= self._heads(real)
        keys = self._block_keys(real)
        stored = {block: self._material.store.arrays("codes", key) for block, key in keys.items()}
        if any(found is None for found in stored.values()):
            self._walk(real, keys, parts, rounder)
        else:
            for found in stored.values():
                parts |= _by_layer(found or {})
        self._tell({name for name in real if name in self._cols and name not in parts})
        return rounder

    def _tell(self, layers: Collection[str], why: str = UNREACHED) -> None:
        """That layers were rounded to nearest, each layer once."""
        fused = set(layers) & self._fused
        if fused and why == UNREACHED:
            self._tell(fused, UNVISITED)
        new = sorted(set(layers) - self._told)
        self._told |= set(new)
        if new:
            more = f" and {len(new) - 3} more" if len(new) > 3 else ""
            self._material.note(f"{self.name} rounds {', '.join(new[:3])}{more} to nearest: {why}")

    def _heads(self, real: Mapping[str, Precision]) -> dict[str, Parts]:
        """The head's codes, with the reference's inputs also in a joint rounding: a tied embedding
        has to be rounded before the first block runs."""
        heads = {x.name for x in self._material.inventory.layers if x.predicts} & self._cols.keys()
        own = {name: p for name, p in real.items() if name in heads}
        self.prepare({name: [p] for name, p in own.items()})
        kept = {
            name: self._material.store.arrays("codes", self._alone(name, p))
            for name, p in own.items()
        }
        return {name: _tensors(found) for name, found in kept.items() if found is not None}

    def _block_keys(self, real: Mapping[str, Precision]) -> dict[int, str]:
        """A block's codes depend on the precisions of all layers up to it, and of no later one."""
        places = {layer.name: layer.block for layer in self._material.inventory.layers}
        named = sorted((name, p.name) for name, p in real.items())
        blocks = {places[name] for name in real if name in self._cols}
        before = {
            block: [pair for pair in named if (places[pair[0]] or 0) <= block]
            for block in sorted(b for b in blocks if b is not None)
        }
        fused = self._settings.reads_experts and self._fused & real.keys()
        how = [self.key, "joint", *(["experts"] if fused else [])]
        return {block: digest([*how, pairs]) for block, pairs in before.items()}

    def _walk(
        self,
        real: Mapping[str, Precision],
        keys: Mapping[int, str],
        parts: dict[str, Parts],
        rounder: Rounder,
    ) -> None:
        """Round block after block; a killed run finds the blocks that it finished in the store."""
        ids, model = self._material.calibration(), self._material.model
        _ = self._weights  # of the reference, so before anything is rounded
        places = {name: model.layers[name].block for name in real}
        done = {name: p for name, p in real.items() if places[name] is None}
        with model.rounded(rounder, done) as rounding:
            stream = Stream(model, ids, experts=self._settings.reads_experts)
            for block in self._material.track(
                range(max(keys) + 1), f"{self.name}, block by block"
            ):
                own = {name: p for name, p in real.items() if places[name] == block}
                stored = self._material.store.arrays("codes", keys[block]) if own else {}
                if stored is None:
                    self._round_block(stream, block, own, parts, rounding, done)
                    made = _flat({name: parts[name] for name in own if name in parts})
                    self._material.store.arrays("codes", keys[block], lambda made=made: made)  # type: ignore[misc]
                parts |= _by_layer(stored or {})
                done |= own
                rounding.set(done)
                if block < max(keys):
                    stream.advance(block)

    def _round_block(
        self,
        stream: Stream,
        block: int,
        own: Mapping[str, Precision],
        parts: dict[str, Parts],
        rounding: Rounding,
        before: Mapping[str, Precision],
    ) -> None:
        """Fill `parts` for the block's layers in the order of execution: what comes later in the
        block sees its earlier layers rounded. Layers that never ran get no parts."""
        done = dict(before)
        wanted = {name: [precision] for name, precision in own.items()}
        for step in stream.steps(block):
            sets = [[name for name in names if name in own] for names in step]
            for name, precision, codes in self._solved(
                self._material.model, stream, block, sets, wanted
            ):
                parts[name] = codes.pack()
                done[name] = precision
            rounding.set(done)


def _arrays(parts: Parts) -> dict[str, np.ndarray]:
    return {suffix: part.contiguous().cpu().numpy() for suffix, part in parts.items()}


def _tensors(arrays: Mapping[str, np.ndarray]) -> Parts:
    return {suffix: torch.from_numpy(array) for suffix, array in arrays.items()}


def _flat(parts: Mapping[str, Parts]) -> dict[str, np.ndarray]:
    return {f"{n}.{suffix}": a for n, own in parts.items() for suffix, a in _arrays(own).items()}


def _by_layer(arrays: Mapping[str, np.ndarray]) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for key, part in _tensors(arrays).items():
        name, _, suffix = key.rpartition(".")
        found.setdefault(name, {})[suffix] = part
    return found
