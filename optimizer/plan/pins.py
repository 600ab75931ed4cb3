"""Pins in an engine's own names, and llama-quantize's tensor_types.txt: -> pins of layers.

`blk.12.ffn_down.weight = q6_k` is a pin of the layers that this tensor of the file holds. `@FILE`
stands for all lines of a file as `llama-quantize --tensor-type-file` reads it: `EXPRESSION=type`,
between spaces or line ends, in lower case; the first expression that is found in a tensor's name
decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from optimizer.errors import ConfigError
from optimizer.plan.inventory import glob
from optimizer.plan.policy import parsed

WHOLE = {"f16": "16", "bf16": "16", "f32": "16"}  # types that leave a tensor as it is
Tensors = Mapping[str, Sequence[str]]  # a tensor of the engine's file -> the layers that it holds


def translated(
    pins: Sequence[str], names: Sequence[str], tensors: Tensors | None
) -> list[list[str]]:
    """For each of `pins`, one or more pins of layers. names: of the layers in scope. tensors: None
    where the engine's names aren't known. Raises ConfigError."""
    own = None if tensors is None else _in_scope(tensors, set(names))
    return [list(_translated(pin, names, own)) for pin in pins]


def _in_scope(tensors: Tensors, names: set[str]) -> dict[str, list[str]]:
    return {tensor: [x for x in layers if x in names] for tensor, layers in tensors.items()}


def _translated(pin: str, names: Sequence[str], tensors: Tensors | None) -> Iterator[str]:
    if pin.startswith("@"):
        yield from _of_file(Path(pin[1:]).expanduser(), tensors)
        return
    pattern, sign, value = parsed(pin)
    expression = glob(pattern)
    if tensors is None or any(expression.fullmatch(name) for name in names):
        yield pin
        return
    found = [x for t, layers in tensors.items() if expression.fullmatch(t) for x in layers]
    value = WHOLE.get(value, value)
    yield from (f"{layer} {sign} {value}" for layer in dict.fromkeys(found))
    if not found:
        yield pin  # matches nothing: refused with the others of that kind


def _of_file(file: Path, tensors: Tensors | None) -> Iterator[str]:
    if tensors is None:
        raise ConfigError(
            f"{file} names tensors of a GGUF file; policy.pins=@FILE needs runtime=llamacpp."
        )
    listed = _expressions(file)
    count = 0
    for tensor, layers in tensors.items():
        kind = next((kind for x, kind in listed if x.search(tensor)), None)
        if kind is not None:
            count += len(layers)
            yield from (f"{layer} = {WHOLE.get(kind, kind)}" for layer in layers)
    if not count:
        raise ConfigError(
            f"None of the expressions in {file} is found in a tensor's name of this model (such as "
            f"{next(iter(tensors), 'none')}) that is in scope. Correct the file or widen scope."
        )


def _expressions(file: Path) -> list[tuple[re.Pattern[str], str]]:
    try:
        words = file.read_text(encoding="utf-8").lower().split()
    except (OSError, ValueError) as error:
        raise ConfigError(f"policy.pins=@{file} can't be read ({error}).") from None
    found = []
    for word in words:
        expression, equals, kind = word.rpartition("=")
        try:
            pattern = re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{file} has {expression!r}, no expression ({error}).") from None
        if not equals or not expression or not kind:
            raise ConfigError(
                f"A tensor type is EXPRESSION=TYPE, such as ^blk\\.0\\.attn_v\\.weight$=q6_k; {file} "
                f"has {word!r}."
            )
        found.append((pattern, kind))
    return found
