from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from optimizer.data.text import Data, Part
from optimizer.errors import ConfigError
from optimizer.models.source import Source
from optimizer.plan.cache import CacheKind
from optimizer.quantization.methods import Rtn, bind
from optimizer.stages.session import Kept, Session, check_device


@pytest.mark.parametrize("name", ["gpu", "", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match="device is cpu, cuda"):
        check_device(name)


def test_the_cpu_is_always_here() -> None:
    check_device("cpu")
    check_device("cpu:0")


@pytest.fixture
def session(store: Path, source: Source) -> Session:
    few = Part(sequences=4, length=32)
    data = Data(source="self", calibration=few, search=few, heldout=few)
    return Session.open("stories", data, str(store))


def test_nobody_writes_into_a_session(session: Session) -> None:
    with pytest.raises(FrozenInstanceError):
        session.cache = Kept(CacheKind(8))  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        session.model = None  # type: ignore[assignment]


def test_another_cache_shares_what_is_loaded_and_changes_what_is_measured(
    session: Session,
) -> None:
    other = session.with_cache(Kept(CacheKind(4)))
    assert other.model is session.model and other.tokens is session.tokens
    assert other.teacher("search") is session.teacher("search")
    assert session.cache.kind.whole and not other.cache.kind.whole
    assert other.part_key("search") != session.part_key("search")
    assert other.calibration_key == session.calibration_key
    quantizer = bind(Rtn(), session)
    whole, rounded = (one.score({}, "search", quantizer).mean_kl for one in (session, other))
    assert whole == 0 < rounded


def test_a_loaded_model_is_taken_as_it_is(session: Session) -> None:
    again = Session.open("stories", session.data, str(session.store.root), model=session.model)
    assert again.model is session.model
