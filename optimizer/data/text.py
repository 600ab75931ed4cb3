"""Tokens for calibration, search and holding out.

A document belongs to exactly one of the three parts, so nothing that a plan is judged on was
seen when it was made. A window is a run of `length` tokens; windows of one document share its
number, and intervals are taken over documents.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from optimizer.data.documents import (
    Documents,
    by_template,
    hub_rows,
    others,
    read_documents,
    text_files,
)
from optimizer.errors import ConfigError, ModelError, TextError

VERSION = 1
OWN = ("bundled", "self")  # sources that need no path
SAMPLED_TOGETHER = 64  # documents in one generation batch; a killed run loses at most one batch
SHARES = {"calibration": 2.0, "search": 1.0, "heldout": 1.0}  # fixed, so that a longer search
# doesn't change the calibration windows, and a measured table stays good
DRAWN = 4  # from a hub data set: this many times the tokens that are needed, then stop


@dataclass(kw_only=True)
class Part:
    """`sequences` windows of `length` tokens."""

    sequences: int
    length: int


@dataclass(kw_only=True)
class Data:
    """Where tokens come from.

    source: `bundled` (the texts that come with the program, see `optimizer.data.domains`; sampled
    text where the model can't read them), `self` (sampled from the reference), `text` (a file or a
    folder of files, see `optimizer.data.documents`), `hub` (a data set id or folder for
    `datasets.load_dataset`). column: of rows; a list of turns in it, or in `messages`, is a chat.
    template: chats as the tokenizer's own template writes them, else what was said alone.
    """

    source: str = "bundled"
    path: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    template: bool = True
    seed: int = 0
    calibration: Part = field(default_factory=lambda: Part(sequences=64, length=128))
    search: Part = field(default_factory=lambda: Part(sequences=64, length=128))
    heldout: Part = field(default_factory=lambda: Part(sequences=24, length=256))

    @property
    def parts(self) -> dict[str, Part]:
        return {"calibration": self.calibration, "search": self.search, "heldout": self.heldout}

    def check(self, context: int | None) -> None:
        """Everything that can be wrong before any work. context: the model's longest input."""
        if self.source not in ("bundled", "self", "text", "hub"):
            raise ConfigError(f"data.source is bundled, self, text or hub, not {self.source!r}.")
        check_seed("data.seed", self.seed)
        for name, part in self.parts.items():
            if part.sequences < 1 or part.length < 2:
                raise ConfigError(
                    f"data.{name} needs at least one sequence of two tokens, not "
                    f"{part.sequences} of {part.length}."
                )
            if context is not None and part.length > context:
                raise ConfigError(
                    f"Windows must fit the model's context of {context} tokens; data.{name}.length "
                    f"is {part.length}. Lower it."
                )
        if self.source in OWN:
            return
        if self.path is None:
            raise ConfigError(f"data={self.source} needs data.path. For example data.path=my.txt")
        if self.source == "text" and not Path(self.path).exists():
            raise TextError(f"There is no text at {self.path}. Correct data.path.")
        if self.source == "text":
            text_files(Path(self.path))

    def key(self, fingerprint: str) -> list[Any]:
        """What determines the tokens, for the store; a text counts by content, not by name."""
        content = ""
        if self.source == "text" and self.path is not None:
            hashes = [_sha256(file) for file in text_files(Path(self.path))]
            content = hashlib.sha256("".join(hashes).encode()).hexdigest()
        if self.source == "hub" and Path(str(self.path)).is_dir():
            files = sorted(f for f in Path(str(self.path)).rglob("*") if f.is_file())
            content = repr([(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
        settings = asdict(self) | {"path": content or self.path}
        if self.template:  # as in stores from before there was a choice
            del settings["template"]
        return [VERSION, fingerprint, settings]


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise TextError(f"{file} can't be read ({error.strerror}).") from None


def check_seed(name: str, seed: int) -> None:
    """NumPy takes none below 0; Optuna's samplers, seeded beside it, none from 2**32 on."""
    if not 0 <= seed < 2**31:
        raise ConfigError(f"{name} is a whole number from 0 to {2**31 - 1}, not {seed}.")


@dataclass(frozen=True)
class Windows:
    """ids: int64 [windows, length]; documents: int64 [windows], the document of each window;
    domains: the kind of text of each window, () where it isn't known."""

    ids: np.ndarray
    documents: np.ndarray
    domains: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return int(self.ids.size)

    def head(self, windows: int) -> Windows:
        return Windows(self.ids[:windows], self.documents[:windows], self.domains[:windows])

    def spread(self, windows: int) -> Windows:
        """So many of them, evenly from the first to the last; all if there are no more."""
        count = len(self.ids)
        if windows >= count:
            return self
        some = np.linspace(0, count - 1, windows).round().astype(int)
        domains = tuple(self.domains[i] for i in some) if self.domains else ()
        return Windows(self.ids[some], self.documents[some], domains)


Tokens = dict[str, Windows]


# ---------------------------------------------------------------- given text


def cut(data: Data, tokenizer: Any, tell: Callable[[str], None] = lambda _: None) -> Tokens:
    """Text -> disjoint windows for every part. tell: hears what was left out. Raises TextError if
    there is too little."""
    seen: set[str] = set()
    wanted = sum(part.sequences * part.length for part in data.parts.values())
    documents: list[list[int]] = []
    total, prefix = 0, text_prefix(tokenizer)
    given = documents_of(data, tokenizer)
    for text in texts_of(data, given):
        mark = hashlib.sha256(text.strip().encode()).hexdigest()
        if not text.strip() or mark in seen:  # a repeated document would leak across the parts
            continue
        seen.add(mark)
        ids = encode(tokenizer, text)
        documents.append(ids[1:] if prefix and ids[:1] == prefix else ids)  # a template's own BOS
        total += len(documents[-1])
        if data.source == "hub" and total > DRAWN * wanted:
            break
    for line in left_out(data, given):
        tell(line)
    order = np.random.default_rng(data.seed).permutation(len(documents))
    shuffled = [documents[i] for i in order]

    def windows(shares: dict[str, float]) -> Tokens:
        parts = _shared_out(shuffled, shares)
        return {
            name: _windows(parts[name], part, prefix, name, total, len(documents))
            for name, part in data.parts.items()
        }

    try:
        return windows(SHARES)
    except TextError:  # a small text: cut it by need
        return windows({n: float(p.sequences * p.length) for n, p in data.parts.items()})


def left_out(data: Data, given: Documents) -> list[str]:
    """What of data.path is not in the tokens, in sentences."""
    lines = [given.told] if given.told else []
    strange = others(given.path) if data.source == "text" else []
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        lines.append(
            f"not read in {given.path}, because their names don't say that they are text: "
            f"{', '.join(strange[:3])}{more}"
        )
    return lines


def _shared_out(
    documents: list[list[int]], shares_wanted: dict[str, float]
) -> dict[str, list[list[int]]]:
    """Give each document to the part that still lacks the largest part of its share."""
    have = dict.fromkeys(shares_wanted, 0)
    shares: dict[str, list[list[int]]] = {name: [] for name in have}
    for document in documents:
        name = min(have, key=lambda n: have[n] / shares_wanted[n])
        shares[name].append(document)
        have[name] += len(document)
    return shares


def _windows(
    documents: list[list[int]], part: Part, prefix: list[int], name: str, total: int, count: int
) -> Windows:
    """Long documents give several windows, short ones are joined; drawn evenly from all."""
    body = part.length - len(prefix)
    queues: list[list[list[int]]] = []
    joined: list[int] = []
    for document in documents:
        if len(document) >= body:
            queues.append(
                [document[i : i + body] for i in range(0, len(document) - body + 1, body)]
            )
            continue
        joined = joined + document
        if len(joined) >= body:
            queues.append([joined[:body]])
            joined = []
    drawn: list[tuple[int, list[int]]] = []
    for turn in range(max(map(len, queues), default=0)):
        drawn += [(i, queue[turn]) for i, queue in enumerate(queues) if turn < len(queue)]
    if len(drawn) < part.sequences:
        raise TextError(
            f"data.{name} needs {part.sequences} windows of {part.length} tokens from documents of "
            f"its own; the text ({total} tokens in {count} documents) gives {len(drawn)}. Give more "
            f"text, or lower data.{name}.sequences or data.{name}.length."
        )
    drawn = drawn[: part.sequences]
    ids = np.array([prefix + window for _, window in drawn], dtype=np.int64)
    return Windows(ids, np.array([i for i, _ in drawn], dtype=np.int64))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text of any length, without special tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def text_prefix(tokenizer: Any) -> list[int]:
    """The token that this tokenizer puts before every text, if it does (Llama: its BOS)."""
    start = getattr(tokenizer, "bos_token_id", None)
    ids = list(tokenizer("a")["input_ids"])
    return ids[:1] if start is not None and ids[:1] == [start] else []


def text_start(tokenizer: Any) -> list[int]:
    """The token that a text of its own begins with: BOS, or the one that separates documents in
    training; [] if the tokenizer has neither."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return [int(token)]
    return []


def documents_of(data: Data, tokenizer: Any = None) -> Documents:
    """What data.path holds. tokenizer: whose template chats are written by."""
    spoken = by_template(tokenizer) if data.template and tokenizer is not None else None
    return read_documents(Path(str(data.path)), data.column, spoken)


def texts_of(data: Data, documents: Documents) -> Iterator[str]:
    """Its texts, one by one. Raises TextError."""
    if data.source != "hub":
        return iter(documents)
    return documents.texts(hub_rows(str(data.path), data.name, data.split))


# ---------------------------------------------------------------- text sampled from the model


class HasNet(Protocol):
    @property
    def net(self) -> Any: ...


Batch = Callable[[str, Callable[[], dict[str, np.ndarray]]], dict[str, np.ndarray]]


def sample(data: Data, model: HasNet, keep: Batch, track: Callable[..., Iterable[Any]]) -> Tokens:
    """Windows sampled from the reference at temperature 1, each a document of its own.

    keep(name, make): the stored batch of that name, or made and stored. Costs one generated
    token per token.
    """
    jobs = [
        (name, part, first)
        for name, part in data.parts.items()
        for first in range(0, part.sequences, SAMPLED_TOGETHER)
    ]
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in data.parts}
    for name, part, first in track(jobs, "sampling text from the reference"):
        count = min(SAMPLED_TOGETHER, part.sequences - first)
        seed = [data.seed, list(data.parts).index(name), first]
        make = partial(generate, model, count, part.length, seed)
        batch = keep(f"{name} {first} {count} {part.length} {data.seed}", make)
        pieces[name].append(batch["ids"])
    ids = {name: np.concatenate(batches) for name, batches in pieces.items()}
    return {name: Windows(block, np.arange(len(block))) for name, block in ids.items()}


def generate(model: HasNet, count: int, length: int, seed: list[int]) -> dict[str, np.ndarray]:
    """{ids: [count, length]}, sampled at temperature 1. The end token is never sampled, so every
    window is full."""
    import torch

    net: Any = model.net
    config = net.generation_config
    rng = np.random.default_rng(seed)
    starts = torch.from_numpy(_starts(net.config.get_text_config(), count, rng))
    device = next(net.parameters()).device
    first = int(rng.integers(2**31))

    def sampled(**how: Any) -> Any:
        torch.manual_seed(first)
        return net.generate(
            starts.to(device),
            attention_mask=torch.ones_like(starts, device=device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=length - 1,
            max_new_tokens=length - 1,
            pad_token_id=config.pad_token_id or 0,
            **how,
        )

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            ids = sampled()
        except Exception:  # noqa: BLE001  transformers' caches don't know every mixture of blocks
            ids = _uncached(net, sampled)
    return {"ids": ids.cpu().numpy()}


def _uncached(net: Any, sampled: Callable[..., Any]) -> Any:
    """The same without a cache, many times slower. Raises ModelError."""
    try:
        return sampled(use_cache=False)
    except Exception as error:  # noqa: BLE001  each architecture's own
        raise ModelError(
            f"transformers can't write text with {type(net).__name__} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Give a text to measure on: data=text "
            "data.path=FILE."
        ) from None


def _starts(config: Any, count: int, rng: np.random.Generator) -> np.ndarray:
    """First tokens [count, 1]: BOS; without one the end token, which separates documents in
    training; without either, tokens drawn evenly from the vocabulary."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        token = token[0] if isinstance(token, list) else token
        if token is not None and 0 <= token < config.vocab_size:
            return np.full((count, 1), token, dtype=np.int64)
    return rng.integers(config.vocab_size, size=(count, 1))
