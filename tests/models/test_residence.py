"""Where weights shall be: what fits, and what no cap allows."""

from __future__ import annotations

import pytest

from optimizer.errors import ConfigError
from optimizer.models.model import Model
from optimizer.models.offload import offloaded
from optimizer.models.residence import Residence
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
