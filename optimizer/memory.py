"""What a model needs in memory while it runs: weights, cache, activations, the runtime itself.

Everything is arithmetic on a config and a plan; standard library only. One token of one sequence
leaves in a block (values, not bytes)

    full attention       2 * kv_heads * head_dim             grouped queries: kv_heads < heads
    sliding window       the same, for the last `window` tokens only
    latent attention     kv_lora_rank + qk_rope_head_dim     (DeepSeek-V2, arXiv:2405.04434, eq. 9)
    recurrent blocks     nothing per token; a fixed state    (Mamba-2, gated delta rule)
    shared blocks        nothing: they read an earlier block's cache

Caches of 8 and 4 bits carry scales: llama.cpp's q8_0 and q4_0 store 8.5 and 4.5 bits per value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from optimizer.errors import BudgetError, ConfigError, ModelError
from optimizer.plan import Budget, Plan, parse_size

MIB = 2**20
STATE_BYTES = 4  # recurrent states are kept in fp32
LOGIT_BYTES = 4
UNPACKING = 14  # torch: bytes per weight while a layer is unpacked: codes, offsets, fp32 twice


@dataclass(frozen=True)
class Engine:
    """What is particular to a runtime. kv: cache bits -> stored bits per value; prefill: tokens
    that it pushes through together; overhead: its own bytes by kind of machine. All of them keep
    latent attention latent; for transformers 5.23 that was read off its own cache."""

    kv: Mapping[int, float]
    prefill: int
    overhead: Mapping[str, int]


# overhead. torch on CPU: resident memory of an interpreter that has run a tiny model, measured at
# 391 MiB (experiments/04-memory, one machine). All others are allowances that nobody measured here;
# budget.overhead replaces them.
ENGINES = {
    "torch": Engine(
        {32: 32, 16: 16}, 512, {"cpu": 391 * MIB, "gpu": 600 * MIB, "apple": 600 * MIB}
    ),
    "vllm": Engine(
        {16: 16, 8: 8}, 2048, {"cpu": 1024 * MIB, "gpu": 1024 * MIB, "apple": 1024 * MIB}
    ),
    "llamacpp": Engine(
        {32: 32, 16: 16, 8: 8.5, 4: 4.5},
        512,
        {"cpu": 32 * MIB, "gpu": 400 * MIB, "apple": 150 * MIB},
    ),
}


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

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Geometry:
        blocks = tuple(Block(**block) for block in data["blocks"])
        return cls(**{**data, "blocks": blocks})


@dataclass(frozen=True)
class Use:
    """Bytes, line by line."""

    weights: int
    cache: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.runtime

    @property
    def besides(self) -> int:
        return self.total - self.weights


# ---------------------------------------------------------------- geometry


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


# ---------------------------------------------------------------- bytes


def _engine(runtime: str) -> Engine:
    """Runtimes of your own count as torch, the most careful of them."""
    return ENGINES.get(runtime, ENGINES["torch"])


def cache_bytes(shape: Geometry, context: int, batch: int, bits: float) -> int:
    """`batch` sequences of `context` tokens."""
    total = 0.0
    for block in shape.blocks:
        tokens = min(context, block.window) if block.window else context
        one = block.values * tokens * bits / 8 + block.state * STATE_BYTES
        total += block.count * one
    return int(total * batch)


def activation_bytes(
    shape: Geometry, context: int, batch: int, prefill: int, compute: int, largest: int
) -> int:
    """The most that is alive at one moment of a step of `prefill` tokens per sequence.

    Two hidden states and the larger of a gated feed-forward (gate, up, product) and an attention
    (queries, keys, values, output); the logits of one position, twice. largest: weights of the
    largest layer that is unpacked to be used, 0 where kernels read packed codes.
    Too low where activations dominate: 31 and 44 % under the measured peak (experiments/04-memory).
    """
    tokens = batch * min(context, prefill)
    wide = max(3 * shape.intermediate, 4 * shape.heads)
    step = tokens * (2 * shape.hidden + wide) * compute // 8
    logits = 2 * batch * shape.vocabulary * LOGIT_BYTES
    return max(step + UNPACKING * largest, logits)


def use(
    shape: Geometry,
    runtime: str,
    budget: Budget,
    weights: int,
    largest: int = 0,
    compute: int = 16,
) -> Use:
    """All lines for `weights` bytes at the budget's context, batch and cache precision.

    compute: bits of activations. Raises ConfigError for a cache that the runtime doesn't have.
    """
    engine = _engine(runtime)
    if budget.kv not in engine.kv:
        raise ConfigError(
            f"A cache is stored as its runtime can: {runtime} has {', '.join(map(str, engine.kv))} "
            f"bits, not budget.kv={budget.kv}. Choose one of these or another runtime."
        )
    overhead = engine.overhead[budget.machine]
    if budget.overhead is not None:
        overhead = parse_size(budget.overhead)
    unpacked = largest if runtime == "torch" else 0
    context, batch = budget.context, budget.batch
    return Use(
        weights,
        cache_bytes(shape, context, batch, engine.kv[budget.kv]),
        activation_bytes(shape, context, batch, engine.prefill, compute, unpacked),
        overhead,
    )


def resident_weights(plan: Plan, compute: int = 16) -> int:
    """Bytes of a plan's weights in memory: packed layers as stored, all others in `compute` bits."""
    return plan.bytes["quantized"] + plan.bytes.get("untouched", 0) * compute // 16


def largest_packed(plan: Plan) -> int:
    """Weights of the largest layer that is unpacked as a whole: embeddings unpack single rows."""
    sizes = (
        rows * cols
        for name, (rows, cols) in plan.shapes.items()
        if plan.choice[name].kind != "none"
    )
    return max(sizes, default=0)


def usable(budget: Budget) -> int:
    """Bytes of the machine that a program can have."""
    return int(parse_size(str(budget.memory)) * budget.usable)


def longest_context(
    shape: Geometry, runtime: str, budget: Budget, weights: int, largest: int = 0
) -> int:
    """The most tokens per sequence that fit, at most what the model was made for; 0: none."""

    def fits(context: int) -> bool:
        need = use(shape, runtime, replace(budget, context=context), weights, largest)
        return need.total <= usable(budget)

    low, high = 0, shape.longest or 2**20
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def resolve(
    budget: Budget, shape: Geometry, runtime: str, smallest: int, largest: int = 0
) -> tuple[Budget, str]:
    """A budget of a machine's memory -> the same as bytes of weights, and how that came about.

    smallest: bytes of the smallest plan. Other budgets come back as they are. Raises BudgetError
    if the smallest plan doesn't fit beside the cache, saying which context would.
    """
    if budget.memory is None:
        return budget, ""
    need = use(shape, runtime, budget, 0, largest)
    room = usable(budget) - need.besides
    if room < smallest:
        longest = longest_context(shape, runtime, budget, smallest, largest)
        remedy = (
            f"A context of {longest} tokens would fit: budget.context={longest}"
            if longest
            else "No context fits: choose a larger machine, a runtime with less overhead, or lower "
            "precisions"
        )
        raise BudgetError(
            f"Weights, cache, activations and runtime must fit the machine together. "
            f"{_sentence(budget.device or 'it')} has {mib(usable(budget))} usable; at budget.context="
            f"{budget.context}, budget.batch={budget.batch} and budget.kv={budget.kv} the cache "
            f"takes {mib(need.cache)}, activations {mib(need.activations)}, the runtime "
            f"{mib(need.runtime)}, and the smallest plan {mib(smallest)}. {remedy}, or lower "
            "budget.batch or budget.kv."
        )
    text = (
        f"{budget.device or 'the machine'}: {mib(usable(budget))} usable - cache {mib(need.cache)} "
        f"({budget.context} tokens, batch {budget.batch}, {budget.kv} bits) - activations "
        f"{mib(need.activations)} - runtime {mib(need.runtime)} = {mib(room)} for weights"
    )
    return Budget(size=str(room)), text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def mib(count: float) -> str:
    """Bytes for a person, in powers of two."""
    if count >= 1024 * MIB:
        return f"{count / MIB / 1024:.2f} GiB"
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"
