from __future__ import annotations

import numpy as np
import pytest
import torch

from optimizer.data.text import Windows
from optimizer.metrics import generation
from optimizer.models.model import Model
from optimizer.plan import Precision
from optimizer.plan.certificate import to_json
from optimizer.quantization.uniform import Nearest


def test_where_texts_part() -> None:
    one = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [5, 5, 5, 5]])
    other = np.array([[1, 2, 9, 4], [1, 2, 3, 4], [6, 5, 5, 5]])
    assert generation.first_difference(one, other).tolist() == [2, 4, 0]


def test_repetition_is_the_share_of_grams_seen_before() -> None:
    rows = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 1, 2, 3, 4]])
    assert generation.repetition(rows) == pytest.approx([0, 4 / 5, 1 / 5])
    assert generation.repetition(rows[:, :3]) == pytest.approx([0, 0, 0])


def test_what_lies_beyond_the_limit_is_not_made_up() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(50, size=(11, 20))
    other = one.copy()
    other[:5, 6] += 1
    found = to_json(generation.compare(one, other, 0))
    assert found["never"] == 6 and found["prompts"] == 11 and found["limit"] == 20
    assert found["median"]["value"] is None, "censored: more than half never part"
    assert found["mean"]["value"] == pytest.approx((5 * 6 + 6 * 20) / 11)
    other[5:8, 9] += 1
    assert generation.compare(one, other, 0).median.value == 9
    same = to_json(generation.compare(one, one, 0))
    assert same["mean"] == {"value": 20, "low": 20, "high": 20}
    assert same["repeated_more"]["value"] == 0


def test_a_median_is_of_the_texts_in_order() -> None:
    """Nine texts of eleven part after 3 tokens, the first one never, the last at once: any resample's
    median is 3 with more than 99.9 %."""
    one = np.zeros((11, 8), int)
    other = one.copy()
    other[1:10, 3] = other[10, 0] = 1
    found = generation.compare(one, other, 0).median
    assert (found.value, found.low, found.high) == (3, 3, 3)
    other[1:6, 3], other[1:6, 5] = 0, 1  # 0, four times 3, five times 5, never: the sixth is 5
    found = generation.compare(one, other, 0).median
    assert (found.value, found.low, found.high) == (5, 3, 5)


def test_prompts_are_beginnings_of_different_documents_and_leave_room() -> None:
    ids = np.arange(60 * 40).reshape(60, 40)
    windows = Windows(ids, np.repeat(np.arange(30), 2))
    begun = generation.prompts(windows, 1000, 100)
    assert begun.shape == (generation.PROMPTS, 20)
    assert np.array_equal(begun[1], ids[2, :20])
    assert generation.prompts(windows, 112, 100).shape[1] == 12
    assert generation.prompts(windows, None, 100).shape[1] == 20


def test_continuations_are_the_most_probable_tokens_one_by_one(stories: Model) -> None:
    begun = np.random.default_rng(0).integers(3, 80, size=(3, 5))
    found = generation.continuations(stories.net, begun, 7)
    assert found.shape == (3, 7)
    ids = torch.from_numpy(begun)
    with torch.inference_mode():
        for _ in range(7):
            scores = stories.net(input_ids=ids).logits[:, -1]
            scores[:, stories.net.generation_config.eos_token_id] = -torch.inf
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert np.array_equal(found, ids[:, 5:].numpy())
    with stories.rounded(
        Nearest(), dict.fromkeys(list(stories.layers)[1:], Precision("int", 2, 32))
    ):
        other = generation.continuations(stories.net, begun, 7)
    assert generation.first_difference(found, other).min() < 7
