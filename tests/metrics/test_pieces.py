"""Small pieces of the measures, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.data.short_texts import TEXTS
from optimizer.data.text import Windows
from optimizer.errors import TextError
from optimizer.metrics import blur, divergence, embeddings, generation, margins
from optimizer.metrics.divergence import Scores, Teacher
from optimizer.metrics.objective import Meaning, Objective
from optimizer.models.model import Model
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from tests.metrics.test_margins import Greedy, pair

LOW = Precision("int", 3, 32)


def text_of(count: int = 5, length: int = 9) -> Windows:
    ids = np.random.default_rng(0).integers(3, 80, size=(count, length))
    return Windows(ids, np.arange(count) // 2)


def changed(model: Model) -> dict[str, Precision]:
    return dict.fromkeys(list(model.layers)[1:], LOW)


# ---------------------------------------------------------------- what is shown of a token


def test_no_control_character_reaches_a_terminal() -> None:
    """C0 but for line break and tab, DEL, C1, and the marks of writing direction; their neighbours
    stay."""
    assert blur.visible("\x00\x1b\x1f") == "\u2400\u241b\u241f"
    assert blur.visible("\n\t \x20~\x7e") == "\n\t \x20~\x7e"
    assert blur.visible("\x7f") == "\u2421"
    assert blur.visible("\x80\x9f") == "\ufffd" * 2 and blur.visible("\xa0\xe9") == "\xa0\xe9"
    for first, last in ((0x202A, 0x202E), (0x2066, 0x2069)):
        assert blur.visible(chr(first) + chr(last)) == "\ufffd" * 2
        assert blur.visible(chr(first - 1) + chr(last + 1)) == chr(first - 1) + chr(last + 1)


def test_a_word_is_shown_with_its_white_space() -> None:
    assert blur.shown(" a\nb\tc\x1b") == "␣a⏎b⇥c\u241b"
    assert blur.shown("") == "(nothing)" and blur.shown("a\ufffd") == "(part of a letter)"


def test_words_are_spelled_behind_another_one() -> None:
    """Tokenizers that drop the space of a first token don't drop that of a later one."""

    class Dropping:
        words = (" the", " dog", "s", "")

        def decode(self, ids: list[int]) -> str:
            return "".join(self.words[i] for i in ids).removeprefix(" ")

    reading = SimpleNamespace(words=np.array([[1, 2], [3, 1]]))
    found = blur._spelling(Dropping(), [reading], np.array([0, 2]))  # type: ignore[list-item]
    assert found == {0: "␣the", 1: "␣dog", 2: "s", 3: "(nothing)"}

    class Merging(Dropping):
        def decode(self, ids: list[int]) -> str:
            return "both" if len(ids) > 1 else self.words[ids[0]]

    found = blur._spelling(Merging(), [reading], np.array([0]))  # type: ignore[list-item]
    assert found == {0: "␣the", 1: "␣dog", 2: "s", 3: "(nothing)"}


# ---------------------------------------------------------------- maps


def reading(kl: list[float], opened: list[bool] | None = None) -> blur.Reading:
    many = np.zeros((len(kl), 1))
    values = np.array(kl)
    state = None if opened is None else np.array(opened)
    return blur.Reading("plan", 1, values, values, values > 9, many, many, state)


def map_of(*others: blur.Reading) -> blur.Map:
    count = len(others[0].kl)
    units = tuple(blur.Unit(i, i + 1, (2 * i, 2 * i + 1)) for i in range(count // 2))
    passages = (range(2), range(2, len(units)))
    return blur.Map("a" * count, np.arange(count), units, others[0], others, passages, (), {}, ())


def test_a_unit_of_several_tokens_is_shaded_by_its_worst() -> None:
    nan = float("nan")
    found = map_of(
        reading([nan, nan, nan, 0.5, 0.2, 0.1, 0.0, 3.0], [False] * 5 + [True, False, False])
    )
    units, plan = found.units, found.plan
    shades = [plan.shade(u) for u in units]
    assert np.isnan(shades[0]) and shades[1:] == [0.5, 0.2, 3.0]
    assert [found.worst_token(u) for u in units] == [0, 3, 4, 7]
    assert [plan.unpacked(u) for u in units] == [False, False, True, False]
    assert not reading([1.0, 1.0]).unpacked(units[0])
    assert found.worst_units(2) == [3, 1] and found.worst_units(9) == [3, 1, 2]
    assert found.mean_kl(plan, range(2)) == 0.5  # NaN doesn't count
    assert found.mean_kl(plan, range(2, 4)) == pytest.approx(3.3 / 4)
    assert np.isnan(found.mean_kl(plan, range(1)))
    assert [found.passage_of(i) for i in range(4)] == [0, 0, 1, 1]


def test_what_unpacking_saved_is_said_with_its_share() -> None:
    nan = float("nan")
    base = reading([nan, 0.4, 0.4, 0.4, 0.4, 0.0])
    plan = reading([nan, 0.1, 0.1, 0.1, 0.1, 0.0], [True, True, True, False, False, False])
    assert map_of(plan, base).unpacking == (
        "Planes were opened for 40 % of the tokens: mean KL 0.0800 instead of 0.3200 nats, 75 % less."
    )
    none = reading([nan, 0.0, 0.0, 0.0, 0.0, 0.0])
    same = reading([nan, 0.0, 0.0, 0.0, 0.0, 0.0], [False] * 6)
    assert map_of(same, none).unpacking == (
        "Planes were opened for 0 % of the tokens: mean KL 0.0000 instead of 0.0000 nats."
    )
    assert map_of(base, base).unpacking is None


def test_a_short_text_is_read_in_one_window_and_says_nothing(source: Any) -> None:
    tokenizer = load_tokenizer(source.folder)
    text = "Mia went to the garden . " * 2
    whole = blur.cut(text, tokenizer, 64, None, 12, 3)
    count = len(whole.ids)
    assert whole.notes == () and len(whole.windows) == 1 and whole.top == 3
    assert whole.windows.shape == (1, count + 1) and count == 12 and whole.text == text
    exact = blur.cut(text, tokenizer, 1000, count + 1, 12, 3)  # the model's context is enough
    assert exact.windows.shape == (1, count + 1)
    less = blur.cut(text, tokenizer, count, 1000, 12, 3)
    assert less.windows.shape == (2, count) and "Read in 2 windows of 12 tokens" in less.notes[0]
    one = blur.cut(text, tokenizer, 64, None, 11, 3)
    assert len(one.ids) == 11 and one.text == text[: one.units[-1].end] and len(one.notes) == 1

    class Bare:
        is_fast, bos_token_id, unk_token_id = True, None, None

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {
                "input_ids": [5] * len(text),
                "offset_mapping": [(i, i + 1) for i in range(len(text))],
            }

    with pytest.raises(TextError, match="at least two tokens"):
        blur.cut("a", Bare(), 8, None, 8, 1)
    assert blur.cut("ab", Bare(), 8, None, 8, 1).at.tolist() == [-1, 0]


def test_where_planes_were_open_follows_the_tokens(stories: Model, source: Any) -> None:
    """A model that decides by a whole text: read window by window, and its marks belong to the
    predictions."""
    tokenizer = load_tokenizer(source.folder)
    made = blur.cut("Mia went to the garden and saw a dog . " * 3, tokenizer, 16, None, 99, 2)
    teacher = Teacher(stories.net, Windows(made.windows, np.zeros(len(made.windows), np.int64)))
    state = SimpleNamespace(read=None)
    rows = iter(torch.arange(made.windows.size).view(len(made.windows), 1, -1) % 3 == 0)
    one = blur.Weights("plan", 7, None)

    class Opened:
        unpacking = state

        def parameters(self) -> Any:
            return stories.net.parameters()

        def __call__(self, **given: Any) -> Any:
            state.read = next(rows)
            return stories.net(**given)

    with stories.rounded(Nearest(), changed(stories)):
        plain, reference = blur._read(teacher, stories.net, made, one)
        found, _ = blur._read(teacher, Opened(), made, one)
    assert plain.opened is None and found.opened is not None
    marks = (np.arange(made.windows.size).reshape(made.windows.shape) % 3 == 0)[:, :-1].ravel()
    assert np.array_equal(found.opened, marks[made.at] & (made.at >= 0))
    assert (
        np.allclose(found.kl, plain.kl, atol=1e-5, equal_nan=True) and plain.kl[1:].mean() > 1e-3
    )
    assert np.array_equal(found.words, plain.words) and found.words.shape == (len(made.ids), 2)
    assert np.allclose(found.true, plain.true, rtol=1e-4, equal_nan=True)
    assert (found.chances[:, 0] >= found.chances[:, 1]).all() and found.bytes == 7
    assert reference.bytes == 0 and not reference.kl.any() and not reference.flip.any()


# ---------------------------------------------------------------- divergences


def test_a_window_at_a_time_is_the_same_as_in_chunks(stories: Model) -> None:
    text = text_of()
    teacher = Teacher(stories.net, text)
    with stories.rounded(Nearest(), changed(stories)):
        pairs = list(zip(*teacher.pairs(stories.net), strict=True))
        whole = list(zip(*teacher.whole_pairs(stories.net), strict=True))
        for a, b in zip(pairs, whole, strict=True):
            assert torch.allclose(torch.cat(a).float(), torch.cat(b).float(), atol=1e-4)
        assert len(whole[0]) == 5
        p, q, target = (torch.cat(x) for x in whole)
        assert torch.equal(target, torch.from_numpy(text.ids[:, 1:]).flatten())
        scores = teacher.score(stories.net)
        assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(scores.mean_kl, rel=1e-4)
        some = scores.only(np.array([True, False, True, False, False]))
    for key, value in scores.arrays().items():
        assert np.array_equal(some.arrays()[key], value[[0, 2]]), key
    assert np.array_equal(divergence.stored(scores.arrays()).kl, scores.kl)


@pytest.mark.parametrize("objective", [Objective(), Objective(2.0, 0.5, 0.01)])
def test_a_window_is_measured_by_the_objective_and_never_below_zero(
    stories: Model, objective: Objective
) -> None:
    teacher = Teacher(stories.net, text_of())
    teacher.objective = objective
    with stories.rounded(Nearest(), changed(stories)):
        kl = teacher.score(stories.net).kl
        found = [teacher.window(stories.net, i) for i in range(5)]
    wanted = kl + objective.cvar * (0.01 + (kl - 0.01).clip(0) / 0.5)
    assert found == pytest.approx(wanted.mean(1), rel=2e-3)
    teacher.objective = Objective()
    assert [teacher.window(stories.net, i) for i in range(5)] == pytest.approx([0] * 5, abs=1e-6)
    assert all(teacher.window(stories.net, i) >= 0 for i in range(5))


def test_measures_of_one_token_by_hand() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    found = divergence.compare(p.log(), q.log(), torch.tensor([1, 2]))
    ln2 = float(np.log(2))
    wanted = {
        "kl": [0.25 * ln2, 0.0], "ear": [0.75, 1.0], "flip": [True, False],
        "nll": [ln2, -np.log(0.6)], "nll_reference": [2 * ln2, -np.log(0.6)],
        "hit": [True, True], "hit_reference": [False, True],
    }  # fmt: skip
    for key, values in wanted.items():
        assert found[key].tolist() == pytest.approx(values, abs=1e-6), key


def test_later_positions_of_a_window_are_cut_alike() -> None:
    columns = {k: np.arange(12.0).reshape(2, 6) for k in divergence.COLUMNS}
    scores = Scores(**columns, documents=np.array([3, 4]))
    assert scores.after(1).kl.shape == (2, 6) and scores.after(6).kl.tolist() == [[5], [11]]
    assert scores.mean_kl == 5.5 and scores.unit == "token"


# ---------------------------------------------------------------- embeddings


def test_the_nearest_of_few_texts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four texts on a circle, two in a batch; no text is its own neighbour."""
    monkeypatch.setattr(embeddings, "TEXTS", 2)
    angles = torch.tensor([0.0, 10, 30, 100]) * np.pi / 180
    z = torch.stack([angles.cos(), angles.sin()], 1)
    assert embeddings._nearest(z, 0).tolist() == [[1, 2, 3], [0, 2, 3]]
    assert embeddings._nearest(z, 2).tolist() == [[1, 0, 3], [2, 1, 0]]
    monkeypatch.setattr(embeddings, "NEAREST", 1)
    assert embeddings._nearest(z, 2).tolist() == [[1], [2]]
    moved = z.clone()
    moved[1] = z[3]
    found = embeddings.compare(z, moved, 0)
    assert found["flip"].tolist() == [1, 1] and found["overlap"].tolist() == [0, 0]
    assert found["cosine"].shape == (2,)
    change = abs(float(z[0] @ z[3] - z[0] @ z[1]))
    assert found["cosine"].tolist() == pytest.approx([change, change], abs=1e-5)
    same = embeddings.compare(z, z, 2)
    assert same["overlap"].tolist() == [1, 1] and same["kl"].tolist() == [0, 0]
    assert TEXTS > 2


# ---------------------------------------------------------------- generation


def test_prompts_are_no_longer_than_they_may_and_come_in_the_texts_order() -> None:
    ids = np.arange(4 * 200).reshape(4, 200)
    found = generation.prompts(Windows(ids, np.array([9, 9, 2, 5])), None, 10)
    assert found.shape == (3, 64) and found[:, 0].tolist() == [0, 400, 600]
    assert generation.prompts(Windows(ids, np.arange(4)), 50, 100).shape == (4, 1)
    for width in (1, 2, 3):
        assert generation.prompts(Windows(ids[:, :width], np.arange(4)), 50, 10).shape == (4, 1)
    assert generation.prompts(Windows(ids, np.arange(4)), 70, 10).shape == (4, 60)


def test_texts_that_part_are_counted_with_how_they_repeat() -> None:
    one, other = np.arange(60).reshape(3, 20), np.arange(60).reshape(3, 20)
    other[0, 5:] = 7  # sixteen equal tokens and more: grams that were there before
    other[1, 9] = 0
    found = generation.compare(one, other, 0)
    assert (found.prompts, found.limit, found.never) == (3, 20, 1)
    assert found.mean.value == pytest.approx((5 + 9 + 20) / 3)
    assert found.median.value == 9 and found.repeated["reference"].value == 0
    grams, new = 17, 6  # 0 1 2 3, 1 2 3 4, 2 3 4 7, 3 4 7 7, 4 7 7 7, 7 7 7 7
    share = (1 - new / grams) / 3
    assert found.repeated["plan"].value == pytest.approx(share)
    assert found.repeated_more.value == pytest.approx(share)


# ---------------------------------------------------------------- margins


def test_texts_as_long_as_the_context_are_measured_and_one_unknown_word_is_enough() -> None:
    pairs = [pair("x", "a", "cc"), pair("x", "q", "a"), pair("x", "a", "q"), pair("q", "a", "c")]
    found = margins.encode(pairs, Greedy(), 4)
    assert isinstance(found[0], margins.Job) and found[1:] == [margins.UNKNOWN] * 3
    assert margins.encode(pairs[:1], Greedy(), 3) == [margins.TOO_LONG]
    swapped = margins.encode([pair("x", "cc", "a")], Greedy(), 3)
    assert swapped == [margins.TOO_LONG]
    start = Greedy()
    start.unk_token_id = 0  # its start token is what it takes unknown words for
    assert isinstance(margins.encode(pairs[:1], start, None)[0], margins.Job)
    prefix = margins.encode([pair("x", "a", "ac"), pair("x", "ac", "a")], Greedy(), None)
    assert prefix == [margins.ALIKE] * 2  # one is the other's beginning


def test_an_objective_of_all_parts_is_named_and_tuned_as_they_stand() -> None:
    every = Meaning(cvar=0.25, level=0.9, domain=3, domains=["code", "law"], probes=1.5)
    assert every.name == "KL + 0.25 CVaR90 + 3 worst domain + 1.5 lost margin"
    assert every.tuned == ["code", "law"]
    assert Objective(0.5, 0.75, 1.0).of(np.array([0.0, 1.0, 3.0])).tolist() == [0.5, 1.5, 7.5]
    assert Objective(0.5, 0.75, 1.0).weights(np.array([0.0, 1.0, 3.0])).tolist() == [1, 1, 3]
