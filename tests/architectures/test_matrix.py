"""The support matrix holds: what the data says of an architecture is what happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from optimizer.models.model import Model, take_inventory
from optimizer.models.source import quiet
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Desk, Task, Text, by_block, chunks, vocabulary
from tests.architectures import matrix, zoo
from tests.conftest import slow_beside

FEW = ["gpt2", "granitemoe", "zamba2", "gemma3_text", "bert encoder", "deepseek_v32", "prophetnet"]
ROWS = {row["kind"]: row for row in matrix.load()["rows"]}


@pytest.mark.parametrize("kind", slow_beside(["granitemoe", "bert encoder", "deepseek_v32"], FEW))
def test_a_few_architectures(kind: str) -> None:
    row = matrix.measure(kind)
    assert (row.outcome, row.why) == ("exact", "")


@pytest.mark.campaign
@pytest.mark.parametrize("kind", [k for k in ROWS if k not in FEW])
def test_every_architecture(kind: str) -> None:
    assert matrix.measure(kind).outcome == ROWS[kind]["outcome"]


READ = ["llama", "mixtral", "falcon"]


@pytest.mark.parametrize("kind", slow_beside(["mixtral"], READ))
def test_transformers_reads_the_export_of_a_few(kind: str) -> None:
    outcome, why = matrix.read_by_transformers(kind)
    assert outcome == "read", why
    assert float(why.partition("KL ")[2].split()[0]) < 1e-6


@pytest.mark.campaign
@pytest.mark.parametrize("kind", [k for k, row in ROWS.items() if row.get("transformers")])
def test_transformers_reads_what_the_data_says(kind: str) -> None:
    assert matrix.read_by_transformers(kind)[0] == ROWS[kind]["transformers"]


def posed(kind: str, folder: Path) -> tuple[Model, Task, Text]:
    """A small model, all of its layers at two precisions, and a text."""
    with quiet():
        zoo.build(kind).to(torch.bfloat16).save_pretrained(folder)
    inventory = take_inventory(folder)
    model = Model.load(folder, inventory)
    columns = {"int3": Precision("int", 3), "int6": Precision("int", 6)}
    names = list(model.layers)
    fitted = {(name, key): p for name in names for key, p in columns.items()}
    task = Task(tuple((name,) for name in names), tuple(columns), fitted, Nearest())
    read = Text(np.random.default_rng(1).integers(5, 30, size=(4, 16)), chunks(4, 2), 5)
    return model, task, read


EXACT = [k for k, r in ROWS.items() if r["outcome"] == "exact" and not k.endswith(zoo.ENCODER)]


@pytest.mark.campaign
@pytest.mark.parametrize("kind", EXACT)
def test_experts_products_are_the_gradients_of_all_of_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a block is scored by products of its own; 34 of 48 with experts on 2026-11-27."""
    model, task, read = posed(kind, tmp_path)
    if not any("expert" in name for name in model.layers):
        return
    products = by_block.samples(model, task, read, Desk())
    monkeypatch.setattr(by_block._Passes, "_by_products", lambda *_: False)
    gradients = by_block.samples(model, task, read, Desk())
    if products is None or gradients is None:
        assert products is gradients
        return
    np.testing.assert_allclose(products, gradients, rtol=1e-4, atol=1e-9 * gradients.max())


@pytest.mark.campaign
@pytest.mark.parametrize("kind", EXACT)
def test_a_table_by_rows_of_the_vocabulary_is_the_whole_gradients(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task, read = posed(kind, tmp_path)
    whole = by_block.samples(model, task, read, Desk())
    monkeypatch.setattr(vocabulary, "LARGE", 0)
    monkeypatch.setattr(vocabulary, "SQUARES", 2**13)
    rows = by_block.samples(model, task, read, Desk())
    if whole is None or rows is None:
        assert whole is rows  # no chain of blocks: the whole model is asked either way
        return
    np.testing.assert_allclose(rows, whole, rtol=1e-3, atol=1e-9 * whole.max())


def test_transformers_reads_most_and_nothing_is_wrong() -> None:
    outcomes = [row.get("transformers", "") for row in ROWS.values()]
    assert outcomes.count("read") >= 60 and "WRONG" not in outcomes
    assert all(row["transformers_why"] for row in ROWS.values() if row.get("transformers"))


def test_nothing_is_silently_wrong_and_most_is_exact() -> None:
    outcomes = [row["outcome"] for row in ROWS.values() if not row["kind"].endswith(" encoder")]
    assert "WRONG" not in outcomes
    assert outcomes.count("exact") >= 110
    assert all(row["why"] for row in ROWS.values() if row["outcome"] != "exact")


def test_the_page_is_the_datas() -> None:
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.render(matrix.load())
