"""The whole certificate from the command line, on the stories model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from optimizer.commands import optimize
from optimizer.config import Optimize, Proof
from optimizer.models import stories
from optimizer.models.source import Source
from optimizer.plan import Plan
from optimizer.stages.view import View
from tests.commands.test_optimize import Seen, settings
from tests.conftest import QUICK, Command


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text("\n---\n".join(stories.corpus(12, 5)))
    return path


def asked(own: Path) -> list[str]:
    return [f"proof.domains=[prose,long,'own = {own} * 3']", "proof.generate=24"]


def optimized(mezzotint: Command, own: Path, bits: float) -> tuple[Plan, str]:
    call = ["model=stories", f"budget.bits={bits}", *QUICK, *asked(own)]
    found = mezzotint("optimize", *call, "hydra.run.dir=run")
    assert found.code == 0, found.err
    return Plan.load(Path("run")), found.out


def flat(text: str) -> str:
    return " ".join(re.sub(r"[│┃]", " ", text).split())


def test_the_certificate_has_everything_that_was_asked(mezzotint: Command, own: Path) -> None:
    plan, out = optimized(mezzotint, own, 3)
    found = plan.certificate["meaning"]
    assert [row["name"] for row in found["texts"]] == ["held-out", "long", "own"]
    assert [row["name"] for row in found["noise"]] == [
        "reference, one window at a time", "reference in bf16",
    ]  # fmt: skip
    assert found["noise"][1]["kl"]["value"] < found["texts"][0]["kl"]["value"] / 10
    long = found["texts"][1]
    assert (long["documents"], long["tokens"]) == (8, 8 * 128), "the second half of 256 positions"
    means = {row["name"]: row["kl"]["value"] for row in found["texts"]}
    assert found["weighted_kl"] == pytest.approx((means["long"] + 3 * means["own"]) / 4)
    assert found["greedy"]["limit"] == 24 and 0 < found["greedy"]["mean"]["value"] < 24
    assert found["documents"][0]["begins"]
    assert found["state"] == "lossy" and found["verdict"].startswith("Lossy: on ")
    assert plan.certificate["verdict"], "the comparison with uniform plans is still there"
    assert "left out whole: prose" in flat(out)
    assert "Lossy: on " in flat(out) and "Worst kind of text: " in flat(out)
    for words in (found["verdict"], "Greedy texts of 24 tokens", "Worst domain: "):
        assert flat(words) in flat(mezzotint("show", "run/plan.json").out)
    page = Path("run/report.html").read_text()
    assert "Lossy: on " in page and "within tolerance" in page and "reference in bf16" in page
    json.dumps(found, allow_nan=False)


def test_the_packed_model_gets_the_same_answer(mezzotint: Command, own: Path) -> None:
    plan, _ = optimized(mezzotint, own, 4)
    assert mezzotint("apply", "run/plan.json", "out=packed").code == 0
    more = [text.removeprefix("proof.") for text in asked(own)]
    data = [text for text in QUICK if text.startswith("data.")]
    found = mezzotint("evaluate", "model=packed", *data, *more)
    assert found.code == 0, found.err
    said = flat(found.out)
    for words in ("Greedy texts of 24", "Worst domain", "Of the tokens that only one"):
        assert words in said
    assert flat(plan.certificate["meaning"]["verdict"]) in said


@pytest.mark.slow
def test_a_second_proof_measures_nothing(source: Source, tmp_path: Path, own: Path) -> None:
    proof = Proof(random=2, domains=["long", f"own = {own}"], generate=8)
    config = settings(source, tmp_path / "store", proof=proof)
    first, view = optimize.optimize(config, tmp_path / "one"), Seen()
    second = optimize.optimize(config, tmp_path / "two", view)
    assert second.plan.certificate == first.plan.certificate
    assert not {"loading the reference", "the plan reads domains"} & set(view.stages)


class Refusing(View):
    """Nothing expensive may begin."""

    def stage(self, text: str) -> None:
        assert "loading" not in text and "sampling" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generate": 256}, "context of 256 tokens"),
        ({"generate": -1}, "number of tokens"),
        ({"domains": ["own = gone.txt"]}, "no text at gone.txt"),
        ({"domains": ["own = short.txt"]}, "needs at least two documents"),
    ],
)
def test_mistakes_are_found_before_any_work(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, words: str
) -> None:
    from optimizer.errors import MezzotintError

    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("Mia had a red ball .")
    config: Optimize = settings(source, tmp_path / "store", proof=Proof(**change))
    with pytest.raises(MezzotintError, match=words):
        optimize.optimize(config, tmp_path / "run", Refusing())
