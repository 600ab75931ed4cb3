"""What fits where, and the budget of a run that was given none."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.commands import advise
from optimizer.commands.advise import OVERHEAD, WORTH, Size
from optimizer.commands.capacity import machines
from optimizer.config import Advise, Optimize
from optimizer.errors import BudgetError, ConfigError
from optimizer.hardware.geometry import Block, Geometry
from optimizer.hardware.this_machine import this_machine
from optimizer.models.source import Source
from optimizer.plan import Budget, Plan
from tests.conftest import Command

SHAPE = Geometry((Block(32, 2048),), 4096, 14336, 4096, 128_256, 131_072, 128)
LLAMA = Size(8_030_000_000, 266_240, SHAPE)
ROOMY = Budget(memory="64GiB", machine="cpu", device="this machine")


def test_more_memory_and_less_context_allow_more_bits() -> None:
    def bits(memory: str, context: int) -> float:
        budget = Budget(memory=memory, machine="gpu", context=context)
        return LLAMA.bits(advise.room(LLAMA, budget, "vllm", 16))

    assert bits("24GiB", 8192) == 16.0
    assert 16 > bits("12GiB", 8192) > bits("8GiB", 8192) > 2.3
    assert bits("8GiB", 4096) > bits("8GiB", 8192)
    assert bits("4GiB", 8192) == 0.0


def test_bits_and_bytes_are_each_others_inverse() -> None:
    assert LLAMA.bits(LLAMA.bytes(4.375)) == pytest.approx(4.375, abs=1e-6)


@pytest.mark.parametrize(("memory", "taken"), [("12GiB", 8), ("8GiB", 6), ("6GiB", 4)])
def test_a_run_without_a_budget_takes_the_largest_that_fits(
    memory: str, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advise, "measured", lambda _folder: LLAMA)
    machine = Budget(memory=memory, machine="cpu", device="this machine")
    config, said = advise.propose(Optimize(model="x"), Path(), lambda: machine)
    assert int(str(config.budget.size)) == LLAMA.bytes(taken + OVERHEAD)
    assert f"Taken: {taken} bits" in said[0] and "8192 tokens" in said[0]
    left = advise.room(LLAMA, machine_with(machine), "torch", 16)
    larger = [b for b in WORTH if b > taken]
    assert all(LLAMA.bytes(b + OVERHEAD) > left for b in larger)
    config.check()


def machine_with(machine: Budget) -> Budget:
    from dataclasses import replace

    return replace(machine, context=8192)


def test_a_model_that_is_too_large_names_the_smallest_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(advise, "measured", lambda _folder: LLAMA)
    small = Budget(memory="2GiB", machine="cpu", device="this machine")
    with pytest.raises(BudgetError, match=r"too large for this machine.*budget=\w+") as caught:
        advise.propose(Optimize(model="x"), Path(), lambda: small)
    name = str(caught.value).rpartition("budget=")[2].rstrip(").")
    assert name in {machine.name for machine in machines()}


def test_a_given_budget_is_left_alone() -> None:
    asked = Optimize(model="x", budget=Budget(bits=4.5))
    assert advise.propose(asked, Path("nowhere")) == (asked, [])


def test_this_machine_is_its_card_or_its_memory() -> None:
    card = this_machine(lambda: ("RTX 9", 12 * 2**30), lambda: 0)
    assert (card.machine, card.memory, card.device) == ("gpu", str(12 * 2**30), "this RTX 9")
    plain = this_machine(lambda: None, lambda: 8 * 2**30)
    assert plain.machine in ("cpu", "apple") and plain.memory == str(8 * 2**30)
    with pytest.raises(BudgetError, match="couldn't be found out"):
        this_machine(lambda: None, lambda: 0)
    assert int(str(this_machine().memory)) > 2**28  # the real one


def test_the_table_of_a_real_model(mezzotint: Command, source: Source, store: Path) -> None:
    done = mezzotint("advise", f"model={source.folder}", "contexts=[64,4096]")
    assert done.code == 0, done.err
    assert "this machine" in done.out and "rtx3060_12gb" in done.out and "64 tokens" in done.out
    found = advise.advise(Advise(model="stories", store=str(store)), lambda: ROOMY)
    assert found.here is not None and found.here.bits == (16.0,) * len(found.contexts)
    wrong = mezzotint("advise", "model=stories", "contexts=[]")
    assert wrong.code == 2 and "contexts is a list" in wrong.err


def test_a_run_without_a_budget_is_a_run(mezzotint: Command) -> None:
    parts = [
        f"data.{part}.{key}"
        for part in ("calibration", "search", "heldout")
        for key in ("sequences=8", "length=32")
    ]
    done = mezzotint(
        "optimize", "model=stories", *parts, "proof.certify=false", "wandb=off", "hydra.run.dir=r"
    )
    assert done.code == 0, done.err
    assert "No budget was given." in done.out and "Taken: 8 bits" in done.out
    plan = Plan.load("r")
    assert plan.quantizer["name"] == "gptq" and plan.effective_bits > 8
    assert set(plan.scope) == set(plan.layers)


def test_contexts_must_be_numbers() -> None:
    with pytest.raises(ConfigError, match="contexts"):
        Advise(model="x", contexts=[0]).check()
