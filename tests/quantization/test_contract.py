"""What every quantizer promises; one that is added is one line here, or an entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.formats.torch.reader import TYPES
from optimizer.models.model import Model
from optimizer.plan import Precision
from optimizer.quantization.methods import Quantizer, bind, methods
from optimizer.quantization.uniform import Nearest
from optimizer.store import Store

PRECISIONS = [
    Precision("int", 1, 32, True),
    Precision("int", 3, 32),
    Precision("int", 4, None, True),
    Precision("ternary", 2, 32, True),
    Precision("int", 8, 16),
    *(Precision.floating(kind) for kind in ("nvfp4", "mxfp4", "fp8")),
]
ROUGH = [Precision("int", 3, 32), Precision.floating("nvfp4"), Precision.floating("mxfp4")]
NAMES = sorted(methods().keys() - {"auto"})  # auto stands for one of the others


class Material:
    """The stories model with some tokens of its own."""

    def __init__(self, model: Model, store: Store) -> None:
        self.model, self.inventory, self.store = model, model.inventory, store
        self.calibration_key = "tokens"

    def calibration(self) -> np.ndarray:
        return np.random.default_rng(3).integers(3, self.model.net.config.vocab_size, (4, 32))

    def track(self, items: Any, _text: str) -> Any:
        return items


def watched(model: Model) -> str:
    return next(x.name for x in model.inventory.layers if x.watchable and x.cols % 32 == 0)


def made(name: str, model: Model, folder: Path) -> Any:
    return bind(methods()[name](), Material(model, Store(folder)))


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", NAMES)
def test_the_parts_have_the_promised_shapes_and_decode_to_what_is_rounded(
    stories: Model, tmp_path: Path, name: str, precision: Precision
) -> None:
    layer = watched(stories)
    weight, rounder = stories.weight(layer), made(name, stories, tmp_path)
    rounder.prepare({layer: [precision]})
    codes = rounder.encode(weight, precision, layer)
    parts = codes.pack()
    for part, (dtype, shape) in precision.parts(*weight.shape).items():
        assert parts[part].shape == shape
        assert parts[part].dtype == TYPES[dtype]
    assert torch.equal(codes.decode(), rounder.round(weight, precision, layer))


@pytest.mark.parametrize("name", NAMES)
def test_untouched_stays_untouched(stories: Model, tmp_path: Path, name: str) -> None:
    weight = stories.weight(watched(stories))
    found = made(name, stories, tmp_path).round(weight, Precision(), watched(stories))
    assert torch.equal(found, weight.float())


@pytest.mark.parametrize("precision", ROUGH, ids=lambda p: p.name)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_input_gives_the_same_codes(
    stories: Model, tmp_path: Path, name: str, precision: Precision
) -> None:
    layer = watched(stories)
    found = []
    for folder in ("one", "two"):
        rounder = made(name, stories, tmp_path / folder)
        rounder.prepare({layer: [precision]})
        found.append(rounder.encode(stories.weight(layer), precision, layer).pack())
    assert all(torch.equal(found[0][part], found[1][part]) for part in found[0])


@pytest.mark.parametrize("precision", ROUGH, ids=lambda p: p.name)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_no_worse_than_nearest_on_its_own_tokens(
    stories: Model, tmp_path: Path, name: str, precision: Precision
) -> None:
    """The error of the layer's output over the inputs that it is calibrated with; a calibrated
    method may lose a little to the damping of its Hessian."""
    from optimizer.models.blockwise import Stream

    layer = watched(stories)
    material = Material(stories, Store(tmp_path))
    rounder = bind(methods()[name](), material)
    rounder.prepare({layer: [precision]})
    (hessian,) = Stream(stories, material.calibration()).hessians(0, [[layer]])
    weight = stories.weight(layer)

    def loss(rounded: torch.Tensor) -> float:
        error = rounded - weight
        return float(((error @ hessian) * error).sum())

    own = loss(rounder.round(weight, precision, layer))
    assert own <= 1.05 * loss(Nearest().round(weight, precision))


@pytest.mark.parametrize("precision", PRECISIONS[1:], ids=lambda p: p.name)
@pytest.mark.parametrize("name", NAMES)
def test_dead_rows_stay_finite(
    stories: Model, tmp_path: Path, name: str, precision: Precision
) -> None:
    rounder = made(name, stories, tmp_path)
    weight = torch.zeros(4, 64)  # of a layer whose inputs nobody watches: rounded to nearest
    found = rounder.round(weight, precision, "unseen")
    assert torch.isfinite(found).all() and torch.equal(found, weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_key_names_the_method_its_version_and_its_fields(name: str) -> None:
    method: Quantizer = methods()[name]()
    assert method.name == name and name.lower() == type(method).__name__.lower()
    assert method.key("a")[:2] == [type(method).__name__, method.VERSION]
    assert (method.key("a") != method.key("b")) == method.calibrated
