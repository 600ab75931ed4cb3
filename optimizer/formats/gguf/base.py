"""The GGUF file of the unquantized model, from which every plan's file is made by retyping tensors.

It is the user's own (gguf=FILE), or the one that the model came from, or made by llama.cpp's converter
and kept in the store. Before it is used it must be the model's: its matrices are rows of the model's
layers, its metadata says what the model's config says, and llama.cpp makes the same tokens of texts,
and the same probabilities, as transformers does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer import drafts
from optimizer.errors import ModelError
from optimizer.formats.gguf import converter, llamacpp, placement
from optimizer.formats.gguf.placement import Piece, Placement
from optimizer.formats.gguf.strings import texts
from optimizer.models import gguf_metadata
from optimizer.models.gguf_metadata import Metadata
from optimizer.models.model import Model
from optimizer.models.source import Source, file_hash, gguf_of, quiet
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Inventory, digest
from optimizer.store import Store, alone, unwritable

if TYPE_CHECKING:
    import torch

VERSION = 1  # raised when a check or a placement changes
ALIKE = (
    0.01  # nats per token between 16-bit weights in llama.cpp and in transformers; < .0002 seen
)
ALIKE_QUANTIZED = 0.1  # the same where llama.cpp also rounds activations to 8 bits; .004 seen
WINDOW, LONGEST = 64, 640  # tokens that are compared; at most, for a sliding window
COMPARED = 10**9  # weights up to which probabilities are compared: transformers takes 4 bytes each


@dataclass(frozen=True)
class Base:
    """origin: given, source or converted. placed: where the model's layers are. notes: what a person
    should know of it."""

    file: Path
    origin: str
    placed: Placement
    notes: tuple[str, ...] = ()

    @cached_property
    def reader(self) -> Any:
        return gguf_metadata.opened(self.file)


@dataclass(frozen=True)
class Subject:
    """Whose file it is."""

    source: Source
    inventory: Inventory
    store: Store

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.inventory.layers)

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        with quiet():
            return AutoConfig.from_pretrained(self.source.folder)


def find(source: Source, inventory: Inventory, store: Store, given: str | None) -> Base:
    """The model's base file, checked. given: the user's own. Raises ModelError."""
    subject = Subject(source, inventory, store)
    file, origin = _file(subject, given)
    told = gguf_metadata.read(file)
    if int(told.fields.get("split.count", 0) or 0) > 1:
        raise ModelError(f"{file} is one of several parts. Join them with llama-gguf-split first.")
    gguf_metadata.check(subject.config, told)
    key = digest(["gguf base", VERSION, source.fingerprint, file_hash(file, store), origin])
    placed = _placed(subject, file, origin, key)
    notes = store.json(
        "gguf", digest([key, llamacpp.installed()]), lambda: _compared(subject, file, origin, told)
    )
    return Base(file, origin, placed, tuple(notes))


def _file(subject: Subject, given: str | None) -> tuple[Path, str]:
    if given is not None:
        file = Path(given).expanduser()
        if not file.is_file():
            raise ModelError(f"gguf= names a GGUF file of the model; there is no file {file}.")
        return file, "given"
    own = gguf_of(subject.source.name)
    if own is not None:
        return own, "source"
    return _converted(subject), "converted"


def _converted(subject: Subject) -> Path:
    """Made once for each model; its bytes are those of the 16-bit model again."""
    kind = _outtype(subject.inventory)
    key = digest(["gguf", converter.VERSION, VERSION, subject.source.fingerprint, kind])
    target = subject.store.root / "gguf" / f"{key[:40]}.gguf"
    if target.exists():
        return target
    name = Path(subject.source.name).name or "model"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with alone(target), drafts.folder(target.parent, target.name) as draft:
            if not target.exists():  # not made while this process waited
                converter.convert(subject.source.folder, draft / target.name, kind, name)
                (draft / target.name).rename(target)
    except OSError as error:
        raise unwritable(target, error) from None
    return target


def _outtype(inventory: Inventory) -> str:
    """16 bits, unless a matrix has more."""
    own = {layer.dtype for layer in inventory.layers}
    return {"F16": "f16", "BF16": "bf16"}.get(inventory.dtype, "f32") if len(own) == 1 else "f32"


# ---------------------------------------------------------------- whose rows


def _placed(subject: Subject, file: Path, origin: str, key: str) -> Placement:
    """Kept in the store: a placement is as many numbers as the model has rows."""

    def make() -> dict[str, np.ndarray]:
        return _arrays(_place(subject, file, origin))

    found = subject.store.arrays("placements", key, make)
    assert found is not None
    return _placement(found)


def _place(subject: Subject, file: Path, origin: str) -> Placement:
    model = Model.load(subject.source.folder, subject.inventory, full=False)
    tensors = {t.name: t for t in gguf_metadata.opened(file).tensors}

    def read(layer: Any) -> torch.Tensor:
        return model.weight(layer.name)

    found = placement.place(tensors, subject.inventory.layers, read, subject.inventory.dtype)
    if origin == "given":
        wrong = placement.first_difference(tensors, found, file)
        if wrong is not None:
            raise wrong
    return found


def _arrays(placed: Placement) -> dict[str, np.ndarray]:
    """As arrays that the store keeps: texts as uint8, a tensor's layers joined by line ends."""
    found: dict[str, np.ndarray] = {
        "refused": _bytes([f"{name}\t{reason}" for name, reason in placed.refused.items()])
    }
    for name, piece in placed.pieces.items():
        found[f"names|{name}"] = _bytes(piece.layers)
        found[f"layer|{name}"], found[f"row|{name}"] = piece.layer, piece.row
    return found


def _bytes(lines: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\n".join(lines).encode(), np.uint8)


def _lines(data: np.ndarray) -> list[str]:
    return data.tobytes().decode().split("\n") if len(data) else []


def _placement(found: Mapping[str, np.ndarray]) -> Placement:
    names = [key.partition("|")[2] for key in found if key.startswith("names|")]
    pieces = {
        name: Piece(
            tuple(_lines(found[f"names|{name}"])), found[f"layer|{name}"], found[f"row|{name}"]
        )
        for name in names
    }
    refused = dict(line.split("\t", 1) for line in _lines(found["refused"]))
    return Placement(pieces, refused)


# ---------------------------------------------------------------- what llama.cpp makes of it


def _compared(subject: Subject, file: Path, origin: str, told: Metadata) -> list[str]:
    """Notes. Raises ModelError where llama.cpp computes something else than transformers."""
    if not llamacpp.installed():
        return [
            f"The GGUF file wasn't read in llama.cpp: {llamacpp.PACKAGE} isn't installed (pip install "
            "'mezzotint[gguf]')."
        ]
    tokenizer = load_tokenizer(subject.source.folder)
    notes = _compare_tokens(tokenizer, file, origin)
    if subject.weights > COMPARED:
        return [*notes, "The model is too large for its probabilities to be compared here."]
    _compare_probabilities(subject, tokenizer, file, told)
    return notes


def _compare_tokens(tokenizer: Any, file: Path, origin: str) -> list[str]:
    wanted = texts(sorted(tokenizer.all_special_tokens))
    few = wanted[:: max(1, len(wanted) // 20)]
    with quiet():
        own = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in wanted]
        whole = [tokenizer(t)["input_ids"] for t in few]
    both = [(wanted, own, False), (few, whole, True)]
    for asked, mine, special in both:
        theirs = llamacpp.tokens(file, asked, special)
        for text, a, b in zip(asked, mine, theirs, strict=True):
            if a == b:
                continue
            odd = f"{text!r} is {_shown(a)} in transformers and {_shown(b)} in llama.cpp"
            if origin == "converted":
                raise ModelError(
                    f"llama.cpp has no tokenizer that does what this model's does: {odd}. "
                    f"{converter.WAY_OUT}"
                )
            return [f"{file.name} cuts some texts otherwise than the model's tokenizer: {odd}."]
    return []


def _shown(ids: Sequence[int]) -> str:
    return str(list(ids)[:8]) + ("..." if len(ids) > 8 else "")


def _compare_probabilities(subject: Subject, tokenizer: Any, file: Path, told: Metadata) -> None:
    import torch

    quantized = any(t not in ("F32", "F16", "BF16") for t in _types(file))
    ids = list(_window(subject, tokenizer))
    positions = sorted({7, len(ids) // 3, 2 * len(ids) // 3, len(ids) - 1})
    model = Model.load(subject.source.folder, subject.inventory)
    with torch.inference_mode(), quiet():
        logits = model.net(input_ids=torch.tensor([ids])).logits[0, positions].float()
    log_p = torch.log_softmax(logits, -1).double().numpy()
    del model, logits
    log_q = llamacpp.log_probabilities(file, ids, positions, log_p.shape[1])
    losses = [divergence(p, q) for p, q in zip(log_p, log_q, strict=True)]
    worst = max(losses)
    if not worst <= (ALIKE_QUANTIZED if quantized else ALIKE):
        raise ModelError(
            f"llama.cpp computes another model from {file.name} ({told.architecture}) than "
            f"transformers from {subject.source.folder}: after {positions[losses.index(worst)] + 1} "
            f"tokens their predictions differ by {worst:.3g} nats. {converter.WAY_OUT}"
        )


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q) in nats over the words of which both say something; infinite if q says nothing."""
    told = np.isfinite(log_q) & np.isfinite(log_p)
    if not told.any():
        return float("inf")
    p = log_p[told]
    return float(np.abs((np.exp(p) * (p - log_q[told])).sum()))


def _types(file: Path) -> Iterator[str]:
    for tensor in gguf_metadata.opened(file).tensors:
        if len(tensor.shape) > 1:
            yield tensor.tensor_type.name


def _window(subject: Subject, tokenizer: Any) -> Iterator[int]:
    """Tokens of ordinary texts, more than a sliding window has, if that is affordable."""
    text = gguf_metadata.text_part(subject.config)
    own = gguf_metadata.window(text) or 0
    length = max(WINDOW, own + WINDOW // 2) if own <= LONGEST else WINDOW
    most = getattr(text, "max_position_embeddings", None) or length
    count, joined = 0, " ".join(texts(()))
    while count < min(length, most):
        for i in tokenizer(joined, add_special_tokens=False)["input_ids"]:
            if count < min(length, most):
                count += 1
                yield int(i)
