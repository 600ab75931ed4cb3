"""Budgets and plans, their exact bytes and their JSON. No torch: plans can be read anywhere."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from optimizer import untrusted
from optimizer.errors import ConfigError, PlanError
from optimizer.plan.cache import parse_keep
from optimizer.plan.certificate import Certificate, Prediction
from optimizer.plan.container import Entry, container_bytes, stored_entries
from optimizer.plan.inventory import Inventory, Layer
from optimizer.plan.precision import UNTOUCHED, WIDTH, Precision
from optimizer.plan.refinement import SHA256, Refinement
from optimizer.store import write_atomically

FORMAT, VERSION = "mezzotint-plan", 1
LARGEST = 1e21  # bytes: a thousand exabytes

SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes of `80MiB` (2**20), `80MB` (10**6), `1.5g`, or a plain number of bytes."""
    match = SIZE.fullmatch(str(text))
    if match is None:
        raise ConfigError(
            f"A size is a number with B, kB, MB, GB, KiB, MiB or GiB, not {str(text)[:60]!r}. "
            "Write, for example, budget.size=80MiB."
        )
    number, prefix, binary = match.groups()
    power = "kmgt".index(prefix.lower()) + 1 if prefix else 0
    size = float(number) * (1024 if binary else 1000) ** power
    if size >= LARGEST:
        raise ConfigError(f"A size is below {LARGEST:.0e} bytes, and {str(text)[:20]}... is more.")
    return int(size)


@dataclass(kw_only=True)
class Budget:
    """What the plan must fit in; exactly one of the first four is given.

    bits: average bits per weight in scope, scales and zero points counted.
    code_bits: average bits per weight in scope, codes alone.
    size: the whole weight file in the runtime's own format, untouched tensors, header and a GGUF's
        vocabulary counted, e.g. `80MiB`.
    memory: a machine's memory, of which the share `usable` is for a program; what the cache (of
        `batch` sequences of `context` tokens at `kv` bits), activations and the runtime take is
        subtracted (optimizer.hardware.memory). overhead: replaces the runtime's own estimate.
    kv: 32, 16, 8 or 4; several as a list, or `auto` for all that the runtime has: then weights and
        cache are searched together (optimizer.stages.kv_budget).
    keep: of a cache below 16 bits, how many of the first and the last tokens stay at 16, such as
        `4+64` (runtime=torch); a list, with null for none: they are searched, too.
    machine: gpu, apple or cpu. device, source: what it is called and where that is known from.
    """

    bits: float | None = None
    code_bits: float | None = None
    size: str | None = None
    memory: str | None = None
    usable: float = 1.0
    context: int = 4096
    batch: int = 1
    kv: Any = 16
    keep: Any = None
    overhead: str | None = None
    machine: str = "gpu"
    device: str | None = None
    source: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Which of the four are given."""
        four = {k: getattr(self, k) for k in ("bits", "code_bits", "size", "memory")}
        return {k: v for k, v in four.items() if v is not None}

    @property
    def asked(self) -> dict[str, Any]:
        """What determines the bytes, for a plan's own record."""
        if self.memory is None:
            return self.given
        return {k: v for k, v in asdict(self).items() if v is not None}

    @property
    def caches(self) -> list[int]:
        """Bits of the caches to try; none: all that the runtime has."""
        if self.kv == "auto":
            return []
        found = self.kv if isinstance(self.kv, list) else [self.kv]
        if not found or not all(isinstance(b, int) and 2 <= b <= 32 for b in found):
            raise ConfigError(
                f"budget.kv is bits of a cache such as 16, 8 or 4, a list of them, or auto, not "
                f"{self.kv!r}."
            )
        return sorted(set(found), reverse=True)

    @property
    def keeps(self) -> list[str | None]:
        """What to try beside each cache that is rounded."""
        found = self.keep if isinstance(self.keep, list) else [self.keep]
        for one in found:
            parse_keep(one)
        if not found:
            raise ConfigError("budget.keep is an empty list. Write 4+64, a list of such, or null.")
        return list(dict.fromkeys(None if one is None else str(one) for one in found))

    def with_cache(self, bits: int, keep: str | None = None) -> Budget:
        return replace(self, kv=bits, keep=keep)

    def check(self) -> None:
        _ = self.keeps
        if self.memory is None and len(self.caches) * len(self.keeps) != 1:
            raise ConfigError(
                "A smaller cache saves bytes for the weights only where both share a machine's "
                f"memory. Add budget=NAME (a machine), or choose one cache instead of "
                f"budget.kv={self.kv}, budget.keep={self.keep}."
            )
        if self.keeps != [None] and self.caches and min(self.caches) >= 16:
            raise ConfigError(
                f"budget.keep={self.keep} is about a cache of fewer than 16 bits, and budget.kv is "
                f"{self.kv}. Set budget.kv=8 or 4, or leave budget.keep out."
            )
        given = self.given
        if len(given) != 1:
            found = ", ".join(f"budget.{k}={v}" for k, v in given.items()) or "none"
            raise ConfigError(
                f"Exactly one of budget.bits, budget.code_bits, budget.size and a machine's "
                f"memory (budget=NAME) is needed; found {found}. For example: budget.bits=4.5"
            )
        key, value = next(iter(given.items()))
        number = parse_size(value) if key in ("size", "memory") else float(value)
        if not (math.isfinite(number) and number > 0):
            raise ConfigError(f"A budget is a positive number, not {value}.")
        self._check_machine()

    def _check_machine(self) -> None:
        if self.machine not in ("gpu", "apple", "cpu"):
            raise ConfigError(f"budget.machine is gpu, apple or cpu, not {self.machine!r}.")
        if not 0 < self.usable <= 1:
            raise ConfigError(f"budget.usable is a share above 0, at most 1, not {self.usable}.")
        _ = self.caches
        for key in ("context", "batch"):
            if getattr(self, key) < 1:
                raise ConfigError(f"budget.{key} is at least 1, not {getattr(self, key)}.")
        if self.overhead is not None:
            parse_size(self.overhead)

    @property
    def text(self) -> str:
        for key, unit in (("bits", "bits per weight"), ("code_bits", "code bits per weight")):
            if getattr(self, key) is not None:
                return f"{getattr(self, key):g} {unit}"
        if self.memory is not None:
            return str(self.device or self.memory)
        text = str(self.size)
        return text if text.strip(" .0123456789") else f"{parse_size(text)} bytes"


def stored_bytes(inventory: Inventory, choice: Mapping[str, Precision]) -> dict[str, int]:
    """Exact bytes of the packed file: {quantized, untouched, container, total}.

    `choice`: layer name -> precision; layers that it doesn't name stay untouched.
    """
    quantized = sum(
        layer.bytes(choice[layer.name])
        for layer in inventory.layers
        if choice.get(layer.name, UNTOUCHED).kind != "none"
    )
    entries = stored_entries(inventory, choice)
    untouched = sum(entry[3] for entry in entries) - quantized
    container = container_bytes(entries)
    return {
        "quantized": quantized,
        "untouched": untouched,
        "container": container,
        "total": quantized + untouched + container,
    }


def plane_bytes(inventory: Inventory, planes: Mapping[str, Precision]) -> dict[str, int]:
    """Exact bytes of the refinement's file: {quantized, container, total}; all 0 without planes."""
    entries: list[Entry] = []
    for layer in inventory.layers:
        if layer.name not in planes:
            continue
        parts = planes[layer.name].parts(layer.rows, layer.cols)
        for suffix, (dtype, shape) in parts.items():
            size = math.prod(shape) * WIDTH[dtype]
            entries.append((f"{layer.name}.{suffix}", dtype, shape, size))
    quantized = sum(entry[3] for entry in entries)
    container = container_bytes(entries, {"base": "0" * SHA256}) if entries else 0
    return {"quantized": quantized, "container": container, "total": quantized + container}


@dataclass(frozen=True)
class Plan:
    """Layer -> precision, with provenance; the product.

    `layers` names every quantizable tensor of the checkpoint; `palette` holds the precisions
    that it uses; `scope` the layers over which `effective_bits` averages; `kv` the bits of the
    cache that it is meant for and was measured with; `refinement`, where there is one, what can be
    added to the layers as they are stored.
    """

    model: dict[str, Any]
    runtime: str
    quantizer: dict[str, Any]
    palette: dict[str, Precision]
    layers: dict[str, str]
    shapes: dict[str, tuple[int, int]]
    scope: tuple[str, ...]
    bytes: dict[str, int]
    effective_bits: float
    code_bits: float
    predicted: dict[str, Any]
    kv: int = 16
    keep: str | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    refinement: Refinement | None = None

    @property
    def choice(self) -> dict[str, Precision]:
        """Layer name -> precision."""
        return {name: self.palette[key] for name, key in self.layers.items()}

    @cached_property
    def proof(self) -> Certificate | None:
        """The certificate, if there is one."""
        return Certificate.read(self.certificate)

    @property
    def prediction(self) -> Prediction:
        known = {f.name for f in fields(Prediction)}
        return Prediction(**{k: v for k, v in self.predicted.items() if k in known})

    @property
    def id(self) -> str:
        """Twelve hex digits that depend on the model, the quantizer and the assignment only."""
        return identity(self.model.get("fingerprint"), self.quantizer, self.layers)

    def to_json(self) -> dict[str, Any]:
        data = {"format": FORMAT, "version": VERSION, **{k: getattr(self, k) for k in _KEYS}}
        data["palette"] = {key: asdict(p) for key, p in self.palette.items()}
        data["shapes"] = {key: list(shape) for key, shape in self.shapes.items()}
        data["scope"] = list(self.scope)
        if self.refinement is not None:
            data["refinement"] = self.refinement.to_json()
        return {**data, "checksum": digest(data)}

    def save(self, path: str | Path) -> Path:
        """Write atomically; a killed or failed save leaves the old file as it was."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        return write_atomically(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read and verify. Raises PlanError for anything that isn't a whole, consistent plan.

        A plan without `checksum` (written or changed by hand) is accepted if its arithmetic is
        right, without certificate: what was measured may be another plan.
        """
        path = Path(path)
        path = path / "plan.json" if path.is_dir() else path
        try:
            data = untrusted.read(path)
        except FileNotFoundError:
            raise PlanError(
                f"No plan at {path}. `mezzotint optimize` writes one; give the path to it."
            ) from None
        except (OSError, ValueError) as error:
            raise PlanError(
                f"A plan is one whole JSON file; {path} can't be read ({error}). It was cut off "
                "or changed: run the command that made it again."
            ) from None
        return cls.from_json(data, where=str(path))

    @classmethod
    def from_json(cls, data: Any, where: str = "plan") -> Plan:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f'{where} is not a plan: its "format" must be "{FORMAT}".')
        if data.get("version") != VERSION:
            raise PlanError(
                f"{where} has plan version {data.get('version')!r}, this program reads version "
                f"{VERSION}. Make the plan again, or use the program that made it."
            )
        body = {key: value for key, value in data.items() if key != "checksum"}
        if "checksum" in data and data["checksum"] != digest(body):
            raise PlanError(
                f"{where} was changed after it was written: its checksum is {digest(body)[:12]}, "
                f"not {str(data['checksum'])[:12]!r}. Make it again; or, if the change is meant, "
                'delete the "checksum" line and the rest is checked instead.'
            )
        if "checksum" not in data:  # what was measured may be another plan
            body = _unmeasured(body)
            if isinstance(body.get("refinement"), dict):
                body["refinement"] = _unmeasured(body["refinement"])
        try:
            plan = cls._build(body)
        except (ValueError, ConfigError) as error:
            raise PlanError(
                f"{where} doesn't have a plan's structure ({error}). Make it again with `mezzotint "
                "optimize`."
            ) from None
        plan._check(where)
        return plan

    @classmethod
    def _build(cls, data: Mapping[str, Any]) -> Plan:
        """Raises ValueError for what isn't of the types in `schema`."""
        from optimizer.plan.schema import PlanFile

        found = untrusted.checked(PlanFile, data)
        palette = {
            key: Precision(row.kind, row.bits, row.group_size, row.symmetric)
            for key, row in found.palette.items()
        }
        scope = found.scope or [k for k, v in found.layers.items() if v != "none"]
        return cls(
            model=dict(data["model"]),
            runtime=found.runtime,
            quantizer=dict(data["quantizer"]),
            palette=palette | {"none": UNTOUCHED},
            layers=found.layers,
            shapes={key: (rows, cols) for key, (rows, cols) in found.shapes.items()},
            scope=tuple(scope),
            bytes=dict(data["bytes"]),
            effective_bits=found.effective_bits,
            code_bits=found.code_bits,
            predicted=dict(data["predicted"]),
            kv=found.kv,
            keep=found.keep,
            budget=found.budget,
            certificate=dict(data.get("certificate") or {}),
            provenance=dict(data.get("provenance", {})),
            refinement=None if found.refinement is None else Refinement.of(found.refinement),
        )

    def _check(self, where: str) -> None:
        unknown = {key for key in self.layers.values() if key not in self.palette}
        if unknown:
            raise PlanError(
                f"{where} gives layers the precision {sorted(unknown)[0]!r}, which its palette "
                f"doesn't have ({', '.join(sorted(self.palette))}). Add it there or change it."
            )
        strangers = set(self.scope) - self.layers.keys()
        if strangers:
            raise PlanError(
                f"{where} has {sorted(strangers)[0]} in its scope, but not among its layers. Correct "
                "the name."
            )
        unknown = self.shapes.keys() - self.layers.keys()
        if unknown:
            raise PlanError(
                f"{where} has a shape for {min(unknown)[:80]}, which isn't among its layers. Correct "
                "the name."
            )
        for name, (_, cols) in self.shapes.items():
            precision = self.palette[self.layers[name]] if name in self.layers else UNTOUCHED
            if not precision.fits(cols):
                raise PlanError(
                    f"{where}: a group must divide a row; {precision.name} doesn't divide the "
                    f"{cols} columns of {name}. Choose another precision for it."
                )
        if self.shapes.keys() == self.layers.keys():
            self._check_bytes(where)
        if self.refinement is not None:
            self.refinement.check(where, self.choice, self.shapes)

    def _check_bytes(self, where: str) -> None:
        found = sum(
            precision.bytes(*self.shapes[name])
            for name, precision in self.choice.items()
            if precision.kind != "none"
        )
        if found != self.bytes.get("quantized"):
            raise PlanError(
                f"{where} says that its quantized layers take {self.bytes.get('quantized')} "
                f"bytes, but they take {found}. It was changed by hand: correct bytes, or make "
                "it again."
            )


def _unmeasured(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was measured of it: a certificate, a refinement's thresholds."""
    return {key: value for key, value in data.items() if key not in ("certificate", "hard")}


_KEYS = (
    "model",
    "runtime",
    "quantizer",
    "palette",
    "layers",
    "shapes",
    "scope",
    "bytes",
    "effective_bits",
    "code_bits",
    "predicted",
    "kv",
    "keep",
    "budget",
    "certificate",
    "provenance",
)


def digest(content: Any) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def identity(
    fingerprint: str | None, quantizer: Mapping[str, Any], layers: Mapping[str, str]
) -> str:
    """A plan's id from what determines it; `layers` names every layer, untouched ones too."""
    return digest([fingerprint, quantizer, layers])[:12]


def assemble(
    inventory: Inventory, scope: Sequence[Layer], choice: Mapping[str, Precision], **rest: Any
) -> Plan:
    """A plan from an assignment: fills in names, shapes, bytes and averages."""
    full = {layer.name: choice.get(layer.name, UNTOUCHED) for layer in inventory.layers}
    size = sum(layer.bytes(full[layer.name]) for layer in scope)
    codes = sum(full[layer.name].code_bits * layer.weights for layer in scope)
    weights = sum(layer.weights for layer in scope)
    return Plan(
        palette={p.name: p for p in sorted(set(full.values()))} | {"none": UNTOUCHED},
        layers={name: precision.name for name, precision in full.items()},
        shapes={layer.name: (layer.rows, layer.cols) for layer in inventory.layers},
        scope=tuple(layer.name for layer in scope),
        bytes=stored_bytes(inventory, full),
        effective_bits=8 * size / weights,
        code_bits=float(codes / weights),
        **rest,
    )
