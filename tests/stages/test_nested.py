"""`optimize nested.size=...`: bytes of both files, what is measured, what can't be."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import optimizer
from optimizer.errors import PlanError
from optimizer.models.model import Model
from optimizer.plan import Plan
from tests.conftest import QUICK, Command

MODES = ("never", "always")


@pytest.fixture(scope="module")
def plan(nested_plan: Path) -> Plan:
    return Plan.load(nested_plan)


def test_both_budgets_are_kept(plan: Plan) -> None:
    section = plan.refinement
    assert section is not None and section.layers
    assert plan.bytes["total"] <= 100_000
    together = plan.bytes["total"] + section.bytes["total"]
    assert 0.9 * 130_000 < together <= 130_000, "room for planes was left"


def test_the_refined_model_is_nearer_and_both_are_measured(plan: Plan) -> None:
    assert plan.refinement is not None
    kl = {k: v["value"] for k, v in plan.refinement.certificate["kl"].items()}
    assert kl["refined"] < 0.5 * kl["base"]
    assert kl["separate refined"] < kl["separate base"]
    assert plan.refinement.predicted["kl"] == pytest.approx(kl["refined"], rel=0.5)


def test_unpacking_more_tokens_loses_less(plan: Plan) -> None:
    assert plan.refinement is not None
    points = plan.refinement.hard["points"]
    kl = [p["kl"] for p in points]
    assert points[0]["share"] == 0 and points[-1]["share"] == 1
    assert all(b < 1.1 * a for a, b in pairwise(kl)), "more planes lose more"
    assert kl[-1] < kl[3] < kl[0]


def test_a_plan_that_says_other_bytes_or_planes_is_refused(
    nested_plan: Path, tmp_path: Path
) -> None:
    data = json.loads(nested_plan.read_text())
    del data["checksum"]
    data["refinement"]["bytes"]["quantized"] += 1
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="planes take"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nested.size=90kB"], "is not above budget.size"),
        (["nested.size=130kB", "runtime=vllm"], "runtime=torch"),
        (["nested.size=130kB", "search=moves"], "search=exact"),
        (["nested.size=130kB", "nested.share=2"], "nested.share"),
        (["nested.size=130kB", "budget.kv=8"], "a cache of 16 bits"),
    ],
)
def test_mistakes_are_explained(mezzotint: Command, words: list[str], said: str) -> None:
    quick = [w for w in QUICK if not w.startswith("search=")]
    found = mezzotint("optimize", "model=stories", "budget.size=100kB", *quick, *words)
    assert found.code == 2 and said in found.err


@pytest.mark.slow
def test_gptq_refines_every_layer_the_head_too(
    mezzotint: Command, tmp_path: Path, stories: Model
) -> None:
    """Its planes are made by GPTQ, too; stored under keys of their own."""
    quick = [w for w in QUICK if not w.startswith(("scope", "quantizer"))]
    sizes = ["budget.size=95kB", "nested.size=200kB"]
    run = [*sizes, *quick, "quantizer=gptq", "proof.certify=false", f"hydra.run.dir={tmp_path}"]
    assert mezzotint("optimize", "model=stories", *run).code == 0
    assert mezzotint("apply", tmp_path / "plan.json", "out=packed").code == 0
    tied = [x.name for x in stories.inventory.layers if x.predicts]
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.refinement is not None and set(tied) <= plan.refinement.layers.keys()
    begun = torch.arange(5, 9)[None]
    with torch.inference_mode():
        ids = stories.net.generate(begun, do_sample=False, max_new_tokens=80, pad_token_id=0)
        wanted, base, refined = (
            net(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
            for net in (stories.net, *(optimizer.load("packed", unpack=u) for u in MODES))
        )
    kl = [float((wanted.exp() * (wanted - q)).sum(-1).mean()) for q in (base, refined)]
    assert kl[1] < 0.2 * kl[0]
