"""A folder with a base and a refinement: what each way of unpacking computes, and damaged folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import optimizer
from optimizer.errors import ConfigError, PlanError
from optimizer.formats.folder import sha256
from optimizer.models import planes
from optimizer.plan import Plan
from tests.conftest import Command

PROMPT = torch.arange(5, 17)[None]
SAYS = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 40, "min_new_tokens": 40}


@pytest.fixture
def folder(nested_folder: Path) -> Path:
    return nested_folder


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(folder, tmp_path / "model")


def logits(net: Any) -> torch.Tensor:
    with torch.inference_mode():
        return net(input_ids=PROMPT, use_cache=False).logits


def test_both_files_have_the_promised_bytes(folder: Path) -> None:
    plan = Plan.load(folder)
    assert plan.refinement is not None
    assert (folder / "base.safetensors").stat().st_size == plan.bytes["total"]
    assert (folder / "refinement.safetensors").stat().st_size == plan.refinement.bytes["total"]


def test_always_moves_towards_the_reference_and_is_the_default(folder: Path, stories: Any) -> None:
    reference = logits(stories.net)
    base, refined = (logits(optimizer.load(folder, unpack=u)) for u in ("never", "always"))
    assert (refined - reference).norm() < 0.8 * (base - reference).norm()
    assert torch.equal(logits(optimizer.load(folder)), refined)
    for place in ("cpu", "disk"):
        assert torch.equal(
            logits(optimizer.load(folder, unpack="always", refinement=place)), refined
        )


def test_fast_multiplies_the_same_planes(folder: Path) -> None:
    exact, fast = (logits(optimizer.load(folder, fast=f)).float() for f in (False, True))
    base = logits(optimizer.load(folder, unpack="never", fast=True)).float()
    assert (fast - exact).norm() < 0.5 * (base - exact).norm()


@pytest.mark.filterwarnings("ignore")
def test_drafts_change_no_word(folder: Path) -> None:
    always = optimizer.load(folder, unpack="always").generate(PROMPT, **SAYS)
    net = optimizer.load(folder, unpack="draft")
    assert torch.equal(net.generate(PROMPT, **SAYS), always)
    assert 0 < net.unpacking.passes["refined"] < 40, "nothing was drafted"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sampled_drafts_have_the_refined_distribution(folder: Path) -> None:
    """The second of two sampled tokens, which a draft may have been: chi-square against the refined
    model's own probabilities."""
    runs = 200
    net = optimizer.load(folder, unpack="draft")
    net.generation_config.update(temperature=1.0, top_k=0, top_p=1.0)
    torch.manual_seed(3)
    always = optimizer.load(folder, unpack="always")
    first = int(logits(always)[0, -1].argmax())
    begun = torch.cat([PROMPT, torch.tensor([[first]])], 1)
    with torch.inference_mode():
        wanted = (
            always(input_ids=begun, use_cache=False).logits[0, -1].double().softmax(-1).numpy()
        )
    drawn = np.zeros(len(wanted))
    for _ in range(runs):
        said = net.generate(
            begun, do_sample=True, top_k=0, max_new_tokens=2, min_new_tokens=2, pad_token_id=0
        )
        drawn[int(said[0, begun.shape[1]])] += 1
    often = wanted * runs >= 5
    seen = np.append(drawn[often], drawn[~often].sum())
    expected = np.append(wanted[often], wanted[~often].sum()) * runs
    expected *= seen.sum() / expected.sum()
    assert stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_a_text_is_read_as_if_it_had_been_written(folder: Path) -> None:
    """With planes open for some tokens: as writing them one by one, where the refined model catches
    up with all that the base alone has read."""
    net = optimizer.load(folder, unpack="hard")
    gate, inner = net.unpacking.gate, net.forward.__wrapped__
    mask = torch.arange(PROMPT.shape[1])[None] % 3 == 1
    with torch.inference_mode():
        whole, base = planes.caught_up(inner, gate, PROMPT, mask, torch.float32)
        cache, pending, steps, own = None, 0, [], []
        for i in range(PROMPT.shape[1]):
            found = inner(input_ids=PROMPT[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache, pending = found.past_key_values, pending + 1
            own.append(found.logits[0, -1])
            if mask[0, i]:
                cache.crop(-pending)
                gate.open = True
                ids = PROMPT[:, i + 1 - pending : i + 1]
                found = inner(input_ids=ids, past_key_values=cache, use_cache=True)
                gate.open, pending = False, 0
            steps.append(found.logits[0, -1])
    assert torch.allclose(whole[0], torch.stack(steps), atol=1e-3)
    assert torch.allclose(base[0], torch.stack(own), atol=1e-3)
    refined = logits(optimizer.load(folder, unpack="always"))
    assert torch.allclose(whole[mask], refined[mask], atol=1e-3), (
        "planes make it the refined model"
    )
    assert not torch.allclose(whole[~mask], refined[~mask], atol=1e-3)
    assert not torch.allclose(whole, logits(optimizer.load(folder, unpack="never")), atol=1e-3)


def test_writing_catches_up_in_one_pass(folder: Path) -> None:
    """Each word is what reading all before it says: the base's where it is sure, else the refined
    model's own."""
    net = optimizer.load(folder, unpack="hard", share=0.3)
    said = net.generate(PROMPT, **SAYS)
    state, length = net.unpacking, PROMPT.shape[1]
    opened = torch.tensor([state.opened(40)])
    assert 0 < opened.sum() < 40
    mask = torch.cat([torch.ones(1, length - 1, dtype=torch.bool), opened], 1)
    assert state.passes == {"base": 39, "refined": int(opened.sum())}
    with torch.inference_mode():
        found, _ = planes.caught_up(
            net.forward.__wrapped__, state.gate, said[:, :-1], mask, torch.float32
        )
    assert torch.equal(found[0, length - 1 :].argmax(-1), said[0, length:])


def test_hard_unpacks_what_it_is_told(folder: Path) -> None:
    texts = {}
    for share in (0.0, 0.3, 1.0):
        net = optimizer.load(folder, unpack="hard", share=share)
        texts[share] = net.generate(PROMPT, **SAYS)
        assert net.unpacking.share == pytest.approx(share, abs=0.2)
        assert net.unpacking.passes["base"] == 39, "one pass a token after the prompt"
    assert torch.equal(
        texts[1.0], optimizer.load(folder, unpack="always").generate(PROMPT, **SAYS)
    )
    both = optimizer.load(folder, unpack="hard", share=0.3).generate(PROMPT.repeat(2, 1), **SAYS)
    assert torch.equal(both[1:], texts[0.3])


def test_evaluate_finds_what_the_certificate_says(
    mezzotint: Command, folder: Path, nested_plan: Path
) -> None:
    plan = Plan.load(nested_plan)
    assert plan.refinement is not None
    proof, hard = plan.refinement.certificate["kl"], plan.refinement.hard["heldout"]["kl"]
    for mode, kl in (("always", proof["refined"]), ("hard", hard), ("never", proof["base"])):
        found = mezzotint("evaluate", f"model={folder}", f"unpack={mode}", "domains=[]")
        assert found.code == 0, found.err
        line = next(line for line in found.out.splitlines() if "mean KL" in line)
        assert f"{kl['value']:.4f}" in line, mode


# ---------------------------------------------------------------- what can't be


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_the_base_works_beside_a_damaged_refinement(damaged: Path, damage: str) -> None:
    file = damaged / "refinement.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        own = sha256(damaged / "base.safetensors").encode()
        file.write_bytes(file.read_bytes().replace(own, b"0" * len(own)))
    said = {"missing": "is missing", "cut": "cut off", "other": "another base"}
    with pytest.raises(PlanError, match=said[damage]) as error:
        optimizer.load(damaged)
    assert 'unpack="never"' in str(error.value)
    assert logits(optimizer.load(damaged, unpack="never")).isfinite().all()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"unpack": "sometimes"}, "never, always, draft, hard"),
        ({"unpack": "always", "share": 0.2}, "share says how much"),
        ({"unpack": "hard", "share": 0.2, "kl": 0.1}, "Give one of them"),
        ({"unpack": "hard", "share": 2.0}, "0 to 1"),
        ({"unpack": "hard", "kl": 1e-9}, "No share of tokens reaches"),
        ({"refinement": "tape"}, "memory, cpu, disk"),
    ],
)
def test_mistakes_are_explained(folder: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        optimizer.load(folder, **asked)


def test_a_plan_without_thresholds_can_not_be_hard(damaged: Path) -> None:
    data = json.loads((damaged / "plan.json").read_text())
    data["refinement"]["hard"] = {}
    del data["checksum"]
    (damaged / "plan.json").write_text(json.dumps(data))
    hashes = json.loads((damaged / "manifest.json").read_text())
    hashes["sha256"]["plan.json"] = sha256(damaged / "plan.json")
    (damaged / "manifest.json").write_text(json.dumps(hashes))
    with pytest.raises(ConfigError, match=r"proof\.certify=true"):
        optimizer.load(damaged, unpack="hard")


def test_drafts_want_one_sequence(folder: Path) -> None:
    net = optimizer.load(folder, unpack="draft")
    with pytest.raises(ConfigError, match="one sequence at a time"):
        net.generate(PROMPT.repeat(2, 1), max_new_tokens=4)


def test_folders_without_a_refinement(packed_folder: Path) -> None:
    assert logits(optimizer.load(packed_folder, unpack="never")).isfinite().all()
    with pytest.raises(ConfigError, match="needs a refinement"):
        optimizer.load(packed_folder, unpack="hard")
