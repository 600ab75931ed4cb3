"""The picture of a plan: kinds of layers down, blocks across, bits as colours. Shared by the
terminal and the page. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from optimizer.plan import Precision

# viridis, dark to light: readable by people with any kind of colour-blindness
COLOURS = (
    "#440154",
    "#472d7b",
    "#3b528b",
    "#2c728e",
    "#21918c",
    "#28ae80",
    "#5ec962",
    "#addc30",
    "#fde725",
)
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
MOST_CELLS = 100_000  # that are drawn; models have some thousands
DARK = 4  # colours below this index carry white text; each pair has a contrast of 4.5 or more


def arrange(names: Iterable[str]) -> tuple[dict[str, dict[int, list[str]]], list[str]]:
    """Layer names -> ({kind: {block: names}}, names outside the blocks), both in given order."""
    cells: dict[str, dict[int, list[str]]] = {}
    rest: list[str] = []
    for name in names:
        stem = re.sub(r"\.weight$", "", name)
        match = re.search(r"\.(\d+)\.", stem)
        if match is None:
            rest.append(name)
            continue
        kind = re.sub(r"\.\d+\.", ".", stem[match.end() :])
        cells.setdefault(kind, {}).setdefault(int(match.group(1)), []).append(name)
    return cells, rest


def label(precisions: list[Precision]) -> tuple[str, int]:
    """What a cell says and its step in COLOURS. Several layers (experts): their average."""
    bits = round(sum(float(p.code_bits) for p in precisions) / len(precisions))
    text = "t" if all(p.kind == "ternary" for p in precisions) else str(bits)
    return text, shade(bits)


def shade(bits: float) -> int:
    return sum(bits > step for step in STEPS[:-1])
