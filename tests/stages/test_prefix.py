"""Skipping blocks that a change doesn't reach must change nothing but the time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from optimizer.metrics.divergence import Teacher
from optimizer.models.blockwise import blocks_of
from optimizer.models.head import OwnHead
from optimizer.models.model import Model
from optimizer.models.offload import offloaded
from optimizer.quantization.uniform import Nearest
from optimizer.stages.prefix import Prefix, Shortcut
from tests.conftest import Small, mixed
from tests.metrics.test_divergence import windows


@contextmanager
def counted(model: Model) -> Iterator[list[int]]:
    """Blocks that really run, in order; grows while the model runs."""
    ran: list[int] = []
    handles = []
    for k, block in enumerate(blocks_of(model)):
        norm = next(m for m in block.modules() if not list(m.children()) and m is not block)
        handles.append(norm.register_forward_pre_hook(lambda _m, _a, k=k: ran.append(k)))
    yield ran
    for handle in handles:
        handle.remove()


def test_a_window_that_starts_at_a_door_gives_the_whole_passs_loss(small: Small) -> None:
    model, text = small.model, windows(small.model.net.config.vocab_size)
    teacher = Teacher(model.net, text, OwnHead(model.net))
    shortcut = Shortcut(model, teacher)
    before = mixed(small.inventory.layers)
    last = [x.name for x in small.inventory.layers if x.block == 1]
    after = {name: before[name] for name in before if name not in last}
    known = Prefix(before)
    with model.rounded(Nearest(), before) as rounding:
        for window in range(3):
            shortcut.window(window, None, known)
        rounding.set(after)
        own = Prefix(after)
        found = [shortcut.window(window, known, own) for window in range(3)]
        whole = [teacher.window(model.net, window) for window in range(3)]
    assert found == pytest.approx(whole, abs=1e-6)
    assert whole[0] > 1e-4


def test_blocks_before_the_first_change_do_not_run_again(stories: Model) -> None:
    text = windows(stories.net.config.vocab_size, 2, 12)
    teacher = Teacher(stories.net, text)
    shortcut = Shortcut(stories, teacher)
    layers = stories.inventory.layers
    before = {x.name: p for x, p in zip(layers, mixed(layers).values(), strict=True)}
    before = {n: p for n, p in before.items() if stories.layers[n].block is not None}
    count = len(blocks_of(stories))
    last = next(x.name for x in layers if x.block == count - 1)
    after = {n: p for n, p in before.items() if n != last}
    assert shortcut.first(before, after) == count - 1
    known, own = Prefix(before), Prefix(after)
    with counted(stories) as ran, stories.rounded(Nearest(), before) as rounding:
        shortcut.window(0, None, known)
        assert ran == list(range(count))
        ran.clear()
        rounding.set(after)
        shortcut.window(0, known, own)
    assert ran == list(range(max(shortcut.doors), count))
    assert own.hidden.keys() == known.hidden.keys()


def test_a_model_whose_blocks_are_not_in_its_path_falls_back(
    stories: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = Teacher(stories.net, windows(stories.net.config.vocab_size, 1, 12))
    decoys = [nn.Identity() for _ in blocks_of(stories)]
    monkeypatch.setattr("optimizer.stages.prefix.blocks_of", lambda _model: decoys)
    shortcut = Shortcut(stories, teacher)
    assert shortcut.window(0, None, Prefix({})) == teacher.window(stories.net, 0)
    assert not any("forward" in vars(block) for block in decoys)


def test_a_model_whose_doors_lead_elsewhere_falls_back(
    stories: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put in at the door must decide what comes out."""
    teacher = Teacher(stories.net, windows(stories.net.config.vocab_size, 1, 12))
    monkeypatch.setattr(Shortcut, "_leads", lambda *_: False)
    own = Prefix({})
    Shortcut(stories, teacher).window(0, None, own)
    assert not own.hidden


@pytest.mark.parametrize("last", ["in memory", "on disk"])
def test_blocks_on_disk_are_read_once_for_all_windows(
    small: Small, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last: the head and the embeddings."""
    if last == "on disk":
        monkeypatch.setattr("optimizer.models.offload.LARGE", 0)
    model = Model.load(small.folder, small.inventory, offload="disk")
    disk = offloaded(model.net)
    assert disk is not None
    text = windows(small.model.net.config.vocab_size)
    before = mixed(small.inventory.layers)
    after = {n: p for n, p in before.items() if small.model.layers[n].block != 1}
    found = {}
    for name, own in (("memory", small.model), ("disk", model)):
        shortcut = Shortcut(own, Teacher(own.net, text, OwnHead(own.net)))
        known, new = Prefix(before), Prefix(after)
        with own.rounded(Nearest(), before) as rounding:
            read = disk.brought
            first = shortcut.windows(range(3), None, known, float)
            if name == "disk":
                assert disk.brought - read <= len(blocks_of(model)), "once for all windows"
            rounding.set(after)
            found[name] = [*first, *shortcut.windows(range(3), known, new)]
    assert found["disk"] == found["memory"] and found["disk"][3] > 1e-4
    assert not torch.is_inference_mode_enabled()
