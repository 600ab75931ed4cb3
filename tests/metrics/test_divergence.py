"""Every measure against its definition, written out naively in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizer.data.text import Windows
from optimizer.errors import ModelError
from optimizer.metrics import divergence
from optimizer.metrics.divergence import Scores, Teacher, TopTeacher
from optimizer.models.head import OwnHead, _in_16_bits, output_head
from optimizer.models.model import Model
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from tests.conftest import GLU, Small, build, opened

LOW = Precision("int", 3, 32)


def windows(vocabulary: int, count: int = 5, length: int = 9) -> Windows:
    ids = np.random.default_rng(0).integers(vocabulary, size=(count, length))
    return Windows(ids, np.array([0, 0, 1, 2, 2])[:count])


def logits(net: Any, ids: np.ndarray) -> Tensor:
    with torch.inference_mode():
        return net(input_ids=torch.from_numpy(ids)).logits.double()


def naive(reference: Tensor, other: Tensor, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Full logits [windows, length, vocabulary] in float64 -> measures [windows, length - 1]."""
    p = reference[:, :-1].softmax(-1).numpy()
    q = other[:, :-1].softmax(-1).numpy()
    true = np.asarray(ids)[:, 1:, None]
    return {
        "kl": (p * (np.log(p) - np.log(q))).sum(-1),
        "ear": np.minimum(p, q).sum(-1),
        "flip": p.argmax(-1) != q.argmax(-1),
        "nll": -np.log(np.take_along_axis(q, true, -1))[..., 0],
        "nll_reference": -np.log(np.take_along_axis(p, true, -1))[..., 0],
        "hit": q.argmax(-1) == true[..., 0],
        "hit_reference": p.argmax(-1) == true[..., 0],
    }


def assert_agree(scores: Scores, expected: dict[str, np.ndarray]) -> None:
    for key, value in expected.items():
        found = getattr(scores, key)
        assert found.dtype == np.float32 and found.shape == value.shape
        assert np.allclose(found, value, rtol=1e-3, atol=2e-5), key
    assert scores.mean_kl == pytest.approx(expected["kl"].mean(), rel=1e-3)


def scored(
    model: Model, text: Windows, choice: dict[str, Precision], own_head: bool = False
) -> None:
    teacher = Teacher(model.net, text, OwnHead(model.net) if own_head else None)
    reference = logits(model.net, text.ids)
    with model.rounded(Nearest(), choice):
        scores = teacher.score(model.net)
        expected = naive(reference, logits(model.net, text.ids), text.ids)
    assert expected["kl"].mean() > 1e-3
    assert_agree(scores, expected)
    assert np.array_equal(scores.documents, text.documents)


def test_measures_of_every_architecture(small: Small) -> None:
    choice = dict.fromkeys((x.name for x in small.inventory.scoped(["blocks"])), LOW)
    scored(small.model, windows(96), choice)


@pytest.mark.parametrize("own_head", [False, True])
def test_single_windows_agree_with_full_logits(small: Small, own_head: bool) -> None:
    """Also without ever making the reference's logits again (own_head=False)."""
    model, text = small.model, windows(96)
    teacher = Teacher(model.net, text, OwnHead(model.net) if own_head else None)
    reference = logits(model.net, text.ids)
    choice = dict.fromkeys((x.name for x in small.inventory.scoped(["blocks"])), LOW)
    with model.rounded(Nearest(), choice):
        found = [teacher.window(model.net, i) for i in range(len(text.ids))]
        expected = naive(reference, logits(model.net, text.ids), text.ids)["kl"]
    assert expected.mean() > 1e-3
    assert found == pytest.approx(expected.mean(1), rel=1e-3, abs=2e-5)


def test_the_reference_keeps_its_own_head_when_the_head_is_rounded(small: Small) -> None:
    choice = dict.fromkeys((x.name for x in small.inventory.scoped(["head"])), LOW)
    scored(small.model, windows(96), choice, own_head=True)


def test_a_large_head_is_kept_in_16_bits_and_multiplied_in_pieces(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = small.model, windows(96)
    hidden = torch.randn(5, output_head(model.net).weight.shape[1])
    wanted, whole = output_head(model.net)(hidden), OwnHead(model.net)
    monkeypatch.setattr("optimizer.models.head.LARGE", 0)
    monkeypatch.setattr("optimizer.models.head.PIECE", 7 * hidden.shape[1])
    pieces = OwnHead(model.net)
    if type(output_head(model.net)) is torch.nn.Linear:
        stored = next(x.dtype for x in small.inventory.layers if x.predicts)
        assert pieces._small is not None
        assert pieces._small.element_size() == (4 if stored == "F32" else 2)
    choice = dict.fromkeys((x.name for x in small.inventory.scoped(["head"])), LOW)
    vars(model).pop("own_head", None)
    with model.rounded(Nearest(), choice):
        torch.testing.assert_close(pieces(hidden), wanted)
        assert torch.equal(whole(hidden), wanted)
        assert not torch.allclose(output_head(model.net)(hidden), wanted, atol=1e-3)
        with pytest.raises(RuntimeError, match="holds its own weights"):
            _ = model.own_head
    scored(model, text, choice, own_head=True)


def test_numbers_that_16_bits_lack_are_kept_whole() -> None:
    odd = torch.nn.Linear(4, 3)
    found = _in_16_bits(odd.weight.detach())
    assert torch.equal(found, odd.weight) and found.dtype == torch.float32
    assert found.data_ptr() != odd.weight.data_ptr()
    halves = odd.weight.detach().half().float()
    assert _in_16_bits(halves).dtype == torch.float16
    assert _in_16_bits(halves.bfloat16().float()).dtype == torch.bfloat16


FINAL = {
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0},
}


@pytest.mark.parametrize("kind", FINAL)
def test_what_comes_after_the_head_is_heard(kind: str, tmp_path: Path) -> None:
    folder = build(tmp_path / kind, kind, GLU | FINAL[kind], torch.float16)
    found = opened(kind, folder)
    scored(found.model, windows(96), dict.fromkeys((x.name for x in found.inventory.layers), LOW),
           own_head=True)  # fmt: skip


def test_an_unknown_final_transform_is_an_error_and_not_a_wrong_number(llama: Small) -> None:
    def cubed(_module: Any, _args: Any, output: Any) -> Any:
        output.logits = output.logits**3
        return output

    handle = llama.model.net.register_forward_hook(cubed)
    try:
        with pytest.raises(ModelError, match="something else to its head"):
            Teacher(llama.model.net, windows(96))
    finally:
        handle.remove()


def test_a_model_against_itself_is_perfect(stories: Model) -> None:
    text = windows(80)
    scores = Teacher(stories.net, text).score(stories.net)
    assert scores.kl.max() == 0
    assert not scores.flip.any()
    assert scores.ear.min() > 1 - 1e-5
    assert np.array_equal(scores.nll, scores.nll_reference)


@pytest.mark.parametrize(("chunk", "batch"), [(1, 1), (3, 20), (1000, 10000)])
def test_how_the_work_is_cut_does_not_count(
    stories: Model, monkeypatch: pytest.MonkeyPatch, chunk: int, batch: int
) -> None:
    text = windows(80)
    choice = dict.fromkeys(list(stories.layers)[1:], LOW)

    def run() -> Scores:
        teacher = Teacher(stories.net, text)
        with stories.rounded(Nearest(), choice):
            return teacher.score(stories.net)

    whole = run()
    monkeypatch.setattr(divergence, "tokens_together", lambda _head: chunk)
    monkeypatch.setattr(divergence, "BATCH_TOKENS", batch)
    for key, value in run().arrays().items():
        assert np.allclose(value, whole.arrays()[key], atol=1e-5), key


def test_scoring_leaves_no_hooks_and_no_changes(stories: Model) -> None:
    before = {k: v.clone() for k, v in stories.net.state_dict().items()}
    Teacher(stories.net, windows(80), OwnHead(stories.net)).score(stories.net)
    assert not any(module._forward_pre_hooks for module in stories.net.modules())
    assert all(torch.equal(v, before[k]) for k, v in stories.net.state_dict().items())
    assert not any(p.requires_grad for p in stories.net.parameters())


def test_scores_survive_the_store(stories: Model) -> None:
    scores = Teacher(stories.net, windows(80)).score(stories.net)
    again = Scores(**scores.arrays())
    assert again.mean_kl == scores.mean_kl
    assert set(scores.arrays()) == {
        "kl",
        "ear",
        "flip",
        "nll",
        "nll_reference",
        "hit",
        "hit_reference",
        "documents",
    }


def test_the_reference_against_itself_is_noise_and_not_zero(stories: Model) -> None:
    teacher = Teacher(stories.net, windows(80))
    noise = teacher.noise(stories.net)
    alone, half = noise.values()
    assert alone.mean_kl < 1e-6, "fp32 sums in another order"
    assert 1e-6 < half.mean_kl < 1e-3, "bf16 keeps eight bits"
    assert np.array_equal(half.nll_reference, teacher.score(stories.net).nll_reference)
    assert teacher.score(stories.net).kl.max() == 0, "the teacher is as it was"


def test_the_later_positions(stories: Model) -> None:
    scores = Teacher(stories.net, windows(80)).score(stories.net)
    late = scores.after(4)
    assert np.array_equal(late.nll, scores.nll[:, 3:])
    assert np.array_equal(late.documents, scores.documents)


# ---------------------------------------------------------------- the top K and a bucket


def merged_kl(reference: Tensor, other: Tensor, k: int) -> np.ndarray:
    """Naively: the K most probable tokens of the reference, and one for all others."""
    p, q = reference[:, :-1].softmax(-1), other[:, :-1].softmax(-1)
    top = p.topk(k)
    q_top = q.gather(-1, top.indices)
    p_all = torch.cat([top.values, (1 - top.values.sum(-1, keepdim=True)).clamp(min=1e-300)], -1)
    q_all = torch.cat([q_top, (1 - q_top.sum(-1, keepdim=True)).clamp(min=1e-300)], -1)
    return (p_all * (p_all.log() - q_all.log())).sum(-1).numpy()


@pytest.mark.parametrize("k", [1, 5, 40, 79])
def test_the_top_k_teacher_is_the_kl_of_merged_distributions(stories: Model, k: int) -> None:
    text = windows(80)
    exact, top = Teacher(stories.net, text), TopTeacher(stories.net, text, k)
    reference = logits(stories.net, text.ids)
    with stories.rounded(Nearest(), dict.fromkeys(list(stories.layers)[1:], LOW)):
        found = top.kl(stories.net)
        whole = exact.score(stories.net).kl
        expected = merged_kl(reference, logits(stories.net, text.ids), k)
    assert found.shape == whole.shape and found.dtype == np.float32
    assert np.allclose(found, expected, rtol=1e-3, atol=2e-5)
    assert (found <= whole + 1e-5).all(), "merging can only lose"
    assert whole.mean() > 1e-3


def test_all_tokens_in_the_top_is_exact(stories: Model) -> None:
    text = windows(80)
    exact, top = Teacher(stories.net, text), TopTeacher(stories.net, text)
    with stories.rounded(Nearest(), dict.fromkeys(list(stories.layers)[1:], LOW)):
        assert np.allclose(top.kl(stories.net), exact.score(stories.net).kl, atol=2e-6)
    vocabulary, positions = stories.net.config.vocab_size, 5 * 8
    assert top.bytes == positions * (8 * vocabulary + 4)
