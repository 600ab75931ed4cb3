"""Every file of conf/ composes, means what its dataclass says, and wrong values are explained."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from optimizer import config
from optimizer.cli import compose as composing
from optimizer.commands import effort
from optimizer.config import Apply, Evaluate, Optimize, conf_folder
from optimizer.data.text import Data, Part
from optimizer.errors import ConfigError
from optimizer.formats.runtime import Runtime
from optimizer.plan import Budget, Palette, Precision
from optimizer.quantization.methods import Gptq
from optimizer.sensitivity import Measured
from optimizer.sensitivity.estimators import Fisher
from tests.conftest import Command

CONF = conf_folder().resolve()
COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))
NEEDED = {
    "optimize": ["model=stories", "budget.bits=4.5"],
    "apply": ["plan=plan.json", "out=packed"],
    "evaluate": ["model=packed"],
    "check": ["plan=plan.json", "to=vllm"],
    "export": ["plan=plan.json", "to=vllm", "out=exported"],
    "fit": ["plan=run"],
    "advise": ["model=stories"],
    "probe": ["plan=plan.json"],
    "blur": ["plan=plan.json", "text=text.txt"],
    "generate": ["model=packed", "prompt=once"],
    "judge": ["models=[one.json,reference]"],
    "overlay": ["model=packed"],
    "learn": ["files=[votes.jsonl]"],
}


def composed(command: str, *overrides: str, needed: bool = True) -> Any:
    composing.register(command)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = NEEDED[command] if needed else []
        return composing.build(command, compose(command, [*given, *overrides]))


def test_every_command_has_a_file_and_a_schema() -> None:
    assert set(COMMANDS) == set(NEEDED) == set(composing.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose_to_their_dataclass(command: str) -> None:
    assert type(composed(command)) is composing.COMMANDS[command]


def test_a_group_without_a_file_would_be_noticed() -> None:
    groups = {group for group, _ in CHOICES}
    assert groups == {
        "budget", "data", "meaning", "palette", "policy", "quantizer", "runtime", "search",
        "sensitivity", "wandb",
    }  # fmt: skip
    assert groups <= {f.name for f in fields(Optimize)}


def test_the_files_and_the_dataclasses_have_the_same_defaults() -> None:
    """From Python and from the command line, saying nothing means the same."""
    found = composed("optimize")
    plain = Optimize(model="stories", budget=Budget(bits=4.5))
    for item in fields(Optimize):
        if item.name != "store":
            assert getattr(found, item.name) == getattr(plain, item.name), item.name
    assert composed("evaluate").data == Evaluate(model="x").data
    assert composed("apply").overwrite is Apply(plan="p", out="o").overwrite is False


def test_the_defaults_pass_their_own_check() -> None:
    composed("optimize").check()


def test_the_store_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_STORE", "/elsewhere")
    assert composed("optimize").store == "/elsewhere"
    monkeypatch.delenv("MEZZOTINT_STORE")
    assert composed("optimize").store == "~/.cache/mezzotint"


def test_overrides_arrive_with_their_types() -> None:
    found = composed(
        "optimize", "palette.bits=[3,ternary]", "scope=head", "data.calibration.length=32",
        "sensitivity.measured.groups=[a,b]", "palette.group_size=[32,64]",
    )  # fmt: skip
    assert found.palette.bits == [3, "ternary"] and found.palette.group_size == [32, 64]
    assert found.scopes == ["head"]
    assert found.data.calibration == Part(sequences=64, length=32)
    assert found.sensitivity.measured == Measured(groups=["a", "b"])


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_missing_is_named(command: str) -> None:
    with pytest.raises(ConfigError, match=f"`mezzotint {command}` needs"):
        composed(command, needed=False)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["apply", "plan.json", "memory=5GB"], "memory"),
        (["optimize", "data.serch=3"], "data.serch"),
    ],
)
def test_a_setting_that_does_not_exist_is_named_and_nothing_else(
    mezzotint: Command, words: list[str], key: str
) -> None:
    found = mezzotint(*words)
    assert found.code == 2
    assert f"`mezzotint {words[0]}` has no setting {key}." in found.err
    assert "quote" not in found.err


def test_a_users_own_folder(mezzotint: Command, tmp_path: Path) -> None:
    """--config-dir adds a palette of the user's own."""
    (tmp_path / "mine" / "palette").mkdir(parents=True)
    (tmp_path / "mine" / "palette" / "tight.yaml").write_text("bits: [2, 5]\ngroup_size: 32\n")
    found = mezzotint(
        "optimize", "--config-dir", tmp_path / "mine", "palette=tight", "model=stories", "--cfg",
        "job",
    )  # fmt: skip
    assert found.code == 0
    assert OmegaConf.create(found.out).palette.bits == [2, 5]
    assert OmegaConf.create(found.out).palette.symmetric is False


# ---------------------------------------------------------------- palettes


def test_a_palette_is_sorted_and_without_repetition() -> None:
    found = Palette(bits=[8, 3, 16, "ternary", 3], group_size=[64, 32]).precisions()
    assert [p.name for p in found] == [
        "ternary_g32", "ternary_g64", "int3_g32", "int3_g64", "int8_g32", "int8_g64", "none",
    ]  # fmt: skip


def test_zero_means_one_scale_per_channel() -> None:
    assert Palette(bits=[4], group_size=0).precisions() == [Precision("int", 4)]
    assert Palette(bits=[4], group_size=0, symmetric=True).precisions()[0].symmetric


def test_one_bit_and_ternary_are_always_symmetric() -> None:
    assert all(p.symmetric for p in Palette(bits=[1, "ternary"], symmetric=False).precisions())


BAD: list[tuple[Any, str]] = [
    (Palette(bits=[9]), "palette.bits"),
    (Palette(bits=[0]), "palette.bits"),
    (Palette(bits=[4.5]), "not 4.5"),
    (Palette(bits=["four"]), "not 'four'"),
    (Palette(bits=[True]), "not True"),
    (Palette(bits=[]), "at least one entry"),
    (Palette(group_size=[]), "at least one entry"),
    (Palette(group_size=-1), "not -1"),
    (Palette(group_size="64"), "not '64'"),
    (Palette(group_size=[64, 1.5]), "not 1.5"),
    (Palette(fit="loose"), "untouched, nearest, strict"),
]


@pytest.mark.parametrize(("palette", "words"), BAD)
def test_a_wrong_palette_is_explained(palette: Palette, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        palette.precisions()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": Budget(bits=4, size="1MB")}, "Exactly one of"),
        ({"sensitivity": Fisher(chunks=1)}, "chunks"),
        ({"data": Data(source="x")}, "data.source"),
        ({"quantizer": Gptq(order="x")}, "quantizer.order"),
        ({"proof": config.Proof(random=-1)}, "proof.random"),
        ({"scope": []}, "scope is"),
        ({"scope": [3]}, "scope is"),
        ({"palette": Palette(bits=[99])}, "palette.bits"),
        (
            {
                "quantizer": Gptq(),
                "data": Data(search=Part(sequences=1, length=8)),
            },
            "at least two search windows",
        ),
        ({"seed": -1}, "^seed is"),
        ({"seed": 2**32}, "^seed is"),
        ({"data": Data(seed=-1)}, "data.seed is"),
    ],
)
def test_everything_is_checked_before_anything_is_loaded(
    changes: dict[str, Any], words: str
) -> None:
    found = Optimize(**{"model": "no-such-model", "budget": Budget(bits=4), **changes})
    with pytest.raises(ConfigError, match=words):
        found.check()


@pytest.mark.parametrize(
    ("words", "encoder", "meant"),
    [
        ([], False, ("gptq", "gain", "exact")),
        ([], True, ("rtn", "fisher", "exact")),
        (["effort=quick"], False, ("rtn", "fisher", "exact")),
        (["effort=thorough"], False, ("gptq", "gain", "moves")),
        (["effort=thorough"], True, ("rtn", "fisher", "moves")),
        (["quantizer=awq"], False, ("awq", "tokenwise", "exact")),
        (["quantizer=rtn", "effort=thorough", "search=exact"], False, ("rtn", "fisher", "exact")),
        (["quantizer=gptq", "sensitivity=fisher"], False, ("gptq", "fisher", "exact")),
    ],
)
def test_what_an_effort_means(words: list[str], encoder: bool, meant: tuple[str, ...]) -> None:
    asked = composed("optimize", *words)
    asked.check()
    found, said = effort.settle(asked, encoder, lambda: None)
    assert (found.quantizer.name, found.sensitivity.estimator, found.search.space) == meant
    assert not said
    found.check()


def test_a_model_that_gptq_cannot_round_is_rounded_to_nearest_and_says_so() -> None:
    found, said = effort.settle(composed("optimize"), False, lambda: "its blocks are no chain.")
    assert (found.quantizer.name, found.sensitivity.estimator) == ("rtn", "fisher")
    assert said == [
        "Rounded to nearest, because gptq can't be used here: its blocks are no chain."
    ]


def test_a_quick_run_reads_fewer_windows_unless_a_number_was_chosen() -> None:
    def read(*words: str) -> int:
        return effort.reading(composed("optimize", *words)).data.calibration.sequences

    assert read("effort=quick") < read() == read("effort=thorough") == 64
    assert read("effort=quick", "data.calibration.sequences=50") == 50
    composed("optimize", "effort=quick", "sensitivity.chunks=12").check()
    assert read("effort=quick", "sensitivity.chunks=12") == 12


def test_a_diagonal_reads_some_of_the_windows_unless_somebody_said_how_many() -> None:
    def read(*words: str) -> int | None:
        found, _ = effort.settle(composed("optimize", *words), False, lambda: None)
        return found.sensitivity.windows

    assert read() == read("effort=thorough") == read("quantizer=rtn") == 16
    assert read("sensitivity.windows=40") == 40
    assert read("sensitivity.chunks=20") == 20
    assert read("quantizer=awq") is None and read("sensitivity=gain") is None
    with pytest.raises(ConfigError, match=r"chunks=8 with sensitivity\.windows=6"):
        composed("optimize", "sensitivity.windows=6").check()
    composed("optimize", "sensitivity.windows=99", "data.calibration.sequences=8").check()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["sensitivity=gain", "quantizer=rtn"], "sensitivity=gain foretells")],
)
def test_a_foretold_table_needs_gptq(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        composed("optimize", *words).check()
    with pytest.raises(ConfigError, match="effort is one of quick, standard, thorough"):
        effort.check(composed("optimize", "effort=lazy"))


def test_runtimes_fuse_what_their_engines_fuse() -> None:
    assert composed("optimize", "runtime=vllm").runtime.experts == "block"
    assert ["q_proj", "k_proj", "v_proj"] in composed("optimize", "runtime=vllm").runtime.fused
    assert composed("optimize", "runtime=torch").runtime == Runtime()
