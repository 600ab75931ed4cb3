"""What a GGUF file's metadata says of a model, beside what its transformers config says.

transformers drops some of it when it reads such a file (stretched positions, windows), and some
configs hold what llama.cpp's converter doesn't write. Either way another model would be measured, so
`mend` gives a config what the file says, `check` compares the two, and both refuse what they can't.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.errors import ModelError

# the file's key, without the architecture -> what transformers' configs call it
NUMBERS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "attention.scale": ("attention_multiplier",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "expert_used_count": ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "embedding_length": ("hidden_size", "n_embd"),
}
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW = "attention.sliding_window"
FREQUENCIES = "rope_freqs.weight"
WINDOWS_IGNORED = ("phi3",)  # llama-model.cpp: "Phi SWA is currently disabled"
CLOSE = 1e-4  # relative: the file holds 32-bit floats
LONG = 10_000  # elements from which a list is a vocabulary's


@dataclass(frozen=True)
class Metadata:
    """architecture: llama.cpp's name. fields: the rest, numbers and texts, without that prefix.
    tensors: name -> shape as in numpy. frequencies: of FREQUENCIES, if the file has it."""

    file: Path
    architecture: str
    fields: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    frequencies: np.ndarray | None = None


def read(file: Path) -> Metadata:
    """Raises ModelError for what isn't a GGUF file."""
    try:
        reader = opened(file)
        arch = str(reader.fields["general.architecture"].contents())
        own = {
            name.removeprefix(f"{arch}."): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(f"{arch}.")
        }
        tensors = {t.name: t for t in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError, TypeError, MemoryError) as error:
        raise ModelError(
            f"{file} couldn't be read as a GGUF file ({error}). It may be cut off: get it again."
        ) from None
    shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in tensors.items()}
    found = np.array(tensors[FREQUENCIES].data) if FREQUENCIES in tensors else None
    return Metadata(file, arch, own, shapes, found)


def opened(file: Path) -> Any:
    """The file as gguf's GGUFReader, but for the elements of lists that are as long as a vocabulary:
    it makes several arrays of each, .6 GB and 5 s for 150,000 words and their merges. Such a field
    has no contents."""
    return _skimming()(file)


def release(reader: Any) -> None:
    """Give back the pages of the mapped file that were read, which otherwise count as this process's
    memory; whoever reads them again has them from the disk or its cache."""
    data = reader.data
    # a map that may be written would lose what was
    if data.mode == "r" and hasattr(mmap, "MADV_DONTNEED"):
        data._mmap.madvise(mmap.MADV_DONTNEED)


@cache
def _skimming() -> Any:
    from gguf import GGUFValueType
    from gguf.gguf_reader import GGUFReader  # `from_gguf` stands in for the other name

    class Skimming(GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            whole = super()._get_field_parts
            if GGUFValueType(raw_type) != GGUFValueType.ARRAY or self.byte_order == "S":
                return whole(orig_offs, raw_type)
            item = self._get(orig_offs, np.uint32)
            count = self._get(orig_offs + item.nbytes, np.uint64)
            first, kind = orig_offs + item.nbytes + count.nbytes, GGUFValueType(item[0])
            if count[0] <= LONG or kind == GGUFValueType.ARRAY:
                return whole(orig_offs, raw_type)
            if kind == GGUFValueType.STRING:
                end = _behind_texts(memoryview(self.data), first, int(count[0]))
            else:
                end = first + int(count[0]) * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
            return end - orig_offs, [item, count], [], [GGUFValueType.ARRAY, kind]

    return Skimming


def _behind_texts(data: memoryview, place: int, count: int) -> int:
    """Where so many texts end, each with its length in 64 bits before it. Raises ValueError where the
    file ends first."""
    length = struct.Struct("<Q")
    try:
        for _ in range(count):
            place += length.size + length.unpack_from(data, place)[0]
    except struct.error as error:
        raise ValueError(f"a list of {count} texts isn't whole: {error}") from None
    return place


def text_part(config: Any) -> Any:
    """The config of the language model, also where it is one part of a larger one."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def window(text: Any) -> int | None:
    """Tokens that a sliding layer sees, where any layer has such a window shorter than the context."""
    found, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if not found or getattr(text, "use_sliding_window", True) is False:
        return None
    if kinds is not None and SLIDING not in kinds:
        return None
    most = getattr(text, "max_position_embeddings", None)
    return None if most is not None and found >= most else int(found)


def rope_of(text: Any) -> dict[str, Any]:
    """rope_type, rope_theta and the rest, of the layers with full attention; empty: no rotation."""
    found = getattr(text, "rope_parameters", None) or {}
    return dict(found.get(FULL) or found)


def check(config: Any, told: Metadata) -> None:
    """Raises ModelError that names the first thing in which a file and the model's config differ."""
    text = text_part(config)
    for key, names in NUMBERS.items():
        own = next((getattr(text, n) for n in names if getattr(text, n, None) is not None), None)
        if isinstance(own, (int, float)) and isinstance(told.fields.get(key), (int, float)):
            _equal(told, key, told.fields[key], own)
    _check_window(text, told)
    _check_rope(text, told)


def _equal(told: Metadata, key: str, value: float, own: float) -> None:
    if not math.isclose(value, own, rel_tol=CLOSE):
        raise _different(told, f"{told.architecture}.{key} is {value:g}", f"{own:g}")


def _different(told: Metadata, file_says: str, config_says: str) -> ModelError:
    return ModelError(
        f"A GGUF file and the model's config must say the same; in {told.file} {file_says}, and "
        f"the config says {config_says}. llama.cpp would compute another model. Give a file that "
        "says so (gguf=FILE), or take another runtime."
    )


def _check_window(text: Any, told: Metadata) -> None:
    own, value = window(text), told.fields.get(WINDOW)
    if own is None:
        return
    if not value or told.architecture in WINDOWS_IGNORED:
        raise ModelError(
            f"This model's layers see {own} tokens back (sliding_window), and llama.cpp computes "
            f"{told.architecture} without that window: it would be right up to {own} tokens only. Set "
            "sliding_window to null in a copy of the model if you never use more, or take another "
            "runtime."
        )
    _equal(told, WINDOW, value, own)
    pattern, kinds = told.fields.get(f"{WINDOW}_pattern"), getattr(text, "layer_types", None)
    if isinstance(pattern, list) and kinds is not None:
        wanted = [kind == SLIDING for kind in kinds]
        if [bool(x) for x in pattern[: len(wanted)]] != wanted:
            raise _different(
                told, f"{told.architecture}.{WINDOW}_pattern is {pattern}", f"{wanted}"
            )


def _check_rope(text: Any, told: Metadata) -> None:
    own = rope_of(text)
    kind = own.get("rope_type", "default")
    told_kind = str(told.fields.get("rope.scaling.type") or "none")
    base = told.fields.get("rope.freq_base")
    if base is not None and own.get("rope_theta") and kind != "dynamic":
        _equal(told, "rope.freq_base", base, own["rope_theta"])
    if kind in ("linear", "yarn"):
        if told_kind != kind:
            raise _different(told, f"positions are scaled as {told_kind}", kind)
        _equal(told, "rope.scaling.factor", told.fields["rope.scaling.factor"], own["factor"])
    elif kind == "llama3" and FREQUENCIES not in told.tensors:
        raise _different(told, f"there is no {FREQUENCIES}", "positions scaled as llama3")
    elif kind == "longrope" and not any(n.startswith("rope_factors") for n in told.tensors):
        raise _different(told, "there are no rope_factors", "positions scaled as longrope")
    elif kind == "dynamic" and base is not None and math.isclose(base, own.get("rope_theta", 0)):
        raise _different(told, "positions aren't scaled", "dynamic")
    elif kind == "default" and told_kind in ("linear", "yarn", "longrope"):
        raise _different(told, f"positions are scaled as {told_kind}", "plain positions")


# ---------------------------------------------------------------- a file that was read


def mend(config: Any, told: Metadata) -> None:
    """Give a config that transformers made of the file what it dropped. Raises ModelError for what no
    config of this class can hold."""
    text = text_part(config)
    for key, names in NUMBERS.items():
        name = next((n for n in names if getattr(text, n, None) is not None), None)
        value = told.fields.get(key)
        if name is None or not isinstance(value, (int, float)):
            continue
        if not math.isclose(getattr(text, name), value, rel_tol=CLOSE):
            setattr(text, name, value)
    _mend_window(text, told)
    _mend_rope(text, told)
    check(config, told)


def _mend_window(text: Any, told: Metadata) -> None:
    value, own = told.fields.get(WINDOW), window(text)
    if told.architecture in WINDOWS_IGNORED or not value:
        if own is not None:
            text.sliding_window = None
            if getattr(text, "layer_types", None):
                text.layer_types = [FULL] * len(text.layer_types)
        return
    if own == value or value >= told.fields.get("context_length", math.inf):
        return
    if own is None and getattr(text, "sliding_window", None) is None:
        raise _unread(told, f"a sliding window of {value} tokens")
    text.sliding_window = int(value)


def _unread(told: Metadata, what: str) -> ModelError:
    return ModelError(
        f"{told.file} says {what}, which is lost when the file is read as a transformers model, so "
        "another model would be measured. Give the original folder, and the file as gguf=FILE."
    )


def _mend_rope(text: Any, told: Metadata) -> None:
    kind = str(told.fields.get("rope.scaling.type") or "none")
    scaled: dict[str, Any] | None = None
    if kind in ("linear", "yarn"):
        scaled = {"rope_type": kind, "factor": float(told.fields.get("rope.scaling.factor", 1))}
    if kind == "yarn":
        scaled = _yarn(scaled or {}, told)
    if told.frequencies is not None:
        scaled = _llama3(told)
    if kind == "longrope" or any(n.startswith("rope_factors") for n in told.tensors):
        raise _unread(told, "positions scaled as longrope")
    if scaled is None:
        return
    plain = getattr(text, "rope_parameters", None)
    if plain is None or FULL in plain or SLIDING in plain:
        raise _unread(told, f"positions scaled as {scaled['rope_type']}")
    text.rope_parameters = dict(plain) | scaled


def _yarn(scaled: dict[str, Any], told: Metadata) -> dict[str, Any]:
    """With what the file says of Peng et al., arXiv:2309.00071; what it leaves out has the same
    defaults in both programs."""
    names = {
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    }
    found = {own: told.fields[key] for key, own in names.items() if key in told.fields}
    for key in ("yarn_attn_factor", "attn_factor", "yarn_ext_factor", "yarn_log_multiplier"):
        value = told.fields.get(f"rope.scaling.{key}")
        usual = 0.0 if key == "yarn_log_multiplier" else 1.0
        if value is not None and not math.isclose(value, usual, abs_tol=1e-6):
            raise _unread(told, f"rope.scaling.{key} = {value:g}")
    return scaled | found


def _llama3(told: Metadata) -> dict[str, Any]:
    """Llama 3's formula from the factors f that divide the frequencies. With wavelength w,
        f = 1 for short w, `factor` for long w, and between them 1/f = (1 - s)/factor + s with
        s = (old/w - low) / (high - low);
    a line through the s gives low/(high - low) and old/(high - low), and the same f for every low, so
    low is 1 as in all published models. Raises ModelError where the formula doesn't give f back."""
    f = np.asarray(told.frequencies, np.float64).ravel()
    base = float(told.fields.get("rope.freq_base", 10000.0))
    inverse = base ** (-np.arange(len(f)) / len(f))
    factor = float(f.max())
    inside = (f > 1 + CLOSE) & (f < factor * (1 - CLOSE))
    refused = _unread(told, f"factors of the positions ({FREQUENCIES})")
    if inside.sum() < 2 or factor <= 1:
        raise refused
    s = (1 / f[inside] - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(inverse[inside] / (2 * math.pi), s, 1)
    if not (slope > 0 > offset):
        raise refused
    high = 1 - 1 / offset
    old = slope * (high - 1)
    again = np.clip((old * inverse / (2 * math.pi) - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / ((1 - again) / factor + again), f, rtol=1e-3):
        raise refused
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": float(high),
        "original_max_position_embeddings": round(float(old)),
    }
