"""Who takes part in a comparison: plans, packed folders, models, and the reference that they are
judged beside. Found without loading PyTorch, so that a comparison that is already written starts at
once; opened one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from optimizer import untrusted
from optimizer.commands.deploy import check_language_model, check_names, quantizer_of, reference_of
from optimizer.errors import ConfigError
from optimizer.formats.folder import MANIFEST
from optimizer.hardware.memory import kind_of
from optimizer.models.source import Source, locate, packed_file
from optimizer.plan import Plan, digest
from optimizer.stages.view import View
from optimizer.store import Store

REFERENCE = "reference"


@dataclass(frozen=True)
class Entrant:
    """name: for people, unique in a comparison. home: the model that it is, or was made from. plan:
    None = the model itself. packed: the folder of packed weights, if they are taken from one.
    identity: of what it writes. bytes: of its weight file."""

    name: str
    home: Source
    plan: Plan | None
    packed: Path | None
    identity: str
    bytes: int


@dataclass(frozen=True)
class Open:
    """A loaded entrant. cache: makes an empty one of the plan's kind; None = the model's own."""

    net: Any
    tokenizer: Any
    cache: Callable[[], Any | None]


def find(given: Sequence[str], model: str | None, store: Store, command: str) -> list[Entrant]:
    """The entrants in the order in which they were given. `reference` is the model of the first plan
    or packed folder. model: where that lies, if no longer where the plan says."""
    plans = [_planned(Path(name).expanduser()) for name in given]
    first = next((plan for plan in plans if plan is not None), None)
    found = []
    for name, plan in zip(given, plans, strict=True):
        if plan is None and name == REFERENCE:
            revision = first.model.get("revision") if first else None
            one = _of_model(_home_name(first, model), revision, store)
            one = replace(one, name=REFERENCE)
        elif plan is None:
            one = _of_model(name, None, store)
        else:
            one = _of_plan(Path(name).expanduser(), plan, model, store)
        check_language_model(one.home, command)
        found.append(one)
    return _named_apart(found)


def reference(entrants: Sequence[Entrant]) -> Entrant:
    """The model of the first of them."""
    home = next((one.home for one in entrants if one.plan is not None), entrants[0].home)
    return replace(_model(home), name=REFERENCE)


def _planned(path: Path) -> Plan | None:
    """The plan at a path, or of a packed folder; None for anything else."""
    if path.is_dir():
        return Plan.load(path) if (path / "plan.json").is_file() else None
    return Plan.load(path) if path.suffix == ".json" else None


def _home_name(first: Plan | None, model: str | None) -> str:
    if model is not None:
        return model
    if first is None:
        raise ConfigError(
            "`reference` is the model that a plan was made for, and no plan or packed folder is "
            "among the models. Name the model itself instead, or say model=..."
        )
    return str(first.model["name"])


def _of_plan(path: Path, plan: Plan, model: str | None, store: Store) -> Entrant:
    home = locate(model or str(plan.model["name"]), store, plan.model.get("revision"))
    wanted = plan.model.get("fingerprint")
    if wanted and home.fingerprint != wanted:
        raise ConfigError(
            f"{path} was made for {plan.model['name']} ({str(wanted)[:19]}), and {home.name} is "
            f"another model ({home.fingerprint[:19]}). Say where its own one is with model=..."
        )
    folder = path if packed_file(path) is not None else None
    content = [plan.id, home.fingerprint, plan.quantizer, plan.kv, plan.keep]
    if folder is not None:
        content.append(_manifest_mark(folder))
    name = path.name if path.name != "plan.json" else path.parent.name or path.name
    return Entrant(name, home, plan, folder, digest(content), int(plan.bytes["total"]))


def _manifest_mark(folder: Path) -> str:
    """Stands for the packed files, whose hashes it lists; they are compared when they are loaded."""
    try:
        return sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{folder / MANIFEST} can't be read ({error.strerror}). Make the folder again: mezzotint "
            "apply plan.json out=DIR"
        ) from None


def _of_model(name: str, revision: str | None, store: Store) -> Entrant:
    return _model(locate(name, store, revision))


def _model(home: Source) -> Entrant:
    size = sum(file.stat().st_size for file in home.folder.glob("*.safetensors"))
    return Entrant(Path(home.name).name, home, None, None, digest([home.fingerprint]), size)


def _named_apart(found: Sequence[Entrant]) -> list[Entrant]:
    """Equal names get the plan's id, and what is still equal a number."""
    names: list[str] = []
    for one in found:
        name = one.name
        if sum(other.name == name for other in found) > 1 and one.plan is not None:
            name = f"{name} ({one.plan.id})"
        twins = sum(other == name or other.startswith(f"{name}, number ") for other in names)
        names.append(f"{name}, number {twins + 1}" if twins else name)
    return [replace(one, name=name) for one, name in zip(found, names, strict=True)]


def differences(entrants: Sequence[Entrant]) -> list[str]:
    """What a person must know about models that read or answer in different ways."""
    homes = {one.home.fingerprint: one for one in entrants}
    notes = []
    if len({_tokenizer_mark(one.home.folder) for one in homes.values()}) > 1:
        notes.append(
            f"{_list(homes.values())} have different tokenizers. Their texts are compared; their "
            "predictions can't be, so votes between them teach nothing but length and repetition."
        )
    if len({template(one.home.folder) for one in homes.values()}) > 1:
        notes.append(
            f"{_list(homes.values())} have different chat templates. With chat=true each prompt is "
            "put as the model's own template wants it; without, as plain text to all of them."
        )
    return notes


def _list(some: Any) -> str:
    return " and ".join(one.name for one in some)


def _tokenizer_mark(folder: Path) -> str:
    file = folder / "tokenizer.json"
    return sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def template(folder: Path) -> str | None:
    """The chat template, from the file of its own or the tokenizer's config."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        found = untrusted.read(config)
    except ValueError:
        return None
    text = found.get("chat_template") if isinstance(found, dict) else None
    return json.dumps(text) if text else None


@contextmanager
def opened(
    one: Entrant, store: Store, device: str, view: View, base: bool = False
) -> Iterator[Open]:
    """The entrant, loaded, with its own weights. base: without the refinement that its folder may
    have. Raises PlanError if it isn't what it says."""
    from optimizer.models.kv_cache import BITS, Cache
    from optimizer.models.model import Model
    from optimizer.models.tokenizer import load_tokenizer

    def cache(net: Any) -> Callable[[], Any | None]:
        plan = one.plan
        if plan is None or plan.kv not in BITS:
            return lambda: None
        return lambda: Cache(net.config, kind_of(plan))

    view.stage(f"loading {one.name}")
    if one.packed is not None:
        from optimizer.formats.torch import packed
        from optimizer.formats.torch.modes import Unpacking

        way = Unpacking("never") if base else Unpacking()
        # once: its own reference fits as well
        net = packed.load(one.packed, device=device, unpacking=way, once=True)
        yield Open(net, load_tokenizer(one.packed), cache(net))
        return
    tokenizer = load_tokenizer(one.home.folder)
    if one.plan is None:
        from optimizer.models.model import take_inventory

        model = Model.load(one.home.folder, take_inventory(one.home.folder), device)
        yield Open(model.net, tokenizer, cache(model.net))
        return
    source, inventory = reference_of(one.plan, str(one.home.folder), store)
    check_names(one.plan, inventory)
    model = Model.load(source.folder, inventory, device)
    if one.plan.refinement is not None:
        view.note(f"{one.name} is the plan's base; its packed folder has the refinement, too.")
    quantizer = quantizer_of(one.plan, one.home, inventory, store, view)
    with model.rounded(quantizer.rounder(one.plan.choice, joint=True), one.plan.choice):
        yield Open(model.net, tokenizer, cache(model.net))
