"""GGUF, the file of llama.cpp: one file with every tensor in a type of its own.

A layer's type is the plan's (q4_k, ...), or the one whose levels are the same as those of our
grid: int4 symmetric = q4_0 and so on, groups of 64 or 128 repeated for each 32. Symmetric grids are
carried exactly; of asymmetric ones the zero point becomes an fp16 minimum (off by at most 1/4096 of
it). Matrices that the plan leaves untouched keep their 16 bits, all else is fp32. The experts of
a block are one tensor [experts, rows, cols] for each projection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer import drafts
from optimizer.errors import ModelError, PlanError
from optimizer.formats import rules
from optimizer.formats.gguf import rope, vocabulary
from optimizer.formats.rules import Verdict
from optimizer.formats.runtime import Runtime
from optimizer.plan import GGML, Inventory, Layer, Plan, Precision

if TYPE_CHECKING:
    from torch import Tensor

FILE, TYPES_FILE = "model.gguf", "tensor_types.txt"
SAME = {(4, True): "q4_0", (4, False): "q4_1", (5, True): "q5_0", (5, False): "q5_1",
        (8, True): "q8_0"}  # fmt: skip

# transformers' architecture -> (llama.cpp's, does it reorder the rows of q and k for its rotation)
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "MixtralForCausalLM": ("llama", True),
    "Qwen3MoeForCausalLM": ("qwen3moe", False),
}


def carrier(precision: Precision, cols: int) -> str | None:
    """The ggml type that holds a precision's levels for rows of `cols` weights, or None."""
    if precision.kind in GGML:
        return precision.kind if precision.fits(cols) else None
    length = precision.group_size or cols
    if precision.kind != "int" or length % 32:
        return None
    return SAME.get((precision.bits, precision.symmetric))


def check(
    plan: Plan, inventory: Inventory, profile: Runtime, folder: Path, origin: Path | None
) -> Verdict:
    """origin: the GGUF file that the model came from, whose metadata is kept."""
    engine = profile.name
    try:
        check_model(folder, origin)
    except ModelError as error:
        return Verdict(engine, (str(error),))
    settings = _settings(folder)
    errors = rules.executed(plan, profile) + rules.agreed(plan, inventory, profile)
    if not errors:
        errors = rules.kinds(plan, inventory, engine, holds)
    if errors:
        return Verdict(engine, tuple(errors))
    stored = {
        plan.layers[x.name]: str(carrier(plan.choice[x.name], x.cols))
        for x in rules.quantized(plan, inventory)
    }
    tensors = _tensors(plan, inventory, settings)
    notes = tuple(_odd_rows(inventory))
    size = _size(tensors, settings, folder, origin)
    return Verdict(engine, (), notes, stored, size)


def check_model(folder: Path, origin: Path | None) -> None:
    """Raises ModelError for an architecture or a vocabulary that the converter doesn't know."""
    _settings(folder)
    if origin is None:
        vocabulary.kind(vocabulary.read(folder))


def holds(layer: Layer, precision: Precision) -> str | None:
    """None, or why a GGUF can't hold the layer in that precision."""
    if layer.kind == "experts" and layer.expert is None:
        return "its checkpoint holds all experts in one fused tensor"
    if layer.kind not in ("linear", "head", "embedding", "experts"):
        return f"the converter takes Linear layers and embeddings, and this is {layer.kind}"
    if carrier(precision, layer.cols) is None:
        return f"no block type has the levels of {precision.name} on rows of {layer.cols}"
    return None


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


@dataclass(frozen=True)
class Settings:
    """What of config.json a GGUF file needs."""

    architecture: str
    reorder: bool
    config: dict[str, Any]

    @property
    def heads(self) -> tuple[int, int]:
        heads = int(self.config["num_attention_heads"])
        return heads, int(self.config.get("num_key_value_heads") or heads)

    @property
    def width(self) -> int:
        """Of a head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads[0])


def _settings(folder: Path) -> Settings:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ModelError(
            f"The GGUF converter knows {', '.join(ARCHITECTURES)}; this model is {name}. Export it "
            "to another engine, or convert it with llama.cpp's own script and take the recipe "
            "to=llama-quantize."
        )
    rope.check(config, ARCHITECTURES[name][0])
    odd = _odd_experts(config)
    if odd:
        raise ModelError(
            f"llama.cpp gives every block of {name} experts and makes the weights of those that are "
            f"chosen sum to one; this model has {odd}. Export it to another engine."
        )
    return Settings(*ARCHITECTURES[name], config)


def _odd_experts(config: Mapping[str, Any]) -> str | None:
    """What of a Qwen3Moe's settings llama.cpp has no word for."""
    if config.get("model_type") != "qwen3_moe":
        return None
    if not config.get("norm_topk_prob"):
        return "norm_topk_prob=false"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        return "blocks without experts"
    return None


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. sources: the checkpoint's tensors in it, several only for experts.
    kind: a ggml type in lower case. shape: as in numpy."""

    name: str
    sources: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        count = int(np.prod(self.shape))
        if self.kind in GGML:
            return count // GGML[self.kind].weights * GGML[self.kind].size
        return count * (4 if self.kind == "f32" else 2)


def _tensors(plan: Plan, inventory: Inventory, settings: Settings) -> list[Entry]:
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = MODEL_ARCH[settings.architecture.upper()]
    names = get_tensor_name_map(arch, int(settings.config["num_hidden_layers"]))

    def named(name: str) -> str:
        found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"The GGUF converter doesn't know the tensor {name}.")
        return found

    entries, experts = [], _by_projection(inventory)
    for layer in inventory.layers:
        precision = plan.choice[layer.name]
        kind = inventory.dtype.lower()
        if precision.kind != "none":
            kind = str(carrier(precision, layer.cols))
        shape: tuple[int, ...] = (layer.rows, layer.cols)
        sources: tuple[str, ...] = (layer.name,)
        name = layer.name
        if layer.kind == "experts":
            name = _without_expert(layer)
            if name not in experts:
                continue  # written with the first of them
            sources = experts.pop(name)
            shape = (len(sources), *shape)
        entries.append(Entry(named(name), sources, kind, shape))
    if rope.has_frequencies(settings.config):
        name = rope.FREQUENCIES
        entries.append(Entry(name, (name,), "f32", (settings.width // 2,)))
    return entries + [Entry(named(x.name), (x.name,), "f32", x.shape) for x in inventory.others]


def _without_expert(layer: Layer) -> str:
    """`...experts.7.gate_proj.weight` -> `...experts.gate_proj.weight`"""
    return layer.name.replace(f".experts.{layer.expert}.", ".experts.")


def _by_projection(inventory: Inventory) -> dict[str, tuple[str, ...]]:
    """A projection's experts in order."""
    found: dict[str, list[Layer]] = {}
    for layer in inventory.layers:
        if layer.kind == "experts":
            found.setdefault(_without_expert(layer), []).append(layer)
    return {
        name: tuple(x.name for x in sorted(own, key=lambda x: x.expert or 0))
        for name, own in found.items()
    }


def types_file(plan: Plan, inventory: Inventory, folder: Path) -> str:
    """For `llama-quantize --tensor-type-file`: one anchored `name=type` per line."""
    lines = [
        f"^{e.name.replace('.', chr(92) + '.')}$={e.kind}"
        for e in _tensors(plan, inventory, _settings(folder))
        if len(e.shape) > 1 and e.kind != "f32"
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- write


def _writer(entries: list[Entry], settings: Settings, folder: Path, origin: Path | None) -> Any:
    """A GGUFWriter that knows all metadata and all tensors' shapes, but no data."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(None, settings.architecture)
    if origin is not None:
        _copy_fields(writer, origin)
    else:
        _add_fields(writer, settings, folder)
    writer.add_file_type(1024)  # llama.cpp's "not told: tensors differ"
    writer.add_quantization_version(2)
    for e in entries:
        kind = GGMLQuantizationType[e.kind.upper()]
        shape = list(e.shape)
        if e.kind in GGML:
            shape[-1] = shape[-1] // GGML[e.kind].weights * GGML[e.kind].size
        dtype = np.dtype(np.uint8 if e.kind in GGML else np.float32)
        writer.add_tensor_info(e.name, shape, dtype, e.bytes, raw_dtype=kind)
    return writer


def _copy_fields(writer: Any, origin: Path) -> None:
    from gguf import GGUFReader, GGUFValueType

    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for field in GGUFReader(origin).fields.values():
        if field.name.startswith("GGUF.") or field.name in skipped:
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)


def _add_fields(writer: Any, settings: Settings, folder: Path) -> None:
    config = settings.config
    heads, kv_heads = settings.heads
    writer.add_name(folder.name)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    count = config.get("num_local_experts") or config.get("num_experts")
    if count:
        writer.add_expert_count(int(count))
        writer.add_expert_used_count(int(config["num_experts_per_tok"]))
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(int(config["moe_intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(settings.width)
    writer.add_value_length(settings.width)
    writer.add_rope_dimension_count(settings.width)
    rope.add_fields(writer, config)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    vocabulary.add(writer, folder, int(config["vocab_size"]))


def _size(entries: list[Entry], settings: Settings, folder: Path, origin: Path | None) -> int:
    """Exact bytes of the file."""
    layout = tuple((e.name, len(e.shape)) for e in entries)
    head = _head_bytes(layout, json.dumps(settings.config), folder, origin)
    return _aligned(head) + sum(_aligned(e.bytes) for e in entries)


@cache
def _head_bytes(
    layout: tuple[tuple[str, int], ...], config: str, folder: Path, origin: Path | None
) -> int:
    """The header is written, to a scratch place, and counted. Types and widths of tensors take the
    same bytes whatever they are, and a vocabulary takes seconds: once for all plans of a model."""
    import tempfile

    settings = json.loads(config)
    known = Settings(*ARCHITECTURES[settings["architectures"][0]], settings)
    entries = [Entry(name, (), "f32", (1,) * dimensions) for name, dimensions in layout]
    place = Path(tempfile.gettempdir())
    drafts.sweep(place, "gguf")
    with drafts.folder(place, "gguf") as scratch:
        head = scratch / "head"
        writer = _writer(entries, known, folder, origin)
        _write_head(writer, head)
        writer.close()
        return head.stat().st_size


def _aligned(size: int) -> int:
    return -(-size // 32) * 32


def _write_head(writer: Any, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def write(
    plan: Plan,
    inventory: Inventory,
    packed: Mapping[str, Tensor],
    folder: Path,
    out: Path,
    origin: Path | None,
) -> None:
    """packed: the plan's stored tensors. folder: where config.json and the tokenizer are."""
    settings = _settings(folder)
    entries = _tensors(plan, inventory, settings)
    writer = _writer(entries, settings, folder, origin)
    layers = {layer.name: layer for layer in inventory.layers}
    if rope.has_frequencies(settings.config):
        packed = {**packed, rope.FREQUENCIES: rope.frequencies(folder)}
    _write_head(writer, out / FILE)
    for e in entries:
        pieces = [
            _data(name, layers.get(name), e.kind, plan, packed, settings) for name in e.sources
        ]
        writer.write_tensor_data(pieces[0] if len(pieces) == 1 else np.stack(pieces))
    writer.close()
    (out / TYPES_FILE).write_text(types_file(plan, inventory, folder), encoding="utf-8")


def _data(
    name: str,
    layer: Layer | None,
    kind: str,
    plan: Plan,
    packed: Mapping[str, Tensor],
    settings: Settings,
) -> np.ndarray:
    import torch

    if layer is None or plan.choice[layer.name].kind == "none":
        value = packed[name]
        value = value.float() if kind == "f32" else value.view(torch.uint8)
    else:
        value = _blocks(layer, plan.choice[layer.name], kind, packed).pack()["blocks"]
    order = _order(name, len(value), settings)
    return (value if order is None else value[order]).contiguous().numpy()


def _blocks(layer: Layer, precision: Precision, kind: str, packed: Mapping[str, Tensor]) -> Any:
    """The layer's stored tensors as blocks; codes stay, scales are repeated for each block."""
    import torch

    from optimizer.quantization.ggml import Blocks, Grid
    from optimizer.quantization.uniform import Codes

    suffixes = precision.parts(layer.rows, layer.cols)
    parts = {suffix: packed[f"{layer.name}.{suffix}"] for suffix in suffixes}
    stored = Codes.unpack(parts, precision, layer.cols)
    if isinstance(stored, Blocks):
        return stored
    each = layer.cols // 32 // stored.scales.shape[1]
    scales = stored.scales.float().repeat_interleave(each, 1).view(-1, 1)
    lower, one = torch.zeros_like(scales), torch.ones(scales.shape, dtype=torch.long)
    if stored.zeros is not None:
        zeros = stored.zeros.float().repeat_interleave(each, 1).view(-1, 1)
        lower = (scales * zeros).half().float()
    grid = Grid(kind, (layer.rows, layer.cols), scales, lower, one, one)
    return grid.pack(stored.codes)


def _order(name: str, rows: int, settings: Settings) -> Any:
    """Llama's q and k: transformers rotates halves of a head, llama.cpp neighbours, so row
    (half, i) of a head becomes row (i, half)."""
    import torch

    role = name.rsplit(".", 2)[-2]
    if not settings.reorder or role not in ("q_proj", "k_proj"):
        return None
    heads = settings.heads[role == "k_proj"]
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def decode(folder: Path, plan: Plan, inventory: Inventory) -> dict[str, Tensor]:
    """The file, read by the gguf package: layer -> W' [rows, cols] fp32. Raises PlanError."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    settings = _settings(folder)
    tensors = {t.name: t for t in GGUFReader(folder / FILE).tensors}
    layers = {layer.name: layer for layer in rules.quantized(plan, inventory)}
    found: dict[str, Tensor] = {}
    for e in _tensors(plan, inventory, settings):
        if e.sources[0] not in layers:
            continue
        if e.name not in tensors:
            raise PlanError(f"{folder / FILE} lacks {e.name}. Export it again.")
        tensor = tensors[e.name]
        value = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if len(e.shape) == 3:
            found |= dict(zip(e.sources, value, strict=True))
            continue
        order = _order(e.sources[0], len(value), settings)
        found[e.sources[0]] = value if order is None else value[torch.argsort(order)]
    return found
