"""Planes of further bits: prefix codes beside rounding to nearest, GPTQ's own beside GPTQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from optimizer.plan import Precision
from optimizer.quantization import residual
from optimizer.quantization.gptq import Solver
from optimizer.quantization.methods import Gptq, Rtn, bind
from optimizer.quantization.residual import NEAR, PlaneCodes, Refining, Stacked, nearest, solved
from optimizer.quantization.uniform import Nearest
from optimizer.store import Store
from tests.quantization.test_calibrated import Made, everything, kl, logits, small

torch.manual_seed(0)
WEIGHT = torch.randn(24, 128)
BASE = Precision("int", 4, 32)


def plane(bits: int) -> Precision:
    return Precision("int", bits, None, True)


@pytest.mark.parametrize("bits", range(1, 7))
def test_a_bit_more_leaves_about_a_quarter_of_the_squared_error(bits: int) -> None:
    base = Nearest().codes(WEIGHT, BASE)
    rest = WEIGHT - base.decode()
    left = rest - nearest(rest, base.scales, plane(bits), NEAR).decode(base.scales)
    ratio = float(left.square().sum() / rest.square().sum())
    assert ratio == pytest.approx(4.0**-bits, rel=0.1), "a bit is spent twice"


def test_packed_planes_come_back() -> None:
    base = Nearest().codes(WEIGHT, BASE)
    made = nearest(WEIGHT - base.decode(), base.scales, plane(3), NEAR)
    parts = made.pack()
    stored = {k: v.numel() * v.element_size() for k, v in parts.items()}
    assert sum(stored.values()) == plane(3).bytes(*WEIGHT.shape)
    again = PlaneCodes.unpack(parts, plane(3), WEIGHT.shape[1])
    assert torch.equal(again.decode(base.scales), made.decode(base.scales))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gptq_refines_its_own_base_better_than_rounding_to_nearest(bits: int) -> None:
    mixed = torch.randn(128, 128) * torch.logspace(0, -2, 128)
    hessian = mixed.T @ mixed @ torch.eye(128) + 1e-3 * torch.eye(128)
    method = Solver(order="columns")
    base = method.solve([(WEIGHT, BASE)], hessian)[0]
    rest = WEIGHT - base.decode()

    def loss(error: torch.Tensor) -> float:
        return float(((error @ hessian) * error).sum())

    by_gptq = loss(
        rest - solved(rest, base.scales, plane(bits), hessian, method).decode(base.scales)
    )
    rounded = loss(rest - nearest(rest, base.scales, plane(bits), NEAR).decode(base.scales))
    assert by_gptq < 0.8 * rounded and by_gptq < loss(rest)


def test_a_plane_by_hand() -> None:
    """Two bits below steps of 1 and 4: levels at -3/8, -1/8, 1/8 and 3/8 of a step."""
    steps = torch.tensor([[1.0, 4.0]], dtype=torch.float16)
    rest = torch.tensor([[0.2, -0.3, 0.4, -0.9, 2.5, -2.5]])
    made = nearest(rest, steps, plane(2), [1.0])
    assert made.scales.tolist() == [[0.25]] and made.scales.dtype == torch.float16
    assert made.codes.tolist() == [[2, 0, 3, 1, 3, 0]]
    assert made.decode(steps).tolist() == [[0.125, -0.375, 0.375, -0.5, 1.5, -1.5]]
    one = nearest(rest, steps, plane(1), [1.0])
    assert one.decode(steps).tolist() == [[0.25, -0.25, 0.25, -1.0, 1.0, -1.0]]


def test_each_row_gets_the_factor_that_loses_least() -> None:
    """A row inside of half a step, and one beyond; of equal factors the first stays."""
    steps = torch.ones(3, 1)
    rest = torch.stack([torch.linspace(-0.5, 0.5, 33), torch.linspace(-1, 1, 33), torch.zeros(33)])
    made = nearest(rest, steps, plane(3), [1.0, 2.0, 1.0])
    assert made.scales.flatten().tolist() == [0.125, 0.25, 0.125]
    each = [nearest(rest, steps, plane(3), [f]) for f in (1.0, 2.0)]
    assert torch.equal(made.codes[:2], torch.stack([each[0].codes[0], each[1].codes[1]]))


def test_factors_beside_gptq_grow_with_the_bits() -> None:
    assert residual._wide(1) == pytest.approx((0.847, 1.1, 1.43))
    assert residual._wide(4) == pytest.approx((1.771, 2.3, 2.99))


# ---------------------------------------------------------------- whole models


UP, HEAD = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"


def refining(material: Any, method: Any, planes: dict[str, Precision]) -> Refining:
    return Refining(bind(method, material), planes, method, material)


@pytest.fixture
def material(tmp_path: Path) -> Made:
    return Made(small("llama", tmp_path / "model"), Store(tmp_path / "store"))


def test_beside_rounding_to_nearest_a_plane_is_added_where_there_is_one(material: Made) -> None:
    choice = everything(material.model, BASE)
    made = refining(material, Rtn(), {UP: plane(2)}).rounder(choice)
    assert isinstance(made, Stacked)
    for name in choice:
        weight = material.model.weight(name)
        base = Nearest().codes(weight, BASE)
        wanted = base.decode()
        if name == UP:
            own = nearest(weight - wanted, base.scales, plane(2), NEAR)
            assert torch.equal(made.plane(weight, name).codes, own.codes)
            assert torch.equal(made.rest(weight, name), own.decode(base.scales))
            wanted = wanted + own.decode(base.scales)
        assert torch.equal(made.round(weight, Precision(), name), wanted)
    assert not material.asked


def test_a_key_knows_the_planes_and_not_their_order(material: Made) -> None:
    down = "model.layers.0.mlp.down_proj.weight"
    one = refining(material, Gptq(), {UP: plane(2), down: plane(3)}).key
    assert one == refining(material, Gptq(), {down: plane(3), UP: plane(2)}).key
    assert one != refining(material, Gptq(), {UP: plane(2), down: plane(2)}).key
    assert one != refining(material, Rtn(), {UP: plane(2), down: plane(3)}).key
    assert one == [
        bind(Gptq(), material).key, "planes", residual.VERSION,
        [(down, plane(3).name), (UP, plane(2).name)],
    ]  # fmt: skip


def test_beside_gptq_planes_are_made_with_what_refined_layers_send(material: Made) -> None:
    """Better than planes rounded to nearest; the base is as if it were alone; from the store the
    second time; a layer without a plane is its base."""
    model = material.model
    choice = everything(model, Precision("int", 3, 16)) | {HEAD: Precision("int", 3, 16)}
    planes = {name: plane(2) for name in choice if name != UP}
    reference, found = logits(model.net), {}
    quantizer = refining(material, Gptq(), planes)
    made = {"gptq": quantizer.rounder(choice), "nearest": quantizer.rounder(choice, joint=False)}
    base = bind(Gptq(), material).rounder(choice)
    for name, rounder in {**made, "base": base}.items():
        with model.rounded(rounder, choice):
            found[name] = kl(reference, logits(model.net))
    assert found["gptq"] < 0.9 * found["nearest"] < 0.3 * found["base"]
    alone = model.weight(UP)
    assert torch.equal(
        made["gptq"].round(alone, choice[UP], UP), base.round(alone, choice[UP], UP)
    )
    for name in (HEAD, "model.layers.0.self_attn.q_proj.weight"):
        weight = model.weight(name)
        own, other = (made[k].plane(weight, name) for k in ("gptq", "nearest"))
        assert not torch.equal(own.codes, other.codes)
        factors = own.scales.float().unique() * 4
        wide = torch.tensor(residual._wide(2)).half().float()
        assert all(float((wide - f).abs().min()) < 2e-3 for f in factors)
    material.asked.clear()
    again = refining(material, Gptq(), planes).rounder(choice)
    assert not material.asked
    for name in choice:
        weight = model.weight(name)
        assert torch.equal(
            again.round(weight, choice[name], name), made["gptq"].round(weight, choice[name], name)
        )
    assert all(note.count("to nearest") == 1 for note in material.notes)


def test_a_long_head_is_refined_some_rows_at_a_time(
    material: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = {HEAD: BASE}
    whole = refining(material, Gptq(), {HEAD: plane(2)}).rounder(choice)
    weight = material.model.weight(HEAD)
    plain = whole.plane(weight, HEAD)
    material.store = Store(material.store.root.parent / "other")
    monkeypatch.setattr(residual, "STACKED", 64 * 40)  # 40 rows of 96
    pieces = refining(material, Gptq(), {HEAD: plane(2)}).rounder(choice).plane(weight, HEAD)
    assert pieces.codes.shape == weight.shape
    assert (pieces.codes != plain.codes).float().mean() < 0.01
