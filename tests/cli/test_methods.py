"""One truth about a method: what conf/ says and what Python says are the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
from omegaconf import OmegaConf

from optimizer.cli import compose as composing
from optimizer.config import Optimize, Wandb
from optimizer.data.text import Data, Part
from optimizer.errors import ConfigError
from optimizer.formats.runtime import Runtime
from optimizer.metrics.objective import Meaning
from optimizer.plan import Budget, Palette, Policy
from optimizer.quantization.methods import (
    Auto,
    Awq,
    Gptq,
    Importance,
    Quantizer,
    Rtn,
    method,
    methods,
    of_plan,
)
from optimizer.search import Search
from optimizer.sensitivity import (
    Directional,
    Fisher,
    Hessian,
    Kronecker,
    Measured,
    Tokenwise,
    estimator,
    estimators,
)
from optimizer.sensitivity.estimators import AutoEstimator, Gain
from tests.cli.test_compose import CHOICES, COMMANDS, CONF, NEEDED, composed
from tests.conftest import slow_beside

TWINS: dict[tuple[str, str], Any] = {
    ("quantizer", "auto"): Auto(),
    ("quantizer", "rtn"): Rtn(),
    ("quantizer", "gptq"): Gptq(),
    ("quantizer", "awq"): Awq(),
    ("quantizer", "importance"): Importance(),
    ("sensitivity", "auto"): AutoEstimator(),
    ("sensitivity", "gain"): Gain(),
    ("sensitivity", "fisher"): Fisher(),
    ("sensitivity", "directional"): Directional(),
    ("sensitivity", "tokenwise"): Tokenwise(),
    ("sensitivity", "hessian"): Hessian(),
    ("sensitivity", "kronecker"): Kronecker(),
    ("palette", "default"): Palette(),
    ("policy", "free"): Policy(),
    ("runtime", "torch"): Runtime(),
    ("meaning", "mean"): Meaning(),
    ("search", "moves"): Search(),
    ("search", "exact"): Search(space="exact"),
}


TYPES: dict[str, Any] = {
    "budget": Budget,
    "data": Data,
    "meaning": Meaning,
    "palette": Palette,
    "policy": Policy,
    "runtime": Runtime,
    "search": Search,
    "wandb": Wandb,
}
PARTS = {"calibration": Part, "search": Part, "heldout": Part, "measured": Measured}


def twin(group: str, choice: str) -> Any:
    """In Python, with the values that the file names."""
    whole: Any = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{choice}.yaml"))
    values = {k: v for k, v in whole.get(group, whole).items() if k != "defaults"}
    named = {"quantizer": method, "sensitivity": estimator}
    if group in named:
        made = named[group](choice)
        values = {k: v for k, v in values.items() if k not in ("name", "estimator")}
    else:
        made = TYPES[group]
    parts = {k: PARTS[k](**v) if k in PARTS else v for k, v in values.items() if v != "???"}
    return made(**parts)


GROUPS = {group: [c for g, c in CHOICES if g == group] for group, _ in CHOICES}
# Choices of all groups at once, each of them at least once: composing takes a quarter of a second.
# What is left at the end are machines, which are all read by the same rule.
SETS = [
    {group: choices[min(i, len(choices) - 1)] for group, choices in GROUPS.items()}
    for i in range(max(map(len, GROUPS.values())))
]
FEW = sorted(map(len, GROUPS.values()))[-2]


@pytest.mark.parametrize("number", slow_beside(range(FEW), range(len(SETS))))
def test_every_file_means_what_its_dataclass_says(number: int) -> None:
    """Whole: what the file leaves out is the dataclass's default. From Python and from the command
    line, a method's name means the same."""
    chosen = SETS[number]
    words = ["data.path=text"] if chosen["data"] in ("text", "hub") else []
    found = composed("optimize", *(f"{k}={v}" for k, v in chosen.items()), *words)
    for group, choice in chosen.items():
        own = twin(group, choice)
        own = replace(own, bits=4.5) if group == "budget" else own
        own = replace(own, path="text") if group == "data" and words else own
        made = getattr(found, group)
        assert type(made) is type(own) and made == own, (group, choice)
        assert made == TWINS.get((group, choice), own), (group, choice)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "optimize"])
def test_every_command_means_what_its_dataclass_says(command: str) -> None:
    given: Any = OmegaConf.to_container(OmegaConf.from_dotlist(NEEDED[command]))
    found = composed(command)
    for key, value in asdict(composing.COMMANDS[command](**given)).items():
        assert key == "store" or asdict(found)[key] == value, key


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_quantizer_and_estimator_has_a_twin(group: str, choice: str) -> None:
    if group in ("quantizer", "sensitivity"):
        assert (group, choice) in TWINS


@pytest.mark.parametrize("made", [Rtn(), Gptq(), Awq()])
def test_a_quantizer_brings_the_sensitivity_that_suits_it(made: Quantizer) -> None:
    found = composed("optimize", f"quantizer={made.name}")
    plain = Optimize(model="stories", budget=Budget(bits=4.5), quantizer=made)
    assert found.quantizer == plain.quantizer and found.sensitivity == plain.sensitivity


def test_every_registered_method_has_a_file_of_its_own() -> None:
    assert set(methods()) == {choice for group, choice in CHOICES if group == "quantizer"}
    assert set(estimators()) == {choice for group, choice in CHOICES if group == "sensitivity"}


@pytest.mark.parametrize("made", [Rtn(clip=True), Gptq(order="groups"), Awq()])
def test_a_plan_names_a_method_and_its_values(made: Quantizer) -> None:
    assert of_plan(made.described("tokens")) == made


def test_plans_from_before_there_was_a_choice_mean_what_they_did() -> None:
    old = {"name": "gptq", "damping": 0.01, "order": "groups", "clip": False, "inputs": "rounded"}
    assert of_plan(old | {"tokens": "t"}) == Gptq(
        damping=0.01, order="groups", inputs="rounded", weighting="alike", head=False
    )


def test_a_field_that_is_added_changes_the_key() -> None:
    @dataclass(kw_only=True)
    class One(Quantizer):
        name: str = field(default="one", init=False)

    plain = One()

    @dataclass(kw_only=True)
    class Two(Quantizer):
        name: str = field(default="one", init=False)
        strength: float = 0.5

    Two.__name__ = "One"
    assert plain.key(None) != Two().key(None)
    assert Two().key(None) != Two(strength=0.6).key(None)
    before = plain.key(None)
    One.VERSION = 2
    assert plain.key(None) != before


@pytest.mark.parametrize("made", [Fisher(), Hessian()])
def test_an_estimators_key_has_its_settings_and_not_what_is_measured_beside(made: Any) -> None:
    other = type(made)(chunks=made.chunks + 1)
    assert other.key != made.key
    assert type(made)(measured=Measured(groups=["*"])).key == made.key
    assert len({str(e().key) for e in estimators().values()}) == len(estimators())


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="rtn, gptq, awq, importance, not 'best'"):
        method("best")


def test_a_value_of_another_type_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"quantizer\.damping"):
        composed("optimize", "quantizer=gptq", "quantizer.damping=much")
    with pytest.raises(ConfigError, match="probes"):
        composed("optimize", "sensitivity=hessian", "sensitivity.probes=many")


def test_settings_are_written_with_their_names() -> None:
    assert asdict(Gptq())["name"] == "gptq" and asdict(Tokenwise())["estimator"] == "tokenwise"
