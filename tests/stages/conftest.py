"""What tests of stages share."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib isn't installed: Optuna's pictures of a study, which tests of the search
    see, take as long as the study."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
