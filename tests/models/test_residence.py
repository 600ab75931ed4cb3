"""Where weights shall be: what fits, and what no cap allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optimizer.config import Optimize
from optimizer.config.optimize import Nested, Proof
from optimizer.data.text import Data, Part
from optimizer.errors import ConfigError, ModelError
from optimizer.metrics.objective import Meaning
from optimizer.models.model import Model
from optimizer.models.offload import offloaded
from optimizer.models.residence import Residence
from optimizer.models.source import Source
from optimizer.models.stories import corpus
from optimizer.plan import Budget
from optimizer.quantization.methods import Awq, Rtn
from optimizer.search import Search
from optimizer.sensitivity import Fisher, Measured, Tokenwise
from optimizer.stages.session import Session
from tests.conftest import Small


def test_a_cap_below_one_block_names_the_block_and_the_smallest_cap(llama: Small) -> None:
    with pytest.raises(ConfigError, match=r"largest is block \d+.*smallest cap is memory=\d+MB"):
        Residence("disk", "1KB").settled(llama.inventory)
    with pytest.raises(ConfigError, match="smallest cap"):
        Residence("auto", "1KB").settled(llama.inventory)


def test_the_smallest_cap_that_is_named_is_taken(llama: Small) -> None:
    with pytest.raises(ConfigError) as refused:
        Residence("auto", "1KB").settled(llama.inventory)
    smallest = str(refused.value).rpartition("memory=")[2].rstrip(".")
    assert Residence("disk", smallest).settled(llama.inventory) == "disk"


def test_auto_keeps_what_fits_and_leaves_the_rest(llama: Small) -> None:
    layers = llama.inventory.layers
    whole = 4 * sum(x.weights for x in layers)
    assert Residence("auto", str(10 * whole)).settled(llama.inventory) == "none"
    assert Residence("auto").settled(llama.inventory) == "none"
    assert Residence("auto", str(int(2.4 * whole))).settled(llama.inventory) in ("cpu", "disk")


def test_a_job_of_few_passes_leaves_all_but_a_small_model_on_disk(
    llama: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Residence(few=True)
    assert few.settled(llama.inventory) == "none"
    monkeypatch.setattr("optimizer.models.residence.LARGE", 0)
    assert few.settled(llama.inventory) == "disk" != Residence().settled(llama.inventory)
    assert Residence("none", few=True).settled(llama.inventory) == "none"


@pytest.mark.parametrize(
    ("changes", "few"),
    [
        ({}, True),
        ({"quantizer": Rtn()}, True),
        ({"effort": "quick"}, True),
        ({"effort": "thorough"}, False),
        ({"search": Search(space="moves")}, False),
        ({"quantizer": Awq()}, False),
        ({"sensitivity": Tokenwise()}, False),
        ({"sensitivity": Fisher(measured=Measured(groups=["*"]))}, False),
        ({"data": Data(source="self")}, False),
        ({"proof": Proof(generate=8)}, False),
        ({"proof": Proof(domains=["long"])}, False),
        ({"proof": Proof(domains=["long"], certify=False)}, True),
        ({"meaning": Meaning(cvar=1.0)}, False),
        ({"budget": Budget(kv=[16, 8])}, False),
        ({"nested": Nested(size="1GB")}, False),
        ({"device": "meta"}, False),
    ],
)
def test_what_reads_a_model_often_wants_it_in_memory(changes: dict[str, Any], few: bool) -> None:
    assert (
        Optimize(**{"model": "x", "data": Data(source="bundled")} | changes).residence.few == few
    )


def test_a_model_that_writes_its_own_text_is_loaded_whole(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token would read every block. Stories can't read the texts that come with the program."""
    monkeypatch.setattr("optimizer.models.residence.LARGE", 0)
    few, corpus_of = Part(sequences=2, length=32), tmp_path / "own.txt"
    corpus_of.write_text("\n---\n".join(corpus(40, seed=2)), encoding="utf-8")

    def opened(data: Data) -> Model:
        home, store = Residence(few=True), str(tmp_path / "store")
        return Session.open(str(source.folder), data, store, residence=home).model

    parts = {"calibration": few, "search": few, "heldout": few}
    assert offloaded(opened(Data(**parts)).net) is None
    assert offloaded(opened(Data(source="text", path=str(corpus_of), **parts)).net) is not None


def test_a_model_that_can_not_run_from_disk_is_loaded_whole(
    llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("a buffer that the file lacks")

    monkeypatch.setattr("optimizer.models.residence.LARGE", 0)
    monkeypatch.setattr("optimizer.models.model.opened_on_disk", refuse)

    def opened(offload: str) -> Model:
        home = Residence(offload, few=True)
        few = Part(sequences=2, length=32)
        data = Data(calibration=few, search=few, heldout=few)
        return Session.open(str(llama.folder), data, str(tmp_path), residence=home).model

    assert offloaded(opened("auto").net) is None
    with pytest.raises(ModelError, match="a buffer"):
        opened("disk")


def test_other_words_and_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="offload is one of auto, none, cpu, disk"):
        Residence("tape").check()
    with pytest.raises(ConfigError):
        Residence("disk", "much").check()


def test_a_model_kept_in_memory_as_it_is_stored_is_read_once(llama: Small) -> None:
    model = Model.load(llama.folder, llama.inventory, offload="cpu")
    assert offloaded(model.net) is not None
    kept = model.checkpoint.kept
    assert kept is not None
    held = {x.name for x in llama.inventory.held}
    assert held <= kept.keys()
    assert {kept[x.name].dtype for x in llama.inventory.layers} == {
        model.checkpoint.read(x.name).dtype for x in llama.inventory.layers
    }
