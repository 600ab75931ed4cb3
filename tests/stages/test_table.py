"""Which windows a table reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

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
