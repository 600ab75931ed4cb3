"""Without the packages of the extra `person` there is nothing to test here."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from optimizer import person

if not all(find_spec(name) for name in person.NEEDED):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    """The page of a fresh session, see `comparisons.Page`."""
    from tests.person.comparisons import judging, opened

    with opened(judging(tmp_path)) as found:
        yield found
