"""A model of five tokens, where sums over all labels are possible."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimizer.models.model import Model
from optimizer.plan import Inventory, Layer

VOCABULARY = 5
NAMES = ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight")


@pytest.fixture(scope="module")
def tiny() -> Model:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    net = LlamaForCausalLM(config).eval().requires_grad_(False)
    for value in net.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.5)
    layers = tuple(
        Layer(
            n,
            *net.get_parameter(n).shape,
            "linear",
            n.split(".")[-2],
            0,
            n,
            tuple(net.get_parameter(n).shape),
            dtype="F32",
        )
        for n in NAMES
    )
    return Model(net, Inventory(layers, (), "F32"), None)  # type: ignore[arg-type]  # nothing reads its files
