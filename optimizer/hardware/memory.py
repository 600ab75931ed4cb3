"""What a model needs in memory while it runs: weights, cache, activations, the runtime itself.

Everything is arithmetic on a model's geometry and a plan; standard library only.
Caches of 8 and 4 bits carry an fp16 scale per block of 32 values, as llama.cpp's q8_0 and q4_0 do:
8.5 and 4.5 bits per value; more where heads are too short for such blocks (optimizer.models.kv_cache).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from optimizer.errors import BudgetError, ConfigError
from optimizer.hardware.geometry import Geometry
from optimizer.plan import Budget, Plan, Precision, parse_size
from optimizer.plan.cache import CacheKind, parse_keep

MIB = 2**20
STATE_BYTES = 4  # recurrent states are kept in fp32
LOGIT_BYTES = 4
UNPACKED = 2**16  # torch: weights that are unpacked together
MANY_UNPACKED = 2**24  # on a GPU, which waits for each of many small kernels
UNPACKING = 14  # torch: bytes for each of them: codes, offsets, fp32 twice
SPREAD = 17  # the same without the codes' own bits where they cross bytes: through 64-bit words
RESULT = 4  # torch: bytes per weight of an unpacked layer, fp32


@dataclass(frozen=True)
class Engine:
    """What is particular to a runtime. kv: cache bits -> stored bits per value; prefill: tokens
    that it pushes through together; overhead: its own bytes by kind of machine. All of them keep
    latent attention latent; for transformers 5.23 that was read off its own cache."""

    kv: Mapping[int, float]
    prefill: int
    overhead: Mapping[str, int]
    floating: bool = False  # 8 bits of a cache are e4m3


# overhead. torch on CPU: resident memory of an interpreter that has run a tiny model, measured at
# 391 MiB (experiments/04-memory, one machine). All others are allowances that nobody measured here;
# budget.overhead replaces them.
ENGINES = {
    "torch": Engine(
        {32: 32, 16: 16, 8: 8.5, 4: 4.5},
        512,
        {"cpu": 391 * MIB, "gpu": 600 * MIB, "apple": 600 * MIB},
    ),
    "vllm": Engine(
        {16: 16, 8: 8}, 2048, {"cpu": 1024 * MIB, "gpu": 1024 * MIB, "apple": 1024 * MIB}, True
    ),
    "llamacpp": Engine(
        {32: 32, 16: 16, 8: 8.5, 4: 4.5},
        512,
        {"cpu": 32 * MIB, "gpu": 400 * MIB, "apple": 150 * MIB},
    ),
}


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


# ---------------------------------------------------------------- bytes


def _engine(runtime: str) -> Engine:
    """Runtimes of your own count as torch, the most careful of them."""
    return ENGINES.get(runtime, ENGINES["torch"])


def block_of(length: int) -> int:
    """Values of a head that share a scale in a cache of few bits."""
    return math.gcd(32, length)


def caches(runtime: str) -> list[int]:
    """The cache precisions that are worth trying, widest first."""
    return sorted((bits for bits in _engine(runtime).kv if bits <= 16), reverse=True)


def floating(runtime: str) -> bool:
    """Whether the runtime's 8-bit cache holds floating-point numbers."""
    return _engine(runtime).floating


def stored_bits(shape: Geometry, runtime: str, kv: int) -> float:
    """Bits per cached value, its scale counted. Raises ConfigError for a cache that the runtime
    doesn't have."""
    engine = _engine(runtime)
    if kv not in engine.kv:
        raise ConfigError(
            f"A cache is stored as its runtime can: {runtime} has {', '.join(map(str, engine.kv))} "
            f"bits, not budget.kv={kv}. Choose one of these or another runtime."
        )
    short = engine is ENGINES["torch"] and kv < 16  # llama.cpp has no shorter blocks
    return kv + 16 / block_of(shape.head) if short else engine.kv[kv]


def kind(runtime: str, bits: int, keep: str | None = None) -> CacheKind:
    """A cache as the runtime keeps it. Raises ConfigError for tokens kept whole where it can't."""
    if keep is not None and bits < 16 and _engine(runtime) is not ENGINES["torch"]:
        raise ConfigError(
            f"budget.keep={keep} keeps some tokens of a cache at 16 bits, which {runtime} can't. Take "
            "runtime=torch, or leave it out."
        )
    first, last = parse_keep(keep if bits < 16 else None)
    return CacheKind(bits, floating(runtime), first, last)


def kind_of(plan: Plan) -> CacheKind:
    """The cache that a plan was measured with."""
    return kind(plan.runtime, plan.kv, plan.keep)


def cache_bytes(shape: Geometry, context: int, batch: int, bits: float, exact: int = 0) -> int:
    """`batch` sequences of `context` tokens, of which `exact` are kept at 16 bits."""
    total = 0.0
    for block in shape.blocks:
        tokens = min(context, block.window) if block.window else context
        whole = min(tokens, exact)
        stored = whole * 16 + (tokens - whole) * bits
        one = block.values * stored / 8 + block.state * STATE_BYTES
        total += block.count * one
    return int(total * batch)


def activation_bytes(
    shape: Geometry,
    runtime: str,
    context: int,
    batch: int,
    bits: float,
    compute: int = 16,
    unpacked: int = 0,
) -> int:
    """The most that is alive at one moment beside weights and the cache when it is full.

    Sequences of `context` tokens are pushed through in the engine's pieces. bits: stored bits per
    value of the cache; compute: bits of activations; unpacked: bytes while the largest layer is
    unpacked, 0 where kernels read packed codes.
    """
    prefill = _engine(runtime).prefill
    piece = min(context, prefill)
    whole = context // piece * piece  # full pieces end here; then comes the rest
    full = cache_bytes(shape, context, batch, bits)
    step = _torch_step if runtime not in ENGINES or runtime == "torch" else _any_step
    most = 0
    for tokens, seen in ((piece, whole), (context - whole, context)):
        if tokens:
            before = cache_bytes(shape, seen, batch, bits) - full
            now = step(shape, Step(tokens, seen, batch, compute, bits < 16), unpacked)
            most = max(most, before + now)
    return max(most, 2 * batch * shape.vocabulary * LOGIT_BYTES)


@dataclass(frozen=True)
class Step:
    """A forward pass. tokens: new ones of each sequence; seen: with those before them; batch:
    sequences; compute: bits of activations; opened: whether a block's keys and values are decoded."""

    tokens: int
    seen: int
    batch: int
    compute: int
    opened: bool


def _any_step(shape: Geometry, step: Step, unpacked: int) -> int:
    """Two hidden states and the larger of a gated feed-forward (gate, up, product) and an
    attention (queries, keys, values, output). Not measured."""
    wide = max(3 * shape.intermediate, 4 * shape.heads)
    return step.batch * step.tokens * (2 * shape.hidden + wide) * step.compute // 8 + unpacked


def _torch_step(shape: Geometry, step: Step, unpacked: int) -> int:
    """A gated block of transformers with PyTorch's fused attention, as the allocator saw it.

    feed-forward: embeddings, block input, residual and its norm; activated gate, up, product
    rotation: embeddings, input, norm; queries, their two products, half of them turned;
    keys and values are where the cache will count them
    attention: embeddings, input, norm; queries, output. From the second piece on also the mask,
    as booleans once and as numbers for every sequence, and with grouped queries the keys and values
    of all tokens so far, repeated for every head; and one block's keys and values, decoded.
    """
    tokens, seen, batch, compute = step.tokens, step.seen, step.batch, step.compute
    width, keys = shape.hidden, max(block.values for block in shape.blocks) // 2
    feed = 4 * width + 3 * shape.intermediate
    rotation = 3 * width + 4 * shape.heads
    attention = 3 * width + 2 * shape.heads
    unpacking = 4 * width + shape.intermediate
    later = 2 * keys * seen if step.opened else 0
    if seen > tokens:
        later += tokens * seen
        later += 2 * shape.heads * seen if shape.heads > keys else 0
    booleans = tokens * seen if seen > tokens else 0
    values = batch * max(tokens * max(feed, rotation), tokens * attention + later)
    return max(
        values * compute // 8 + booleans,
        batch * tokens * unpacking * compute // 8 + booleans + unpacked,
    )


def use(
    shape: Geometry,
    runtime: str,
    budget: Budget,
    weights: int,
    unpacked: int = 0,
    compute: int = 16,
) -> Use:
    """All lines for `weights` bytes at the budget's context, batch and cache precision.

    unpacked: see `unpacked_bytes`. compute: bits of activations. Raises ConfigError for a cache
    that the runtime doesn't have.
    """
    engine = _engine(runtime)
    overhead = engine.overhead[budget.machine]
    if budget.overhead is not None:
        overhead = parse_size(budget.overhead)
    unpacked = unpacked if runtime == "torch" else 0
    context, batch = budget.context, budget.batch
    bits = stored_bits(shape, runtime, budget.kv)
    exact = kind(runtime, budget.kv, budget.keep).exact(context) if budget.kv < 16 else 0
    cache = cache_bytes(shape, context, batch, bits, exact)
    activations = activation_bytes(shape, runtime, context, batch, bits, compute, unpacked)
    return Use(weights, cache, activations, overhead)


def resident_weights(plan: Plan, compute: int = 16) -> int:
    """Bytes of a plan's weights in memory: packed layers as stored, all others in `compute` bits."""
    return plan.bytes["quantized"] + plan.bytes.get("untouched", 0) * compute // 16


def unpacked_bytes(plan: Plan, machine: str = "cpu") -> int:
    """torch: bytes while the layer that needs most is unpacked (an embedding unpacks rows)."""
    choice = plan.choice
    found = (unpacking(rows * cols, choice[n], machine) for n, (rows, cols) in plan.shapes.items())
    return max(found, default=0)


def unpacking(weights: int, precision: Precision, machine: str = "cpu") -> int:
    """torch: bytes that are alive at most while a layer of so many weights is unpacked."""
    if precision.kind == "none":
        return 0
    across = precision.kind == "int" and 8 % precision.bits != 0
    each = SPREAD + precision.bits if across else UNPACKING
    return RESULT * weights + each * min(weights, UNPACKED if machine == "cpu" else MANY_UNPACKED)


def usable(budget: Budget) -> int:
    """Bytes of the machine that a program can have."""
    return int(parse_size(str(budget.memory)) * budget.usable)


def longest_context(
    shape: Geometry, runtime: str, budget: Budget, weights: int, unpacked: int = 0
) -> int:
    """The most tokens per sequence that fit, at most what the model was made for; 0: none."""

    def fits(context: int) -> bool:
        need = use(shape, runtime, replace(budget, context=context), weights, unpacked)
        return need.total <= usable(budget)

    low, high = 0, shape.longest or 2**20
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def resolve(
    budget: Budget, shape: Geometry, runtime: str, smallest: int, unpacked: int = 0
) -> tuple[Budget, str]:
    """A budget of a machine's memory -> the same as bytes of weights, and how that came about.

    smallest: bytes of the smallest plan. Other budgets come back as they are. Raises BudgetError
    if the smallest plan doesn't fit beside the cache, saying which context would.
    """
    if budget.memory is None:
        return budget, ""
    need = use(shape, runtime, budget, 0, unpacked)
    room = usable(budget) - need.besides
    if room < smallest:
        longest = longest_context(shape, runtime, budget, smallest, unpacked)
        remedy = (
            f"A context of {longest} tokens would fit: budget.context={longest}, or lower "
            "budget.batch or budget.kv."
            if longest
            else "No context fits: choose a larger machine, a runtime with less overhead, "
            f"{'a lower budget.batch, ' if budget.batch > 1 else ''}or lower precisions."
        )
        raise BudgetError(
            f"Weights, cache, activations and runtime must fit the machine together. "
            f"{_sentence(budget.device or 'it')} has {mib(usable(budget))} usable; at budget.context="
            f"{budget.context}, budget.batch={budget.batch} and budget.kv={budget.kv} the cache "
            f"takes {mib(need.cache)}, activations {mib(need.activations)}, the runtime "
            f"{mib(need.runtime)}, and the smallest plan {mib(smallest)}. "
            f"{remedy}"
        )
    text = (
        f"{budget.device or 'the machine'}: {mib(usable(budget))} usable - cache {mib(need.cache)} "
        f"({budget.context} tokens, batch {budget.batch}, "
        f"{kind(runtime, budget.kv, budget.keep).said}) - activations "
        f"{mib(need.activations)} - runtime {mib(need.runtime)} = "
        f"{mib(room)} for weights"
    )
    if 0 < shape.longest < budget.context:
        text += (
            f". The model was made for {shape.longest} tokens only: budget.context={shape.longest} "
            "would leave more for the weights"
        )
    return Budget(size=str(room)), text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def mib(count: float) -> str:
    """Bytes for a person, in powers of two."""
    if count >= 1024 * MIB:
        return f"{count / MIB / 1024:.2f} GiB"
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"
