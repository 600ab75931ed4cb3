"""Which windows a table reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.data.text import Part, Windows
from optimizer.models.source import Source
from optimizer.sensitivity import Fisher
from optimizer.stages.table import measure_table
from tests.commands.test_optimize import settings
from tests.stages.test_objective import opened


def test_a_table_reads_windows_spread_over_all(source: Source, tmp_path: Path) -> None:
    config = settings(source, tmp_path)
    config.data.calibration = Part(sequences=9, length=32)
    some = replace(config, sensitivity=Fisher(chunks=2, windows=3))
    session, space = opened(some)
    found = measure_table(session, some, space)
    whole = session.windows("calibration")
    session.tokens["calibration"] = Windows(whole.ids[[0, 4, 8]], whole.documents[[0, 4, 8]])
    alone = measure_table(session, replace(config, sensitivity=Fisher(chunks=2)), space)
    np.testing.assert_array_equal(found.loss, alone.loss)


def test_windows_are_spread_from_the_first_to_the_last() -> None:
    all_of_them = Windows(np.arange(10)[:, None], np.arange(10), tuple("abcdefghij"))
    some = all_of_them.spread(4)
    assert some.ids[:, 0].tolist() == some.documents.tolist() == [0, 3, 6, 9]
    assert some.domains == ("a", "d", "g", "j")
    assert all_of_them.spread(10) is all_of_them.spread(11) is all_of_them
    bare = Windows(np.arange(3)[:, None], np.arange(3)).spread(2)
    assert bare.domains == () and bare.ids[:, 0].tolist() == [0, 2]


def test_a_layer_that_no_gradient_reaches_but_that_matters_is_measured(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row would say that all of its precisions are free."""
    config = replace(settings(source, tmp_path), sensitivity=Fisher(chunks=2))
    session, space = opened(config)
    blocks = session.model.net.model.layers

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(
            self.act_fn(self.gate_proj(x)) * self.up_proj(x).detach()
        )
        return found

    with monkeypatch.context() as patched:
        patched.setattr(type(blocks[0].mlp), "forward", forward)
        told: list[str] = []
        patched.setattr(session.view, "note", told.append)
        found = measure_table(session, config, space)
    own = [i for i, group in enumerate(space.groups) if "up_proj" in group[0]]
    assert own and (found.loss[own].max(1) > 0).all() and (found.stderr[own].max(1) > 0).all()
    assert (found.loss[own, 0] > 0).all()
    assert [x for x in told if x.startswith("No gradient reaches model.layers.0.mlp.up_proj")]


def test_a_layer_that_nothing_depends_on_stays_free(source: Source, tmp_path: Path) -> None:
    config = replace(settings(source, tmp_path), sensitivity=Fisher(chunks=2))
    session, space = opened(config)
    last = max(x.block for x in session.inventory.layers if x.block is not None)
    with torch.no_grad():
        session.model.net.model.layers[last].mlp.down_proj.weight.zero_()
    told: list[str] = []
    session.view.note = told.append  # type: ignore[method-assign]
    found = measure_table(session, config, space)
    dead = [i for i, g in enumerate(space.groups) if f"layers.{last}.mlp.up_proj" in g[0]]
    assert dead and not found.loss[dead].any()
    assert not [x for x in told if x.startswith("No gradient")]
