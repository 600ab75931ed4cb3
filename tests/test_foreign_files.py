"""Foreign and damaged files: whatever one holds, a command ends with a paragraph and a code, soon.

The campaign is seeded: 2,000 mutated plans and 500 of every other format, through the functions that
the commands read them with.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from optimizer.cli import screen, terminal
from optimizer.cli.main import main
from optimizer.commands import capacity
from optimizer.config import Fit
from optimizer.data import pairs
from optimizer.data.documents import read_documents
from optimizer.errors import MezzotintError
from optimizer.formats.folder import manifest
from optimizer.formats.model_card import card
from optimizer.formats.rules import Verdict
from optimizer.models.inventory import skeleton
from optimizer.models.source import Source, locate, pooling
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import Budget, Plan
from optimizer.plan.plan import digest
from optimizer.reports import html
from optimizer.reports.html import compare
from optimizer.store import Store

PLANS, OTHERS = 2000, 500
SLOW = 30  # seconds of processor time that no single file may take
SCRIPT = "<script>alert(1)</script>"
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 10**30, -(10**30), 1e308, -1e308, 5e-324, 0.1, float("nan"),
    float("inf"), "", "x", "none", SCRIPT, "[/b][link=x]", "\ud800", "a\udfffb", "\x1b[2J", "\x00",
    "../..", "/etc/passwd", "9" * 5000, "x" * 100_000, "\u2028", [], {}, [[]], [None], {"": None},
    [1, 2, 3], {"name": 5}, {"value": "x"},
]  # fmt: skip


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to every value inside."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))
        else:
            yield (*at, key)


def changed(value: Any, rng: random.Random) -> Any:
    """One to three values replaced, removed, doubled or moved."""
    value = deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        every = list(places(value))
        if not every:
            return rng.choice(ODD)
        *way, last = rng.choice(every)
        inner = value
        for key in way:
            inner = inner[key]
        kind = rng.randrange(6)
        if kind == 0:
            del inner[last]
        elif kind == 1 and isinstance(inner, dict):
            inner[str(rng.choice(ODD))] = inner.pop(last)
        elif kind == 2 and isinstance(inner, list):
            inner += inner
        elif kind == 3:
            inner[last] = deep(rng.choice((3, 70, 300)))
        else:
            inner[last] = deepcopy(rng.choice(ODD))
    return value


def torn(text: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut off, doubled, or given another beginning."""
    at, kind = rng.randrange(len(text)), rng.randrange(5)
    if kind == 0:
        return text[:at]
    if kind == 1:
        return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
    if kind == 2:
        return text[:at] + text[at // 2 :]
    if kind == 3:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"[" * 100_000)) + text
    return text.replace(b":", b",", 1) if rng.random() < 0.5 else b""


def mutated(value: Any, rng: random.Random, sign: bool = False) -> bytes:
    """A file that may be anything; sign: with the right checksum, as of a hostile author."""
    if rng.random() < 0.25:
        return torn(json.dumps(value).encode(), rng)
    found = changed(value, rng)
    if sign and isinstance(found, dict) and rng.random() < 0.9:
        found.pop("checksum", None)
        try:
            found["checksum"] = digest(found)
        except (ValueError, RecursionError, TypeError):
            found["checksum"] = "x"
    return json.dumps(found, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def told(use: Callable[[], Any]) -> bool:
    """Whether the file was taken; anything but a MezzotintError goes on. Never minutes of work."""
    begun = time.process_time()
    try:
        use()
    except MezzotintError as error:
        assert len(str(error)) < 5000
        return False
    finally:
        assert time.process_time() - begun < SLOW
    return True


@pytest.fixture
def run(run_folder: Path) -> Path:
    """A finished run of the stories model, with a certificate."""
    return run_folder


# ---------------------------------------------------------------- plans and runs


def pages(folder: Path) -> str:
    """Everything that is made of a plan and its run without the model."""
    plan = Plan.load(folder)
    made = card(plan, Verdict("torch", (), (), {}, 5), "run it")
    html.write(folder)
    made += (folder / html.FILE).read_text()
    compare.write(folder.parent)
    return made + (folder.parent / compare.PAGE).read_text()


def fitted(folder: Path, loss: float | None = None) -> None:
    """`mezzotint fit`, without composing its settings a thousand times."""
    budget = Budget(memory="12GB", usable=0.9, kv="auto")
    found = capacity.answer(Fit(plan=str(folder), budget=budget, loss=loss, bandwidth="360GB"))
    terminal.fitting(screen.console(), found)


def one_plan(run: Path, tmp_path: Path, rng: random.Random) -> bool:
    folder = tmp_path / "sweep/0"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "run.json", folder / "run.json")
    data = json.loads((run / "plan.json").read_text())
    (folder / "plan.json").write_bytes(mutated(data, rng, sign=True))
    assert main(["show", str(folder)]) in (0, 2)
    told(lambda: fitted(folder))
    made = []
    taken = told(lambda: made.append(pages(folder)))
    assert not any(SCRIPT in page for page in made)
    return taken


@pytest.mark.slow
def test_a_campaign_of_mutated_plans(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = 0
    for seed in range(PLANS):
        taken += one_plan(run, tmp_path, random.Random(seed))
        capsys.readouterr()
    assert 0 < taken < PLANS


@pytest.mark.slow
def test_a_campaign_of_mutated_nested_plans(
    run: Path, nested_plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "nested"
    both.mkdir()
    shutil.copyfile(run / "run.json", both / "run.json")
    shutil.copyfile(nested_plan, both / "plan.json")
    taken = 0
    for seed in range(OTHERS):
        taken += one_plan(both, tmp_path, random.Random(seed))
        capsys.readouterr()
    assert 0 < taken < OTHERS


def test_some_mutated_plans(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(20):
        one_plan(run, tmp_path, random.Random(PLANS + seed))
    assert "Traceback" not in capsys.readouterr().err


def one_run(run: Path, tmp_path: Path, rng: random.Random) -> bool:
    folder = tmp_path / "sweep/0"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "plan.json", folder / "plan.json")
    (folder / "run.json").write_bytes(mutated(json.loads((run / "run.json").read_text()), rng))
    made = []
    taken = told(lambda: made.append(pages(folder)))
    assert not any(SCRIPT in page for page in made)
    told(lambda: fitted(folder, loss=0.01))
    return taken


@pytest.mark.slow
def test_a_campaign_of_mutated_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = 0
    for seed in range(OTHERS):
        taken += one_run(run, tmp_path, random.Random(seed))
        capsys.readouterr()
    assert 0 < taken < OTHERS


def test_some_mutated_runs(run: Path, tmp_path: Path) -> None:
    for seed in range(15):
        one_run(run, tmp_path, random.Random(OTHERS + seed))


# ---------------------------------------------------------------- model folders


@pytest.fixture
def model(source: Source) -> Path:
    """The stories model's folder; what changes it, copies it."""
    return source.folder


MODEL_FILES: dict[str, Callable[[Path], Any]] = {
    "config.json": skeleton,
    "tokenizer.json": load_tokenizer,
    "tokenizer_config.json": load_tokenizer,
    "modules.json": pooling,
    "pooling.json": pooling,
    "manifest.json": manifest,
}
OWN: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ],
    "pooling.json": {"pooling": "mean"},
    "manifest.json": {"engine": "torch", "sha256": {"config.json": "0" * 64}},
}


def one_file(model: Path, tmp_path: Path, name: str, rng: random.Random) -> bool:
    folder = tmp_path / "m"
    if not folder.exists():
        shutil.copytree(model, folder)
    own = OWN[name] if name in OWN else json.loads((model / name).read_text())
    (folder / name).write_bytes(mutated(own, rng))
    taken = told(lambda: MODEL_FILES[name](folder))
    if name not in OWN:
        told(lambda: locate(str(folder), Store(tmp_path / "store")))
    return taken


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODEL_FILES))
def test_a_campaign_of_mutated_model_files(model: Path, tmp_path: Path, name: str) -> None:
    taken = [one_file(model, tmp_path, name, random.Random(seed)) for seed in range(OTHERS)]
    assert not all(taken)


@pytest.mark.parametrize("name", list(MODEL_FILES))
def test_some_mutated_model_files(model: Path, tmp_path: Path, name: str) -> None:
    for seed in range(8):
        one_file(model, tmp_path, name, random.Random(OTHERS + seed))


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
def test_a_config_of_endless_layers_is_refused_at_once(
    model: Path, tmp_path: Path, key: str
) -> None:
    shutil.copytree(model, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {key: 10**9}))
    begun = time.process_time()
    with pytest.raises(MezzotintError, match="no model has more"):
        locate(str(tmp_path / "m"), Store(tmp_path / "store"))
    assert time.process_time() - begun < SLOW


# ---------------------------------------------------------------- rows of text

ROWS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "text.jsonl": ({"id": 1, "text": "one two"}, lambda file: list(read_documents(file))),
    "chat.jsonl": (
        {"messages": [{"role": "user", "content": "Hi"}]},
        lambda file: list(read_documents(file)),
    ),
    "array.json": ([{"text": "one"}, {"text": "two"}], lambda file: list(read_documents(file))),
    "probes.jsonl": (
        {"id": "a", "phenomenon": "p", "language": "en", "prefix": "a", "good": " b", "bad": " c"},
        pairs.read,
    ),
}


def one_row(tmp_path: Path, name: str, rng: random.Random) -> bool:
    row, use = ROWS[name]
    (tmp_path / name).write_bytes(mutated(row, rng))
    return told(lambda: use(tmp_path / name))


@pytest.mark.parametrize("name", list(ROWS))
def test_some_mutated_rows(tmp_path: Path, name: str) -> None:
    taken = [one_row(tmp_path, name, random.Random(OTHERS + seed)) for seed in range(60)]
    assert any(taken) and not all(taken)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ROWS))
def test_a_campaign_of_mutated_rows(tmp_path: Path, name: str) -> None:
    taken = [one_row(tmp_path, name, random.Random(seed)) for seed in range(OTHERS)]
    assert any(taken) and not all(taken)
