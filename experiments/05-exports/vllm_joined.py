"""Which layers vLLM loads as one matrix, read from its sources: optimizer/formats/safetensors/
vllm_joined.json.

    pip download vllm==0.33.0 --no-deps --no-binary vllm -d /tmp/vllm
    tar xzf /tmp/vllm/vllm-0.33.0.tar.gz -C /tmp/vllm
    python experiments/05-exports/vllm_joined.py /tmp/vllm/vllm-0.33.0 OUT.json

A model class declares joined layers in `packed_modules_mapping` (as a class attribute, or added to in
`__init__`), in a weight mapper's `orig_to_new_stacked`, or in lists of triples named `..._mapping`.
Nothing of vLLM is run: the files are parsed. An architecture gets what its class, the classes that it
derives from, and the other classes of their files declare. That may join more than one configuration
needs, never less.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REGISTERED = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")


@dataclass
class Read:
    """A file of vLLM's models. sets: joined name -> its parts; bases: files of imported classes."""

    sets: dict[str, dict[str, None]] = field(default_factory=dict)
    bases: list[str] = field(default_factory=list)

    def join(self, whole: str, part: str) -> None:
        whole, part = whole.strip("."), part.strip(".")
        named = whole.rpartition(".")[2], part.rpartition(".")[2]
        if "expert" not in whole + part and not {"weight", "bias", ""} & set(named):
            self.sets.setdefault(named[0], {})[named[1]] = None


def text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def entries(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Of dictionary displays inside `node`, whose keys are texts."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Dict):
            for key, value in zip(inner.keys, inner.values, strict=True):
                if (name := text(key)) is not None:
                    yield name, value


def texts(node: ast.AST) -> list[str]:
    return [name for x in ast.walk(node) if (name := text(x)) is not None]


def names(node: ast.AST) -> set[str]:
    """Variables and attributes that an assignment writes to, or an argument's name."""
    return {
        x.id if isinstance(x, ast.Name) else x.attr
        for x in ast.walk(node)
        if isinstance(x, ast.Name | ast.Attribute)
    }


def triples(node: ast.AST) -> Iterator[tuple[str, str]]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Tuple) and len(inner.elts) == 3:
            whole, part = text(inner.elts[0]), text(inner.elts[1])
            if whole is not None and part is not None:
                yield whole, part


def read(tree: ast.Module, found: Read) -> None:
    """Add what a file declares."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(x.name[:1].isupper() for x in node.names):
            own = node.module or ""
            if node.level == 1:
                found.bases.append(own)
            elif own.startswith("vllm.model_executor.models."):
                found.bases.append(own.removeprefix("vllm.model_executor.models."))
        if isinstance(node, ast.keyword) and node.arg == "orig_to_new_stacked":
            for part, into in entries(node.value):
                found.join(texts(into)[0], part)
        targets: list[ast.expr] = []
        value: ast.expr | None = None
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign):
            targets, value = [node.target], node.value
        if value is None:
            continue
        for target in targets:
            written = names(target)
            if "packed_modules_mapping" in written:
                if isinstance(target, ast.Subscript) and (whole := text(target.slice)):
                    for part in texts(value):
                        found.join(whole, part)
                for joined, parts in entries(value):
                    for part in texts(parts):
                        found.join(joined, part)
            elif any("mapping" in name for name in written):
                for whole, part in triples(value):
                    found.join(whole, part)


class Sources:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: dict[str, Read | None] = {}

    def file(self, module: str) -> Read | None:
        """A model's file, or all files of a model's package; None: there is none."""
        if module not in self.seen:
            path = self.root / module.replace(".", "/")
            if not module.startswith("vllm."):
                path = self.root / "vllm/model_executor/models" / module.replace(".", "/")
            files = [f for f in (path.with_suffix(".py"),) if f.exists()] or sorted(
                path.rglob("*.py")
            )
            found = Read()
            for file in files:
                read(ast.parse(file.read_text()), found)
            self.seen[module] = found if files else None
        return self.seen[module]

    def closure(self, module: str) -> list[Read]:
        """The file and those that it takes classes from, of models only."""
        seen: dict[str, Read] = {}
        todo = [module]
        while todo:
            name = todo.pop()
            if name in seen or name in ("interfaces", "interfaces_base", "utils", "registry"):
                continue
            found = self.file(name)
            if found is not None:
                seen[name] = found
                todo += found.bases
        return list(seen.values())


def united(reads: list[Read]) -> dict[str, list[str]]:
    """Joined name -> its parts, of which there are at least two."""
    sets: dict[str, set[str]] = {}
    for found in reads:
        for whole, parts in found.sets.items():
            sets.setdefault(whole, set()).update(set(parts) - {whole})
    return {whole: sorted(parts) for whole, parts in sorted(sets.items()) if len(parts) > 1}


def architectures(root: Path) -> dict[str, str]:
    """Architecture -> the file of vLLM's models that has its class."""
    tree = ast.parse((root / "vllm/model_executor/models/registry.py").read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and names(node.targets[0]) & set(REGISTERED):
            for name, value in entries(node.value):
                found[name] = texts(value)[0]
    return found


def main() -> None:
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    sources = Sources(root)
    known = {
        architecture: united(sources.closure(module))
        for architecture, module in sorted(architectures(root).items())
        if sources.file(module) is not None
    }
    version = root.name.removeprefix("vllm-")
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(sets)}" for name, sets in known.items())
    out.write_text(f'{{"vllm": {json.dumps(version)}, "architectures": {{\n{lines}\n}}}}\n')
    print(f"{len(known)} architectures of vLLM {version}")


main()
