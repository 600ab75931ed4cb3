"""A nested plan as two GGUF files: llama.cpp finds in them the base and the refined model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import optimizer
from tests.conftest import QUICK, Command
from tests.formats.conftest import IDS, LlamaCpp, Wide

GGML_HAS = ["palette.bits=[4,5,8,16]", "palette.symmetric=true", "quantizer=rtn"]


def nested(mezzotint: Command, wide: Wide, *words: str) -> None:
    made = mezzotint(
        "optimize", f"model={wide.folder}", "budget.size=1.2MB", "nested.size=2MB", *QUICK,
        "proof.random=0", "proof.domains=[]", "data=self", "nested.separate=false",
        "wandb=off", "hydra.run.dir=run", *words,
    )  # fmt: skip
    assert made.code == 0, made.err


@pytest.mark.slow
def test_draft_and_target_are_base_and_refined_model(mezzotint: Command, wide: Wide) -> None:
    nested(mezzotint, wide, *GGML_HAS)
    done = mezzotint("export", "run/plan.json", "to=gguf", "nested=true", "out=pair")
    assert done.code == 0, done.err
    assert (
        "llama-server -m target/model.gguf -md draft/model.gguf"
        in Path("pair/README.md").read_text()
    )
    assert mezzotint("apply", "run/plan.json", "out=packed").code == 0
    far = {}
    for name, unpack in (("draft", "never"), ("target", "always")):
        with torch.inference_mode():
            net = optimizer.load("packed", unpack=unpack)
            mine = torch.log_softmax(net(input_ids=IDS[:1]).logits, -1)[0, -1]
            theirs = LlamaCpp(Path(f"pair/{name}/model.gguf")).log_p(IDS[0].tolist())
            original = wide.log_p(None, IDS)[0, -1]
        far[name] = (
            float((mine.exp() * (mine - theirs)).sum()),
            float((original.exp() * (original - theirs)).sum()),
        )
    assert all(own < 0.02 for own, _ in far.values()), far
    assert far["target"][1] < 0.5 * far["draft"][1], "the target isn't the refined model"


@pytest.mark.slow
def test_what_can_not_be_a_pair_is_said(mezzotint: Command, wide: Wide) -> None:
    nested(mezzotint, wide, "palette.bits=[2,3,16]", "quantizer=rtn", "budget.size=900kB")
    for words, said in (
        (["run/plan.json", "to=gguf", "activations=true"], "is for to=vllm"),
        (["run/plan.json", "to=gguf"], "palette.bits=[4,5,8,16]"),
        (["run/plan.json", "to=vllm"], "to=gguf, not to=vllm"),
    ):
        done = mezzotint("export", *words, "nested=true", "out=pair")
        assert done.code == 2 and said in " ".join(done.err.split()), done.err
        assert not Path("pair").exists()
