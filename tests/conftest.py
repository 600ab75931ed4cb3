"""What the tests share: one stories model trained once, tiny models of every architecture, and
the command line called inside the process.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before any import that reads them: no network, one thread (two processes on two cores would
# spend their time waiting for each other's threads), and no cache outside the tests' folders.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONDONTWRITEBYTECODE": "",
}

import numpy as np
import pytest
import torch
from filelock import FileLock
from hydra._internal.hydra import Hydra
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM

from optimizer.cli.main import main
from optimizer.models import stories as builtin
from optimizer.models.model import Model, take_inventory
from optimizer.models.source import Source, locate, quiet
from optimizer.plan import Choices, Inventory, Layer, Plan, Precision, assemble
from optimizer.store import Store

# Bytecode is kept, also where the machine says otherwise: compiling it in each worker and each process
# that a test starts, takes longer than the tests of whole rooms.
sys.dont_write_bytecode = False
torch.set_num_threads(1)
settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")

# What is imported stays: the collector need not look through torch at each command.
gc.collect()
gc.freeze()

# Hydra composes the settings twice, the first time only to read hydra.mode. Where no word sets that,
# it isn't set. Processes that tests start have Hydra as it is.
_mode = Hydra.get_mode


def _mode_if_set(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    asked = any("hydra" in word for word in overrides if not word.startswith("hydra.run.dir="))
    return _mode(self, config_name, overrides) if asked else None


Hydra.get_mode = _mode_if_set

# Enough tokens for a table that means something on the stories model, in about two seconds.
QUICK = [
    "data.calibration.sequences=16",
    "data.calibration.length=64",
    "data.search.sequences=4",
    "data.search.length=64",
    "data.heldout.sequences=12",
    "data.heldout.length=64",
    "scope=[blocks]",
    "wandb=off",
    "quantizer=rtn",
    "proof.random=4",
    "search=exact",
]


def slow_beside(chosen: Sequence[Any], every: Iterable[Any]) -> list[Any]:
    """Parameters of which the chosen ones run by default and the others with the slow tests."""
    rows = ((value if isinstance(value, tuple) else (value,), value in chosen) for value in every)
    return [pytest.param(*row, marks=[] if first else pytest.mark.slow) for row, first in rows]


BODY = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
WIDE = BODY | {"hidden_size": 64, "max_position_embeddings": 128}
GLU = WIDE | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}

# name -> (config, dtype on disk). Different enough to reach every kind of layer.
ARCHITECTURES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "llama": (GLU | {"tie_word_embeddings": True}, torch.float16),
    "gpt2": (BODY | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, torch.float32),
    "opt": (WIDE | {"ffn_dim": 96, "word_embed_proj_dim": 32}, torch.float16),
    "qwen3": (GLU | {"tie_word_embeddings": False}, torch.bfloat16),
    "gpt_neox": (WIDE | {"intermediate_size": 96}, torch.float16),
    "qwen3_moe": (
        GLU | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        torch.bfloat16,
    ),
    "gpt_oss": (
        GLU | MOE | {"layer_types": ["sliding_attention", "full_attention"]},
        torch.bfloat16,
    ),
    "mixtral": (GLU | MOE, torch.float16),
    "gemma2": (GLU | {"query_pre_attn_scalar": 16, "sliding_window": 32}, torch.bfloat16),
}


def build(folder: Path, kind: str, settings: dict[str, Any], dtype: torch.dtype) -> Path:
    """A model of random weights, large enough for rounding to matter, saved to `folder`."""
    torch.manual_seed(7)
    with quiet():
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ENDS, **settings))
        for name, value in net.named_parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=0.08)
            elif "norm" not in name and "ln_" not in name:
                torch.nn.init.normal_(value, std=0.02)
        net.to(dtype).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Small:
    """A tiny model on disk and loaded."""

    name: str
    folder: Path
    inventory: Inventory
    model: Model


def opened(name: str, folder: Path) -> Small:
    inventory = take_inventory(folder)
    return Small(name, folder, inventory, Model.load(folder, inventory))


# Tied and grouped, transposed, projected, of experts with biases, capped: what a default test sees.
USUAL = ("llama", "gpt2", "opt", "gpt_oss", "gemma2")


@pytest.fixture(scope="session", params=slow_beside(USUAL, ARCHITECTURES))
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Every architecture in turn. Tests must leave the weights as they were."""
    kind = request.param
    folder = build(tmp_path_factory.mktemp(kind), kind, *ARCHITECTURES[kind])
    return opened(kind, folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return opened("llama", build(tmp_path_factory.mktemp("one"), "llama", *ARCHITECTURES["llama"]))


MIXTURE = (
    Precision("int", 3, 32),
    Precision("int", 4, 16, True),
    Precision(),
    Precision("ternary", 2, 32, True),
    Precision("int", 8),
    Precision("int", 1, 32, True),
    Precision("int", 5, 32),
)


def mixed(layers: tuple[Layer, ...]) -> dict[str, Precision]:
    """Every kind of precision, dealt to the layers in turn."""
    return {layer.name: MIXTURE[i % len(MIXTURE)] for i, layer in enumerate(layers)}


def choices_of(
    layers: Sequence[Layer],
    palette: Sequence[Precision],
    groups: Sequence[tuple[str, ...]] | None = None,
    allowed: np.ndarray | None = None,
) -> Choices:
    """Every precision for each of the groups; without groups, each layer is one."""
    names = tuple((layer.name,) for layer in layers) if groups is None else tuple(groups)
    fitted = {(layer.name, p.name): p for layer in layers for p in palette}
    return Choices(tuple(layers), names, tuple(p.name for p in palette), fitted, allowed)


def planned(
    inventory: Inventory, choice: dict[str, Precision], fingerprint: str = "sha256:test"
) -> Plan:
    return assemble(
        inventory,
        inventory.layers,
        choice,
        model={"name": "small", "revision": None, "fingerprint": fingerprint},
        runtime="torch",
        quantizer={"name": "rtn"},
        predicted={"kl": 0.25, "stderr": 0.01},
    )


# ---------------------------------------------------------------- the stories model


@pytest.fixture(scope="session", autouse=True)
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whoever makes the stories model in a store gets a copy of one that is trained once a run, also
    beside another worker. Processes that tests start train their own."""
    base, train = tmp_path_factory.getbasetemp(), builtin.train
    once = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "stories"

    def copied(folder: Path) -> None:
        with FileLock(f"{once}.lock"):
            if not once.exists():
                train(base / "training")
                (base / "training").rename(once)
        shutil.copytree(once, folder, dirs_exist_ok=True)

    builtin.train = copied
    yield
    builtin.train = train


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the trained stories model; every test adds to it."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def source(store: Path) -> Source:
    return locate("stories", Store(store))


@pytest.fixture(scope="session")
def stories(source: Source) -> Model:
    return Model.load(source.folder, take_inventory(source.folder))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@contextmanager
def _own_logging() -> Iterator[None]:
    """Hydra sets up logging for the process; take its handlers away again."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in list(root.handlers):
            if handler not in before:
                handler.close()
        root.handlers[:] = before
        root.setLevel(level)


@pytest.fixture
def mezzotint(
    tmp_path: Path,
    store: Path,
    source: Source,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """mezzotint("optimize", "model=stories", ...) in an empty folder, the stories model at hand.
    Runs are recorded for W&B, by a process that takes seconds, only where a test says wandb=..."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEZZOTINT_STORE", str(store))
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: Any) -> Ended:
        words = [str(argument) for argument in arguments]
        if words[:1] == ["optimize"] and not any(w.startswith(("wandb", "-")) for w in words):
            words.append("wandb=off")
        capsys.readouterr()
        with _own_logging():
            code = main(words)
        text = capsys.readouterr()
        return Ended(code, text.out, text.err)

    return call


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond `size` bytes, as on a full disk. Keep it around the call
    alone: the test runner's own output may go to a file, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="session")
def run_folder(store: Path, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outcome of `optimize model=stories budget.bits=4.5` with QUICK settings."""
    folder = tmp_path_factory.mktemp("run")
    with _own_logging():
        code = main(
            ["optimize", "model=stories", "budget.bits=4.5", *QUICK, f"store={store}",
             f"hydra.run.dir={folder}"]
        )  # fmt: skip
    assert code == 0
    return folder


@pytest.fixture(scope="session")
def packed_folder(store: Path, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    with _own_logging():
        assert (
            main(["apply", str(run_folder / "plan.json"), f"out={folder}", f"store={store}"]) == 0
        )
    return folder


@pytest.fixture(scope="session")
def nested_plan(store: Path, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plan.json of the stories model with a base and a refinement."""
    folder = tmp_path_factory.mktemp("nested")
    with _own_logging():
        code = main(
            ["optimize", "model=stories", "budget.size=100kB", "nested.size=130kB", *QUICK,
             "proof.random=0", "proof.domains=[]", f"store={store}", f"hydra.run.dir={folder}"]
        )  # fmt: skip
    assert code == 0
    return folder / "plan.json"


@pytest.fixture(scope="session")
def nested_folder(
    store: Path, nested_plan: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What `apply` makes of it. Tests must leave it as it is."""
    out = tmp_path_factory.mktemp("unpack") / "model"
    with _own_logging():
        assert main(["apply", str(nested_plan), f"out={out}", f"store={store}"]) == 0
    return out
