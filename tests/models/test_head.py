"""What follows an output head, found by sending numbers through it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optimizer.errors import ModelError
from optimizer.models.head import final_transform, unchanged
from tests.conftest import Small


class Headed(nn.Module):
    """An embedding and a head, with something behind it."""

    def __init__(self, behind: Callable[[Tensor], Tensor], **numbers: float) -> None:
        super().__init__()
        self.body, self.head = nn.Embedding(96, 8), nn.Linear(8, 96)
        self.behind = behind
        text = SimpleNamespace(to_dict=lambda: numbers)
        self.config: Any = SimpleNamespace(get_text_config=lambda: text)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.behind(self.head(self.body(input_ids))))


def masked(z: Tensor) -> Tensor:
    z = z.clone()
    z[..., 3] = -3e38
    return z / 3.0


BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda z: z,
    "times": lambda z: z * 0.25,
    "divided": lambda z: z / 3.0,
    "capped": lambda z: torch.tanh(z / 30) * 30,
    "scaled and capped": lambda z: torch.tanh(z * 0.3 / 15) * 15,
    "unknown to the config": lambda z: z * 0.123,
    "one token fixed": masked,
}


@pytest.mark.parametrize("name", list(BEHIND))
def test_what_follows_is_found(name: str) -> None:
    net = Headed(BEHIND[name], factor=3.0, cap=30, other=0.25)
    found = final_transform(net)
    z = 40 * torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(found(z), BEHIND[name](z), rtol=1e-5, atol=1e-6)
    assert (found is unchanged) == (name == "nothing")


@pytest.mark.parametrize(
    "behind",
    [lambda z: z**2, lambda z: z.flip(-1), lambda z: z[..., :90], lambda z: z.softmax(-1)],
)
def test_what_isnt_known_is_refused(behind: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match="isn't supported"):
        final_transform(Headed(behind))


def test_a_model_that_fails_before_its_head_is_told_so() -> None:
    """DBRX without clip_qkv: what its head does was blamed."""
    net = Headed(lambda z: z)
    net.body.register_forward_hook(lambda _, __, output: output.clamp(min=None, max=None))
    with pytest.raises(ModelError, match=r"can't run Headed on text \(RuntimeError: .*clamp"):
        final_transform(net)


def test_small_logits_hide_no_cap() -> None:
    """With weights near zero a cap changes nothing that could be seen in the model's own logits."""
    net = Headed(BEHIND["capped"], cap=30.0)
    for value in net.parameters():
        nn.init.normal_(value, std=1e-4)
    assert final_transform(net) is not unchanged


def test_real_models(small: Small) -> None:
    assert (small.name == "gemma2") != (final_transform(small.model.net) is unchanged)


def test_a_head_that_predicts_several_tokens_ahead_is_refused() -> None:
    """ProphetNet: two streams of hidden states, whose comparison ended in a traceback."""
    from optimizer.data.text import Windows
    from optimizer.metrics.divergence import Teacher
    from tests.architectures import zoo

    ids = np.arange(3, 23).reshape(2, 10)
    net = zoo.build("prophetnet")
    with pytest.raises(ModelError, match=r"\(2, 2, 10\) vectors for \(2, 10\) tokens"):
        Teacher(net, Windows(ids, np.arange(2)))
