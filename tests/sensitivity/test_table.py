"""The table that every estimator fills, measured rows, and how well it foretells real losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from optimizer.data.text import Windows
from optimizer.errors import ConfigError
from optimizer.formats.safetensors.joined import Joined
from optimizer.metrics.divergence import Teacher
from optimizer.models.model import Model
from optimizer.plan import UNTOUCHED, Layer, Palette, Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Table, Task, chunks, palette_columns
from optimizer.sensitivity import estimator as estimator_of
from optimizer.sensitivity.estimators import Estimator, Fisher
from optimizer.sensitivity.measured import WINDOWS, measure
from optimizer.sensitivity.table import Text, agreeing, rarely_met, unfitting
from tests.conftest import Small, slow_beside

# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("windows", "count"), [(64, 8), (7, 3), (5, 5), (2, 2), (100, 7)])
def test_chunks_are_even_and_cover_all(windows: int, count: int) -> None:
    found = chunks(windows, count)
    assert [i for part in found for i in range(windows)[part]] == list(range(windows))
    lengths = [part.stop - part.start for part in found]
    assert len(found) == count and max(lengths) - min(lengths) <= 1


def example(samples: np.ndarray) -> Table:
    groups = tuple((f"layer{i}",) for i in range(samples.shape[1]))
    columns = tuple(f"p{i}" for i in range(samples.shape[2]))
    return Table.from_samples(Task(groups, columns, {}, Nearest()), samples)


def test_the_table_is_the_chunks_mean_with_its_standard_error() -> None:
    samples = np.random.default_rng(0).exponential(size=(6, 4, 3))
    table = example(samples)
    assert np.allclose(table.loss, samples.mean(0))
    assert np.allclose(table.stderr, samples.std(0, ddof=1) / np.sqrt(6))


def test_a_plans_error_counts_the_correlation_between_groups() -> None:
    """All groups rise and fall together: the errors of four groups add up, not their squares."""
    level = np.array([1.0, 1.2, 0.8, 1.0])[:, None, None]
    table = example(np.ones((1, 4, 1)) * level)
    value, error = table.predict(np.zeros(4, dtype=int))
    assert value == pytest.approx(4)
    assert error == pytest.approx(4 * table.stderr[0, 0])


def test_measured_rows_replace_and_count_in_predictions() -> None:
    samples = np.random.default_rng(0).exponential(size=(6, 3, 2))
    table = example(samples)
    new = table.with_rows({1: (np.array([5.0, 0.5]), np.array([0.1, 0.2]))})
    assert new.loss[1].tolist() == [5.0, 0.5] and new.stderr[1].tolist() == [0.1, 0.2]
    assert np.array_equal(new.loss[[0, 2]], table.loss[[0, 2]])
    assert np.array_equal(table.loss, samples.mean(0)), "the old table was changed"
    assert np.allclose(new.samples.mean(0), new.loss)
    value, _ = new.predict(np.array([0, 0, 1]))
    assert value == pytest.approx(table.loss[0, 0] + 5 + table.loss[2, 1])


def test_a_palette_that_does_not_divide_names_the_layer_and_a_divisor(llama: Small) -> None:
    layers = llama.inventory.scoped(["blocks"])
    with pytest.raises(ConfigError, match=r"groups of 48 don't divide the 64 columns of .*32 is"):
        palette_columns(layers, [Precision("int", 4, 48)], "strict")
    fitted = palette_columns(layers, [Precision("int", 4, 48), Precision()], "nearest")
    sizes = {fitted[x.name, "int4_g48"].group_size for x in layers if x.cols == 64}
    assert sizes == {64}
    assert all(fitted[x.name, "int4_g48"].fits(x.cols) for x in layers)
    assert all(fitted[x.name, "none"] == Precision() for x in layers)


def test_the_remedy_for_a_group_size_works(llama: Small) -> None:
    """32 divides the rows of 96, too; the blocks of llama.cpp have no other length."""
    layers = llama.inventory.scoped(["blocks"])
    assert {layer.cols for layer in layers} == {64, 96}
    palette_columns(layers, [Precision("int", 4, 32)], "strict")
    with pytest.raises(ConfigError, match=r"Leave q4_k out of palette\.bits"):
        palette_columns(layers, [Precision.ggml("q4_k")], "strict")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Fisher(chunks=1), "at least two chunks"),
        (Fisher(chunks=9), r"sensitivity\.chunks=9 with data\.calibration\.sequences=8"),
    ],
)
def test_wrong_settings(settings: Estimator, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings.check(8)


# ---------------------------------------------------------------- every architecture

ESTIMATORS = ("fisher", "directional", "tokenwise", "hessian", "kronecker")


def task(model: Model, scope: str = "blocks", experts: str = "tensor") -> Task:
    layers = model.inventory.scoped([scope])
    palette = Palette(bits=[3, 4, 6, 16], group_size=32).precisions()
    fitted = palette_columns(layers, palette, "strict")
    groups = Joined({}, experts).groups(layers)
    return Task(groups, tuple(p.name for p in palette), fitted, Nearest())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_fills_the_same_table(small: Small, estimator: str) -> None:
    work = task(small.model)
    ids = np.random.default_rng(2).integers(96, size=(2, 12))
    experts = any(x.kind == "experts" for x in small.inventory.layers)
    if estimator == "kronecker" and experts:
        with pytest.raises(ConfigError, match="sensitivity=fisher"):
            estimator_of(estimator)().score(small.model, work, ids, [0])
        return
    table = estimator_of(estimator)().score(small.model, work, ids, [0])
    assert table.shape == (len(work.groups), 4) and table.dtype == np.float64
    assert np.isfinite(table).all() and (table >= 0).all()
    assert (table[:, 3] == 0).all(), "untouched costs nothing"
    assert table[:, 0].sum() > 3 * table[:, 2].sum() > 0, "three bits cost more than six"


@pytest.mark.parametrize("estimator", ["fisher", "tokenwise"])
def test_embeddings_and_heads_are_scored_too(small: Small, estimator: str) -> None:
    ids = np.random.default_rng(2).integers(96, size=(2, 12))
    work = task(small.model, "all")
    table = estimator_of(estimator)().score(small.model, work, ids, [0])
    row = [i for i, g in enumerate(work.groups) if small.model.layers[g[0]].kind == "embedding"]
    assert row and (table[row, 0] > 0).any()


# ---------------------------------------------------------------- against the truth


@pytest.fixture(scope="module")
def text(stories: Model) -> Windows:
    """96 windows of 64 tokens sampled from the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = stories.net.generate(
            torch.ones(96, 1, dtype=torch.long), do_sample=True, top_k=0, min_new_tokens=63,
            max_new_tokens=63, pad_token_id=0,
        )  # fmt: skip
    return Windows(ids.numpy(), np.arange(96))


def true_loss(model: Model, text: Windows, choice: dict[str, Precision]) -> float:
    teacher = Teacher(model.net, text)
    with model.rounded(Nearest(), choice):
        return teacher.score(model.net).mean_kl


def plan(work: Task, columns: np.ndarray) -> dict[str, Precision]:
    return {
        name: work.fitted[name, work.columns[column]]
        for group, column in zip(work.groups, columns, strict=True)
        for name in group
    }


def foretold(model: Model, text: Windows, estimator: str) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true losses of plans from mostly three bits to mostly six, on the very
    windows that were scored."""
    work = task(model)
    settings = estimator_of(estimator)()
    runs = chunks(len(text.ids), 4)
    parts = [settings.score(model, work, text.ids[c], [0, c.start]) for c in runs]
    table = Table.from_samples(work, np.array(parts))
    rng = np.random.default_rng(0)
    shares = [(1 - t, t * (1 - t), t) for t in np.linspace(0, 1, 10)]
    size = len(work.groups)
    columns = [rng.choice(3, size=size, p=np.array(s) / sum(s)) for s in shares]
    predicted = np.array([table.predict(c)[0] for c in columns])
    return predicted, np.array([true_loss(model, text, plan(work, c)) for c in columns])


@pytest.mark.parametrize("estimator", slow_beside(["fisher"], ESTIMATORS))
def test_predictions_rank_plans_of_a_trained_model(
    stories: Model, text: Windows, estimator: str
) -> None:
    """The stories model is so sure of most words that few sampled labels carry most of the
    Fisher: the order is right after 6000 tokens, the size only roughly."""
    predicted, measured = foretold(stories, text, estimator)
    assert spearmanr(predicted, measured).statistic > 0.85
    assert 0.25 < np.median(measured / predicted) < 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_predictions_are_nats(llama: Small, estimator: str) -> None:
    """An unsure model has no rare labels to wait for: predictions are calibrated."""
    ids = np.random.default_rng(1).integers(96, size=(24, 24))
    predicted, measured = foretold(llama.model, Windows(ids, np.arange(24)), estimator)
    assert spearmanr(predicted, measured).statistic > 0.9
    assert 0.7 < np.median(measured / predicted) < 1.4


def test_measured_rows_are_the_true_losses(stories: Model, text: Windows) -> None:
    work, text = task(stories), text.head(16)
    group = work.groups[3]
    found = measure(stories, work, text, group, "reference")
    for column, value in zip(work.columns, found["loss"], strict=True):
        choice = {name: work.fitted[name, column] for name in group}
        assert value == pytest.approx(true_loss(stories, text, choice), rel=1e-4, abs=1e-9)
    assert found["loss"][3] == 0
    assert (found["stderr"][:3] > 0).all()


def test_measured_at_an_operating_point_is_what_the_group_adds(
    stories: Model, text: Windows
) -> None:
    work, text = task(stories), text.head(16)
    group, low = work.groups[3], work.columns[0]
    base = {name: work.fitted[name, low] for name in work.layers if name not in group}
    found = measure(stories, work, text, group, low)
    floor = true_loss(stories, text, base)
    assert floor > 0
    for column, value in zip(work.columns, found["loss"], strict=True):
        whole = base | {name: work.fitted[name, column] for name in group}
        assert value == pytest.approx(true_loss(stories, text, whole) - floor, rel=1e-3, abs=1e-7)
    assert found["loss"][3] == 0


def test_measuring_restores_and_reads_few_windows(stories: Model, text: Windows) -> None:
    work, text = task(stories), text.head(16)
    before = {k: v.clone() for k, v in stories.net.state_dict().items()}
    twice = Windows(np.concatenate([text.ids, text.ids]), np.arange(32))
    one = measure(stories, work, twice, work.groups[0], "reference")
    assert WINDOWS == 16
    assert np.allclose(
        one["loss"], measure(stories, work, text, work.groups[0], "reference")["loss"]
    )
    assert all(torch.equal(v, before[k]) for k, v in stories.net.state_dict().items())


# ---------------------------------------------------------------- words and columns


def layer(name: str, cols: int) -> Layer:
    return Layer(f"{name}.weight", 8, cols, "linear", name, 0, f"{name}.weight", (8, cols))


WIDE, ODD = layer("q_proj", 128), layer("dt_proj", 48)
P32, P64, WHOLE = Precision("int", 4, 32), Precision("int", 4, 64), Precision("int", 8)


def test_what_a_column_means_for_a_layer_that_it_does_not_divide() -> None:
    palette = [P32, P64, WHOLE, Precision()]
    untouched = palette_columns([WIDE, ODD], palette, "untouched")
    assert [untouched[WIDE.name, p.name] for p in palette] == palette
    assert [untouched[ODD.name, p.name].name for p in palette] == (
        ["none", "none", "int8_channel", "none"]
    )
    nearest = palette_columns([WIDE, ODD], palette, "nearest")
    assert [nearest[ODD.name, p.name].group_size for p in palette] == [24, 48, None, None]
    for fit, layers in (("strict", [WIDE, ODD]), ("untouched", [ODD])):
        with pytest.raises(
            ConfigError, match=r"groups of 32 don't divide the 48 columns of dt_proj"
        ):
            palette_columns(layers, palette, fit)
    assert palette_columns([WIDE], palette, "strict")[WIDE.name, "int4_g64"] == P64


def test_what_goes_together_is_untouched_together() -> None:
    """Where one of a group has no such column, none of it has; other groups and columns stay."""
    names = (WIDE.name, ODD.name, "other.weight")
    fitted = {(n, c): p for n in names for c, p in (("a", P32), ("b", WHOLE))}
    fitted[ODD.name, "a"] = UNTOUCHED
    found = agreeing([names[:2], names[2:]], ["a", "b"], fitted)
    assert {key for key, p in found.items() if p == UNTOUCHED} == {
        (names[0], "a"),
        (names[1], "a"),
    }
    assert found[names[2], "a"] == P32 and found[names[0], "b"] == WHOLE
    assert agreeing([names[:2], names[2:]], ["a", "b"], fitted, {ODD.name}) == fitted


def test_layers_that_no_group_divides_are_named_once_for_each_length() -> None:
    palette = [P32, P64, Precision("int", 2, 32), WHOLE]
    (of_32, of_64) = unfitting([WIDE, ODD, layer("x_proj", 80)], palette, "untouched")
    assert of_32.startswith(
        "Groups of 32 don't divide the 48 columns of dt_proj.weight and 1 more:"
    )
    assert of_64.startswith(
        "Groups of 64 don't divide the 48 columns of dt_proj.weight and 1 more:"
    )
    (alone,) = unfitting([WIDE, ODD], [P32], "untouched")
    assert "dt_proj.weight: untouched" in alone
    assert unfitting([WIDE], palette, "untouched") == ()
    assert unfitting([WIDE, ODD], palette, "nearest") == ()


def test_a_factor_scales_losses_errors_and_samples_alike() -> None:
    table = example(np.random.default_rng(0).exponential(size=(6, 3, 2)))
    found = table.scaled(np.array([1.0, 2.0, 0.5]))
    columns = np.array([1, 0, 1])
    wide = np.array([1.0, 2.0, 0.5])[:, None]
    assert found.loss == pytest.approx(table.loss * wide)
    assert found.stderr == pytest.approx(table.stderr * wide)
    again = example(table.samples * wide)
    assert found.predict(columns) == pytest.approx(again.predict(columns))


def test_labels_of_a_window_depend_on_its_chunk_and_place() -> None:
    text = Text(np.zeros((7, 2)), [slice(0, 3), slice(3, 5), slice(5, 7)], seed=9)
    assert [text.chunk(w) for w in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [text.labels(w) for w in (0, 2, 3, 4, 6)] == (
        [[9, 0, 0], [9, 0, 2], [9, 3, 0], [9, 3, 1], [9, 5, 1]]
    )


def test_a_part_of_the_chunks_tells_what_it_tells_among_all() -> None:
    ids = np.arange(14).reshape(7, 2)
    runs = [slice(0, 3), slice(3, 5), slice(5, 7)]
    text = Text(ids, runs, seed=9, weights=ids / 10)
    part = text.part([0, 2])
    rows = [0, 1, 2, 5, 6]
    assert part.ids.tolist() == ids[rows].tolist() and part.weights is not None
    assert part.weights.tolist() == (ids[rows] / 10).tolist()
    assert part.runs == [slice(0, 3), slice(3, 5)]
    assert [part.labels(w) for w in range(5)] == [text.labels(w) for w in rows]
    assert part.part([1]).labels(1) == text.labels(6)


def test_experts_that_few_tokens_visit_are_counted() -> None:
    losses = {f"b.0.mlp.experts.{i}.up": np.ones((3, 2)) for i in range(3)}
    losses["b.0.q"] = np.zeros((3, 2))  # no expert
    assert rarely_met(losses) is None
    losses["b.0.mlp.experts.1.up"][:] = 0
    losses["b.0.mlp.experts.2.up"][0] = 0
    said = rarely_met(losses)
    assert said is not None
    assert "Of 3 layers of experts, 1 met no token of the table's text and 1 met some" in said


def test_losses_of_a_groups_layers_add_up() -> None:
    task = Task((("a", "b"), ("c",)), ("p",), {}, Nearest())
    losses = {"a": np.array([1.0]), "b": np.array([2.0]), "c": np.array([5.0])}
    assert task.collect(losses).tolist() == [[3.0], [5.0]] and task.layers == ["a", "b", "c"]


def test_rows_that_no_group_of_a_float_divides_are_told_with_any_fit() -> None:
    palette = [Precision.floating("mxfp4"), Precision.floating("fp8"), Precision()]
    for fit in ("untouched", "nearest"):
        (text,) = unfitting([WIDE, ODD], palette, fit)
        assert text == (
            "Groups of 32 don't divide the 48 columns of dt_proj.weight: untouched in mxfp4."
        )
        fitted = palette_columns([WIDE, ODD], palette, fit)
        assert fitted[ODD.name, "mxfp4"].kind == "none" and fitted[ODD.name, "fp8"].kind == "fp8"
    with pytest.raises(ConfigError, match="Leave mxfp4, whose groups"):
        palette_columns([WIDE, ODD], palette, "strict")


def test_a_part_whose_gradients_explode_does_not_count() -> None:
    rng = np.random.default_rng(0)
    samples = rng.exponential(1.0, (8, 5, 3))
    assert Table.typical(samples).all()
    samples[2, 1] *= 5000
    assert Table.typical(samples).tolist() == [True, True, False, *[True] * 5]
    assert Table.typical(samples[:3]).all()  # of so few nobody knows which is odd
    assert Table.typical(samples - samples.mean() * 9).all()


def test_twenty_medians_are_still_typical_and_three_parts_are_too_few_to_tell() -> None:
    def parts(*totals: float) -> np.ndarray:
        return np.array(totals)[:, None, None] * np.array([[[0.25, 0.25], [0.5, 0.0]]])

    assert Table.typical(parts(1, 1, 1, 20)).all()
    assert Table.typical(parts(1, 1, 1, 20.001)).tolist() == [True, True, True, False]
    assert Table.typical(parts(1, 1, 1000)).all()  # of three nobody knows which is odd
    assert Table.typical(parts(0, 0, 0, 5)).all()  # nothing is a multiple of zero


def test_what_cannot_be_rounded_is_told_with_what_would_round_it() -> None:
    more = layer("x_proj", 80)
    (text,) = unfitting([WIDE, ODD, more], [P32, Precision("int", 2, 32), WHOLE], "untouched")
    assert text == (
        "Groups of 32 don't divide the 48 columns of dt_proj.weight and 1 more: untouched in every "
        "precision with such groups. palette.fit=nearest rounds them in other groups."
    )
    floats = [Precision.floating("mxfp4"), Precision.floating("nvfp4")]
    found = unfitting([layer("a_proj", 40), ODD], floats, "nearest")
    assert found == (
        "Groups of 16 don't divide the 40 columns of a_proj.weight: untouched in nvfp4.",
        "Groups of 32 don't divide the 40 columns of a_proj.weight and 1 more: untouched in mxfp4.",
    )
    (text,) = unfitting([ODD], [P32, Precision.floating("mxfp4")], "untouched")
    assert "every precision with such groups. palette.fit" in text  # int4 could be helped
    assert unfitting([ODD], [P32], "nearest") == ()


def test_a_refused_group_size_comes_with_the_one_that_divides_all() -> None:
    for wrong, size in ((Precision("int", 4, 40), 48), (Precision("int", 4, 20), 16)):
        layers = [layer("a", 96), layer("b", 48 if size == 48 else 80)]
        with pytest.raises(ConfigError, match=rf"divisor of all \({size} is the nearest\)"):
            palette_columns(layers, [wrong], "strict")
    with pytest.raises(
        ConfigError, match=r"q4_k out of palette\.bits, or set palette\.fit=nearest"
    ):
        palette_columns([ODD], [Precision.ggml("q4_k")], "untouched")
