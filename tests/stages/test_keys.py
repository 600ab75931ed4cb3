"""Keys of stored results are made from what determines them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pytest

from optimizer.plan.keys import Key
from optimizer.stages import keys

KINDS: list[type[Key]] = [
    kind for kind in vars(keys).values() if isinstance(kind, type) and issubclass(kind, Key)
]
KINDS.remove(Key)


def made(kind: type[Key]) -> Any:
    return kind(*(f"{i}" for i, _ in enumerate(fields(kind))))


@dataclass(frozen=True)
class One(Key):
    name: str


def test_a_field_that_is_added_changes_the_key_by_itself() -> None:
    @dataclass(frozen=True)
    class Two(Key):
        name: str
        strength: float = 0.5

    Two.__name__ = "One"
    assert One("a").text != Two("a").text
    assert Two("a").text != Two("a", 0.6).text


def test_a_version_that_is_raised_changes_the_key() -> None:
    @dataclass(frozen=True)
    class Later(One):
        VERSION: ClassVar[int] = 2

    Later.__name__ = "One"
    assert One("a").text != Later("a").text and One("a").text == One("a").text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_is_part_of_the_key(kind: type[Key]) -> None:
    own = made(kind)
    changed = [replace(own, **{item.name: "other"}) for item in fields(kind)]
    assert len({own.text, *(other.text for other in changed)}) == 1 + len(fields(kind))


def test_kinds_of_results_never_share_a_key() -> None:
    assert len({kind("a").text for kind in (keys.InventoryKey, keys.ChainKey, One)}) == 3
    assert len(KINDS) >= 12
