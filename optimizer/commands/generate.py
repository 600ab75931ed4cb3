"""`mezzotint generate DIR "prompt"`: a text by a packed folder, where it was unpacked, and what
it took.

Greedy, one sequence. Every way of unpacking writes the same number of tokens after the same
prompt in one run, and so does the reference in bf16; a model is let go before the next one is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.commands.deploy import reference_of
from optimizer.errors import ConfigError, MezzotintError, TextError
from optimizer.models.source import context_length, is_encoder
from optimizer.plan import Inventory, Plan
from optimizer.stages.session import check_device
from optimizer.stages.view import View
from optimizer.store import Store, root

if TYPE_CHECKING:
    from optimizer.formats.torch.modes import Unpacking

WARM = 2  # tokens that are written before the clock runs
REFERENCE = "reference in bf16"


@dataclass(kw_only=True)
class Generate:
    """`mezzotint generate DIR "prompt"`. model: a folder that `apply` wrote. unpack, share, kl,
    refinement: see `optimizer.load`; unpack=None: hard, where there are thresholds. tokens: to write.
    compare: write with the other ways and the reference, too. fast, wide: see `optimizer.load`.
    reference: as Apply.model."""

    model: str
    prompt: str
    unpack: str | None = None
    share: float | None = None
    kl: float | None = None
    refinement: str = "memory"
    tokens: int = 48
    compare: bool = True
    fast: bool = True
    wide: bool = True
    reference: str | None = None
    device: str = "cpu"
    store: str = "~/.cache/mezzotint"

    def check(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"tokens is how many are written, 1 or more, not {self.tokens}.")
        if not self.prompt.strip():
            raise TextError("There is nothing to continue: the prompt is empty. Give some words.")


@dataclass(frozen=True)
class Told:
    """One way of writing. marks: for each new token whether planes were open when it was chosen
    (draft: whether it is the refined model's own word). read: bytes of weights read per token.
    passes: of the base and of the refined model, per token. acceptance: share of drafted words
    that were kept."""

    name: str
    ids: list[int]
    marks: list[bool]
    passes: tuple[float, float]
    read: float
    per_second: float
    acceptance: float | None = None

    @property
    def share(self) -> float:
        """Of the tokens after the first, which the prompt's own pass gives."""
        rest = self.marks[1:]
        return sum(rest) / len(rest) if rest else 0.0


@dataclass(frozen=True)
class Answer:
    """asked: the way that was asked for. pieces: its text token by token, with marks. notes: what
    couldn't be compared."""

    asked: Told
    pieces: list[tuple[str, bool]]
    rows: list[Told]
    notes: list[str]


def generate(config: Generate, view: View | None = None) -> Answer:
    """Raises MezzotintError for what can't be, before any model is loaded."""
    from optimizer.formats.torch import packed
    from optimizer.formats.torch.modes import Unpacking
    from optimizer.models.tokenizer import load_tokenizer

    config.check()
    check_device(config.device)
    view, folder = view or View(), Path(config.model)
    asked = Unpacking(config.unpack, config.share, config.kl, config.refinement)
    if config.unpack is None and (config.share is not None or config.kl is not None):
        asked = Unpacking("hard", config.share, config.kl, config.refinement)
    asked.check()
    plan = packed.verify(folder, whole=config.unpack != "never")
    if is_encoder(folder):
        raise ConfigError(f"{folder} is an encoder, which writes no text. Give a language model.")
    refined = plan.refinement
    if asked.mode is None and refined is not None:
        asked = Unpacking("hard" if refined.hard else "always", refinement=config.refinement)
    mode = asked.settle(plan, folder)
    tokenizer = load_tokenizer(folder)
    prompt = _encoded(tokenizer, config, folder)
    ways: list[Unpacking] = [Unpacking(mode, asked.share, asked.kl, asked.refinement)]
    if config.compare and refined is not None and mode != "never":
        others = [m for m in ("never", "always") if m != mode]
        ways += [Unpacking(m, refinement=config.refinement) for m in others]
    inventory = packed.read_inventory(folder)
    rows = [_written(config, plan, inventory, way, prompt, view) for way in ways]
    notes: list[str] = []
    if config.compare:
        try:
            rows.append(_by_reference(config, plan, inventory, prompt, view))
        except MezzotintError as error:
            notes.append(f"Not beside the reference: {error}")
    return Answer(rows[0], _pieces(tokenizer, prompt, rows[0]), rows, notes)


def _encoded(tokenizer: Any, config: Generate, folder: Path) -> list[int]:
    from optimizer.data.text import encode, text_prefix

    found = [*text_prefix(tokenizer), *encode(tokenizer, config.prompt)]
    context = context_length(folder)
    if context is not None and len(found) + config.tokens > context:
        raise ConfigError(
            f"Prompt and text must fit the model's context of {context} tokens; they have "
            f"{len(found)} + {config.tokens}. Lower tokens, or shorten the prompt."
        )
    return [int(i) for i in found]


def _written(
    config: Generate,
    plan: Plan,
    inventory: Inventory,
    way: Unpacking,
    prompt: Sequence[int],
    view: View,
) -> Told:
    from optimizer.formats.torch import packed

    view.stage(f"writing, unpack={way.mode}")
    net = packed.load(Path(config.model), None, config.device, config.fast, True, way, config.wide)
    state = getattr(net, "unpacking", None)
    _continued(net, prompt, WARM)
    if state is not None:
        state.reset()
    ids, seconds = _continued(net, prompt, config.tokens)
    count = len(ids)
    if state is None:
        passes, opened, acceptance = {"base": count, "refined": 0}, [False] * count, None
        planes = 0
    else:
        passes, planes, acceptance = state.passes, state.gate.read, state.acceptance(count)
        opened = state.opened(count)
    every = passes["base"] + passes["refined"]
    read = every * _base_bytes(net, plan, inventory) + planes
    each = (passes["base"] / count, passes["refined"] / count)
    return Told(str(way.mode), ids, opened, each, read / count, count / seconds, acceptance)


def _by_reference(
    config: Generate, plan: Plan, inventory: Inventory, prompt: Sequence[int], view: View
) -> Told:
    import torch

    from optimizer.models.model import Model

    source, _ = reference_of(plan, config.reference, Store(root(config.store), view.note))
    view.stage("writing, the reference in bf16")
    net = Model.load(source.folder, inventory, config.device).net.to(torch.bfloat16)
    _continued(net, prompt, WARM)
    ids, seconds = _continued(net, prompt, config.tokens)
    inside = [x for x in inventory.layers if x.kind != "embedding" or x.tied]
    read = 2.0 * sum(x.weights for x in inside)
    return Told(REFERENCE, ids, [False] * len(ids), (0, 1), read, len(ids) / seconds)


def _continued(net: Any, prompt: Sequence[int], tokens: int) -> tuple[list[int], float]:
    """Greedy tokens, the prompt's pass counted among the seconds."""
    import torch

    ids = torch.tensor([list(prompt)], device=next(iter(net.parameters())).device)
    begun = time.perf_counter()
    with torch.inference_mode():
        found = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=net.generation_config.pad_token_id or 0,
        )
    return found[0, ids.shape[1] :].tolist(), time.perf_counter() - begun


def _base_bytes(net: Any, plan: Plan, inventory: Inventory) -> int:
    """Of the weights that one pass reads, as they are held: an embedding that isn't the head's looks
    rows up."""
    from optimizer.formats.torch.kernels import Product
    from optimizer.formats.torch.modules import Piece

    inside = {x.name: x for x in inventory.layers if x.kind != "embedding" or x.tied}
    pieces = [m for m in net.modules() if isinstance(m, Piece) and m.layer.name in inside]
    held = [*pieces, *(m for m in net.modules() if isinstance(m, Product))]
    told = {piece.layer.name for piece in pieces}
    whole = [x for n, x in inside.items() if n not in told and plan.choice[n].kind == "none"]
    return sum(b.nbytes for m in held for b in m.buffers()) + sum(
        layer.bytes(plan.choice[layer.name]) for layer in whole
    )


def _pieces(tokenizer: Any, prompt: Sequence[int], told: Told) -> list[tuple[str, bool]]:
    """The text that each token adds; a character that a token cuts in two belongs to the next one."""
    found, said = [], tokenizer.decode(list(prompt), skip_special_tokens=True)
    for i, mark in enumerate(told.marks, 1):
        now = tokenizer.decode([*prompt, *told.ids[:i]], skip_special_tokens=True)
        whole = now.rstrip("\ufffd") if i < len(told.marks) else now
        found.append((whole[len(said) :] if whole.startswith(said) else "", mark))
        said = whole if whole.startswith(said) else said
    return found
