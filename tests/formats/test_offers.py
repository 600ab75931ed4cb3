"""A search offers only what the engine holds: whatever it may choose, `mezzotint check` accepts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from optimizer import search
from optimizer.commands import export, notes, optimize
from optimizer.errors import ConfigError
from optimizer.formats import registry
from optimizer.formats.format import Subject
from optimizer.models.source import locate
from optimizer.plan import Budget, Plan, assemble
from optimizer.stages.space import SearchSpace, search_space
from optimizer.store import Store
from tests.cli.test_compose import composed
from tests.conftest import ARCHITECTURES, QUICK, WIDE, Command, Small, build, opened
from tests.formats.conftest import Wide

CHECKPOINTS = ("vllm", "transformers", "autoround", "gptq")


def offered(runtime: str, model: Wide | Small, *overrides: str) -> SearchSpace:
    given = [f"runtime={runtime}", "scope=all", *overrides]
    return search_space(composed("optimize", *given), model.inventory, model.folder)


def drawn(
    found: SearchSpace, rng: np.random.Generator, model: Wide | Small, fingerprint: str
) -> Plan:
    """Any plan of those that a search may make."""
    assert found.allowed is not None
    picks = np.array([rng.choice(np.flatnonzero(row)) for row in found.allowed])
    return assemble(
        model.inventory, found.scope, found.choice(picks),
        model={"name": str(model.folder), "fingerprint": fingerprint}, runtime="torch",
        quantizer={"name": "rtn"}, predicted={"kl": 0.1, "stderr": 0.01},
    )  # fmt: skip


@pytest.mark.parametrize("runtime", ["torch", "llamacpp", "mlx", *CHECKPOINTS])
def test_whatever_may_be_chosen_is_accepted(wide: Wide, runtime: str) -> None:
    found, rng = offered(runtime, wide), np.random.default_rng(0)
    for _ in range(8):
        plan = drawn(found, rng, wide, wide.fingerprint)
        assert not export.check(plan, runtime, str(wide.store)).errors
    inside = any("model.embed_tokens.weight" in group for group in found.groups)
    assert found.allowed is not None and found.allowed.all()
    assert inside == (runtime not in CHECKPOINTS)
    if runtime in CHECKPOINTS:  # bits are averaged over what the engine can round
        assert "model.embed_tokens.weight untouched, out of scope" in found.notes[0]
    else:
        assert not found.notes


@pytest.mark.parametrize("runtime", ["vllm", "transformers"])
def test_floats_that_may_be_chosen_are_accepted(wide: Wide, runtime: str) -> None:
    found = offered(runtime, wide, "palette=blackwell")
    assert {"nvfp4", "mxfp4", "fp8", "none"} == set(found.columns)
    for seed in range(4):
        plan = drawn(found, np.random.default_rng(seed), wide, wide.fingerprint)
        assert not export.check(plan, runtime, str(wide.store)).errors


# of a matrix, one engine with every architecture
@pytest.mark.parametrize(
    "runtime",
    ["vllm", *(pytest.param(r, marks=pytest.mark.slow) for r in (*CHECKPOINTS[1:], "mlx"))],
)
def test_every_architecture_is_refused_or_accepted(
    small: Small, runtime: str, tmp_path: Path
) -> None:
    """Conv1D, joined experts, matrices of 16 rows: no plan that could not be exported."""
    try:
        found = offered(runtime, small, "palette.group_size=0")
    except ConfigError as refused:
        assert small.name == "gpt2", refused
        assert "conv1d" in str(refused) and "another runtime" in str(refused)
        return
    fingerprint = locate(str(small.folder), Store(tmp_path)).fingerprint
    for seed in range(4):
        plan = drawn(found, np.random.default_rng(seed), small, fingerprint)
        assert not export.check(plan, runtime, str(tmp_path)).errors


def test_words_that_rows_do_not_fill(llama: Small) -> None:
    """GPTQ packs 32 rows into words: 16 keys stay untouched, and so do queries and values, which vLLM
    joins with them; the embeddings do anyway."""
    layers = tuple(
        replace(x, rows=16, shape=(16, x.cols)) if x.role == "k_proj" else x
        for x in llama.inventory.layers
    )
    found = offered(
        "gptq",
        replace(llama, inventory=replace(llama.inventory, layers=layers)),
        "palette.group_size=0",
    )
    assert found.allowed is not None and found.allowed.all()
    inside = {x.name for x in found.scope}
    assert {x.role for x in layers if x.name not in inside} == {
        "q_proj", "k_proj", "v_proj", "embed_tokens",
    }  # fmt: skip
    assert any("16 rows" in note for note in found.notes)


@pytest.mark.parametrize("runtime", ["torch", "llamacpp", *CHECKPOINTS])
def test_a_size_is_that_of_the_engines_file(wide: Wide, runtime: str) -> None:
    """Whatever the table says: plans fill the budget, and no file is larger."""
    config = composed("optimize", f"runtime={runtime}", "scope=all")
    kept = Store(Path(wide.store))
    source = locate(str(wide.folder), kept)
    base = registry.base_of(config.runtime, source, wide.inventory, kept, None)
    found = search_space(config, wide.inventory, wide.folder, base)
    subject = Subject(wide.inventory, wide.folder, base)
    over = registry.overhead(config.runtime, subject, optimize._uniform(found))
    assert (over == 0) == (runtime == "torch")
    rng, size = np.random.default_rng(0), 1_250_000
    for seed in range(6):
        loss = -np.sort(-(rng.exponential(1.0, found.allowed.shape) ** 3), axis=1)
        problem = search.pose(wide.inventory, found, loss, Budget(size=str(size)), over)
        plan = assemble(
            wide.inventory, found.scope, found.choice(search.exact.solve(problem)),
            model={"name": str(wide.folder), "fingerprint": wide.fingerprint}, runtime=runtime,
            quantizer={"name": "rtn"}, predicted={"kl": 0.1, "stderr": 0.01},
        )  # fmt: skip
        verdict = export.check(plan, runtime, str(wide.store))
        assert verdict.bytes is not None and 0.93 * size < verdict.bytes <= size, seed


def test_a_layer_that_nothing_is_left_for(wide: Wide) -> None:
    with pytest.raises(ConfigError, match=r"embed_tokens.*add 16"):
        offered("vllm", wide, "palette.bits=[4,8]", "scope=[blocks,embeddings]")
    with pytest.raises(ConfigError, match=r"runtime=vllm.*embed_tokens\* = 8"):
        given = ["scope=[blocks,embeddings]", "policy.pins=['*embed_tokens* = 8']"]
        offered("vllm", wide, *given)


@pytest.mark.slow
def test_an_architecture_the_converter_does_not_know(mezzotint: Command, tmp_path: Path) -> None:
    """Said before anything is measured."""
    folder = build(tmp_path / "neox", "gpt_neox", *ARCHITECTURES["gpt_neox"])
    ended = mezzotint("optimize", f"model={folder}", "budget.bits=8", "runtime=llamacpp", *QUICK,
                      f"hydra.run.dir={tmp_path}")  # fmt: skip
    assert ended.code == 2 and "converter" in ended.err and "gguf=FILE" in ended.err


@pytest.mark.parametrize("runtime", ["torch", "vllm"])
def test_an_engine_holds_a_palette_of_nothing_but_untouched(llama: Small, runtime: str) -> None:
    found = offered(runtime, llama, "palette.bits=[16]")
    assert found.allowed is not None and found.allowed.all() and not found.notes


def remarked(mezzotint: Command, folder: Path, *arguments: str) -> str:
    ended = mezzotint(
        "optimize", *QUICK, *arguments, "proof.certify=false", f"hydra.run.dir={folder}"
    )
    assert ended.code == 0, ended.err
    return " ".join(ended.out.split())


@pytest.mark.slow
def test_much_of_the_file_out_of_scope_is_said(mezzotint: Command, tmp_path: Path) -> None:
    """With the bytes of the runtime's own file, which the same budget then keeps."""
    kind, dtype = ARCHITECTURES["llama"]
    folder = build(tmp_path / "m", "llama", kind | {"vocab_size": 4096}, dtype)
    given = [f"model={folder}", "palette.group_size=32", "wandb=off", f"store={tmp_path / 's'}"]
    out = remarked(mezzotint, tmp_path / "own", *given, "budget.bits=5")
    total = re.search(r"scope=all budget.size=(\d+) lets the search", out)
    assert total and "model.embed_tokens.weight" in out and "As a file" not in out
    whole = remarked(mezzotint, tmp_path / "all", *given, "scope=all", f"budget.size={total[1]}")
    assert "out of scope" not in whole
    plan = Plan.load(tmp_path / "all" / "plan.json")
    assert plan.bytes["total"] <= int(total[1])
    assert plan.choice["model.embed_tokens.weight"].kind == "int"
    vllm = remarked(mezzotint, tmp_path / "v", *given, "runtime=vllm", "budget.bits=5")
    size = re.search(r"As a file for vllm: (\d+) bytes", vllm)
    assert size and "out of scope" not in vllm  # vLLM couldn't hold it rounded
    exported = mezzotint("export", tmp_path / "v" / "plan.json", "to=vllm", f"out={tmp_path / 'x'}",
                         f"store={tmp_path / 's'}")  # fmt: skip
    assert exported.code == 0, exported.err
    assert (tmp_path / "x" / "model.safetensors").stat().st_size == int(size[1])


def test_nothing_to_quantize_is_no_fault(mezzotint: Command, llama: Small, tmp_path: Path) -> None:
    given = [f"model={llama.folder}", "palette.bits=[16]", "budget.bits=17", "wandb=off"]
    out = remarked(mezzotint, tmp_path, *given, f"store={tmp_path / 's'}")
    assert "the reference itself" in out and "out of scope" not in out


def test_an_engines_limits_are_not_the_policys(wide: Wide) -> None:
    config = composed("optimize", "runtime=vllm", "scope=[blocks,embeddings]")
    found = search_space(config, wide.inventory, wide.folder)
    assert found.allowed is not None and not found.allowed.all()
    blank = np.ones(found.allowed.shape)
    problem = search.pose(wide.inventory, found, blank, Budget(bits=12))
    assert notes.price_of_policy(config, found, problem, problem.largest) == []


ODD = {
    "mamba": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 12},
    "falcon": WIDE | {"multi_query": True, "alibi": False, "tie_word_embeddings": False},
}


@pytest.mark.parametrize(
    ("kind", "scope", "bare"),
    [("mamba", "blocks", 2), ("falcon", "blocks", 0), ("falcon", "*query_key_value", 0)],
)
def test_layers_that_stay_untouched_beside_those_unpacked_at_once(
    tmp_path: Path, kind: str, scope: str, bare: int
) -> None:
    """transformers gives all quantized layers of these classes one scheme, and leaves others alone:
    one that no group divides, or that is out of scope, doesn't hinder the rest."""
    model = opened(kind, build(tmp_path / "model", kind, ODD[kind], torch.bfloat16))
    given = [
        "runtime=transformers",
        f"scope=['{scope}']",
        "palette.group_size=32",
        "palette.bits=[4,8]",
    ]
    found = search_space(composed("optimize", *given), model.inventory, model.folder)
    assert found.allowed is not None and found.allowed.all() and len(found.groups) == 1
    odd = [name for name in found.groups[0] if found.fitted[name, found.columns[0]].kind == "none"]
    assert len(odd) == bare and all("dt_proj" in name for name in odd)
    store = str(tmp_path / "store")
    plan = drawn(
        found, np.random.default_rng(0), model, locate(str(model.folder), Store(store)).fingerprint
    )
    told = export.export(plan, "transformers", tmp_path / "out", store)
    assert "the plan's logits" in told.readers[0]
