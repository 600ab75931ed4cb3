"""Real models write real texts: plans, packed folders and the reference."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from optimizer.errors import ConfigError, TextError
from optimizer.models import stories
from optimizer.models.source import Source
from optimizer.person import commands, entrants, prompts, writing
from optimizer.person.settings import Judge
from optimizer.stages.view import View
from tests.conftest import Command


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts in the words of the stories model."""
    rng = random.Random(5)
    rows = []
    for i in range(16):
        who, other = rng.sample(list(stories.PEOPLE), 2)
        words = stories.sentence(rng, who, other, rng.choice(stories.THINGS)).split()
        rows.append(
            {"prompt": " ".join(words[:5]), "domain": ("garden", "mill")[i % 2], "language": "en"}
        )
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def asked(models: list[str], store: Path, begun: Path, folder: Path, **more: object) -> Judge:
    settings: dict[str, object] = {"questions": 12, "pool": 16, "tokens": 12} | more
    return Judge(
        models=models, prompts=str(begun), votes=str(folder / "votes.jsonl"), store=str(store),
        **settings,  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_plan_against_its_reference(
    run_folder: Path, store: Path, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asked([str(run_folder), "reference"], store, begun, tmp_path)
    ready = commands.prepare(config, View())
    found = ready.judging.comparison
    plan, reference = found.entrants
    assert reference.name == "reference"
    assert plan.bytes < reference.bytes
    for question in found.questions:
        if question.about.catch:
            continue
        features = dict(zip(question.about.models, question.about.features, strict=True))
        assert features["reference"]["kl"] == 0
        assert features[plan.name]["kl"] > 0
        assert features[plan.name]["tail"] >= features[plan.name]["kl"]
        own = question.texts[question.about.models.index("reference")]
        assert own == found.reference.texts[question.prompt.id]
    assert any(question.about.catch for question in found.questions)

    def no_model(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(entrants, "opened", no_model)
    monkeypatch.setattr(writing, "opened", no_model)
    again = commands.prepare(config, View())
    assert again.judging.comparison == found


def test_a_plan_says_what_its_packed_folder_says(
    run_folder: Path, packed_folder: Path, store: Path, begun: Path, tmp_path: Path
) -> None:
    config = asked([str(run_folder), str(packed_folder)], store, begun, tmp_path)
    with pytest.raises(
        TextError, match=r"are alike to within .* nats per token on your \d+ prompts"
    ):
        commands.prepare(config, View())
    assert not (tmp_path / "votes.jsonl").exists()


def test_the_reference_against_itself_has_two_texts(
    store: Path, source: Source, begun: Path, tmp_path: Path
) -> None:
    ready = commands.prepare(asked(["stories", "stories"], store, begun, tmp_path), View())
    questions = ready.judging.comparison.questions
    assert questions
    assert all(q.texts[0].strip() != q.texts[1].strip() for q in questions)
    assert {name for q in questions for name in q.about.models} == {"stories", "stories, number 2"}


def test_prompts_that_no_model_reads_are_told(
    run_folder: Path, store: Path, begun: Path, tmp_path: Path
) -> None:
    config = asked([str(run_folder), "reference"], store, begun, tmp_path, tokens=255)
    with pytest.raises(TextError, match="longer than the context"):
        commands.prepare(config, View())


def test_what_differs_between_models_is_said(tmp_path: Path) -> None:
    sides = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(name)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": name}))
        sides.append(entrants.Entrant(name, Source(name, folder, name), None, None, name, 1))
    notes = entrants.differences(sides)
    assert any("different tokenizers" in note for note in notes)
    assert any("different chat templates" in note for note in notes)
    assert not entrants.differences([sides[0], replace(sides[0], name="again")])


# ---------------------------------------------------------------- prompts


def test_built_in_prompts_take_turns() -> None:
    every = prompts.gather(None, ["russian", "code"], ["negation"])
    some = prompts.in_turn(every, 8)
    assert {p.kind for p in some} == {
        ("russian", ""), ("code", ""), ("negation", "en"), ("negation", "ru"),
    }  # fmt: skip
    assert all(p.text == p.text.rstrip() for p in every)
    assert len({p.id for p in every}) == len(every)
    assert {p.domain for p in every if p.pair} == {"prose", "russian"}


def test_a_beginning_keeps_its_lines_and_whole_words() -> None:
    assert prompts._beginning("def f(x):\n    return  x + 1\n", 4) == "def f(x):\n    return  x"
    assert prompts._beginning("雪" * 300, 24) == "雪" * 48
    assert all(len(p.text) < 60 for p in prompts.of_domain("chinese"))
    assert {p.language for p in prompts.of_domain("chinese")} == {"zh"}


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 is no prompt"), ('{"text": "a"}', "line 2 is no prompt"),
     ('{"prompt": ""}', "line 2 is no prompt"), ('{"prompt": 5}', "line 2 is no prompt"),
     ('{"prompt": "a", "mood": "b"}', "line 2 is no prompt")],
)  # fmt: skip
def test_a_wrong_line_of_prompts_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(TextError, match=message):
        prompts.own(file)


def test_documents_of_a_text_are_prompts(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("One thing.\n---\nAnother thing.\n---\nA third.\n")
    assert [p.text for p in prompts.own(file)] == ["One thing.", "Another thing.", "A third."]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs models"),
        (["stories"], "two models or more"),
        (["stories", "reference"], "the model that a plan was made for"),
        (["stories", "stories", "prompts=none.txt"], "There are no prompts at none.txt"),
        (["stories", "stories", "questions=0"], "questions is 1 or more"),
        (["stories", "stories", "catch=0.9"], "catch is a share"),
        (["stories", "stories", "port=80"], "port is a number from 1024"),
        (["stories", "stories", "phenomena=[moods]"], "no built-in probes of moods"),
        (["stories", "stories", "votes=."], "votes is a file"),
        (["stories", "stories", "chat=true"], "chat template"),
        (["nowhere/plan.json", "stories"], "nowhere/plan.json"),
    ],
)
def test_mistakes_are_explained(mezzotint: Command, words: list[str], message: str) -> None:
    ended = mezzotint("judge", *words, "open=false")
    assert ended.code == 2
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizer import person

    monkeypatch.setattr(person, "NEEDED", ("starlette", "no_such_package"))
    with pytest.raises(ConfigError, match=r"no_such_package.*mezzotint\[person\]"):
        person.require()
