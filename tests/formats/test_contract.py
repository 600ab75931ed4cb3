"""What every format promises: what the search may offer, its check accepts and its reader returns. One
that is registered is in these tests by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizer.config import profile
from optimizer.errors import ConfigError
from optimizer.formats import registry
from optimizer.formats.format import Format, Recipe, Subject, format_of, formats
from optimizer.formats.rules import Verdict
from optimizer.formats.torch.packed import pack
from optimizer.models.source import locate
from optimizer.plan import Plan, Precision, assemble
from optimizer.quantization.uniform import Codes
from optimizer.stages.space import SearchSpace, search_space
from optimizer.store import Store
from tests.cli.test_compose import CHOICES, composed
from tests.formats.conftest import Wide
from tests.formats.test_offers import drawn


@dataclass
class Case:
    """A format, a model, and a plan of those that a search may make."""

    engine: str
    wide: Wide

    @property
    def format(self) -> Format:
        return format_of(self.engine)

    @cached_property
    def subject(self) -> Subject:
        kept = Store(Path(self.wide.store))
        source = locate(str(self.wide.folder), kept)
        base = registry.base_of(profile(self.engine), source, self.wide.inventory, kept, None)
        return Subject(self.wide.inventory, self.wide.folder, base)

    @cached_property
    def found(self) -> SearchSpace:
        """With the runtime's own palette, or for those that run floats alone with such a one."""
        own = [f"runtime={self.engine}"] if ("runtime", self.engine) in CHOICES else []
        for more in ([], ["palette=hopper"]):
            config = replace(composed("optimize", *own, *more), runtime=profile(self.engine))
            try:
                inventory, folder = self.wide.inventory, self.wide.folder
                return search_space(config, inventory, folder, self.subject.base)
            except ConfigError:
                continue
        raise AssertionError(f"{self.engine} takes nothing of any palette")

    @cached_property
    def plan(self) -> Plan:
        """The first random one that a recipe can say as a whole."""
        rng = np.random.default_rng(3)
        drawings = (drawn(self.found, rng, self.wide, self.wide.fingerprint) for _ in range(99))
        plans = (replace(plan, runtime=self.engine) for plan in drawings)
        if isinstance(self.format, Recipe):
            return next(plan for plan in plans if not self.check(plan).errors)
        return next(plans)

    def with_layer(self, name: str, precision: Precision) -> Plan:
        own = self.wide.inventory
        scope = [x for x in own.layers if x.name in {*self.plan.scope, name}]
        choice = {x.name: self.plan.choice[x.name] for x in scope} | {name: precision}
        about = {"name": str(self.wide.folder), "fingerprint": self.wide.fingerprint}
        return assemble(
            own, scope, choice, model=about, runtime=self.engine, quantizer={"name": "rtn"},
            predicted={"kl": 0.1, "stderr": 0.01},
        )  # fmt: skip

    def check(self, plan: Plan) -> Verdict:
        return self.format.checker(profile(self.engine), self.subject)(plan)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        return pack(self.plan, self.wide.model, lambda items, _text: items)

    def written(self, out: Path) -> Path:
        out.mkdir()
        self.format.write(self.plan, self.subject, self.tensors, out)
        return out


@pytest.fixture(scope="module", params=sorted(formats()))
def case(request: pytest.FixtureRequest, wide: Wide) -> Case:
    return Case(request.param, wide)


def test_what_may_be_offered_is_accepted_and_read_back(case: Case, tmp_path: Path) -> None:
    made, verdict = case.format, case.check(case.plan)
    assert not verdict.errors and verdict.engine == case.engine
    out = case.written(tmp_path / "out")
    if isinstance(made, Recipe):
        assert list(out.iterdir())
        return
    assert (out / made.file).stat().st_size == verdict.bytes
    read = made.read_back(out, case.plan, case.subject)
    for layer in case.wide.inventory.layers:
        precision = case.plan.choice[layer.name]
        names = precision.parts(layer.rows, layer.cols)
        if names:
            parts = {name: case.tensors[f"{layer.name}.{name}"] for name in names}
            own = Codes.unpack(parts, precision, layer.cols).decode()
            there = ~read[layer.name].isnan().all(1)  # a GGUF leaves out words
            off = (read[layer.name] - own)[there].abs().max()
            assert off <= made.allowed * own.abs().max(), layer.name
            assert made.allowed or torch.equal(read[layer.name], own)


def test_the_same_plan_gives_the_same_files(case: Case, tmp_path: Path) -> None:
    folders = [case.written(tmp_path / name) for name in ("one", "two")]
    one, two = ({f.name: f.read_bytes() for f in sorted(out.iterdir())} for out in folders)
    assert one == two


MANY = [
    Precision("int", 4, 512),
    Precision("int", 1, 32, True),
    Precision("ternary", 2, 64, True),
    Precision.floating("fp8"),
    Precision.floating("nvfp4"),
    Precision.ggml("q4_k"),
]


def test_what_it_does_not_hold_is_refused(case: Case) -> None:
    if case.engine == "torch":  # holds everything
        return
    layers = [x for x in case.wide.inventory.layers if x.block == 0 or x.kind == "embedding"]
    refused = 0
    for layer in layers:
        for precision in (p for p in MANY if p.fits(layer.cols)):
            runs = profile(case.engine).runs(precision)
            if not runs or case.format.holds(layer, precision) is not None:
                assert case.check(case.with_layer(layer.name, precision)).errors, precision.name
                refused += 1
    assert refused
