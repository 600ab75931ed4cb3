"""llama.cpp's own mixtures: types and bytes as its files have them, and a run that shows one."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("xllamacpp")

from gguf import GGMLQuantizationType
from gguf.quants import quantize

from optimizer.cli.main import main
from optimizer.formats.gguf import mixtures
from optimizer.formats.gguf.mixtures import Shape
from optimizer.quantization import ggml_native
from tests.conftest import QUICK
from tests.formats.conftest import Wide

# SmolLM2-135M: 30 blocks, 9 heads, 3 of keys, rows of 576 and 1536, a tied head
ROLES = {"attn_q": 576, "attn_k": 576, "attn_v": 576, "attn_output": 576, "ffn_gate": 576,
         "ffn_up": 576, "ffn_down": 1536}  # fmt: skip
SMOLLM2 = {"token_embd.weight": 576} | {
    f"blk.{i}.{role}.weight": width for i in range(30) for role, width in ROLES.items()
}


@pytest.mark.parametrize(
    ("mixture", "types"),
    [  # of the files that llama.cpp wrote, experiments/08-llamacpp-mixtures/results.csv
        ("Q2_K", "Q3_K:30 Q4_0:180 Q8_0:1"),
        ("Q3_K_M", "Q4_0:120 Q4_K:29 Q5_0:58 Q5_1:2 Q5_K:1 Q8_0:1"),
        ("Q4_K_M", "Q4_K:16 Q5_0:166 Q6_K:14 Q8_0:15"),
        ("Q6_K", "Q6_K:30 Q8_0:181"),
    ],
)
def test_types_are_those_of_llama_cpps_own_files(mixture: str, types: str) -> None:
    found = mixtures.typed(mixture, Shape("llama", 30, 3.0), SMOLLM2)
    counted = Counter(found.values())
    assert " ".join(f"{kind.upper()}:{n}" for kind, n in sorted(counted.items())) == types
    assert found["token_embd.weight"] == "q8_0"


def test_rows_that_no_type_divides_stay_as_they_are() -> None:
    assert mixtures.typed("Q4_K_M", Shape("llama", 2, 1.0), {"blk.0.attn_q.weight": 40}) == {}


def test_a_head_of_its_own_gets_more_bits_and_the_embedding_doesnt() -> None:
    widths = {"token_embd.weight": 256, "output.weight": 256}
    found = mixtures.typed("Q4_K_M", Shape("llama", 2, 1.0), widths)
    assert found == {"token_embd.weight": "q4_k", "output.weight": "q6_k"}


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q5_1", "q8_0"])
def test_weights_are_rounded_as_llama_cpp_does_without_importances(kind: str) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    mine = ggml_native.encode_plainly(weight, kind).numpy()
    theirs = quantize(weight.numpy(), GGMLQuantizationType[kind.upper()])
    assert np.array_equal(mine, theirs.reshape(mine.shape))


def test_a_run_shows_the_largest_mixture_of_at_most_its_bytes(
    wide: Wide, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [f"model={wide.folder}", "runtime=llamacpp", "palette.bits=[q4_k,q6_k]", "budget.bits=6",
             "quantizer=rtn", "search=exact", "proof.domains=[]", "data=self", "wandb=off",
             "hydra.run.dir=r", *[x for x in QUICK if "domains" not in x]]  # fmt: skip
    assert main(["optimize", *given]) == 0
    rows = json.loads((tmp_path / "r/plan.json").read_text())["certificate"]["rows"]
    [stock] = [row for row in rows if row["name"].startswith("llama.cpp's ")]
    mine = next(row for row in rows if row["name"] == "plan")
    assert 0 < stock["bytes"] <= 1.01 * mine["bytes"] and stock["kl"]["value"] > 0
    assert stock["name"] in capsys.readouterr().out
