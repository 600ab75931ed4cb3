"""The sizes of a model that its memory depends on, read from its config.json; standard library only.

One token of one sequence leaves in a block (values, not bytes)

    full attention       2 * kv_heads * head_dim             grouped queries: kv_heads < heads
    sliding window       the same, for the last `window` tokens only
    latent attention     kv_lora_rank + qk_rope_head_dim     (DeepSeek-V2, arXiv:2405.04434, eq. 9)
    recurrent blocks     nothing per token; a fixed state    (Mamba-2, gated delta rule)
    shared blocks        nothing: they read an earlier block's cache
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optimizer.errors import ModelError


@dataclass(frozen=True)
class Block:
    """`count` equal blocks. values: cached per token; window: tokens kept, 0 = all; state: values
    kept per sequence whatever its length."""

    count: int
    values: int
    window: int = 0
    state: int = 0


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that memory depends on. longest: tokens it was made for, 0 = unknown."""

    blocks: tuple[Block, ...]
    hidden: int
    intermediate: int
    heads: int  # values of all query heads of a token
    vocabulary: int
    longest: int
    head: int = 32  # values of one head

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Geometry:
        blocks = tuple(Block(**block) for block in data["blocks"])
        return cls(**{**data, "blocks": blocks})


def geometry(config: Mapping[str, Any]) -> Geometry:
    """A model's config.json -> its sizes. Raises ModelError if one that is needed is missing."""
    config = config.get("text_config") or config
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    heads = _number(config, "num_attention_heads", "n_head", "num_heads")
    count = _number(config, "num_hidden_layers", "n_layer", "num_layers")
    head_dim = _optional(config, "head_dim") or hidden // heads
    kinds = _kinds(config, count)
    per_token = _values(config, heads, head_dim)
    window = _optional(config, "sliding_window", "attention_chunk_size") or 0
    shared = _optional(config, "num_kv_shared_layers") or 0
    blocks: dict[Block, int] = {}
    for index, kind in enumerate(kinds):
        block = Block(1, per_token)
        if kind in ("sliding", "chunked"):
            block = Block(1, per_token, window)
        elif kind == "recurrent":
            block = Block(1, 0, state=_state(config, hidden))
        elif kind == "none" or index >= count - shared:
            block = Block(1, 0)
        blocks[block] = blocks.get(block, 0) + 1
    return Geometry(
        blocks=tuple(Block(n, b.values, b.window, b.state) for b, n in blocks.items()),
        hidden=hidden,
        intermediate=_optional(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        heads=heads * head_dim,
        vocabulary=_optional(config, "vocab_size") or 0,
        longest=_optional(config, "max_position_embeddings", "n_positions") or 0,
        head=head_dim,
    )


def _number(config: Mapping[str, Any], *names: str) -> int:
    found = _optional(config, *names)
    if found is None:
        raise ModelError(
            f"The memory model needs {names[0]} in config.json, and this config has none of "
            f"{', '.join(names)}. Give the budget in bytes instead: budget.size=..."
        )
    return found


def _optional(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[n]) for n in names if isinstance(config.get(n), int)), None)


KINDS = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
    "mamba2": "recurrent",
    "recurrent": "recurrent",
    "hybrid": "full",
    "conv": "none",
    "mlp": "none",
    "moe": "none",
}


def _kinds(config: Mapping[str, Any], count: int) -> list[str]:
    """What each block remembers: full, sliding, chunked, recurrent or none."""
    named = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(named, list) and len(named) == count:
        unknown = sorted({str(kind) for kind in named} - KINDS.keys())
        if unknown:
            raise ModelError(
                f"This config has blocks of the kind {unknown[0]!r}, whose cache isn't known here "
                f"(known: {', '.join(KINDS)}). Give the budget in bytes instead: budget.size=..."
            )
        return [KINDS[kind] for kind in named]
    if not _optional(config, "sliding_window") or config.get("use_sliding_window") is False:
        return ["full"] * count
    pattern = _optional(config, "sliding_window_pattern") or 0
    if config.get("model_type") == "gemma2":
        pattern = 2
    if pattern:  # every pattern-th block sees everything
        return ["full" if (i + 1) % pattern == 0 else "sliding" for i in range(count)]
    below = config.get("max_window_layers", 0) if config.get("use_sliding_window") else 0
    return ["full" if i < below else "sliding" for i in range(count)]


def _values(config: Mapping[str, Any], heads: int, head_dim: int) -> int:
    rank = _optional(config, "kv_lora_rank")
    if rank:
        return rank + _number(config, "qk_rope_head_dim")
    kv_heads = _optional(config, "num_key_value_heads", "num_kv_heads") or heads
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        kv_heads = 1
    return 2 * kv_heads * head_dim


def _state(config: Mapping[str, Any], hidden: int) -> int:
    """Values of a recurrent block: its state and the last inputs of its short convolution."""
    if _optional(config, "linear_num_value_heads"):  # gated delta rule: a matrix per value head
        key, value = (_number(config, f"linear_{k}_head_dim") for k in ("key", "value"))
        v_heads, k_heads = (_number(config, f"linear_num_{k}_heads") for k in ("value", "key"))
        width = _optional(config, "linear_conv_kernel_dim") or 4
        return v_heads * key * value + width * (2 * k_heads * key + v_heads * value)
    size = _number(config, "mamba_d_state", "ssm_state_size", "state_size")
    heads = _optional(config, "mamba_n_heads", "mamba_num_heads")
    head_dim = _optional(config, "mamba_d_head", "mamba_head_dim")
    inner = (_optional(config, "mamba_expand", "expand") or 2) * hidden
    inner = heads * head_dim if heads and head_dim else inner
    groups = _optional(config, "mamba_n_groups", "n_groups") or 0
    width = _optional(config, "mamba_d_conv", "conv_kernel") or 4
    return inner * size + width * (inner + 2 * groups * size)
