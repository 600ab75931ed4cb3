"""A model whose blocks are on disk gets the same codes, the same table and the same packed file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizer.formats.torch import packed
from optimizer.models.model import Model
from optimizer.models.offload import offloaded
from optimizer.quantization.methods import Awq, Gptq, bind
from optimizer.store import Store
from tests.conftest import planned, slow_beside
from tests.quantization.test_calibrated import Made, everything, small


def both(kind: str, folder: Path) -> list[Made]:
    """In memory, and on disk, with a store each."""
    memory = small(kind, folder / "model")
    disk = Model.load(folder / "model", memory.inventory, offload="disk")
    assert offloaded(disk.net) is not None and offloaded(memory.net) is None
    return [
        Made(model, Store(folder / name)) for name, model in (("memory", memory), ("disk", disk))
    ]


@pytest.mark.parametrize(
    ("kind", "method"),
    slow_beside(
        [("mixtral", Gptq(inputs="reference"))],
        [
            ("llama", Gptq(clip=True)),
            ("gemma2", Gptq(inputs="rounded")),
            ("mixtral", Gptq(inputs="reference")),
            ("gpt2", Gptq()),
            ("llama", Awq()),
        ],
    ),
)
def test_codes_and_the_packed_file_are_equal(kind: str, method: Any, tmp_path: Path) -> None:
    files = []
    for material in both(kind, tmp_path):
        choice = everything(material.model)
        rounder = bind(method, material).rounder(choice)
        plan = planned(material.inventory, choice)
        out = tmp_path / f"packed {len(files)}"
        packed.save(plan, material.model, tmp_path / "model", out, lambda x, _: x, rounder)
        files.append((out / "packed.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_gains_are_equal(kind: str, tmp_path: Path) -> None:
    found = [
        bind(Gptq(), material).gains([x.name for x in material.inventory.layers])
        for material in both(kind, tmp_path)
    ]
    assert found[0] == found[1]
    assert len({v for v in found[0].values() if np.isfinite(v)}) > 1
