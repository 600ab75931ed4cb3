"""What is done with a refinement while a model runs: nothing, all, or what is needed.

never    the base alone; the refinement isn't opened
always   planes for every token
draft    the base drafts, the refined model checks (transformers' assisted generation): its words, as
         if it had written alone. Two module trees over the same buffers
hard     the base writes; where it is unsure of the next word, the planes are opened, and all words
         since they were last open are read again in that one pass, which reads the weights once: the
         next word is the refined model's own, and so is the cache from then on
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optimizer.errors import ConfigError, PlanError
from optimizer.formats.torch.planes import PLACES, StoredPlane
from optimizer.models.planes import FEATURES, Gate, Signal, attach, caught_up, watch
from optimizer.plan import Plan

MODES = ("never", "always", "draft", "hard")
OF_TOKENS = ("input_ids", "position_ids", "cache_position")  # [..., tokens] of a forward pass


@dataclass(frozen=True)
class Unpacking:
    """mode: of MODES; None: always, where there is a refinement. share of the tokens, or kl in nats a
    token: how much `hard` unpacks. refinement: where planes lie, on the device (memory), in the host's
    memory (cpu) or on disk."""

    mode: str | None = None
    share: float | None = None
    kl: float | None = None
    refinement: str = "memory"

    def check(self) -> None:
        """Raises ConfigError."""
        if self.mode not in (None, *MODES):
            raise ConfigError(f"unpack is {', '.join(MODES)}, not {self.mode!r}.")
        if self.refinement not in PLACES:
            raise ConfigError(f"refinement is {', '.join(PLACES)}, not {self.refinement!r}.")
        told = [k for k in ("share", "kl") if getattr(self, k) is not None]
        if told and self.mode != "hard":
            raise ConfigError(
                f'{told[0]} says how much unpack="hard" unpacks; unpack is {self.mode}. Leave it out.'
            )
        if len(told) > 1:
            raise ConfigError("share and kl both set unpack=hard's threshold. Give one of them.")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ConfigError(f"share is a share of the tokens, 0 to 1, not {self.share}.")
        if self.kl is not None and not 0 <= self.kl < float("inf"):
            raise ConfigError(f"kl is a mean in nats per token, 0 or more, not {self.kl}.")

    def settle(self, plan: Plan, folder: Path) -> str:
        """What is done with this folder. Raises ConfigError where it can't be."""
        if plan.refinement is None:
            if self.mode in (None, "never"):
                return "never"
            raise ConfigError(
                f"unpack={self.mode} needs a refinement, and {folder} has none. Make a plan with "
                "nested.size=SIZE, and apply it."
            )
        if self.mode == "hard":
            self.threshold(plan)
        return self.mode or "always"

    def threshold(self, plan: Plan) -> float:
        """Of the plan's signal, from its points on search text. Raises ConfigError."""
        assert plan.refinement is not None
        hard = plan.refinement.hard
        if not hard:
            raise ConfigError(
                "unpack=hard goes by thresholds that a certificate measures, and this plan has none: "
                "it was made with proof.certify=false, or its architecture can't be measured so. Make "
                "it again with proof.certify=true, or take unpack=draft."
            )
        points = hard["points"]
        share = hard["share"] if self.share is None else self.share
        if self.kl is None:
            return _between(points, "share", share)
        if self.kl < points[-1]["kl"]:
            raise ConfigError(
                f"No share of tokens reaches a mean KL of {self.kl:g}: with all of them "
                f"unpacked it is "
                f"{points[-1]['kl']:.4g} on search text. Raise kl, or make a larger refinement."
            )
        return _between(points, "kl", min(self.kl, points[0]["kl"]))


def _between(points: list[dict[str, float]], key: str, value: float) -> float:
    """The threshold at a share or a loss, linear between points (by share: rising; by kl: falling)."""
    for a, b in pairwise(points):
        low, high = sorted((a[key], b[key]))
        if low <= value <= high:
            part = 0.0 if high == low else (value - a[key]) / (b[key] - a[key])
            return a["threshold"] + part * (b["threshold"] - a["threshold"])
    return points[-1]["threshold"]


@dataclass
class State:
    """What a loaded model did since somebody set it back: hangs on it as `model.unpacking`.

    tokens: written by the base, or by the refined model. unpacked: how many of them the planes were
    opened for. passes: of the base, of the refined model. marks: the same, token by token.
    """

    mode: str
    gate: Gate
    base: Gate
    threshold: float = 0.0
    read: Tensor | None = None  # of the last whole text, where planes were open [windows, tokens]
    prompt: int = 0  # tokens of the last one that words were drafted after

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.marks: list[list[bool]] = []
        self.rounds: list[tuple[int, int]] = []  # of drafts: tokens in the cache, tokens drafted
        self.passes = {"base": 0, "refined": 0}
        self.gate.read = 0

    @property
    def share(self) -> float:
        """Of the tokens after the prompt."""
        flat = [mark for row in self.marks for mark in row]
        return sum(flat) / len(flat) if flat else 0.0

    def opened(self, count: int) -> list[bool]:
        """For each of `count` new tokens whether planes were open when it was chosen; of drafts,
        whether it is the refined model's own word instead of the base's."""
        if self.mode == "hard":  # the first token is the prompt's pass's, which has the planes
            return [True, *(row[0] for row in self.marks)][:count]
        if self.mode != "draft":
            return [True] * count
        found = [False] * count
        for _, last in self._kept(count):
            found[last] = True
        return found

    def acceptance(self, count: int) -> float | None:
        """Of the drafted words that were looked at, how many were kept; None unless words are
        drafted."""
        if self.mode != "draft" or not self.rounds:
            return None
        kept, looked, before = 0, 0, -1
        for drafted, last in self._kept(count):
            own = last - before - 1
            kept, looked = kept + own, looked + min(own + 1, drafted)
            before = last
        return kept / looked if looked else None

    def _kept(self, count: int) -> list[tuple[int, int]]:
        """Of each round of drafts: how many, and which new token ended it."""
        starts = [cached for cached, _ in self.rounds[1:]]
        ends = [start - self.prompt for start in starts] + [count - 1]
        return [(drafted, end) for (_, drafted), end in zip(self.rounds, ends, strict=True)]


def unpacked(
    net: Any,
    modules: Mapping[str, list[nn.Module]],
    planes: Mapping[str, StoredPlane],
    plan: Plan,
    mode: str,
    wanted: Unpacking,
) -> Any:
    """The model in this mode. modules: those that use each refined layer's weight."""
    gate = Gate(open=mode != "hard")
    state = State(mode, gate, gate)
    if mode == "hard":
        assert plan.refinement is not None
        _check_cache(net)
        state.threshold = wanted.threshold(plan)
        signal = signal_of(net, plan)
    drafts = _twin(net) if mode == "draft" else None
    attach(modules, planes, gate)
    object.__setattr__(net, "unpacking", state)
    if drafts is not None:
        _count(net, state, "refined")
        _count(drafts, state, "base")
        net.generate = _assisted(net, drafts, state)
    elif mode == "hard":
        net.forward = _Watchful(net, state, signal)
    else:
        _count(net, state, "refined")
    return net


def _twin(net: Any) -> Any:
    """Another module tree over the same parameters and buffers."""
    tensors = [*net.parameters(), *net.buffers()]
    return copy.deepcopy(net, {id(value): value for value in tensors})


def _count(net: Any, state: State, name: str) -> None:
    inner = net.forward

    @wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        state.passes[name] += 1
        if state.mode == "draft" and name == "refined":
            ids, cache = kwargs["input_ids"], kwargs.get("past_key_values")
            cached = 0 if cache is None else int(cache.get_seq_length())
            drafted = ids.shape[1] - (1 if cached else state.prompt)
            state.rounds.append((cached, drafted))
        return inner(*args, **kwargs)

    net.forward = forward


# ---------------------------------------------------------------- draft


def _assisted(net: Any, drafts: Any, state: State) -> Any:
    inner = net.generate

    @wraps(inner)
    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", inputs)
        if isinstance(ids, Tensor) and len(ids) > 1:
            raise ConfigError(
                f"unpack=draft writes one sequence at a time, since transformers' assisted generation "
                f"does, and it was given {len(ids)}. Call generate for each, or take unpack=always."
            )
        if isinstance(ids, Tensor):
            state.prompt = ids.shape[1]
        kwargs.setdefault("assistant_model", drafts)
        return inner(inputs, *args, **kwargs)

    return generate


# ---------------------------------------------------------------- hard


def _check_cache(net: Any) -> None:
    """Raises ConfigError for a model whose cache can't forget its last token."""
    config = net.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    others = kinds - {"full_attention"}
    if others or (
        getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    ):
        what = ", ".join(sorted(others)) or "sliding windows"
        raise ConfigError(
            f"unpack=hard computes a token again, and this model's cache can't take one back "
            f"({what}). "
            "Take unpack=draft, always or never."
        )


def signal_of(net: Any, plan: Plan) -> Signal:
    """The plan's, for its base. Raises PlanError for a probe of another model."""
    assert plan.refinement is not None
    hard = plan.refinement.hard
    found = Signal(hard["signal"], tuple(hard["weights"]), hard["bias"])
    width = int(net.get_input_embeddings().weight.shape[1])
    if found.kind == "probe" and len(found.weights) != FEATURES + width:
        raise PlanError(
            f"The plan's probe has {len(found.weights)} weights; this model's needs "
            f"{FEATURES + width}. It was changed by hand: make the plan again."
        )
    return found


class _Watchful:
    """A forward pass that opens planes where the base is unsure of the next word. A prompt is read
    with them; a text without a cache is read as if it had been written so."""

    def __init__(self, net: Any, state: State, signal: Signal) -> None:
        self._inner, self._net, self._state, self._signal = net.forward, net, state, signal
        self._seen, _ = watch(net)
        self._pending: list[dict[str, Tensor]] = []  # what the base alone has read
        wraps(self._inner)(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs["input_ids"] = args[0]
        ids = kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or len(args) > 1:
            raise ConfigError("unpack=hard reads tokens: give input_ids, or take unpack=always.")
        cache = kwargs.get("past_key_values")
        try:
            if cache is None:
                return self._whole(kwargs.pop("input_ids"), kwargs)
            now = {k: kwargs.pop(k) for k in OF_TOKENS if isinstance(kwargs.get(k), Tensor)}
            if int(cache.get_seq_length()) == 0:
                self._pending = []
            elif ids.shape[1] == 1:
                return self._next(now, cache, kwargs)
            return self._refined(now, cache, kwargs)
        finally:
            self._state.gate.open = False

    def _unsure(self, logits: Tensor) -> Tensor:
        """[windows, tokens] of the last pass."""
        return self._signal(logits, self._seen[0][:, -logits.shape[1] :]) > self._state.threshold

    def _whole(self, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """A text: decided by what the base alone makes of it, as in the plan's certificate."""
        self._state.passes["base"] += 1
        found = self._inner(input_ids=ids, **kwargs)
        if found.logits.shape[1] != ids.shape[1]:
            raise ConfigError(
                "unpack=hard decides by all of a text's predictions: leave logits_to_keep out."
            )
        self._state.read = mask = self._unsure(found.logits)
        if bool(mask.any()):
            self._state.passes["refined"] += 1
            gate, dtype = self._state.gate, self._net.dtype
            found.logits, _ = caught_up(self._inner, gate, ids, mask, dtype)
        return found

    def _next(self, now: dict[str, Tensor], cache: Any, kwargs: dict[str, Any]) -> Any:
        """One token of each sequence. The planes are read for all of them, so they all have them."""
        self._state.passes["base"] += 1
        found = self._inner(**now, **kwargs)
        opened = bool(self._unsure(found.logits[:, -1:]).any())
        self._state.marks.append([opened] * len(now["input_ids"]))
        if not opened:
            self._pending.append(now)
            return found
        cache.crop(-1)
        return self._refined(now, cache, kwargs)

    def _refined(self, now: dict[str, Tensor], cache: Any, kwargs: dict[str, Any]) -> Any:
        """These tokens with the planes, and those before them that the base alone has read."""
        count = now["input_ids"].shape[1]
        if self._pending:
            cache.crop(-len(self._pending))
            parts = [*self._pending, now]
            now = {k: torch.cat([x[k] for x in parts], -1) for k in now}
            self._pending = []
        self._state.gate.open = True
        self._state.passes["refined"] += 1
        found = self._inner(**now, **kwargs)
        found.logits = found.logits[:, -count:]
        return found
