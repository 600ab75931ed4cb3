"""Weights and cache share a machine's memory: the pair that measures best is chosen, searched,
certified and packed together."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from optimizer.commands import inspect
from optimizer.config import Probe
from optimizer.errors import ConfigError
from optimizer.plan import Budget, Plan
from optimizer.stages.view import View
from tests.commands.test_probe import story_pairs
from tests.conftest import QUICK

MACHINE = ["budget=pi3_1gb", "budget.overhead=0", "budget.usable=1", "budget.context=256"]


def made(mezzotint, memory, kv, name="out", *more):
    done = mezzotint(
        "optimize", "model=stories", *MACHINE, f"budget.memory={memory}", f"budget.kv={kv}",
        *QUICK, f"hydra.run.dir={name}", *more,
    )  # fmt: skip
    assert done.code == 0, done.err
    return done, Plan.load(name)


def test_few_bytes_go_to_the_weights(mezzotint):
    done, plan = made(mezzotint, "880KB", "auto")
    tried = {row["kv"]: row for row in plan.provenance["caches"]}
    assert list(tried) == [16, 8, 4]
    assert tried[16]["bits"] < tried[8]["bits"] < tried[4]["bits"]
    assert plan.kv == min(tried, key=lambda kv: tried[kv]["kl"]) == 8
    assert json.loads(Path("out/plan.json").read_text())["kv"] == 8
    said = " ".join(done.out.split())
    assert f"Weights at {tried[8]['bits']:.2f} bits, cache at 8" in said
    assert "cache at 8" in " ".join(mezzotint("show", "out/plan.json").out.split())
    assert "cache at 8" in Path("out/report.html").read_text()
    fitting = mezzotint("fit", "out", *MACHINE, "budget.memory=880KB")
    assert "8 bits" in fitting.out and "It fits" in fitting.out


def test_plenty_leaves_the_cache_alone(mezzotint):
    _, plan = made(mezzotint, "2MB", "[16,4]")
    assert plan.kv == 16 and [row["kv"] for row in plan.provenance["caches"]] == [16, 4]


@pytest.mark.slow
def test_what_is_certified_has_the_cache_in_it(mezzotint):
    """With untouched weights only the cache is left to lose anything."""
    _, exact = made(mezzotint, "2MB", "16", "exact")
    _, rough = made(mezzotint, "2MB", "4", "rough")
    loss = [plan.certificate["rows"][0]["kl"]["value"] for plan in (exact, rough)]
    assert loss[0] == 0 and loss[1] > 1e-4 and exact.id == rough.id
    assert mezzotint("apply", "rough/plan.json", "out=packed").code == 0
    done = mezzotint("evaluate", "model=packed", *QUICK[:6])
    found = float(done.out.split("mean KL (nats/token)")[1].split()[1])
    assert found == pytest.approx(loss[1], abs=2e-4)
    pairs = [json.dumps(pair) for pair in story_pairs()]
    Path("pairs.jsonl").write_text("\n".join(pairs))
    worst = []
    for name in ("exact", "rough"):  # the same weights, so only the cache can move a margin
        call = ("probe", f"{name}/plan.json", "probes=pairs.jsonl", f"out={name}.json")
        assert mezzotint(*call).code == 0
        worst.append(json.loads(Path(f"{name}.json").read_text())["cells"][0]["damage"]["plan"])
    assert worst[0] != worst[1]
    asked = Probe(plan="rough/plan.json", store=os.environ["MEZZOTINT_STORE"])
    subject = inspect.Subject("probe", asked, View())
    ids = torch.arange(20)[None] % 90
    with torch.inference_mode():
        plain = subject.model.net(input_ids=ids).logits
        with subject.holding(subject.plan.choice) as net:
            assert not torch.equal(net(input_ids=ids).logits, plain)
        with subject.holding({}) as net:
            assert torch.equal(net(input_ids=ids).logits, plain)


@pytest.mark.slow
def test_the_search_measures_both(mezzotint):
    """The same weights' problem, searched with and without a rounded cache."""
    start = []
    for kv in (16, 4):
        done = mezzotint(
            "optimize", "model=stories", "budget.bits=6", f"budget.kv={kv}", *QUICK,
            "search=moves", "search.tokens=2000", "proof.certify=false",
        )  # fmt: skip
        assert done.code == 0, done.err
        start.append(float(done.out.split("KL went from")[1].split()[0]))
    assert start[1] > start[0] + 5e-4


@pytest.mark.parametrize(
    ("kv", "says"), [("automatic", "or auto"), ([16, "x"], "or auto"), ([], "or auto")]
)
def test_wrong_caches(kv, says):
    with pytest.raises(ConfigError, match=says):
        Budget(memory="1GiB", kv=kv).check()


def test_a_search_over_caches_needs_a_machine():
    with pytest.raises(ConfigError, match="budget=NAME"):
        Budget(bits=4.0, kv="auto").check()


def test_a_cache_that_the_runtime_lacks(mezzotint):
    done = mezzotint("optimize", "model=stories", *MACHINE, "budget.kv=5", "proof.certify=false")
    assert done.code == 2 and "budget.kv=5" in done.err


@pytest.mark.slow
def test_tokens_that_are_kept_whole_are_searched_and_certified(mezzotint):
    """Few bytes: the first and last tokens of a cache of 4 bits at 16 are tried beside others."""
    _, plan = made(mezzotint, "880KB", "4", "out", "budget.keep=[null,4+32]")
    tried = {row["keep"]: row for row in plan.provenance["caches"]}
    assert list(tried) == [None, "4+32"]
    assert tried["4+32"]["bits"] < tried[None]["bits"], "they cost bytes of the weights"
    assert plan.keep == min(tried, key=lambda keep: tried[keep]["kl"])
    _, rough = made(mezzotint, "2MB", "4", "rough")
    _, kept = made(mezzotint, "2MB", "4", "kept", "budget.keep=4+32")
    loss = [p.certificate["rows"][0]["kl"]["value"] for p in (rough, kept)]
    assert 0 < loss[1] < 0.8 * loss[0], "the same weights, and more of the cache"
    assert mezzotint("apply", "kept/plan.json", "out=packed").code == 0
    again = mezzotint("evaluate", "model=packed", *QUICK[:6])
    found = float(again.out.split("mean KL (nats/token)")[1].split()[1])
    assert found == pytest.approx(loss[1], abs=2e-4)
    fitting = mezzotint("fit", "kept", *MACHINE, "budget.memory=2MB")
    assert "4 bits, the first 4 and" in fitting.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["budget.kv=4", "budget.keep=much"], "such as 4+64"),
        (["budget.kv=16", "budget.keep=4+64"], "fewer than 16 bits"),
        (["budget.kv=8", "budget.keep=4+64", "runtime=vllm"], "runtime=torch"),
    ],
)
def test_what_can_not_be_kept(mezzotint, words, said):
    done = mezzotint("optimize", "model=stories", "budget=pi3_1gb", *words)
    assert done.code == 2 and said in " ".join(done.err.split()), done.err


def test_windows_are_refused_before_anything_is_measured(mezzotint, tmp_path):
    from tests.conftest import ARCHITECTURES, build

    folder = build(tmp_path / "m", "gemma2", *ARCHITECTURES["gemma2"])
    done = mezzotint(
        "optimize", f"model={folder}", "budget.bits=5", "budget.kv=4", "budget.keep=4+8", *QUICK,
        "data=self",
    )  # fmt: skip
    assert done.code == 2 and "sees all tokens" in done.err, done.err
    assert "sensitivity" not in done.out
