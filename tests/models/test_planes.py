"""Planes that are added to a model's layers as it runs, on every architecture."""

from __future__ import annotations

import torch

from optimizer.models import planes
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from tests.conftest import Small

IDS = torch.arange(5, 29).view(2, 12)
THREE = Precision("int", 3)


def test_what_a_base_lost_can_be_added_again(small: Small) -> None:
    """Of all layers that are said to be refinable: each is used by calling a module that holds it."""
    model = small.model
    layers = planes.refinable(model.net, small.inventory)
    assert layers, "nothing can be refined"
    choice = {layer.name: THREE for layer in layers}
    weights = {name: model.weight(name).clone() for name in choice}
    dense = {n: planes.Dense(w - Nearest().round(w, THREE)) for n, w in weights.items()}
    modules = planes.modules_of(model.net, layers)
    gate = planes.Gate()
    with torch.inference_mode():
        wanted = model.net(input_ids=IDS, use_cache=False).logits
        with model.rounded(Nearest(), choice), planes.attached(modules, dense, gate):
            base = model.net(input_ids=IDS, use_cache=False).logits
            gate.open = True
            refined = model.net(input_ids=IDS, use_cache=False).logits
    assert (refined - wanted).norm() < 1e-3 * (base - wanted).norm()
    assert gate.read > 0


def test_a_text_with_all_or_no_planes_is_the_refined_model_or_the_base(small: Small) -> None:
    model = small.model
    layers = planes.refinable(model.net, small.inventory)
    choice = {layer.name: THREE for layer in layers}
    dense = {
        n: planes.Dense(w - Nearest().round(w, THREE))
        for n, w in ((name, model.weight(name).clone()) for name in choice)
    }
    gate = planes.Gate()
    modules = planes.modules_of(model.net, layers)
    with (
        torch.inference_mode(),
        model.rounded(Nearest(), choice),
        planes.attached(modules, dense, gate),
    ):
        for open_ in (False, True):
            mask = torch.full(IDS.shape, open_)
            found, base = planes.caught_up(model.net, gate, IDS, mask, torch.float32)
            gate.open = open_
            wanted = model.net(input_ids=IDS, use_cache=False).logits
            gate.open = False
            assert torch.allclose(found, wanted, atol=1e-4), open_
        assert not torch.allclose(base, wanted, atol=1e-3), "the base is another model"
