"""The command line as a person meets it: what works, and one clear paragraph for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import optimizer
from optimizer.models.source import Source
from optimizer.plan import Plan
from tests.conftest import QUICK, Command, Ended, largest_file

OPTIMIZE = ("optimize", "model=stories", "budget.bits=4.5", *QUICK)


def refused(ended: Ended, *words: str) -> None:
    """Exit code 2; one paragraph on stderr that says `words`; no traceback."""
    assert ended.code == 2, ended
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("mezzotint: ")
    assert "Traceback" not in ended.err + ended.out
    for word in words:
        assert word in lines[0], f"{word!r} not in: {lines[0]}"


def results(folder: Path) -> list[str]:
    """Files that a command left, but Hydra's own log."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".log")
    return sorted(
        str(p.relative_to(folder)) for p in found if not {".hydra", "wandb"} & set(p.parts)
    )


# ---------------------------------------------------------------- what works


def test_optimize_writes_a_plan_with_its_proof(run_folder: Path) -> None:
    plan = Plan.load(run_folder)
    assert plan.effective_bits <= 4.5
    assert plan.certificate["verdict"] and plan.certificate["documents"] == 12
    assert plan.predicted["kl"] > 0 and plan.predicted["stderr"] > 0
    assert plan.budget == {"bits": 4.5}
    assert plan.provenance["seed"] == 0 and plan.provenance["versions"]["torch"]
    assert results(run_folder) == [
        "blur.html", "front.csv", "measured.csv", "plan.json", "report.html",
        "run.json",
    ]  # fmt: skip


def test_the_searched_plan_lies_between_its_neighbours_on_the_front(run_folder: Path) -> None:
    head, *rows = (run_folder / "measured.csv").read_text().splitlines()
    assert head == "name,id,bits_per_weight,predicted_kl,measured_kl"
    table = {row.split(",")[0]: row.split(",")[1:] for row in rows}
    assert {"int2_g64", "int8_g64", "random 3"} <= table.keys()
    own, predicted = float(table["plan"][1]), float(table["plan"][2])
    assert 4.3 < own <= 4.5
    front = [row.split(",") for row in (run_folder / "front.csv").read_text().splitlines()[1:]]
    bits, losses = [float(r[0]) for r in front], [float(r[2]) for r in front]
    assert bits == sorted(bits) and losses == sorted(losses, reverse=True)
    larger = max(loss for b, loss in zip(bits, losses, strict=True) if b >= own)
    smaller = min(loss for b, loss in zip(bits, losses, strict=True) if b <= own)
    assert larger * (1 - 1e-6) <= predicted <= smaller * (1 + 1e-6)


def test_apply_load_and_evaluate(
    mezzotint: Command, run_folder: Path, packed_folder: Path
) -> None:
    plan = Plan.load(run_folder)
    assert (packed_folder / "packed.safetensors").stat().st_size == plan.bytes["total"]
    net = optimizer.load(packed_folder)
    assert type(net).__name__ == "LlamaForCausalLM"
    found = mezzotint("evaluate", f"model={packed_folder}", *[q for q in QUICK if "data" in q])
    assert found.code == 0 and found.err == ""
    row = next(line for line in found.out.splitlines() if "mean KL" in line)
    own = plan.certificate["rows"][0]["kl"]["value"]
    assert float(row.split("│")[2]) == pytest.approx(own, abs=2e-4), "not the certificate's text"


def test_show(mezzotint: Command, run_folder: Path) -> None:
    found = mezzotint("show", run_folder / "plan.json")
    plan = Plan.load(run_folder)
    assert found.code == 0
    assert plan.id in found.out and str(plan.bytes["total"]) in found.out
    assert "self_attn.q_proj" in found.out
    verdict = " ".join(plan.certificate["verdict"].split())
    assert verdict[:40] in " ".join(found.out.split())


@pytest.mark.parametrize(
    "budget",
    [
        pytest.param("budget.bits=3.25", marks=pytest.mark.slow),
        pytest.param("budget.code_bits=3.5", marks=pytest.mark.slow),
        "budget.size=220kB",
    ],
)
def test_no_kind_of_budget_is_ever_exceeded(
    mezzotint: Command, tmp_path: Path, budget: str
) -> None:
    """The third is of the whole file, as it is written."""
    ended = mezzotint(
        "optimize", "model=stories", budget, *QUICK, "proof.certify=false", "hydra.run.dir=r"
    )
    assert ended.code == 0
    plan = Plan.load(tmp_path / "r")
    assert mezzotint("apply", "r/plan.json", "out=packed").code == 0
    size = (tmp_path / "packed" / "packed.safetensors").stat().st_size
    key, _, value = budget.removeprefix("budget.").partition("=")
    limit = float(value.removesuffix("kB"))
    spent = {"bits": plan.effective_bits, "code_bits": plan.code_bits, "size": size / 1000}
    assert 0.97 * limit < spent[key] <= limit


def test_a_new_budget_on_a_measured_model_needs_no_torch(store: Path, run_folder: Path) -> None:
    """What makes it take seconds."""
    arguments = [*OPTIMIZE[:2], "budget.bits=3.75", *QUICK, "proof.certify=false", f"store={store}",
                 f"hydra.run.dir={run_folder.parent / 'again'}"]  # fmt: skip
    code = (
        "import sys; from optimizer.cli.main import main\n"
        f"code = main({arguments!r})\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "False False 0"


def test_above_the_reference_the_plan_is_the_reference(mezzotint: Command, tmp_path: Path) -> None:
    found = mezzotint("optimize", "model=stories", "budget.bits=20", *QUICK, "hydra.run.dir=r")
    assert found.code == 0
    assert "above the largest plan" in found.out and "the reference itself" in found.out
    plan = Plan.load(tmp_path / "r")
    assert set(plan.layers.values()) == {"none"}
    assert plan.predicted["kl"] == 0


def test_sweeps(mezzotint: Command, tmp_path: Path) -> None:
    found = mezzotint(
        "optimize", "-m", "model=stories", "budget.bits=3,4", *QUICK, "proof.certify=false",
        "hydra.sweep.dir=sweep", "hydra.verbose=false",
    )  # fmt: skip
    assert found.code == 0
    plans = [Plan.load(path) for path in sorted((tmp_path / "sweep").rglob("plan.json"))]
    assert sorted(plan.budget["bits"] for plan in plans) == [3, 4]


def test_from_python(store: Path, source: Source, tmp_path: Path) -> None:
    from optimizer.config import Proof
    from optimizer.data.text import Data, Part

    short = Part(sequences=8, length=32)
    plan = optimizer.optimize(
        "stories",
        budget=optimizer.Budget(code_bits=4),
        out=tmp_path / "run",
        store=str(store),
        data=Data(calibration=short, search=short, heldout=short),
        proof=Proof(random=2),
    )
    assert plan == Plan.load(tmp_path / "run") and plan.code_bits <= 4
    optimizer.apply(plan, tmp_path / "packed", store=str(store))
    assert optimizer.load(tmp_path / "packed").generate(max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("command", ["optimize", "apply", "evaluate"])
def test_cfg_job_prints_every_key(mezzotint: Command, command: str) -> None:
    found = mezzotint(command, "--cfg", "job")
    assert found.code == 0 and "store:" in found.out and "???" in found.out


def test_help_and_version(mezzotint: Command) -> None:
    assert mezzotint("--help").code == 0
    assert "optimize model=smollm2" in mezzotint("--help").out
    assert mezzotint().code == 2
    assert mezzotint("--version").out.startswith("mezzotint ")


# ---------------------------------------------------------------- mistakes in the call

CALLS: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["optimise"], ["optimise", "optimize, show, apply"]),
    "budget below the smallest": (
        ["budget.bits=1"],
        ["smallest plan has 2.", "int2_g64", "Set budget.bits="],
    ),
    "size below the smallest": (
        ["budget.bits=null", "budget.size=10kB"],
        ["10kB", "Set budget.size="],
    ),
    "two budgets": (["budget.code_bits=3"], ["Exactly one of", "budget.code_bits=3"]),
    "a word for a number": (["budget.bits=many"], ["many", "budget.bits"]),
    "no size": (["budget.bits=null", "budget.size=big"], ["'big'", "budget.size=80MiB"]),
    "unknown key": (["colour=red"], ["colour", "--cfg job"]),
    "unknown inner key": (["palette.colours=3"], ["colours", "--cfg job"]),
    "unknown choice": (["palette=rainbow"], ["palette=rainbow", "two_colours"]),
    "broken override": (["budget.bits="], ["--cfg job"]),
    "unparsable override": (["palette.bits=[2,"], ["--cfg job"]),
    "scope of nothing": (["scope=[nothing*]"], ["'nothing*'", "model.embed_tokens.weight"]),
    "group divides no row": (
        ["palette.group_size=48", "palette.fit=strict"],
        ["48", "divisor", "palette.fit=nearest"],
    ),
    "bits": (["palette.bits=[2,11]"], ["11 bits", "palette.bits"]),
    "estimator": (["sensitivity.estimator=magic"], ["fisher", "'magic'"]),
    "chunks": (["sensitivity.chunks=99"], ["sensitivity.chunks=99"]),
    "measured at": (
        ["sensitivity.measured.groups=[*q_proj]", "sensitivity.measured.at=int7"],
        ["int4_g64", "'int7'"],
    ),
    "measured groups": (["sensitivity.measured.groups=[zzz]"], ["zzz"]),
    "experts": (["runtime.experts=some"], ["tensor, block or model", "'some'"]),
    "quantizer": (["quantizer.name=magic"], ["rtn", "'magic'"]),
    "windows too long": (["data.heldout.length=4000"], ["256 tokens", "data.heldout.length"]),
    "no such model": (["model=./nowhere"], ["./nowhere", "smollm2, minilm, stories"]),
    "no such hub model": (["model=no/where"], ["no/where", "network"]),
    "no path": (["data=text"], ["data.path"]),
    "no such text": (["data=text", "data.path=no.txt"], ["no.txt"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_mistake_in_the_call(mezzotint: Command, tmp_path: Path, case: str) -> None:
    arguments, words = CALLS[case]
    if case != "unknown command":
        arguments = [*OPTIMIZE, "hydra.run.dir=r", *arguments]
    refused(mezzotint(*arguments), *words)
    assert results(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["optimize"], ["budget", "model"]),
        (["apply"], ["plan", "out"]),
        (["apply", "plan.json"], ["needs out"]),
        (["apply", "none.json", "out=o"], ["No plan at none.json"]),
        (["evaluate"], ["needs model"]),
        (["evaluate", "model=nowhere"], ["no model that Mezzotint wrote"]),
        (["show"], ["Give one plan"]),
        (["show", "a", "b"], ["Give one plan"]),
        (["show", "none.json"], ["No plan at none.json"]),
    ],
)
def test_a_command_without_what_it_needs(
    mezzotint: Command, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    refused(mezzotint(*arguments), words[0] if arguments != ["optimize"] else "model")
    assert results(tmp_path) == []


# ---------------------------------------------------------------- mistakes in the files


def texts(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.txt", b"", "holds no text"),
        ("t.txt", b"Mia had a ball .\n", "data.calibration"),
        ("t.txt", b"\xff\xfe\x00", "UTF-8"),
        ("t.jsonl", b'{"text": "a"}\nnot json\n', "line 2"),
        ("t.jsonl", b'{"body": "a"}\n', "data.column"),
    ],
)
def test_a_text_that_will_not_do(
    mezzotint: Command, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = texts(tmp_path / name, content)
    refused(mezzotint(*OPTIMIZE, "hydra.run.dir=r", "data=text", f"data.path={path}"), words)
    assert results(tmp_path) == [name]


@pytest.fixture
def model_copy(source: Source, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source.folder, tmp_path / "model"))


def nan_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "abacus"}))


MODELS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "NaN": (nan_weight, ["model.layers.2.mlp.down_proj.weight", "NaN"]),
    "no config": (no_config, ["lacks a config", "save_pretrained"]),
    "no weights": (no_weights, ["lacks weights"]),
    "cut": (cut_weights, ["no whole safetensors file"]),
    "architecture": (unknown_architecture, ["isn't a causal language model", "abacus"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_folder_that_is_no_good_model(
    mezzotint: Command, model_copy: Path, tmp_path: Path, case: str
) -> None:
    damage, words = MODELS[case]
    damage(model_copy)
    refused(mezzotint(*OPTIMIZE, "model=model", "hydra.run.dir=r"), *words)
    assert not (tmp_path / "r" / "plan.json").exists()


def test_a_packed_model_is_no_reference(mezzotint: Command, packed_folder: Path) -> None:
    refused(mezzotint(*OPTIMIZE, f"model={packed_folder}"), "mezzotint evaluate")


def test_a_plan_for_another_model(
    mezzotint: Command, run_folder: Path, model_copy: Path, tmp_path: Path
) -> None:
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    plan = run_folder / "plan.json"
    refused(mezzotint("apply", plan, "out=o", "model=model"), "A plan fits one model only")
    assert not (tmp_path / "o").exists()


def test_a_copy_of_the_same_model_is_welcome(
    mezzotint: Command, run_folder: Path, model_copy: Path
) -> None:
    assert mezzotint("apply", run_folder / "plan.json", "out=o", "model=model").code == 0


def changed(data: dict[str, Any]) -> str:
    name = next(iter(data["layers"]))
    data["layers"][name] = "int2_g64"
    return json.dumps(data)


def renamed(data: dict[str, Any]) -> str:
    del data["checksum"]
    name = next(iter(data["layers"]))
    data["layers"] = {("x." + k if k == name else k): v for k, v in data["layers"].items()}
    del data["shapes"]
    return json.dumps(data)


def half(data: dict[str, Any]) -> str:
    return json.dumps(data)[:900]


PLANS: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "truncated": (half, "one whole JSON file"),
    "tampered": (changed, "changed after it was written"),
    "another layer": (renamed, "which the model doesn't have"),
    "empty": (lambda _: "", "one whole JSON file"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_will_not_do(
    mezzotint: Command, run_folder: Path, tmp_path: Path, case: str
) -> None:
    change, words = PLANS[case]
    data = json.loads((run_folder / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(change(data))
    refused(mezzotint("apply", "plan.json", "out=o"), words)
    assert not (tmp_path / "o").exists()


def test_a_tampered_packed_file(mezzotint: Command, packed_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(packed_folder, tmp_path / "copy"))
    file = copy / "packed.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    refused(mezzotint("evaluate", "model=copy"), "packed.safetensors was changed, cut off")
    file.write_bytes(content[:-100])
    refused(mezzotint("evaluate", "model=copy"), "packed.safetensors was changed, cut off")


def test_a_target_in_use(mezzotint: Command, run_folder: Path, packed_folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in packed_folder.iterdir()}
    refused(mezzotint("apply", run_folder / "plan.json", f"out={packed_folder}"), "overwrite=true")
    assert {p.name: p.read_bytes() for p in packed_folder.iterdir()} == before


# ---------------------------------------------------------------- the disk


def test_an_output_folder_that_cannot_be_made(
    mezzotint: Command, run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(mezzotint(*OPTIMIZE, "hydra.run.dir=file/run"), "file/run")
    refused(mezzotint("apply", run_folder / "plan.json", "out=file/o"), "file")
    refused(mezzotint("apply", run_folder / "plan.json", "out=file"), "must be new or empty")
    assert results(tmp_path) == ["file"]


def test_a_store_that_cannot_be_made(mezzotint: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refused(mezzotint(*OPTIMIZE, "store=file/store", "hydra.run.dir=r"), "couldn't be written")
    assert results(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder(mezzotint: Command, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    refused(mezzotint("apply", run_folder / "plan.json", "out=closed/o"), "closed")
    refused(mezzotint(*OPTIMIZE, "hydra.run.dir=closed/r"), "closed")


@pytest.mark.parametrize("size", [600, 4000])
def test_a_disk_that_is_full_while_measuring(
    mezzotint: Command, source: Source, tmp_path: Path, size: int
) -> None:
    """First Hydra's own files don't fit, then the sampled text."""
    with largest_file(size):
        ended = mezzotint(*OPTIMIZE, f"model={source.folder}", "store=small", "hydra.run.dir=r")
    refused(ended, "couldn't be written", "half-written", "run the same command")
    kept = ("small/hashes", "small/inventories")
    assert [p for p in results(tmp_path) if not p.startswith(kept)] == []


def test_a_disk_that_is_full_while_packing(
    mezzotint: Command, run_folder: Path, tmp_path: Path
) -> None:
    with largest_file(30_000):
        ended = mezzotint("apply", run_folder / "plan.json", "out=o")
    refused(ended, "couldn't be written")
    assert results(tmp_path) == [] and not list(tmp_path.glob(".packing*"))


def test_a_failed_run_keeps_the_plan_of_the_last_one(
    mezzotint: Command, run_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_folder, tmp_path / "r")
    before = (tmp_path / "r" / "plan.json").read_bytes()
    (tmp_path / "t.txt").write_text("too short")
    refused(mezzotint(*OPTIMIZE, "hydra.run.dir=r", "data=text", "data.path=t.txt"), "data.")
    assert (tmp_path / "r" / "plan.json").read_bytes() == before


# ---------------------------------------------------------------- from outside


def run(arguments: Iterable[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "optimizer", *arguments], capture_output=True, text=True,
        check=False, timeout=120, **more,
    )  # fmt: skip


def test_exit_codes_reach_the_shell(tmp_path: Path) -> None:
    wrong = run(["show", "no.json"], cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("mezzotint: No plan at no.json")
    assert run(["--help"], cwd=tmp_path).returncode == 0


def test_a_closed_pipe_is_no_error(run_folder: Path) -> None:
    pipe = '"$0" -m optimizer show "$1" | head -1'
    done = subprocess.run(
        ["sh", "-c", pipe, sys.executable, str(run_folder / "plan.json")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == "" and done.stdout.startswith("Plan ")
