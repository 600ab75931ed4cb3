"""What a run leaves behind besides its plan: the front, the measured plans, how it was asked.

`run.json` holds everything that the page and the records draw, so both can be made again without
the model. Plans are named by `layers`: one letter per group, chr(48 + column).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimizer import untrusted
from optimizer.errors import ConfigError, PlanError
from optimizer.hardware.throughput import Traffic, price
from optimizer.plan import UNTOUCHED, Inventory, Plan, Precision, digest, identity, stored_bytes
from optimizer.store import write_atomically

if TYPE_CHECKING:
    from optimizer.search import Problem, Third
    from optimizer.stages.space import SearchSpace

FORMAT, VERSION = "mezzotint-run", 1
FILE = "run.json"
LETTERS = 400_000  # groups times front rows that are kept: half a megabyte
FIRST = 48  # "0"
FRONT_ROWS = 400


@dataclass(frozen=True)
class Point:
    """A plan in the plane of bytes and loss.

    bytes: of the tensors, headers not counted, as in the certificate. bits: per weight in scope,
    scales counted. predicted, measured: mean KL in nats, the latter on search documents (None: not
    measured). measures: name -> {value, low, high}. moved: bytes that are read for each new token
    (optimizer.hardware.throughput), or by one pass of an encoder. seconds: that each takes
    by optimizer.stages.latency; 0: not measured.
    """

    name: str
    id: str
    bytes: int
    bits: float
    predicted: float
    measured: float | None = None
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    layers: str = ""
    moved: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """columns: the palette's names; groups: layer names per group; chosen: the plan's point. unit:
    what its KL are nats of, `token` or, for encoders, `text`."""

    model: str
    key: str
    columns: dict[str, Precision]
    groups: tuple[tuple[str, ...], ...]
    chosen: Point
    front: tuple[Point, ...]
    measured: tuple[Point, ...]
    prediction: dict[str, float]
    notes: tuple[str, ...]
    config: dict[str, Any]
    seconds: float
    unit: str = "token"

    def save(self, folder: Path) -> Path:
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return write_atomically(folder / FILE, text.encode())

    @property
    def third(self) -> str | None:
        """Which third objective was asked for."""
        found = self.config.get("search", {}).get("third")
        return None if found is None else str(found)

    def price(self, point: Point) -> float | None:
        """Of a million tokens; None where no rate was given or no time measured."""
        rate = self.config.get("search", {}).get("hourly_rate")
        return price(float(rate), 1 / point.seconds) if rate and point.seconds else None

    def cost(self, point: Point) -> float:
        """The third objective of a plan: bytes, seconds, or a price."""
        if self.third == "price":
            return self.price(point) or 0.0
        return point.seconds if self.third == "time" else float(point.moved)

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Raises PlanError for anything but a whole run.json."""
        path = folder / FILE
        try:
            data = untrusted.read(path, "null")
        except FileNotFoundError:
            raise PlanError(
                f"A run's folder holds {FILE}; {folder} doesn't. Give the folder that `mezzotint "
                "optimize` wrote (hydra.run.dir)."
            ) from None
        except (OSError, ValueError) as error:
            raise PlanError(
                f"{path} can't be read ({error}). Run the same command again."
            ) from None
        try:
            return cls._build(data)
        except (ValueError, ConfigError) as error:
            raise PlanError(
                f"{path} isn't a run of this version ({error}). Run the same command again: what was "
                "measured is kept."
            ) from None

    @classmethod
    def _build(cls, data: Any) -> Run:
        """Raises ValueError for what isn't of the types in `schema`."""
        from optimizer.reports.schema import RunFile, numbers

        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (
            FORMAT,
            VERSION,
        ):
            raise ValueError(f"format and version aren't {FORMAT} {VERSION}")
        found = untrusted.checked(RunFile, data)
        return cls(
            model=found.model,
            key=found.key,
            columns={
                key: Precision(row.kind, row.bits, row.group_size, row.symmetric)
                for key, row in found.columns.items()
            },
            groups=tuple(map(tuple, found.groups)),
            chosen=_point(data["chosen"]),
            front=tuple(map(_point, data["front"])),
            measured=tuple(map(_point, data["measured"])),
            prediction=numbers(found.prediction),
            notes=tuple(found.notes),
            config=data["config"],
            seconds=found.seconds,
            unit=found.unit,
        )


def _point(data: Mapping[str, Any]) -> Point:
    known = {one.name for one in fields(Point)}
    return Point(**{key: value for key, value in data.items() if key in known})


def letters(assignment: Sequence[int] | np.ndarray) -> str:
    return "".join(chr(FIRST + int(column)) for column in assignment)


@dataclass(frozen=True)
class Scale:
    """Turns assignments of one model into points without touching its inventory again.

    size [G, P]: bytes; read [G, P]: those that a step of decoding reads; constant, outside: the
    same of everything outside the groups. times: of each new token, where they were measured.
    """

    fingerprint: str
    quantizer: Mapping[str, Any]
    space: SearchSpace
    names: tuple[str, ...]
    size: np.ndarray
    constant: int
    weights: float
    traffic: Traffic
    read: np.ndarray
    outside: float
    times: Third | None = None

    @classmethod
    def of(
        cls,
        inventory: Inventory,
        space: SearchSpace,
        fingerprint: str,
        quantizer: Mapping[str, Any],
        traffic: Traffic = Traffic(),  # noqa: B008  (frozen)
    ) -> Scale:
        layers = {layer.name: layer for layer in space.scope}

        def size(group: Sequence[str], column: str) -> int:
            return sum(layers[name].bytes(space.fitted[name, column]) for name in group)

        sizes = np.array([[size(g, c) for c in space.columns] for g in space.groups])
        whole = stored_bytes(inventory, {})
        inside = sum(layer.bytes(UNTOUCHED) for layer in space.scope)
        shares = [[traffic.share(layers[name]) for name in group] for group in space.groups]
        read = sizes * np.array([[np.mean(row)] for row in shares])
        untouched = traffic.weights(inventory, {})
        scoped = sum(x.bytes(UNTOUCHED) * traffic.share(x) for x in space.scope)
        return cls(
            fingerprint,
            quantizer,
            space,
            tuple(layer.name for layer in inventory.layers),
            sizes,
            whole["untouched"] - inside,
            float(sum(layer.weights for layer in space.scope)),
            traffic,
            read,
            untouched - scoped,
        )

    def point(self, name: str, assignment: np.ndarray, predicted: float, **rest: Any) -> Point:
        rows = np.arange(len(self.size))
        inside = int(self.size[rows, assignment].sum())
        choice = self.space.choice(assignment)
        full = {layer: choice[layer].name if layer in choice else "none" for layer in self.names}
        return Point(
            name,
            identity(self.fingerprint, self.quantizer, full),
            inside + self.constant,
            8 * inside / self.weights,
            float(predicted),
            layers=letters(assignment),
            moved=self.traffic.token(self.outside + float(self.read[rows, assignment].sum())),
            seconds=0.0 if self.times is None else self.times.of(assignment),
            **rest,
        )

    def third(self, name: str, hourly_rate: float | None) -> Third:
        """The objective of this name, see `Search.third`."""
        from optimizer.search import Third

        if name == "read":
            batch = self.traffic.batch
            return Third(name, self.read / batch, self.outside / batch + self.traffic.cache)
        assert self.times is not None
        if name == "time":
            return self.times
        assert hourly_rate is not None
        a_second = price(hourly_rate, 1.0)
        return Third(name, a_second * self.times.each, a_second * self.times.outside)

    def front(self, problem: Problem, rows: int) -> tuple[Point, ...]:
        """The exact front, thinned evenly to `rows` plans."""
        from optimizer.search import exact

        _, losses, assignments = exact.front(problem)
        rows = max(2, min(rows, LETTERS // len(self.size)))
        keep = np.unique(np.linspace(0, len(losses) - 1, rows).round().astype(int))
        return tuple(self.point("front", assignments[i], losses[i]) for i in keep)


def chosen_point(scale: Scale, plan: Plan, measured: Sequence[Point]) -> Point:
    """The plan's own point, with its measurement if one of the measured plans is the same."""
    column = {name: i for i, name in enumerate(scale.space.columns)}
    fitted = {key: precision.name for key, precision in scale.space.fitted.items()}
    assignment = np.array(
        [
            next(c for c in column if fitted[group[0], c] == plan.layers[group[0]])
            for group in scale.space.groups
        ]
    )
    indices = np.array([column[name] for name in assignment])
    twin = next((point for point in measured if point.id == plan.id), None)
    rest: dict[str, Any] = {}
    if twin is not None:
        rest = {"measured": twin.measured, "measures": twin.measures}
    return scale.point("plan", indices, plan.predicted["kl"], **rest)


def run_key(config: Mapping[str, Any], fingerprint: str) -> str:
    """The same question about the same model has the same key, wherever its results lie."""
    asked = {k: v for k, v in config.items() if k not in ("store", "device", "wandb")}
    return digest(["run", VERSION, fingerprint, asked])[:16]


def overrides(config: Mapping[str, Any]) -> list[str]:
    """The words after `mezzotint optimize` that make this configuration: what differs from the
    defaults, as Hydra reads it."""
    from optimizer.config import Optimize
    from optimizer.quantization.methods import method
    from optimizer.sensitivity import estimator

    quantizer, sensitivity = config.get("quantizer", {}), config.get("sensitivity", {})
    made = method(quantizer.get("name", "rtn"))()
    default = asdict(Optimize(model="", quantizer=made))
    found = [f"model={_written(config.get('model'))}"]
    if made.name != asdict(Optimize(model=""))["quantizer"]["name"]:
        found.append(f"quantizer={made.name}")
    other = sensitivity.get("estimator", default["sensitivity"]["estimator"])
    if other != default["sensitivity"]["estimator"]:
        default["sensitivity"] = asdict(estimator(other)())
        found.append(f"sensitivity={other}")
    usual = _flat(default)
    for key, value in _flat(config).items():
        own = key in ("model", "store", "device") or key.startswith("wandb")
        if not own and value != usual.get(key, None):
            found.append(f"{key}={_written(value)}")
    return found


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


PLAIN = re.compile(r"(?a)[\w./@%+~-]+( [\w./@%+~-]+)*")  # needs no quotes in Hydra's grammar
NOT_TEXT = re.compile(r"(?i)null|true|false|[+-]?(inf|nan|[\d_.]+(e[+-]?[\d_]+)?)")


def _written(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_written(item) for item in value) + "]"
    return quoted(value) if isinstance(value, str) and not _plain(value) else str(value)


def _plain(text: str) -> bool:
    """Whether Hydra reads the text as itself: no quotes needed, and no number or null."""
    return bool(PLAIN.fullmatch(text)) and not NOT_TEXT.fullmatch(text)


def quoted(text: str) -> str:
    """A text as a quoted value of Hydra's overrides that neither Hydra nor OmegaConf changes: of
    backslashes only those before a quote, the end, or an interpolation count."""
    literal = re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", text)
    escaped = re.sub(r"(\\*)('|\Z)", lambda found: _before_quote(found[1], found[2]), literal)
    return f"'{escaped}'"


def _before_quote(backslashes: str, quote: str) -> str:
    return backslashes * 2 + (f"\\{quote}" if quote else "")


def save_history(rows: Sequence[Mapping[str, float]], path: Path) -> Path:
    """What the search measured: one row per trial, with the evaluated tokens until then."""
    lines = [",".join(rows[0])]
    lines += [",".join(f"{v:.8g}" for v in row.values()) for row in rows]
    return write_atomically(path, ("\n".join(lines) + "\n").encode())


def save_pictures(pictures: Mapping[str, bytes], folder: Path) -> None:
    """Of the search: search-NAME.png. Those of an earlier run there are removed."""
    for old in folder.glob("search-*.png"):
        old.unlink()
    for name, data in pictures.items():
        write_atomically(folder / f"search-{name}.png", data)


def save_front(problem: Problem, path: Path) -> Path:
    """The whole front of budgets: size, predicted loss, at most FRONT_ROWS rows."""
    from optimizer.search import exact

    sizes, losses, _ = exact.front(problem)
    keep = np.unique(np.linspace(0, len(sizes) - 1, FRONT_ROWS).round().astype(int))
    scale = problem.weights.sum() / (1 if problem.unit == "code bits" else 8)
    lines = ["bits_per_weight,size,predicted_kl"]
    lines += [f"{sizes[i] / scale:.6f},{sizes[i]:.0f},{losses[i]:.8g}" for i in keep]
    return write_atomically(path, ("\n".join(lines) + "\n").encode())
