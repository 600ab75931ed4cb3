"""The memory model against closed forms, against caches that transformers really fills, and the
answers of `mezzotint fit`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.commands import capacity
from optimizer.config import Fit
from optimizer.errors import BudgetError, ConfigError, ModelError, PlanError
from optimizer.hardware import memory
from optimizer.hardware.geometry import Block, Geometry, geometry
from optimizer.hardware.memory import ENGINES, MIB
from optimizer.plan import Budget
from tests.reports.test_html import make_run

CARD = Budget(memory="1GiB", usable=0.9, context=100)
LLAMA3_8B = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip
DEEPSEEK_V3 = {
    "hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def per_token(config):
    return memory.cache_bytes(geometry(config), 1, 1, 16)


def test_grouped_queries():
    assert per_token(LLAMA3_8B) == 131072  # 2 * 8 heads * 128 * 32 blocks * 2 bytes


def test_latent_attention():
    assert per_token(DEEPSEEK_V3) == 61 * 576 * 2


def test_a_window_ends_the_growth():
    config = LLAMA3_8B | {"sliding_window": 1024}
    shape = geometry(config)
    assert memory.cache_bytes(shape, 5000, 1, 16) == memory.cache_bytes(shape, 1024, 1, 16)
    unused = geometry(config | {"use_sliding_window": False})
    assert memory.cache_bytes(unused, 5000, 1, 16) == 5000 * 131072


def test_alternating_windows():
    gemma2 = LLAMA3_8B | {"sliding_window": 1024, "model_type": "gemma2"}
    assert memory.cache_bytes(geometry(gemma2), 8192, 1, 16) == 16 * 4096 * (8192 + 1024)


def test_caches_of_few_bits_carry_their_scales():
    shape = geometry(LLAMA3_8B)
    sixteen, eight, four = (
        memory.use(shape, "llamacpp", replace(CARD, kv=bits), 0).cache for bits in (16, 8, 4)
    )
    assert eight / sixteen == 8.5 / 16 and four / sixteen == 4.5 / 16


def test_batches_multiply():
    shape = geometry(LLAMA3_8B)
    assert memory.cache_bytes(shape, 77, 5, 16) == 5 * memory.cache_bytes(shape, 77, 1, 16)


COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 128,
}  # fmt: skip
TINY = {
    "llama": {"num_hidden_layers": 3},
    "mistral": {"num_hidden_layers": 2, "sliding_window": 8},
    "gemma3_text": {"num_hidden_layers": 6, "sliding_window": 8, "head_dim": 16},
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 50},
    "deepseek_v3": {
        "num_hidden_layers": 2, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12, "v_head_dim": 20, "num_key_value_heads": 4, "n_group": 1,
        "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    },
    "qwen3_next": {
        "num_hidden_layers": 4, "head_dim": 16, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TINY)
def test_caches_that_transformers_fills(kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens, batch = 20, 2
    common = {} if kind == "gpt2" else COMMON
    config = AutoConfig.for_model(kind, **(common | TINY[kind]))
    net = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        ids = torch.zeros((batch, tokens), dtype=torch.long)
        cache = net(input_ids=ids, use_cache=True).past_key_values
    held = [
        value
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, torch.Tensor)
    ]
    held += [
        v
        for layer in cache.layers
        for value in vars(layer).values()
        if isinstance(value, dict)
        for v in value.values()
        if isinstance(v, torch.Tensor)
    ]
    found = sum(value.numel() * value.element_size() for value in held)
    shape = geometry(json.loads(config.to_json_string(use_diff=False)))
    predicted = memory.cache_bytes(shape, tokens, batch, 32)
    one_token = memory.cache_bytes(shape, 1, batch, 32)  # a window keeps one token less
    assert found <= predicted <= found + one_token


def peak_of_a_step(net, ids, cache):
    """Bytes that torch's allocator had given out at the worst moment of a forward pass."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        net(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        {"intermediate_size": 512},  # feed-forward
        {"intermediate_size": 32, "head_dim": 64},  # rotation
        {"num_key_value_heads": 4},  # nothing is repeated
    ],
)
@pytest.mark.parametrize("context", [48, 128, 176])
def test_activations_are_what_the_allocator_gives_out(change, context, monkeypatch):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    monkeypatch.setitem(ENGINES, "torch", replace(ENGINES["torch"], prefill=64))
    values = COMMON | {"num_hidden_layers": 3, "head_dim": 16, "max_position_embeddings": 256}
    config = AutoConfig.for_model("llama", **(values | change))
    net = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.zeros((16, context), dtype=torch.long)
    cache, most, before = DynamicCache(config=net.config), 0, 0
    shape = geometry(json.loads(config.to_json_string(use_diff=False)))
    with torch.inference_mode():
        net(input_ids=ids[:, :2], logits_to_keep=1)  # what a first pass alone allocates
        for i in range(0, context, 64):
            most = max(most, before + peak_of_a_step(net, ids[:, i : i + 64], cache))
            before = memory.cache_bytes(shape, min(i + 64, context), 16, 32)
    full = memory.cache_bytes(shape, context, 16, 32)
    predicted = full + memory.activation_bytes(shape, "torch", context, 16, 32, 32)
    assert predicted == pytest.approx(most, rel=0.04)


def test_an_architecture_that_is_not_known_says_so():
    with pytest.raises(ModelError, match="hidden_size"):
        geometry({"d": 3})
    with pytest.raises(ModelError, match="telepathy"):
        geometry(LLAMA3_8B | {"layer_types": ["telepathy"] * 32})


SHAPE = Geometry((Block(4, 1024),), 64, 256, 64, 1000, 100_000)


def test_other_budgets_are_left_alone():
    assert memory.resolve(Budget(bits=4.0), SHAPE, "torch", 1) == (Budget(bits=4.0), "")


def test_what_is_left_is_for_weights():
    budget, text = memory.resolve(CARD, SHAPE, "torch", 1000)
    need = memory.use(SHAPE, "torch", CARD, int(budget.size))
    assert need.total == memory.usable(CARD)
    assert "100 tokens" in text and "for weights" in text


def test_a_cache_that_does_not_fit_says_which_context_would():
    budget = replace(CARD, context=90_000)
    with pytest.raises(BudgetError, match=r"budget\.context=(\d+)") as caught:
        memory.resolve(budget, SHAPE, "torch", MIB)
    longest = int(str(caught.value).split("budget.context=")[2].split(",")[0])
    assert memory.use(SHAPE, "torch", replace(CARD, context=longest), MIB).total <= memory.usable(
        CARD
    )
    assert memory.use(
        SHAPE, "torch", replace(CARD, context=longest + 1), MIB
    ).total > memory.usable(CARD)
    memory.resolve(replace(CARD, context=longest), SHAPE, "torch", MIB)


def test_nothing_fits_a_machine_below_the_runtime():
    with pytest.raises(BudgetError, match="No context fits") as caught:
        memory.resolve(replace(CARD, memory="100MiB"), SHAPE, "torch", MIB)
    assert "lower budget.batch" not in str(caught.value)


def test_so_many_sequences_that_no_context_fits():
    with pytest.raises(BudgetError, match=r"No context fits.*lower budget\.batch"):
        memory.resolve(replace(CARD, batch=100_000), SHAPE, "torch", MIB)


def test_a_context_that_the_model_was_not_made_for_is_said():
    shape = replace(SHAPE, longest=1000)
    assert "made for" not in memory.resolve(replace(CARD, context=1000), shape, "torch", MIB)[1]
    assert "made for 1000 tokens" in memory.resolve(
        replace(CARD, context=1001), shape, "torch", MIB
    )[1]  # fmt: skip


def test_a_cache_that_the_runtime_does_not_have():
    with pytest.raises(ConfigError, match=r"budget\.kv=4"):
        memory.use(SHAPE, "vllm", replace(CARD, kv=4), 0)


@pytest.mark.parametrize(
    "wrong",
    [{"usable": 0.0}, {"usable": 1.1}, {"context": 0}, {"batch": 0}, {"machine": "abacus"},
     {"overhead": "much"}, {"bits": 4.0}],
)  # fmt: skip
def test_wrong_machines(wrong):
    with pytest.raises(ConfigError):
        replace(CARD, **wrong).check()


def test_presets():
    found = capacity.machines()
    assert len(found) >= 20
    assert {machine.budget.machine for machine in found} == {"gpu", "apple", "cpu"}
    for machine in found:
        machine.budget.check()
        assert machine.budget.device and machine.budget.source, machine.name
    assert not any(machine.name.startswith("toy") for machine in found)
    sizes = [memory.usable(machine.budget) for machine in found]
    assert sizes == sorted(sizes)


def save(folder: Path, geometry=SHAPE):
    from dataclasses import asdict

    plan, run = make_run()
    plan = replace(plan, provenance={"geometry": asdict(geometry)} if geometry else {})
    plan.save(folder / "plan.json")
    run.save(folder)
    return plan, run


def test_fit_answers(tmp_path):
    _, run = save(tmp_path)
    machine = replace(CARD, memory="1GiB", usable=1.0)
    found = capacity.answer(Fit(plan=str(tmp_path), budget=machine))
    assert found.need.weights == run.chosen.bytes
    assert found.room == MIB * 1024 - found.need.total
    assert 100 < found.longest < SHAPE.longest
    names = [m.name for m in found.smallest]
    assert names[0] == "pi3_1gb" and "gpu4gb" in names  # torch does not fit in 512 MiB


def test_fit_finds_the_smallest_plan_for_a_loss(tmp_path):
    _, run = save(tmp_path)
    wanted = run.front[3].predicted
    found = capacity.answer(Fit(plan=str(tmp_path), loss=wanted))
    assert found.wanted == run.front[3]
    with pytest.raises(BudgetError, match="the least is"):
        capacity.answer(Fit(plan=str(tmp_path), loss=0.0))


def test_fit_says_what_more_memory_buys(tmp_path):
    plan, run = save(tmp_path)
    besides = memory.use(SHAPE, "torch", CARD, 0).besides
    packed = 64 * 64  # at unpacking, the largest layer
    besides += memory.unpacking(packed, plan.choice[next(iter(plan.layers))])
    small = besides + run.front[1].bytes
    more = run.front[4].bytes - run.front[1].bytes
    machine = replace(CARD, memory=str(small), usable=1.0)
    step = capacity.answer(Fit(plan=str(tmp_path), budget=machine, more=str(more))).step
    assert (step.now, step.then) == (run.front[1], run.front[4])


def test_fit_needs_what_it_asks_about(tmp_path):
    save(tmp_path)
    with pytest.raises(ConfigError, match=r"budget\.bits"):
        capacity.answer(Fit(plan=str(tmp_path), budget=Budget(bits=4)))
    with pytest.raises(ConfigError, match="no run's folder"):
        capacity.answer(Fit(plan=str(tmp_path / "plan.json"), loss=0.1))
    save(tmp_path, None)
    with pytest.raises(PlanError, match="sizes"):
        capacity.answer(Fit(plan=str(tmp_path)))


def test_the_command_line_says_it(tmp_path, capsys):
    from optimizer.cli.main import main

    save(tmp_path)
    assert main(["fit", str(tmp_path), "budget=rtx3060_12gb", "loss=1.5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("RTX 3060", "It fits", "Longest context", "budget=pi3_1gb", "1.00 GiB more"):
        assert part in said
    assert "fewer than budget.context" not in said
    long = f"budget.context={SHAPE.longest + 1}"
    assert main(["fit", str(tmp_path), "budget=rtx3060_12gb", long]) == 0
    assert f"made for {SHAPE.longest} tokens, fewer than budget.context" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["fit", str(tmp_path), "budget=rtx306"]) == 2
    assert "Near names: rtx3060_12gb" in capsys.readouterr().err


def test_every_engine_knows_every_machine():
    assert all(engine.overhead.keys() == {"gpu", "apple", "cpu"} for engine in ENGINES.values())
