"""Times of single layers: what they add up to, what they are kept under, and who can't be timed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimizer.config import Optimize
from optimizer.errors import ConfigError
from optimizer.models.source import Source
from optimizer.plan import UNTOUCHED, Palette, Precision
from optimizer.stages import latency
from optimizer.stages.session import Session
from optimizer.stages.space import SearchSpace, search_space
from tests.commands.test_optimize import settings
from tests.conftest import Small

PALETTE = Palette(bits=[3, 4, 16], group_size=64)


def opened(source: Source, store: Path, **changes: object) -> tuple[Session, SearchSpace]:
    config = settings(source, store, palette=PALETTE, **changes)
    session = Session.open(config.model, config.data, config.store)
    return session, search_space(config, session.inventory)


def test_a_step_is_the_sum_of_its_parts_and_measured_once(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, space = opened(source, tmp_path / "s")
    calls: list[int] = []

    def fake(_session: Session, _space: SearchSpace, todo: list[latency.Kind], batch: int) -> dict:
        calls.append(batch)
        return {"layers": np.arange(1.0, 1 + len(todo)), "outside": np.array(7.0)}

    monkeypatch.setattr(latency, "_measure", fake)
    for _ in range(2):
        found = latency.times(session, space, 2)
    assert calls == [2]
    kinds = latency._kinds(space)
    order = list(dict.fromkeys(kinds.values()))
    name = space.groups[3][0]
    expected = [1 + order.index(kinds[name, c]) for c in space.columns]
    assert (found.each[3] * 2).tolist() == expected
    assert found.outside == 3.5
    latency.times(session, space, 1)
    assert calls == [2, 1]  # another batch is another measurement


def test_times_are_those_of_packed_layers(source: Source, tmp_path: Path) -> None:
    """Three bits cross bytes and are unpacked through 64-bit words: slower than untouched."""
    session, space = opened(source, tmp_path / "s", scope="all")
    found = latency.times(session, space, 1)
    assert found.outside > 0 and (found.each > 0).all()  # the embedding is the head, too
    three, whole = space.columns.index("int3_g64"), space.columns.index("none")
    assert found.each[:, three].sum() > 1.2 * found.each[:, whole].sum()


def test_an_embedding_that_is_no_head_costs_nothing_and_a_tied_one_does(small: Small) -> None:
    if small.name not in ("llama", "qwen3", "gpt2"):
        return
    layers = tuple(x for x in small.inventory.layers if x.cols % 32 == 0)
    fitted = {(x.name, "none"): UNTOUCHED for x in layers}
    space = SearchSpace(layers, tuple((x.name,) for x in layers), ("none",), fitted)
    named = {name for name, _ in latency._kinds(space)}
    [embedding] = [x for x in layers if x.kind == "embedding" and x.rows == 96]
    assert (embedding.name in named) == embedding.tied
    rest = latency.Rest(small.folder, layers, 2, "cpu")
    assert rest() > 0  # every other part still runs


def test_who_cannot_be_timed_is_told(small: Small) -> None:
    scope = small.inventory.layers
    space = SearchSpace(scope, tuple((x.name,) for x in scope), ("none",), {})
    if any(x.kind == "experts" for x in scope):
        with pytest.raises(ConfigError, match=r"search\.third=read"):
            latency.check(space, "torch")
    else:
        latency.check(space, "torch")
        with pytest.raises(ConfigError, match="not vllm"):
            latency.check(space, "vllm")


def test_copies_of_a_layer_compute_what_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from optimizer.formats.torch import modules
    from optimizer.quantization.uniform import Nearest

    monkeypatch.setattr(modules, "UNPACKED", 3 * 64)  # three rows at a time, and one is left
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    for precision in (Precision("int", 3, 32), Precision("int", 4, 32), UNTOUCHED):
        layer = modules.linear(weight, precision, False, "cpu")()
        expected = x.float() @ Nearest().round(weight, precision).T
        assert torch.allclose(layer(x).float(), expected, atol=0.25, rtol=0.02)


def test_it_is_refused_before_anything_is_measured(source: Source, tmp_path: Path) -> None:
    from optimizer.commands import optimize
    from optimizer.formats.runtime import Runtime
    from optimizer.search import Search

    search = Search(space="multipliers", front=True, third="time")
    config: Optimize = settings(source, tmp_path / "s", search=search)
    config = replace(config, runtime=Runtime(name="vllm"))
    with pytest.raises(ConfigError, match="not vllm"):
        optimize.optimize(config, tmp_path / "r")
    assert not (tmp_path / "r").exists()
