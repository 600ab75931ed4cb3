"""experiments/08: what is compared is what it says it is. On a random Llama; llama.cpp's own
quantizer where LIBRARIES names its libraries (see matrix.sh)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from optimizer.formats.gguf import retyping
from optimizer.models.stories import corpus
from tests.formats.conftest import Wide, wide

__all__ = ["wide"]

FOLDER = Path(__file__).parents[2] / "experiments" / "08-llamacpp-mixtures"


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("matrix", FOLDER / "matrix.py")
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        yield found
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def scratch(matrix: ModuleType, wide: Wide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixtures")
    text = out / "text.txt"
    text.write_text("\n---\n".join(corpus(600, 5)))
    measure = sys.modules["measure"]
    measure.STORE, measure.LENGTH = str(wide.store), 128
    measure.main(str(wide.folder), str(text), str(out), "1")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rules", "optimum"])
def test_plans_fit_and_the_optimum_uses_what_it_has(
    matrix: ModuleType, scratch: Path, name: str
) -> None:
    model = matrix.Model(str(scratch))
    plain = model.size(dict.fromkeys(model.names.values(), "q4_k"))
    kinds = getattr(matrix, name)(model, plain)
    least = {"optimum": 0.9, "rules": 0.75}[name]  # all but one of its three blocks are ends
    assert least * plain < model.size(kinds) <= plain
    if name == "optimum":
        assert model.loss(kinds) <= model.loss(matrix.rules(model, plain))
        without = matrix.optimum(model, plain, matrix.OWN_GRID)
        assert not set(without.values()) & set(matrix.OWN_GRID)


@pytest.mark.slow
def test_a_first_word_is_in_one_of_three_counts(matrix: ModuleType, tmp_path: Path) -> None:
    """Windows of 255 positions: llama.cpp's tool counts those from 128 on, of 256 tokens."""
    kl = np.full((4, 255), 0.25)
    kl[:, 0], kl[:, 127], flip = 8.0, 4.0, np.zeros(kl.shape, bool)
    flip[:, 128] = True
    np.savez(tmp_path / "at-llama.cpp.npz", kl=np.full(kl.shape, 0.5), flip=flip)
    np.savez(tmp_path / "at-ours.npz", kl=kl, flip=flip)
    found = matrix.statistics(tmp_path, "at", "ours")
    for prefix, mean in (("", (8 + 4 + 253 / 4) / 255), ("rest_", (4 + 253 / 4) / 254)):
        assert float(found[f"{prefix}kl"]) == pytest.approx(mean, abs=1e-5)
        assert float(found[f"{prefix}low"]) < mean < float(found[f"{prefix}high"])
        assert float(found[f"{prefix}ratio"]) == pytest.approx(2 * mean, abs=1e-3)
    assert [found[f"half_{k}"] for k in ("kl", "low", "high", "p99")] == ["0.25000"] * 3 + [
        "0.2500"
    ]
    assert [found[f"half_{k}"] for k in ("ratio", "ratio_low", "ratio_high")] == ["0.500"] * 3
    assert float(found["half_flips"]) == pytest.approx(1 / 127, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif("LIBRARIES" not in os.environ, reason="llama.cpp's libraries aren't here")
@pytest.mark.parametrize("mixture", ["Q3_K_M", "IQ3_M"])
def test_a_mixture_is_llamacpps_own_file(matrix: ModuleType, scratch: Path, mixture: str) -> None:
    """Types by its dry run and payloads by ggml give the tensors that llama_model_quantize writes."""
    import subprocess

    from gguf import GGUFReader

    engine = [sys.executable, str(FOLDER / "engine.py")]
    given, own = str(scratch / "16.gguf"), scratch / f"{mixture}.gguf"
    matrices = str(scratch / "matrix.npz")
    subprocess.run([*engine, "quantize", given, str(own), mixture, matrices], check=True)
    types = scratch / "types.json"
    subprocess.run([*engine, "types", given, str(types), matrices, mixture], check=True)
    assert json.loads(types.read_text())[mixture]
    model, ours = matrix.Model(str(scratch)), scratch / f"{mixture}.ours.gguf"
    retyping.write(
        model.base,
        model.types(mixture),
        lambda tensor, kind: matrix.payload(model, tensor, kind, "alike"),
        ours,
    )
    theirs = {t.name: t for t in GGUFReader(own).tensors}
    for tensor in GGUFReader(ours).tensors:
        assert tensor.tensor_type == theirs[tensor.name].tensor_type
        assert np.array_equal(np.asarray(tensor.data), np.asarray(theirs[tensor.name].data))
