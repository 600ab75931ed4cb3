"""GGUF, the file of llama.cpp: one file with every tensor in a type of its own.

A layer's type is the plan's (q4_k, ...), or the one whose levels are the same as those of our
grid: int4 symmetric = q4_0 and so on, groups of 64 or 128 repeated for each 32. Symmetric grids are
carried exactly; of asymmetric ones the zero point becomes an fp16 minimum (off by at most 1/4096 of
it). Everything else, untouched matrices and metadata, is as in the base file (`base`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.errors import PlanError
from optimizer.formats import rules
from optimizer.formats.gguf import retyping
from optimizer.formats.gguf.base import Base
from optimizer.formats.rules import Demands, Groups, Verdict
from optimizer.formats.runtime import Runtime
from optimizer.formats.safetensors.joined import joined
from optimizer.plan import GGML, Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor

    from optimizer.quantization.ggml import Blocks

FILE, TYPES_FILE = "model.gguf", "tensor_types.txt"
SAME = {
    (4, True): "q4_0",
    (4, False): "q4_1",
    (5, True): "q5_0",
    (5, False): "q5_1",
    (8, True): "q8_0",
}


def carrier(precision: Precision, cols: int) -> str | None:
    """The ggml type that holds a precision's levels for rows of `cols` weights, or None."""
    if precision.kind in GGML:
        return precision.kind if precision.fits(cols) else None
    length = precision.group_size or cols
    if precision.kind != "int" or length % 32:
        return None
    return SAME.get((precision.bits, precision.symmetric))


def holds(layer: Layer, precision: Precision, base: Base | None = None) -> str | None:
    """None, or why a GGUF can't hold the layer in that precision. Without a base file, what can be
    said of any."""
    if base is not None and layer.name in base.placed.refused:
        return base.placed.refused[layer.name]
    if carrier(precision, layer.cols) is None:
        return f"no block type has the levels of {precision.name} on rows of {layer.cols}"
    return None


def demands(profile: Runtime, base: Base) -> Demands:
    """What llama.cpp asks of plans for the model that `base` is of."""
    apart = joined(profile, None).groups

    def groups(layers: Sequence[Layer]) -> Groups:
        found = list(apart(layers))
        for shared in base.placed.groups:
            own = [group for group in found if shared.intersection(group)]
            if len(own) > 1:
                found[found.index(own[0])] = tuple(name for group in own for name in group)
                found = [group for group in found if group not in own[1:]]
        return tuple(found)

    return Demands(profile, groups, lambda x, p: holds(x, p, base), notes=base.notes)


def check(plan: Plan, inventory: Inventory, profile: Runtime, base: Base) -> Verdict:
    """Whether llama.cpp would load and run the plan, and the file's exact bytes."""
    asked = demands(profile, base)
    errors = asked.errors(plan, inventory)
    if errors:
        return Verdict(profile.name, tuple(errors))
    stored = {
        plan.layers[x.name]: str(carrier(plan.choice[x.name], x.cols))
        for x in rules.quantized(plan, inventory)
    }
    size = retyping.file_bytes(base, kinds(plan, inventory, base))
    return Verdict(profile.name, (), (*asked.notes, *_odd_rows(inventory)), stored, size)


def kinds(plan: Plan, inventory: Inventory, base: Base) -> dict[str, str]:
    """Tensors of the file that get another type than in the base: name -> ggml type."""
    types = {
        x.name: str(carrier(plan.choice[x.name], x.cols)) for x in rules.quantized(plan, inventory)
    }
    return {
        name: types[piece.layers[0]]
        for name, piece in base.placed.pieces.items()
        if piece.layers[0] in types
    }


def _odd_rows(inventory: Inventory) -> Iterator[str]:
    """What llama-quantize would make of K-quants here, with the bytes that it would take."""
    wide = sorted({x.cols for x in inventory.layers if x.block is not None and x.cols % 256})
    if not wide:
        return
    pairs = []
    for kind in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"):
        found = Precision.ggml(kind).nearest(wide[0])
        bits = (
            16.0 if found.kind == "none" else 8 * GGML[found.kind].size / GGML[found.kind].weights
        )
        pairs.append(f"{kind} -> {'f16' if found.kind == 'none' else found.kind} ({bits:g} bits)")
    widths = ", ".join(map(str, wide))
    yield f"Rows of {widths} aren't divisible by 256; there K-quants fall back: {', '.join(pairs)}."


def types_file(plan: Plan, inventory: Inventory, base: Base) -> str:
    """For `llama-quantize --tensor-type-file`: one anchored `name=type` per line; matrices that the
    plan leaves untouched are named, too, in the base's own type."""
    own = kinds(plan, inventory, base)
    old = {t.name: t.tensor_type.name.lower() for t in base.reader.tensors}
    listed = {name: own.get(name, old[name]) for name in base.placed.pieces}
    return "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in listed.items())


def write(
    plan: Plan, inventory: Inventory, packed: Mapping[str, Tensor], base: Base, out: Path
) -> None:
    """packed: the plan's stored tensors."""
    layers = {layer.name: layer for layer in inventory.layers}
    own = kinds(plan, inventory, base)

    def rows(name: str, kind: str) -> np.ndarray:
        if not name:
            return _zeros(kind)
        found = _blocks(layers[name], plan.choice[name], kind, packed).data
        return np.ascontiguousarray(found.cpu().numpy())

    retyping.write(base, own, rows, out / FILE)
    (out / TYPES_FILE).write_text(types_file(plan, inventory, base), encoding="utf-8")


def _zeros(kind: str) -> np.ndarray:
    """One block of weights that are all 0, for rows that only the file has."""
    import torch

    from optimizer.quantization import ggml

    zeros = torch.zeros(1, GGML[kind].weights)
    return np.asarray(ggml.encode(zeros, Precision.ggml(kind)).data.numpy())


def _blocks(layer: Layer, precision: Precision, kind: str, packed: Mapping[str, Tensor]) -> Blocks:
    """The layer's stored tensors as blocks; codes stay, scales are repeated for each block."""
    import torch

    from optimizer.quantization.ggml import Blocks, Grid
    from optimizer.quantization.uniform import Codes

    suffixes = precision.parts(layer.rows, layer.cols)
    parts = {suffix: packed[f"{layer.name}.{suffix}"] for suffix in suffixes}
    stored = Codes.unpack(parts, precision, layer.cols)
    if isinstance(stored, Blocks):
        return stored
    assert isinstance(stored, Codes)
    each = layer.cols // 32 // stored.scales.shape[1]
    scales = stored.scales.float().repeat_interleave(each, 1).view(-1, 1)
    lower, one = torch.zeros_like(scales), torch.ones(scales.shape, dtype=torch.long)
    if stored.zeros is not None:
        zeros = stored.zeros.float().repeat_interleave(each, 1).view(-1, 1)
        lower = (scales * zeros).half().float()
    grid = Grid(kind, (layer.rows, layer.cols), scales, lower, one, one)
    return grid.pack(stored.codes)


def decode(folder: Path, plan: Plan, inventory: Inventory, base: Base) -> Mapping[str, Any]:
    """The file, read by the gguf package: layer -> W' [rows, cols] fp32, each made when it is asked
    for. Raises PlanError if it lacks a tensor."""
    layers = {x.name: (x.rows, x.cols) for x in rules.quantized(plan, inventory)}
    found = retyping.Decoded(folder / FILE, base, layers)
    missing = sorted(base.placed.pieces.keys() - found.tensors)
    if missing:
        raise PlanError(f"{folder / FILE} lacks {missing[0]}. Export it again.")
    return found
