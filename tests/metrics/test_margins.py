"""Margins of probes: how texts are cut, what can't be measured, and sums of log-probabilities."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.data.pairs import Pair
from optimizer.metrics import margins
from optimizer.models.head import BATCH_TOKENS, Predictor
from tests.conftest import Small


class Greedy:
    """A tokenizer that merges: "ab" is one token, so "xa" + "b" isn't "xa", "b"."""

    vocabulary = ("<s>", "ab", "a", "b", "c", "x", " ")
    bos_token_id: int | None = 0
    unk_token_id = 99

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids = []
        while text:
            found = next((t for t in self.vocabulary if text.startswith(t)), text[0])
            ids.append(self.vocabulary.index(found) if found in self.vocabulary else 99)
            text = text[len(found) :]
        return {"input_ids": ids}


def pair(prefix: str, good: str, bad: str) -> Pair:
    return Pair("p", "own", "-", prefix, good, bad)


def test_a_token_may_straddle_the_boundary() -> None:
    (job,) = margins.encode([pair("xa", "b", "c")], Greedy(), None)
    assert job == margins.Job([0, 5, 1], [0, 5, 2, 4], 2)


def test_a_text_begins_with_one_start_token_and_has_no_other() -> None:
    """Most tokenizers of encoders and of Llama add one to every text by themselves."""

    class Adding(Greedy):
        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
            ids = super().__call__(text)["input_ids"]
            return {"input_ids": [0, *ids, 0] if add_special_tokens else ids}

    (job,) = margins.encode([pair("x", "a", "c")], Adding(), None)
    assert job == margins.Job([0, 5, 2], [0, 5, 4], 2)


def test_what_cannot_be_measured_has_a_reason() -> None:
    pairs = [
        pair("x", " a", " b"),
        pair("x" * 9, "a", "b"),
        pair("x", "q", "b"),
        pair("x", "q", "z"),
    ]
    found = margins.encode(pairs, Greedy(), 8)
    assert isinstance(found[0], margins.Job)
    assert found[1:] == [margins.TOO_LONG, margins.UNKNOWN, margins.UNKNOWN]
    known = Greedy()
    known.unk_token_id = None  # type: ignore[assignment]
    known.bos_token_id = None
    assert margins.encode([pair("x", "q", "z")], known, 8) == [margins.ALIKE]
    assert margins.encode([pair("", "a", "b")], known, 8) == [margins.NO_START]


def test_margins_are_the_sums_of_the_models_own_logits(small: Small) -> None:
    """Every architecture; lengths differ, so rows are padded."""
    rng = np.random.default_rng(3)
    jobs = []
    for length in (3, 17, 60, 5, 9):
        start = rng.integers(3, 96, length).tolist()
        ends = [rng.integers(3, 96, k).tolist() for k in (2, 4)]
        ends[0][0], ends[1][0] = 10, 11
        jobs.append(margins.Job(start + ends[0], start + ends[1], length))

    def brute(ids: list[int], common: int) -> float:
        with torch.inference_mode():
            logits = small.model.net(torch.tensor([ids]), use_cache=False).logits[0].float()
        log_p = torch.log_softmax(logits, -1)
        return float(sum(log_p[i - 1, ids[i]] for i in range(common, len(ids))))

    wanted = [brute(job.good, job.common) - brute(job.bad, job.common) for job in jobs]
    assert margins.measure(small.model.net, jobs) == pytest.approx(wanted, abs=2e-4)


def test_live_margins_are_the_measured_ones(llama: Small) -> None:
    jobs = [margins.Job([5, 6, 7, 8], [5, 6, 9], 2), margins.Job([5, 10], [5, 11, 12, 13], 1)]
    found = margins.live(llama.model.net, Predictor(llama.model.net), jobs)
    assert found.detach().numpy() == pytest.approx(
        margins.measure(llama.model.net, jobs), abs=1e-5
    )


def test_batches_hold_every_row_once_and_no_more_than_fits() -> None:
    lengths = np.random.default_rng(0).integers(1, BATCH_TOKENS // 3, 60).tolist()
    found = list(margins._batches(lengths))
    assert sorted(row for batch in found for row in batch) == list(range(60))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in found]
    assert max(padded) <= BATCH_TOKENS and len(found) > 3
    for batch, following in itertools.pairwise(found):  # none has room for one more
        assert (len(batch) + 1) * lengths[following[0]] > BATCH_TOKENS
    assert list(margins._batches([BATCH_TOKENS + 5, 1])) == [[1], [0]]
    exact = BATCH_TOKENS // 4
    assert list(margins._batches([exact] * 5)) == [[0, 1, 2, 3], [4]]
    assert list(margins._batches([])) == []


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1], 1),
        ([2], [1], 0),
        ([], [1], 0),
    ],
)
def test_what_two_texts_share_at_the_beginning(
    one: list[int], other: list[int], common: int
) -> None:
    assert margins._common(one, other) == common
