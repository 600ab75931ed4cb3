from __future__ import annotations

import numpy as np
import pytest
import torch

from optimizer import greedy
from optimizer.data import Windows
from optimizer.layer import Precision
from optimizer.model import Model
from optimizer.quantizer import Rtn


def test_where_texts_part() -> None:
    one = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [5, 5, 5, 5]])
    other = np.array([[1, 2, 9, 4], [1, 2, 3, 4], [6, 5, 5, 5]])
    assert greedy.first_difference(one, other).tolist() == [2, 4, 0]


def test_repetition_is_the_share_of_grams_seen_before() -> None:
    rows = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 1, 2, 3, 4]])
    assert greedy.repetition(rows) == pytest.approx([0, 4 / 5, 1 / 5])
    assert greedy.repetition(rows[:, :3]) == pytest.approx([0, 0, 0])


def test_what_lies_beyond_the_limit_is_not_made_up() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(50, size=(11, 20))
    other = one.copy()
    other[:5, 6] += 1
    found = greedy.compare(one, other, 0)
    assert found["never"] == 6 and found["prompts"] == 11 and found["limit"] == 20
    assert found["median"]["value"] is None, "censored: more than half never part"
    assert found["mean"]["value"] == pytest.approx((5 * 6 + 6 * 20) / 11)
    other[5:8, 9] += 1
    assert greedy.compare(one, other, 0)["median"]["value"] == 9
    same = greedy.compare(one, one, 0)
    assert same["mean"] == {"value": 20, "low": 20, "high": 20}
    assert same["repeated_more"]["value"] == 0


def test_prompts_are_beginnings_of_different_documents_and_leave_room() -> None:
    ids = np.arange(60 * 40).reshape(60, 40)
    windows = Windows(ids, np.repeat(np.arange(30), 2))
    begun = greedy.prompts(windows, 1000, 100)
    assert begun.shape == (greedy.PROMPTS, 20)
    assert np.array_equal(begun[1], ids[2, :20])
    assert greedy.prompts(windows, 112, 100).shape[1] == 12
    assert greedy.prompts(windows, None, 100).shape[1] == 20


def test_continuations_are_the_most_probable_tokens_one_by_one(stories: Model) -> None:
    begun = np.random.default_rng(0).integers(3, 80, size=(3, 5))
    found = greedy.continuations(stories.net, begun, 7)
    assert found.shape == (3, 7)
    ids = torch.from_numpy(begun)
    with torch.inference_mode():
        for _ in range(7):
            scores = stories.net(input_ids=ids).logits[:, -1]
            scores[:, stories.net.generation_config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert np.array_equal(found, ids[:, 5:].numpy())
    with stories.rounded(Rtn(), dict.fromkeys(list(stories.layers)[1:], Precision("int", 2, 32))):
        other = greedy.continuations(stories.net, begun, 7)
    assert greedy.first_difference(found, other).min() < 7
