"""Domain values: precisions, layers, budgets and plans, with their byte arithmetic and their JSON.

Notation: a layer's weight has shape [rows, cols] = [outputs, inputs]; groups of `group_size`
weights run along the inputs and share one fp16 scale (and one integer zero point if asymmetric).
Standard library only, so that plans can be read anywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from optimizer.errors import ConfigError, PlanError
from optimizer.store import write_atomically

FORMAT, VERSION = "mezzotint-plan", 1
REFERENCE_BITS = 16
SCALE_BYTES = 2  # fp16
TRITS_PER_BYTE = 5  # 3**5 = 243 <= 256


@dataclass(frozen=True, order=True)
class Precision:
    """How one layer is stored.

    kind: `int` (uniform levels), `ternary` (-s, 0, s) or `none` (the reference's own 16 bits).
    group_size: weights per scale along the inputs; None = one scale per row ("per channel").
    symmetric: no zero point. 1 bit (-s, s) and ternary are always symmetric.
    """

    kind: str = "none"
    bits: int = REFERENCE_BITS
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        legal = {"int": range(1, 9), "ternary": (2,), "none": (REFERENCE_BITS,)}
        if self.kind not in legal or self.bits not in legal[self.kind]:
            raise ConfigError(
                "A precision is 1, 2, 3, 4, 5, 6, 7 or 8 bits, ternary, or 16 (untouched), not "
                f"{self.kind} with {self.bits} bits. Change palette.bits."
            )
        if self.group_size is not None and self.group_size < 1:
            raise ConfigError(
                f"A group holds at least one weight, not {self.group_size}. Change "
                "palette.group_size; 0 there means one scale per channel."
            )

    @property
    def name(self) -> str:
        if self.kind == "none":
            return "none"
        stem = f"int{self.bits}" if self.kind == "int" else "ternary"
        tail = "channel" if self.group_size is None else f"g{self.group_size}"
        marked = self.symmetric and self.kind == "int" and self.bits > 1
        return f"{stem}_{tail}" + ("_sym" if marked else "")

    @property
    def code_bits(self) -> Fraction:
        """Bits per weight of the codes alone, without scales and zero points."""
        return Fraction(8, TRITS_PER_BYTE) if self.kind == "ternary" else Fraction(self.bits)

    def groups(self, cols: int) -> int:
        """Scales per row."""
        return cols // (self.group_size or cols)

    def parts(self, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, int]]]:
        """The stored tensors: suffix -> (safetensors dtype, shape). Rows are padded to bytes."""
        if self.kind == "none":
            return {}
        groups = self.groups(cols)
        parts = {
            "codes": ("U8", (rows, packed_bytes(cols, self.code_bits))),
            "scales": ("F16", (rows, groups)),
        }
        if not self.symmetric:
            parts["zeros"] = ("U8", (rows, packed_bytes(groups, self.code_bits)))
        return parts

    def bytes(self, rows: int, cols: int) -> int:
        """Exact bytes on disk of a [rows, cols] layer: codes, scales, zero points, padding."""
        if self.kind == "none":
            return rows * cols * REFERENCE_BITS // 8
        return sum(
            math.prod(shape) * (SCALE_BYTES if dtype == "F16" else 1)
            for dtype, shape in self.parts(rows, cols).values()
        )

    def fits(self, cols: int) -> bool:
        return self.group_size is None or cols % self.group_size == 0

    def nearest(self, cols: int) -> Precision:
        """The same precision with the divisor of `cols` that is nearest to the group size."""
        if self.group_size is None or self.fits(cols):
            return self
        wanted = self.group_size
        divisors = [d for d in range(1, cols + 1) if cols % d == 0]
        best = min(divisors, key=lambda d: (abs(math.log(d / wanted)), d))
        return replace(self, group_size=best)


UNTOUCHED = Precision()


def packed_bytes(count: int, bits: Fraction) -> int:
    """Bytes of `count` codes in a dense stream, padded to a whole byte."""
    if bits.denominator == TRITS_PER_BYTE:
        return -(-count // TRITS_PER_BYTE)
    return -(-count * int(bits) // 8)


@dataclass(frozen=True)
class Layer:
    """One weight tensor that can be quantized, named as in the checkpoint on disk.

    `parameter` is the live parameter that holds it. Fused experts: the layer is rows
    [offset, offset + rows) of expert `expert`; `expert=None` on a 3-D parameter means all of
    them, stacked. `transposed`: the live tensor stores [inputs, outputs].
    """

    name: str
    rows: int
    cols: int
    kind: str  # linear, conv1d, embedding, head, experts
    role: str  # the last part of the module's name: q_proj, down_proj, ...
    block: int | None  # index of the transformer block, None outside the blocks
    parameter: str
    shape: tuple[int, ...]  # of the layer's tensor in the checkpoint
    expert: int | None = None
    offset: int = 0
    transposed: bool = False
    tied: bool = False

    @property
    def weights(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True)
class Tensor:
    """A tensor that is never quantized: norms, biases, routers."""

    name: str
    parameter: str
    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Inventory:
    """What a model is made of: its layers in checkpoint order, its other tensors, its dtype."""

    layers: tuple[Layer, ...]
    others: tuple[Tensor, ...]
    dtype: str  # F16 or BF16: how untouched weights are stored

    def scoped(self, scope: Sequence[str]) -> tuple[Layer, ...]:
        """Layers in scope. Words: blocks, embeddings, head, all; anything else is a glob.

        Raises ConfigError for a pattern that matches nothing.
        """
        chosen: set[str] = set()
        for pattern in scope:
            hits = {layer.name for layer in self.layers if _in_scope(layer, pattern)}
            if not hits:
                names = [layer.name for layer in self.layers]
                examples = ", ".join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))
                raise ConfigError(
                    f"Every scope pattern must match a layer; {pattern!r} matches none of the "
                    f"{len(names)} layers (for example {examples}). Use blocks, embeddings, "
                    "head, all, or a glob over such names."
                )
            chosen |= hits
        return tuple(layer for layer in self.layers if layer.name in chosen)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Inventory:
        layers = (Layer(**{**row, "shape": tuple(row["shape"])}) for row in data["layers"])
        others = (Tensor(**{**row, "shape": tuple(row["shape"])}) for row in data["others"])
        return cls(tuple(layers), tuple(others), data["dtype"])


def _in_scope(layer: Layer, pattern: str) -> bool:
    if pattern == "all":
        return True
    if pattern == "blocks":
        return layer.block is not None and layer.kind not in ("embedding", "head")
    if pattern == "embeddings":
        return layer.kind == "embedding"
    if pattern == "head":
        return layer.kind == "head" or layer.tied
    return glob(pattern).fullmatch(layer.name) is not None


def glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` as in a shell, over a layer's whole name; a `.weight` may be left out."""
    stem = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(rf"{stem}(\.weight)?")


SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Bytes of `80MiB` (2**20), `80MB` (10**6), `1.5g`, or a plain number of bytes."""
    match = SIZE.fullmatch(str(text))
    if match is None:
        raise ConfigError(
            f"A size is a number with B, kB, MB, GB, KiB, MiB or GiB, not {text!r}. "
            "Write, for example, budget.size=80MiB."
        )
    number, prefix, binary = match.groups()
    power = "kmgt".index(prefix.lower()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


@dataclass(kw_only=True)
class Budget:
    """What the plan must fit in; exactly one of the three is given.

    bits: average bits per weight in scope, scales and zero points counted.
    code_bits: average bits per weight in scope, codes alone.
    size: the whole weight file, untouched tensors and header counted, e.g. `80MiB`.
    """

    bits: float | None = None
    code_bits: float | None = None
    size: str | None = None

    def check(self) -> None:
        given = {k: v for k, v in asdict(self).items() if v is not None}
        if len(given) != 1:
            found = ", ".join(f"budget.{k}={v}" for k, v in given.items()) or "none"
            raise ConfigError(
                f"Exactly one of budget.bits, budget.code_bits and budget.size is needed; found "
                f"{found}. For example: budget.bits=4.5"
            )
        value = next(iter(given.values()))
        number = parse_size(value) if self.size is not None else float(value)
        if not (math.isfinite(number) and number > 0):
            raise ConfigError(f"A budget is a positive number, not {value}.")

    @property
    def text(self) -> str:
        for key, unit in (("bits", "bits per weight"), ("code_bits", "code bits per weight")):
            if getattr(self, key) is not None:
                return f"{getattr(self, key):g} {unit}"
        return str(self.size)


def container_bytes(entries: Iterable[tuple[str, str, Sequence[int], int]]) -> int:
    """Header bytes of a safetensors file with these (name, dtype, shape, bytes) entries.

    The format: an 8-byte length, then JSON padded with spaces to a multiple of 8; tensors lie
    in the order of falling alignment, then name.
    """
    width = {"F32": 4, "I64": 8, "F16": 2, "BF16": 2, "U8": 1}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in sorted(entries, key=lambda e: (-width.get(e[1], 1), e[0])):
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8


def stored_bytes(inventory: Inventory, choice: Mapping[str, Precision]) -> dict[str, int]:
    """Exact bytes of the packed file: {quantized, untouched, container, total}.

    `choice`: layer name -> precision; layers that it doesn't name stay untouched.
    """
    entries: list[tuple[str, str, Sequence[int], int]] = []
    quantized = untouched = 0
    for layer in inventory.layers:
        precision = choice.get(layer.name, UNTOUCHED)
        size = precision.bytes(layer.rows, layer.cols)
        if precision.kind == "none":
            untouched += size
            entries.append((layer.name, inventory.dtype, layer.shape, size))
            continue
        quantized += size
        for suffix, (dtype, shape) in precision.parts(layer.rows, layer.cols).items():
            part = math.prod(shape) * (SCALE_BYTES if dtype == "F16" else 1)
            entries.append((f"{layer.name}.{suffix}", dtype, shape, part))
    for tensor in inventory.others:
        width = {"F32": 4, "I64": 8}.get(tensor.dtype, 2)
        size = math.prod(tensor.shape) * width
        untouched += size
        entries.append((tensor.name, tensor.dtype, tensor.shape, size))
    container = container_bytes(entries)
    return {
        "quantized": quantized,
        "untouched": untouched,
        "container": container,
        "total": quantized + untouched + container,
    }


@dataclass(frozen=True)
class Plan:
    """Layer -> precision, with provenance; the product.

    `layers` names every quantizable tensor of the checkpoint; `palette` holds the precisions
    that it uses; `scope` the layers over which `effective_bits` averages.
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
    budget: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def choice(self) -> dict[str, Precision]:
        """Layer name -> precision."""
        return {name: self.palette[key] for name, key in self.layers.items()}

    @property
    def id(self) -> str:
        """Twelve hex digits that depend on the model, the quantizer and the assignment only."""
        content = [self.model.get("fingerprint"), self.quantizer, self.layers]
        return digest(content)[:12]

    def to_json(self) -> dict[str, Any]:
        data = {"format": FORMAT, "version": VERSION, **{k: getattr(self, k) for k in _KEYS}}
        data["palette"] = {key: asdict(p) for key, p in self.palette.items()}
        data["shapes"] = {key: list(shape) for key, shape in self.shapes.items()}
        data["scope"] = list(self.scope)
        return {**data, "checksum": digest(data)}

    def save(self, path: str | Path) -> Path:
        """Write atomically; a killed or failed save leaves the old file as it was."""
        text = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        return write_atomically(Path(path), text.encode())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read and verify. Raises PlanError for anything that isn't a whole, consistent plan.

        A plan without `checksum` (written by hand) is accepted if its arithmetic is right.
        """
        path = Path(path)
        path = path / "plan.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(
                f"No plan at {path}. `mezzotint optimize` writes one; give the path to it."
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
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
                f"not {str(data['checksum'])[:12]}. Make it again; or, if the change is meant, "
                'delete the "checksum" line and the rest is checked instead.'
            )
        try:
            plan = cls._build(data)
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise PlanError(
                f"{where} doesn't have a plan's structure ({type(error).__name__}: {error}). "
                "Make it again with `mezzotint optimize`."
            ) from None
        plan._check(where)
        return plan

    @classmethod
    def _build(cls, data: Mapping[str, Any]) -> Plan:
        palette = {
            str(key): Precision(**{k: row[k] for k in ("kind", "bits")} | _grouping(row))
            for key, row in data["palette"].items()
        }
        layers = {str(k): str(v) for k, v in data["layers"].items()}
        return cls(
            model=dict(data["model"]),
            runtime=str(data["runtime"]),
            quantizer=dict(data["quantizer"]),
            palette=palette | {"none": UNTOUCHED},
            layers=layers,
            shapes={k: (int(r), int(c)) for k, (r, c) in data.get("shapes", {}).items()},
            scope=tuple(data.get("scope") or (k for k, v in layers.items() if v != "none")),
            bytes={k: int(v) for k, v in data["bytes"].items()},
            effective_bits=float(data["effective_bits"]),
            code_bits=float(data.get("code_bits", 0.0)),
            predicted=dict(data["predicted"]),
            budget=dict(data.get("budget", {})),
            certificate=dict(data.get("certificate", {})),
            provenance=dict(data.get("provenance", {})),
        )

    def _check(self, where: str) -> None:
        unknown = {key for key in self.layers.values() if key not in self.palette}
        if unknown:
            raise PlanError(
                f"{where} gives layers the precision {sorted(unknown)[0]!r}, which its palette "
                f"doesn't have ({', '.join(sorted(self.palette))}). Add it there or change it."
            )
        for name, (rows, cols) in self.shapes.items():
            precision = self.palette[self.layers[name]] if name in self.layers else UNTOUCHED
            if not precision.fits(cols):
                raise PlanError(
                    f"{where}: a group must divide a row; {precision.name} doesn't divide the "
                    f"{cols} columns of {name}. Choose another precision for it."
                )
        if self.shapes.keys() == self.layers.keys():
            self._check_bytes(where)

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


_KEYS = (
    "model", "runtime", "quantizer", "palette", "layers", "shapes", "scope", "bytes",
    "effective_bits", "code_bits", "predicted", "budget", "certificate", "provenance",
)  # fmt: skip


def _grouping(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"group_size": row.get("group_size"), "symmetric": bool(row.get("symmetric", False))}


def digest(content: Any) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def assemble(
    inventory: Inventory, scope: Sequence[Layer], choice: Mapping[str, Precision], **rest: Any
) -> Plan:
    """A plan from an assignment: fills in names, shapes, bytes and averages."""
    full = {layer.name: choice.get(layer.name, UNTOUCHED) for layer in inventory.layers}
    size = sum(full[layer.name].bytes(layer.rows, layer.cols) for layer in scope)
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


def fuse(
    layers: Sequence[Layer], rules: Sequence[Sequence[str]], experts: str
) -> tuple[tuple[str, ...], ...]:
    """Groups of layer names that one runtime must load with the same precision.

    rules: lists of roles that are fused within one parent module, such as [q_proj, k_proj,
    v_proj]. experts: `tensor` (one fused parameter, one precision) or `block` (all experts of
    a block).
    """
    fused = {role: index for index, roles in enumerate(rules) for role in roles}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for layer in layers:
        key: tuple[Any, ...] = (layer.parameter,)
        if layer.kind == "experts":
            key = ("experts", layer.block) if experts == "block" else key
        elif layer.role in fused:
            parent = layer.parameter.rsplit(".", 2)[0]
            key = ("fused", parent, fused[layer.role])
        groups.setdefault(key, []).append(layer.name)
    return tuple(tuple(names) for names in groups.values())
