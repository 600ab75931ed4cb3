"""Bytes that decoding reads, against a count by hand; prices; and what the commands say."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from optimizer.config import Evaluate, Fit
from optimizer.errors import ConfigError
from optimizer.hardware import throughput
from optimizer.hardware.throughput import Traffic
from optimizer.plan import UNTOUCHED, WIDTH, Inventory, Plan, Precision, stored_bytes
from optimizer.reports.run import Scale
from optimizer.stages.space import SearchSpace
from tests.conftest import mixed


def by_hand(inventory: Inventory, choice, experts: float) -> float:
    found = 0.0
    for layer in inventory.layers:
        whole = layer.bytes(choice.get(layer.name, UNTOUCHED))
        if layer.kind == "experts":
            whole *= experts
        if layer.kind == "embedding" and not layer.tied:
            whole /= layer.rows
        found += whole
    return found + sum(WIDTH[x.dtype] * np.prod(x.shape) for x in inventory.others)


def test_what_a_token_reads(small):
    choice = mixed(small.inventory.layers)
    choice = {k: p for k, p in choice.items() if p.fits(dict(columns(small))[k])}
    for traffic in (Traffic(), Traffic(experts=0.5)):
        found = traffic.weights(small.inventory, choice)
        assert found == pytest.approx(by_hand(small.inventory, choice, traffic.experts), abs=1)
    assert Traffic(batch=4, cache=1000).token(800) == 1200


def columns(small):
    return [(layer.name, layer.cols) for layer in small.inventory.layers]


def test_points_know_it_too(small):
    scope = tuple(x for x in small.inventory.layers if x.cols % 16 == 0)
    names = ("int4_g16", "none")
    precisions = {"int4_g16": Precision("int", 4, 16), "none": UNTOUCHED}
    fitted = {(x.name, n): precisions[n] for x in scope for n in names}
    space = SearchSpace(scope, tuple((x.name,) for x in scope), names, fitted)
    scale = Scale.of(small.inventory, space, "sha", {"name": "rtn"}, Traffic(2, 500, 0.5))
    assignment = np.arange(len(scope)) % 2
    choice = {k: p for k, p in space.choice(assignment).items() if p.kind != "none"}
    point = scale.point("p", assignment, 0.1)
    weights = by_hand(small.inventory, choice, 0.5)
    assert point.moved == pytest.approx(weights / 2 + 500, abs=1)
    stored = stored_bytes(small.inventory, choice)
    assert point.bytes == stored["quantized"] + stored["untouched"]


def test_shares_of_experts():
    assert throughput.active_share({"num_experts": 64, "num_experts_per_tok": 8}) == 1 / 8
    assert (
        throughput.active_share(
            {"text_config": {"num_local_experts": 4, "num_experts_per_tok": 2}}
        )
        == 0.5
    )
    assert throughput.active_share({"hidden_size": 64}) == 1


def test_prices():
    assert throughput.price(3.6, 1000) == pytest.approx(1.0)  # 1000 s at 0.001 a second


def test_evaluate_times_both_models(mezzotint, packed_folder):
    done = mezzotint("evaluate", f"model={packed_folder}", "speed=4", "hourly_rate=0.36")
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    found = re.search(r"(\S+) tokens per second packed, (\S+) as the reference: (\S+) times", said)
    packed, reference, ratio = map(float, found.groups())
    assert packed / reference == pytest.approx(ratio, rel=0.06)  # of two digits
    price = re.search(r"tokens cost (\S+) packed", said)
    assert float(price[1]) == pytest.approx(throughput.price(0.36, packed), rel=0.02)


def test_fit_bounds_speed_and_price(mezzotint, run_folder):
    plan = Plan.load(run_folder)
    read = plan.provenance["read"]
    assert read < plan.bytes["total"]
    done = mezzotint("fit", run_folder, "budget.context=10", "bandwidth=1MB", "hourly_rate=1")
    said = " ".join(done.out.split())
    cache = 4 * 64 * 10 * 2  # blocks, values, tokens, bytes
    fastest = float(re.search(r"at most (\S+) tokens per second", said)[1])
    assert fastest == pytest.approx(1e6 / (read + cache), rel=0.01)
    assert f"{throughput.price(1, 1e6 / (read + cache)):.3g}" in said


def test_the_page_shows_it(run_folder):
    assert "read per token" in (run_folder / "report.html").read_text()


def test_prices_need_speeds():
    with pytest.raises(ConfigError, match="speed=64"):
        Evaluate(model="x", hourly_rate=1.0).check()
    with pytest.raises(ConfigError, match="bandwidth"):
        Fit(plan="x", hourly_rate=1.0).check()


@pytest.mark.parametrize("rate", [-3.0, 0.0, float("nan"), float("inf")])
def test_a_rate_is_an_amount(rate):
    with pytest.raises(ConfigError, match="above 0"):
        Evaluate(model="x", speed=4, hourly_rate=rate).check()
    with pytest.raises(ConfigError, match="above 0"):
        Fit(plan="x", bandwidth="1GB", hourly_rate=rate).check()


def test_what_is_timed_fits_the_context(mezzotint, packed_folder):
    done = mezzotint("evaluate", f"model={packed_folder}", "speed=225")
    assert done.code == 2 and "speed=225 more must fit the model's context of 256" in done.err


def test_sizes_that_cannot_be_read(mezzotint, run_folder, tmp_path):
    data = json.loads((run_folder / "plan.json").read_text())
    del data["checksum"], data["provenance"]["geometry"]["blocks"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    done = mezzotint("fit", "plan.json", "budget=pi3_1gb")
    assert done.code == 2 and "provenance.geometry.blocks" in done.err
