"""A finished plan looked at closely, beside the reference and a uniform plan of at least its bytes:
probes of fine distinctions, and the blur map of a text.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer.commands.deploy import check_language_model, check_names, quantizer_of, reference_of
from optimizer.config import Blur, Probe
from optimizer.data import pairs as probes
from optimizer.errors import ConfigError, StorageError, TextError
from optimizer.hardware.memory import kind_of
from optimizer.models.source import context_length
from optimizer.plan import UNTOUCHED, Inventory, Plan, Precision, digest, stored_bytes
from optimizer.plan.cache import WHOLE, CacheKind
from optimizer.stages.session import check_device
from optimizer.stages.view import View
from optimizer.store import Store, write_atomically

if TYPE_CHECKING:
    from optimizer.certificate.pairs import Cell
    from optimizer.formats.torch.modes import Unpacking
    from optimizer.metrics.blur import Map
    from optimizer.models.model import Model

TUNED = "on whose half the plan was tuned"
VERSION = 1  # raised when the margins of the same pairs change

Choice = Mapping[str, Precision]


class Subject:
    """A plan, the reference that it was made for, and the weights that are looked at."""

    def __init__(
        self, command: str, asked: Probe | Blur, view: View, unpack: bool = False
    ) -> None:
        check_device(asked.device)
        self.plan, self.view, self.device = Plan.load(asked.plan), view, asked.device
        self.store = Store.open(asked.store, view.note)
        if self.plan.refinement is not None and not unpack:
            view.note(
                f"`mezzotint {command}` looks at the plan's base, without its refinement; `mezzotint "
                "evaluate` and `generate` unpack it."
            )
        view.stage(f"finding {asked.model or self.plan.model['name']}")
        self.source, self.inventory = reference_of(self.plan, asked.model, self.store)
        check_language_model(self.source, command)
        check_names(self.plan, self.inventory)
        self.quantizer = quantizer_of(self.plan, self.source, self.inventory, self.store, view)
        self.context = context_length(self.source.folder)
        self.rival = uniform_beside(self.plan, self.inventory)

    @cached_property
    def model(self) -> Model:
        from optimizer.models.model import Model

        self.view.stage("loading the reference")
        return Model.load(self.source.folder, self.inventory, self.device)

    @cached_property
    def tokenizer(self) -> Any:
        from optimizer.models.tokenizer import load_tokenizer

        return load_tokenizer(self.source.folder)

    @property
    def weights(self) -> dict[str, Choice]:
        """The name and the assignment of everything that is compared with the reference."""
        found: dict[str, Choice] = {"plan": self.plan.choice}
        return found if self.rival is None else found | {self.rival[0]: self.rival[1]}

    def bytes(self, choice: Choice) -> int:
        return _tensor_bytes(self.inventory, choice)

    @contextmanager
    def holding(self, choice: Choice) -> Iterator[Any]:
        """The network with these weights and, unless they are the reference's, the plan's cache;
        afterwards with the reference's own again."""
        from optimizer.models.kv_cache import rounded

        kind = self.cache if choice else WHOLE
        with (
            self.model.rounded(self.quantizer.rounder(choice), choice),
            rounded(self.model.net, kind),
        ):
            yield self.model.net

    @property
    def cache(self) -> CacheKind:
        """The plan's."""
        return kind_of(self.plan)


def uniform_beside(plan: Plan, inventory: Inventory) -> tuple[str, dict[str, Precision]] | None:
    """Name and assignment of the smallest uniform plan that has at least the plan's bytes and the
    plan's usual kind of groups. None if the plan is that one itself, or quantizes nothing."""
    usual = Counter[tuple[int | None, bool]]()
    for name in plan.scope:
        precision = plan.choice[name]
        if precision.kind != "none" and precision.bits > 1:
            rows, cols = plan.shapes.get(name, (1, 1))
            usual[precision.group_size, precision.symmetric] += rows * cols
    if not usual:
        return None
    group, symmetric = usual.most_common(1)[0][0]
    columns = {layer.name: layer.cols for layer in inventory.layers}
    palette = [Precision("int", bits, group, symmetric or bits == 1) for bits in range(1, 9)]
    found: list[tuple[int, str, dict[str, Precision]]] = []
    for precision in [*palette, UNTOUCHED]:
        name = "16 bits" if precision == UNTOUCHED else f"uniform {precision.name}"
        choice = {layer: precision.nearest(columns[layer]) for layer in plan.scope}
        found.append((_tensor_bytes(inventory, choice), name, choice))
    floor = _tensor_bytes(inventory, plan.choice)
    _, name, choice = min((one for one in found if one[0] >= floor), key=lambda one: one[0])
    full = {layer.name: choice.get(layer.name, UNTOUCHED) for layer in inventory.layers}
    return None if full == plan.choice else (name, choice)


def _tensor_bytes(inventory: Inventory, choice: Choice) -> int:
    """Without the header, which differs by some bytes and would upset comparisons."""
    stored = stored_bytes(inventory, choice)
    return stored["quantized"] + stored["untouched"]


def _check_target(out: str | None, sources: list[str]) -> None:
    """Raise before any work if the result can't be written, or would overwrite what is read."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir():
        raise ConfigError(f"out is a file to write; {out} is a folder. Name a file in it.")
    if any(path.resolve() == Path(source).resolve() for source in sources):
        raise ConfigError(f"out={out} would overwrite what is read. Choose another file.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{folder} can't be written to. Choose another out=FILE.")


# ---------------------------------------------------------------- probes


@dataclass(frozen=True)
class Probed:
    """What `mezzotint probe` found. sizes: bytes by the name of the weights; skipped: how many
    pairs, by reason."""

    plan: Plan
    source: str
    threshold: float
    sizes: dict[str, int]
    cells: list[Cell]
    totals: list[Cell]
    skipped: dict[str, int]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if key != "plan"}
        plain["cells"] = [asdict(cell) for cell in self.cells]
        plain["totals"] = [asdict(cell) for cell in self.totals]
        model = self.plan.model
        return {"plan": self.plan.id, "model": model["name"], **plain}


def probe(config: Probe, view: View | None = None) -> Probed:
    """Margins of minimal pairs with the reference's, the plan's and a uniform plan's weights.
    Resumable: the margins of a phenomenon are kept as soon as they are measured."""
    from optimizer.certificate import pairs as damage
    from optimizer.metrics import margins

    config.check()
    _check_target(config.out, [config.plan, config.probes or config.plan])
    pairs = _pairs(config)
    view = view or View()
    subject = Subject("probe", config, view)
    tuned = subject.plan.provenance.get("tuned", {})
    known = probes.key(config.probes) in (tuned.get("pairs"), tuned.get("choices"))
    whole, pairs = len(pairs), probes.halves(pairs)[1] if known else pairs
    jobs = margins.encode(pairs, subject.tokenizer, subject.context)
    skipped = Counter(job for job in jobs if isinstance(job, str))
    skipped[TUNED] = whole - len(pairs)
    skipped = +skipped
    if whole == skipped.total():
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise TextError(
            f"None of the {whole} pairs can be measured with this model: {reasons}. Give pairs "
            "that it can read with probes=FILE."
        )
    measured = {"reference": _margins(subject, {}, pairs, jobs, "the reference")}
    for name, choice in subject.weights.items():
        measured[name] = _margins(subject, choice, pairs, jobs, name)
    reference = measured.pop("reference")
    cells, totals = damage.judge(pairs, reference, measured, config.threshold)
    rival = None if subject.rival is None else subject.rival[0]
    found = Probed(
        subject.plan,
        config.probes or "built in",
        config.threshold,
        {name: subject.bytes(choice) for name, choice in subject.weights.items()},
        cells,
        totals,
        dict(skipped),
        damage.verdict(cells, "plan", rival),
    )
    if config.out is not None:
        write_atomically(Path(config.out), json_bytes(found.to_json()))
    return found


def _pairs(config: Probe) -> list[probes.Pair]:
    if config.probes is not None:
        return probes.read(Path(config.probes))
    return probes.built_in(config.language_list)


def _margins(
    subject: Subject, choice: Choice, pairs: list[probes.Pair], jobs: list[Any], name: str
) -> np.ndarray:
    """Margins [pairs] of one set of weights, NaN where a pair is skipped; kept by content."""
    from optimizer.metrics import margins

    real = {layer: p.name for layer, p in sorted(choice.items()) if p.kind != "none"}
    weights = [subject.source.fingerprint, subject.quantizer.key, real]
    weights += [astuple(subject.cache)] if choice and subject.plan.kv < 16 else []
    found = np.full(len(pairs), np.nan)
    rows = {
        key: [
            i for i, pair in enumerate(pairs) if pair.cell == key and not isinstance(jobs[i], str)
        ]
        for key in probes.cells(pairs)
    }
    keys = {
        key: digest(["margins", VERSION, weights, [asdict(jobs[i]) for i in row]])
        for key, row in rows.items()
        if row
    }
    todo = [key for key in keys if subject.store.arrays("margins", keys[key]) is None]
    if todo:
        with subject.holding(choice) as net:
            for key in subject.view.track(todo, f"probing {name}"):

                def make(key: tuple[str, str] = key) -> dict[str, np.ndarray]:
                    return {"margins": margins.measure(net, [jobs[i] for i in rows[key]])}

                subject.store.arrays("margins", keys[key], make)
    for key, entry in keys.items():
        kept = subject.store.arrays("margins", entry)
        assert kept is not None
        found[rows[key]] = kept["margins"]
    return found


def json_bytes(value: Any) -> bytes:
    import json

    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------- blur map


def blur(config: Blur, view: View | None = None) -> Map:
    """Read a text with the reference, the plan and a uniform plan, and say where they differ.
    Writes the page if config.to is html."""
    from optimizer.metrics import blur as map_of
    from optimizer.reports.html import blur_map

    config.check()
    html = config.to == "html"
    _check_target(config.out if html else None, [config.plan, config.text])
    text = map_of.read(Path(config.text))
    view = view or View()
    way = _way(config)
    subject = Subject("blur", config, view, unpack=way is not None)
    cut = map_of.cut(
        text, subject.tokenizer, config.context, subject.context, config.tokens, config.top
    )
    weights = [
        map_of.Weights(name, subject.bytes(choice), choice)
        for name, choice in subject.weights.items()
    ]
    holding = subject.holding
    if way is not None:
        weights, holding = _unpacked(subject, Path(config.plan), way, weights[0])
    found = map_of.measure(cut, subject.model.net, holding, weights, subject.tokenizer, view.track)
    if html:
        title = (
            f"{Path(config.text).name}: plan {subject.plan.id} for {subject.plan.model['name']}"
        )
        write_atomically(Path(config.out), blur_map.render(found, title, config.passages).encode())
    return found


def _way(config: Blur) -> Unpacking | None:
    """How the folder is unpacked, if it is to be shown. What can be wrong with it ends here."""
    if config.unpack is None and config.share is None:
        return None
    from optimizer.formats.torch import packed
    from optimizer.formats.torch.modes import Unpacking

    folder, way = Path(config.plan), Unpacking(config.unpack, config.share)
    way.check()
    if not folder.is_dir():
        raise ConfigError(
            f"unpack={config.unpack} opens the planes of a packed folder, and {folder} is none. Give "
            "the folder that `mezzotint apply` wrote."
        )
    way.settle(packed.verify(folder), folder)
    return way


def _unpacked(subject: Subject, folder: Path, way: Unpacking, base: Any) -> tuple[list[Any], Any]:
    """The packed folder as it is unpacked, then its base alone; and how they are held."""
    from optimizer.formats.torch import packed
    from optimizer.models.kv_cache import rounded

    section = subject.plan.refinement
    assert section is not None
    both = base.bytes + section.bytes["quantized"]
    opened = replace(base, name=f"unpack={way.mode}", bytes=both, choice=None)

    @contextmanager
    def holding(choice: Choice | None) -> Iterator[Any]:
        if choice is not None:
            with subject.holding(choice) as net:
                yield net
            return
        net = packed.load(folder, device=subject.device, steady=True, unpacking=way)
        with rounded(net, subject.cache):
            yield net

    return [opened, replace(base, name="base alone")], holding
