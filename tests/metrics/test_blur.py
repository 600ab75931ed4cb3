"""The blur map: every token measured once, the page safe and readable, the terminal too."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimizer.errors import ModelError, TextError
from optimizer.metrics import blur
from optimizer.models.model import Model
from optimizer.models.stories import corpus
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from optimizer.reports.html import blur_map as page
from tests.commands.test_probe import story_plan
from tests.conftest import Command

NASTY = 'Mia <script>alert(1)</script> & "went" \x1b[31m to \u202e the garden . </body>\n'


@pytest.fixture(scope="session")
def found(stories: Model, source: Any) -> blur.Map:
    """A text of several windows, read with a coarse plan and a finer one."""
    tokenizer = load_tokenizer(source.folder)
    text = "\n\n".join(corpus(4, seed=5)) + "\n" + NASTY
    made = blur.cut(text, tokenizer, 64, 256, 10_000, 5)
    layers = stories.inventory.scoped(["blocks"])
    weights = [
        blur.Weights(name, size, {x.name: Precision("int", bits, 32) for x in layers})
        for name, size, bits in (("plan", 10**6, 2), ("uniform <b>", 2 * 10**6, 5))
    ]

    def holding(choice: Any) -> Any:
        class Held:
            def __enter__(self) -> Any:
                self.inner = stories.rounded(Nearest(), choice)
                self.inner.__enter__()
                return stories.net

            def __exit__(self, *error: Any) -> None:
                self.inner.__exit__(*error)

        return Held()

    return blur.measure(made, stories.net, holding, weights, tokenizer, lambda items, _: items)


# ---------------------------------------------------------------- cutting


@pytest.mark.parametrize(("count", "length", "first"), [(50, 16, [1]), (16, 16, []), (7, 64, [1])])
def test_every_token_is_predicted_once(count: int, length: int, first: list[int]) -> None:
    ids = np.arange(100, 100 + count)
    windows, at = blur._windows(ids, first, length)
    assert windows.shape[1] <= length
    targets = windows[:, 1:].ravel()
    blind = at < 0
    assert (targets[at[~blind]] == ids[~blind]).all()
    assert blind.sum() == (0 if first else 1)
    place = at[~blind] % (windows.shape[1] - 1)
    later = np.flatnonzero(at[~blind] >= windows.shape[1] - 1)
    if len(later):  # never from less than a quarter of a window, except in the first
        assert place[later].min() >= (length - len(first)) // 4 - 1


def test_bytes_of_one_letter_are_one_unit() -> None:
    found = blur.units([(0, 2), (2, 3), (2, 3), (3, 5), (5, 5)])
    assert [(u.start, u.end, u.tokens) for u in found] == [
        (0, 2, (0,)), (2, 3, (1, 2)), (3, 5, (3, 4)),
    ]  # fmt: skip


def letters(text: str) -> list[tuple[int, int]]:
    """Passages of a text whose letters are its units: first and last unit behind."""
    units = tuple(blur.Unit(i, i + 1, (i,)) for i in range(len(text)))
    return [(found.start, found.stop) for found in blur.passages(text, units)]


def test_passages_by_hand() -> None:
    assert letters("abc") == [(0, 3)]
    assert letters("a." + "b" * 21 + "." + "c" * 12) == [(0, 24), (24, 36)], "24 are enough"
    assert letters("a." + "b" * 20 + "." + "c" * 13) == [(0, 36)], "23 are not"
    assert letters("a" * 23 + "." + "c" * 11) == [(0, 35)], "a rest of less than 12 joins"
    assert letters("a" * 200) == [(0, 96), (96, 200)]
    assert letters("a" * 204) == [(0, 96), (96, 192), (192, 204)]


def test_passages_without_a_prediction_come_last() -> None:
    units = tuple(blur.Unit(i, i + 1, (i,)) for i in range(4))
    kl, many = np.array([np.nan, 0.0, 0.5, 0.0]), np.zeros((4, 1))
    reading = blur.Reading("plan", 1, kl, kl, kl > 1, many, many, None)
    passages = tuple(range(i, i + 1) for i in range(4))
    ids = np.arange(4)
    found = blur.Map("abcd", ids, units, reading, (reading,), passages, (), {}, ())
    assert blur._sorted(found).worst == (2, 1, 3, 0)
    assert found.worst_units(4) == [2]


def test_shades_grow_with_the_loss() -> None:
    values = [0, 0.009, 0.01, 0.05, 0.1, 0.5, 1, 20, float("nan")]
    assert [blur.level(kl) for kl in values] == [0, 0, 1, 2, 3, 4, 5, 5, 0]


def test_what_is_left_out_is_said(source: Any) -> None:
    tokenizer = load_tokenizer(source.folder)
    made = blur.cut("Mia zebra went to the garden . " * 20, tokenizer, 64, 32, 40, 5)
    assert len(made.ids) == 40
    assert made.windows.shape[1] == 32
    left, unknown, windows = made.notes
    assert "140 tokens; the first 40 were read and 100 left out" in left
    assert "6 of 40 tokens are words that the tokenizer doesn't know" in unknown
    assert "windows of 32" in windows
    with pytest.raises(ModelError, match="fast tokenizer"):
        blur.cut("a b", object(), 64, 32, 40, 5)


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    for name, data, wanted in (
        ("latin", "caf\xe9".encode("latin-1"), "UTF-8"),
        ("empty", b" \n", "holds no text"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TextError, match=wanted):
            blur.read(tmp_path / name)
    with pytest.raises(TextError, match="There is no text"):
        blur.read(tmp_path / "none")


# ---------------------------------------------------------------- measuring


def test_kl_and_words_are_those_of_the_models(found: blur.Map, stories: Model) -> None:
    """Against one plain pass: of the first window, and of a token in a later one."""
    layers = stories.inventory.scoped(["blocks"])
    choice = {x.name: Precision("int", 2, 32) for x in layers}

    def log_p(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = stories.net(torch.tensor([ids])).logits[0, -1].float()
        return torch.log_softmax(logits, -1)

    body = 63
    second = body - body // 4  # where the second window begins
    for token, begin in ((0, 0), (20, 0), (62, 0), (80, second)):
        ids = [1, *found.ids[begin:token].tolist()]
        p = log_p(ids)
        with stories.rounded(Nearest(), choice):
            q = log_p(ids)
        kl = float((p.exp() * (p - q)).sum())
        assert found.plan.kl[token] == pytest.approx(kl, abs=1e-4)
        assert found.reference.words[token, 0] == int(p.argmax())
        assert found.plan.chances[token, 0] == pytest.approx(float(q.exp().max()), abs=1e-4)
        real = int(found.ids[token])
        assert found.reference.true[token] == pytest.approx(float(p[real].exp()), abs=1e-4)
        assert bool(found.plan.flip[token]) == (int(p.argmax()) != int(q.argmax()))


def test_passages_cover_the_text_and_the_worst_comes_first(found: blur.Map) -> None:
    joined = [unit for passage in found.passages for unit in passage]
    assert joined == list(range(len(found.units)))
    means = [found.mean_kl(found.plan, found.passages[i]) for i in found.worst]
    assert means == sorted(means, reverse=True)
    assert found.plan.kl.mean() > 5 * found.others[1].kl.mean()
    worst = found.worst_units(3)
    assert found.plan.shade(found.units[worst[0]]) == np.nanmax(found.plan.kl)
    assert worst[0] in found.passages[found.passage_of(worst[0])]


# ---------------------------------------------------------------- the page


def panes(text: str, number: int) -> str:
    """What a reader sees of the text in one pane."""
    found = re.findall(rf'<div class="text r{number}" dir="auto">(.*?)</div>', text, re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", "".join(found)))


def test_the_page_shows_the_whole_text_and_runs_nothing_of_it(found: blur.Map) -> None:
    text = page.render(found, "a <i>title</i>", 3)
    for number in (0, 1):
        # a row begins and ends without white space
        assert "".join(panes(text, number).split()) == "".join(blur.visible(found.text).split())
    assert text.count("<script") == 2
    assert "alert(1)</script>" not in text
    assert "<i>title" not in text and "uniform <b>" not in text
    assert "\x1b" not in text and "\u202e" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "http://" not in text and "https://" not in text


def test_only_the_pages_own_script_may_run(found: blur.Map) -> None:
    text = page.render(found, "t", 3)
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text
    assert "innerHTML" not in script


def test_the_panels_data(found: blur.Map) -> None:
    text = page.render(found, "t", 3)
    block = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert block is not None
    data = json.loads(block.group(1))
    assert data["models"] == ["reference", "plan", "uniform <b>"]
    assert len(data["units"]) == len(found.units)
    unit = data["units"][30]
    token = found.worst_token(found.units[30])
    assert unit["kl"][0] == f"{found.plan.kl[token]:.3f}"
    word, chance = unit["top"][1][0]
    assert data["words"][word] == found.spelling[int(found.plan.words[token, 0])]
    assert chance == pytest.approx(float(found.plan.chances[token, 0]), abs=1e-4)
    shades = [blur.level(found.plan.shade(found.units[i])) for i in data["marked"]]
    assert shades and min(shades) >= blur.MARKED


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_shade_is_readable_and_they_run_one_way() -> None:
    css = (Path(page.__file__).parent / "blur_map.css").read_text(encoding="utf-8")
    light, dark = css.split("prefers-color-scheme: dark", 1)
    for scheme in (light, dark.split("box-sizing", 1)[0]):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        ramp = [luminance(colours["paper"])] + [luminance(colours[f"k{i}"]) for i in range(1, 6)]
        assert ramp in (sorted(ramp), sorted(ramp, reverse=True))
        for i in range(1, 6):
            pair = sorted((luminance(colours[f"k{i}"]), luminance(colours[f"t{i}"])))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, i
    assert css.count("text-decoration: underline") >= blur.MARKED - 2  # a cue without colour


# ---------------------------------------------------------------- the command


def test_blur_from_the_command_line(
    mezzotint: Command, stories: Model, source: Any, tmp_path: Path
) -> None:
    plan = story_plan(stories, source.fingerprint, tmp_path / "plan.json")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(corpus(2, seed=8)) + NASTY, encoding="utf-8")
    ended = mezzotint("blur", plan, text, "out=deep/map.html")
    assert ended.code == 0, ended.err
    assert "Wrote deep/map.html" in ended.out
    assert panes((tmp_path / "deep/map.html").read_text(encoding="utf-8"), 1)
    shown = mezzotint("blur", plan, text, "to=terminal", "passages=2")
    assert shown.code == 0, shown.err
    assert (
        "1. passage" in shown.out and "2. passage" in shown.out and "3. passage" not in shown.out
    )
    assert "\x1b" not in shown.out and "\u202e" not in shown.out
    for arguments, wanted in (
        (["blur", plan], "needs text"),
        (["blur", plan, text, f"out={text}"], "overwrite what is read"),
        (["blur", plan, text, "to=pdf"], "html or terminal"),
        (["blur", plan, "none.txt"], "There is no text"),
        (["blur", plan, text, "context=1"], "context is 8 or more"),
    ):
        ended = mezzotint(*arguments)
        assert ended.code == 2, arguments
        assert wanted in ended.err


def test_what_is_unpacked_is_framed_and_saves(
    mezzotint: Command, nested_folder: Path, nested_plan: Path, tmp_path: Path
) -> None:
    text = tmp_path / "story.txt"
    text.write_text(
        "Once upon a time there was a little girl. She had a red ball, and a dog. " * 4
    )
    call = ("blur", nested_folder, text, "out=map.html", "unpack=hard", "share=0.3")
    ended = mezzotint(*call)
    assert ended.code == 0, ended.err
    said = re.search(
        r"opened for (\d+) % of the tokens: mean KL ([\d.]+) instead of ([\d.]+)", ended.out
    )
    assert said is not None, ended.out
    share, mine, base = map(float, said.groups())
    assert 5 < share < 95 and mine < base
    page = Path("map.html").read_text()
    framed = len(re.findall(r'<span data-i="\d+" class="[^"]*\bo"', page))
    assert framed and "framed" in page and "base alone" in page
    plain = mezzotint(*call[:3], "out=plain.html")
    assert plain.code == 0 and f"{base:.4f}" in plain.out, "the base is the plan's own"
    assert "without its refinement" in " ".join((plain.out + plain.err).split())
    for words, wrong in (
        ((nested_plan, "unpack=hard"), "is none"),
        ((nested_folder, "unpack=always"), "hard or null"),
        ((nested_folder, "share=0.3"), "share says how much"),
    ):
        refused = mezzotint("blur", words[0], text, words[1])
        assert refused.code == 2 and wrong in " ".join(refused.err.split()), refused.err


def test_examples_are_shaded_by_the_scores_themselves(run_folder, source):
    """The page of the run: its words are the held-out text, its shades their KL."""
    import html
    import re

    from optimizer.metrics.blur import level
    from optimizer.models.tokenizer import load_tokenizer
    from optimizer.reports.html import blur_example

    page = (run_folder / blur_example.FILE).read_text(encoding="utf-8")
    assert "the worst of the held-out windows" in page and "http" not in page.split("<body>")[1]
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 90, size=(3, 20))
    kl = np.array([np.zeros(19), np.full(19, 0.5), np.linspace(0, 3, 19)])
    tokenizer = load_tokenizer(source.folder)
    page = blur_example.render(ids, kl, tokenizer, "<b>")
    assert "<h1>&lt;b&gt;</h1>" in page
    worst = page.split("<h2>the worst of")[1].split("<h2>")[0]
    shades = [int(found) for found in re.findall(r'class="k(\d)"', worst)]
    assert shades == [level(value) for value in kl[2]]
    text = html.unescape(re.sub("<[^>]*>", "", worst.split("<p>")[1]))
    assert text.strip() == tokenizer.decode(ids[2].tolist()).strip()


def test_examples_name_each_window_once():
    from optimizer.reports.html import blur_example

    assert list(blur_example.chosen(np.ones((1, 4)))) == ["the worst of the held-out windows"]
    kl = np.array([[0.1, 0.1], [0.2, 0.9], [0.7, 0.7]])
    assert sorted(blur_example.chosen(kl).values()) == [1, 2]
