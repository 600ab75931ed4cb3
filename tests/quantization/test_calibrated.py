"""GPTQ on whole models: what streams, what is stored, and that apply packs what was certified."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from optimizer.commands import deploy, optimize
from optimizer.config import Optimize, Proof, profile
from optimizer.data.text import Data, Part
from optimizer.errors import ConfigError, PlanError, TextError
from optimizer.formats.torch import packed
from optimizer.models.blockwise import Stream
from optimizer.models.head import hidden_states
from optimizer.models.model import Model, take_inventory
from optimizer.models.source import PACKED_FILE, quiet
from optimizer.models.stories import corpus
from optimizer.plan import GGML, Budget, Inventory, Palette, Plan, Precision
from optimizer.quantization import ggml
from optimizer.quantization.gain import gain
from optimizer.quantization.ggml_native import NATIVE
from optimizer.quantization.keeping import Keeping
from optimizer.quantization.methods import Awq, Gptq, Rtn, bind
from optimizer.quantization.uniform import Nearest
from optimizer.search import Search
from optimizer.sensitivity import Task
from optimizer.sensitivity.estimators import Fisher, Tokenwise
from optimizer.stages.session import Session
from optimizer.stages.space import search_space
from optimizer.stages.table import measure_table
from optimizer.store import Store
from tests.conftest import slow_beside

torch.set_num_threads(1)
BODY = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96, "hidden_size": 64}
GLU = BODY | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GLU,
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96},
    "gpt_neox": BODY | {"intermediate_size": 96, "max_position_embeddings": 64},
    "gemma2": GLU | {"query_pre_attn_scalar": 16, "sliding_window": 8, "head_dim": 16},
    "mixtral": GLU | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
P3 = Precision("int", 3, 16)


def small(kind: str, folder: Path) -> Model:
    torch.manual_seed(3)
    with quiet():
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
    for name, value in net.named_parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.15 if "embed" not in name else 1.0)
    net.half().save_pretrained(folder)
    return Model.load(folder, take_inventory(folder))


@dataclass
class Made:
    """A `rounding.Material` that counts how often it is asked for tokens."""

    model: Model
    store: Store
    calibration_key: str = "tokens"
    asked: list[int] = field(default_factory=list)
    stop_after: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def inventory(self) -> Inventory:
        return self.model.inventory

    def calibration(self) -> np.ndarray:
        self.asked.append(1)
        return np.random.default_rng(0).integers(96, size=(72, 32))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def track(self, items: Iterable[Any], text: str) -> Iterable[Any]:
        for i, item in enumerate(items):
            if i == self.stop_after:
                raise KeyboardInterrupt
            yield item


Maker = Callable[[str], Made]


@pytest.fixture
def made(tmp_path: Path) -> Maker:
    return lambda kind: Made(small(kind, tmp_path / kind), Store(tmp_path / "store"))


def gptq(material: Any, **settings: Any) -> Any:
    return bind(Gptq(clip=True, **settings), material)


def everything(model: Model, precision: Precision = P3) -> dict[str, Precision]:
    return {layer.name: precision for layer in model.inventory.layers if layer.block is not None}


def logits(net: Any) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(1).integers(96, size=(8, 32)))
    with torch.no_grad():
        return net(ids).logits.double()


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_block_by_block_is_the_whole_model(kind: str, made: Maker) -> None:
    material = made(kind)
    model, ids = material.model, material.calibration()
    stream = Stream(model, ids)
    last: list[torch.Tensor] = []
    hook = stream.blocks[-1].register_forward_hook(
        lambda _m, _a, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    for block in range(len(stream.blocks)):
        stream.advance(block)
    streamed = torch.cat(last)
    last.clear()
    with torch.no_grad():
        model.net(torch.from_numpy(ids))
    hook.remove()
    assert torch.allclose(streamed, last[0], atol=1e-4, rtol=1e-4)


def test_a_later_block_gets_its_own_windows_tensors(made: Maker) -> None:
    """Something of the tokens that the first block doesn't get, such as values of a first layer: the
    first batch's was given to all."""
    material = made("llama")
    model, ids = material.model, material.calibration()[:4]
    net: Any = model.net
    looked: list[torch.Tensor] = []
    second = net.model.layers[1]

    def give(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {"seen": looked[-1], **kwargs}

    handles = [
        net.model.embed_tokens.register_forward_hook(lambda _m, _a, out: looked.append(out)),
        second.register_forward_pre_hook(give, with_kwargs=True),
        second.register_forward_hook(lambda _m, _a, kw, y: y + kw["seen"], with_kwargs=True),
    ]
    try:
        stream = Stream(model, ids, together=2)
        for block in range(len(stream.blocks)):
            stream.advance(block)
        with torch.no_grad():
            wanted = net.model(torch.from_numpy(ids)).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    found = torch.cat([stream.tail(x.ids, x.hidden) for x in stream.batches])
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_are_sums_over_a_layers_own_inputs(kind: str, made: Maker) -> None:
    material = made(kind)
    model, ids = material.model, material.calibration()
    stream = Stream(model, ids)
    watched = [x.name for x in model.inventory.layers if x.kind in ("linear", "conv1d")]
    watched = [name for name in watched if model.layers[name].block is not None]
    seen = [n for b in range(len(stream.blocks)) for names in stream.inputs(b) for n in names]
    assert sorted(seen) == sorted(watched)
    stream.advance(0)
    sets = stream.inputs(1)
    for names, hessian in zip(sets, stream.hessians(1, sets), strict=True):
        for name in names:
            inputs: list[torch.Tensor] = []
            module = model.net.get_submodule(model.layers[name].parameter.rpartition(".")[0])
            hook = module.register_forward_pre_hook(
                lambda _m, args, inputs=inputs: inputs.append(args[0])
            )
            with torch.no_grad():
                model.net(torch.from_numpy(ids))
            hook.remove()
            x = inputs[0].flatten(0, -2)
            assert torch.allclose(hessian, x.T @ x, rtol=1e-2, atol=1e-2 * float(hessian.max()))


@pytest.mark.parametrize("squared", [False, True])
def test_weighted_hessians_count_tokens_by_their_gradients(made: Maker, squared: bool) -> None:
    """Against autograd: s_t is the length, or its square, of the sampled labels' gradient."""
    from optimizer.sensitivity.fisher import likelihood
    from optimizer.sensitivity.outputs import token_weights

    material = made("llama")
    model, ids = material.model, material.calibration()[:5]
    name = "model.layers.1.mlp.down_proj.weight"
    layer = model.layers[name]
    found = token_weights(model, [layer], ids, 7, lambda items, _text: items, squared)[name]
    assert found.shape == ids.shape
    assert np.isclose(found.mean(), 1, atol=1e-5)
    module = model.net.get_submodule(layer.parameter.rpartition(".")[0])
    seen: list[torch.Tensor] = []

    def leaf(_module: Any, _inputs: Any, y: torch.Tensor) -> torch.Tensor:
        seen.append(y.detach().requires_grad_(True))
        return seen[-1]

    handle = module.register_forward_hook(leaf)
    likelihood(model, torch.from_numpy(ids[3])[None], [7, 3]).backward()
    handle.remove()
    s = seen[-1].grad.norm(dim=-1).flatten().numpy() ** (2 if squared else 1)
    assert np.allclose(found[3] / found[3].sum(), s / s.sum(), rtol=1e-3, atol=1e-7)
    stream = Stream(model, ids)
    inputs: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _m, args: inputs.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        model.net(torch.from_numpy(ids))
    handle.remove()
    stream.advance(0)
    [hessian] = stream.hessians(1, [[name]], {name: found})
    x = torch.cat(inputs)
    expected = (x * torch.from_numpy(found).reshape(-1, 1)).T @ x
    assert torch.allclose(hessian, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("weighting", slow_beside(["gradient"], ["gradient", "fisher"]))
def test_guided_codes_are_others_and_still_better_than_nearest(
    made: Maker, weighting: str
) -> None:
    material = made("llama")
    model, choice = material.model, everything(material.model)
    reference = logits(model.net)
    with model.rounded(Nearest(), choice):
        nearest = kl(reference, logits(model.net))
    guided = bind(Gptq(weighting=weighting), material)
    rounder, plain = guided.rounder(choice), gptq(material).rounder(choice)
    with model.rounded(rounder, choice):
        assert kl(reference, logits(model.net)) < 0.85 * nearest
    name = next(iter(choice))
    weight = model.weight(name)
    assert not torch.equal(rounder.round(weight, P3, name), plain.round(weight, P3, name))
    assert torch.equal(logits(model.net), reference)
    assert not any(p.requires_grad for p in model.net.parameters())


def test_layers_that_share_an_input_stand_together(made: Maker) -> None:
    roles = [
        [name.split(".")[-2] for name in names]
        for names in Stream(made("llama").model, np.ones((2, 8), dtype=np.int64)).inputs(1)
    ]
    assert roles == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


@pytest.mark.parametrize(
    ("kind", "inputs"),
    slow_beside(
        [("llama", "rounded"), ("mixtral", "reference")], product(KINDS, ["rounded", "reference"])
    ),
)
def test_a_model_moves_less_than_with_nearest(kind: str, inputs: str, made: Maker) -> None:
    material = made(kind)
    model, choice = material.model, everything(material.model)
    reference = logits(model.net)
    with model.rounded(Nearest(), choice):
        nearest = kl(reference, logits(model.net))
    rounder = gptq(material, inputs=inputs).rounder(choice)
    with model.rounded(rounder, choice):
        calibrated = kl(reference, logits(model.net))
    assert calibrated < 0.85 * nearest
    assert torch.equal(logits(model.net), reference)


@pytest.mark.parametrize("kind", slow_beside(["q4_0"], ["q4_0", "iq4_nl", "q5_1"]))
def test_blocks_of_llama_cpp_are_calibrated_too(kind: str, made: Maker) -> None:
    material = made("llama")
    model, precision = material.model, Precision.ggml(kind)
    choice = {x.name: precision for x in model.inventory.scoped(["blocks"])}
    reference = logits(model.net)
    with model.rounded(Nearest(), choice):
        nearest = kl(reference, logits(model.net))
    with model.rounded(gptq(material).rounder(choice), choice):
        assert kl(reference, logits(model.net)) < 0.9 * nearest
    again = gptq(material).rounder(choice)  # from the store
    name = "model.layers.1.mlp.down_proj.weight"
    assert again.encode(model.weight(name), precision, name).precision == precision


def test_several_choices_are_made_in_one_pass(made: Maker) -> None:
    material = made("llama")
    choices = [everything(material.model, Precision("int", bits, 16)) for bits in (5, 6)]
    rounder = gptq(material)
    rounder.ready(choices)
    asked = len(material.asked)
    for choice in choices:
        rounder.rounder(choice)
    assert len(material.asked) == asked == 1


def test_later_layers_see_the_rounded_ones(made: Maker) -> None:
    material = made("llama")
    choice = everything(material.model)
    joint, alone = (
        gptq(material, inputs="rounded").rounder(choice),
        gptq(material).rounder(choice, joint=False),
    )
    w = material.model.weight
    for role, same in (
        ("self_attn.q_proj", True),
        ("self_attn.o_proj", False),
        ("mlp.down_proj", False),
    ):
        name = f"model.layers.0.{role}.weight"  # in one block already, in the order of execution
        found = torch.equal(joint.round(w(name), P3, name), alone.round(w(name), P3, name))
        assert found == same, name


def test_what_has_no_watched_input_is_rounded_to_nearest(made: Maker) -> None:
    material = made("mixtral")
    layers = material.model.inventory.layers
    choice = {layer.name: P3 for layer in layers}
    rounder = gptq(material).rounder(choice)
    for layer in layers:
        own = material.model.weight(layer.name)
        nearest = Nearest().round(own, P3)
        same = torch.equal(rounder.round(own, P3, layer.name), nearest)
        assert same == (layer.kind == "embedding"), layer.name


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_the_head_is_rounded_with_what_it_receives(made: Maker, name: str) -> None:
    material = made(name)
    model, ids = material.model, material.calibration()
    x = torch.cat([h.flatten(0, 1) for _, h in hidden_states(model.net, ids, 2)])
    stream = Stream(model, ids, frozen=True)
    for block in range(len(stream.blocks)):
        stream.hessians(block, stream.inputs(block))
        stream.advance(block)
    found = stream.head_hessian()
    assert found is not None
    torch.testing.assert_close(found, x.T @ x, rtol=1e-4, atol=1e-3)
    head = next(layer for layer in model.inventory.layers if layer.predicts)
    rounder = gptq(material).rounder({head.name: P3})
    own = model.weight(head.name)
    losses = [
        float((x @ (w - own).T).square().sum())
        for w in (rounder.round(own, P3, head.name), Nearest().round(own, P3))
    ]
    assert losses[0] < 0.9 * losses[1]


def test_frozen_weights_save_a_pass_and_change_nothing(made: Maker) -> None:
    model, ids = made("llama").model, made("llama").calibration()
    streams = [Stream(model, ids, frozen=frozen) for frozen in (True, False)]
    for block in range(len(streams[0].blocks)):
        hessians = [s.hessians(block, s.inputs(block)) for s in streams]
        for a, b in zip(*hessians, strict=True):
            assert torch.equal(a, b)
        for stream in streams:
            stream.advance(block)


def test_a_killed_run_goes_on_to_identical_codes(made: Maker) -> None:
    whole = made("llama")
    choice = everything(whole.model) | {
        "model.layers.1.mlp.up_proj.weight": Precision("int", 8, 32)
    }
    expected = gptq(whole).rounder(choice)
    again = Made(whole.model, Store(whole.store.root.parent / "other"), stop_after=2)
    before = logits(whole.model.net)
    with pytest.raises(KeyboardInterrupt):
        gptq(again).rounder(choice)
    assert torch.equal(logits(whole.model.net), before), "the model is itself again"
    again.stop_after = None
    resumed = gptq(again).rounder(choice)
    for name, precision in choice.items():
        own = whole.model.weight(name)
        mine, theirs = (x.encode(own, precision, name) for x in (resumed, expected))
        assert torch.equal(mine.codes, theirs.codes)
        assert torch.equal(mine.scales, theirs.scales)
    asked = len(again.asked)
    gptq(again).rounder(choice)
    assert len(again.asked) == asked, "finished codes need no tokens"


def test_codes_depend_on_tokens_settings_and_earlier_choices_only(made: Maker) -> None:
    material = made("llama")
    joint = partial(gptq, material, inputs="rounded")
    choice = everything(material.model)
    joint().rounder(choice)
    entries = lambda: len(list(material.store.root.glob("codes/*.safetensors")))  # noqa: E731
    assert entries() == 3
    joint().rounder(choice | {"model.layers.2.mlp.up_proj.weight": Precision("int", 8)})
    assert entries() == 4, "only the last block is new"
    joint(damping=0.1).rounder(choice)
    assert entries() == 7
    material.calibration_key = "others"
    joint().rounder(choice)
    assert entries() == 10


def test_a_layer_that_was_not_prepared_is_refused(made: Maker) -> None:
    material = made("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(KeyError, match="prepared"):
        gptq(material).round(material.model.weight(name), P3, name)


# ---------------------------------------------------------------- plan -> apply


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Optimize:
    folder = tmp_path_factory.mktemp("gptq")
    (folder / "text.txt").write_text("\n\n".join(corpus(120)))
    part = {"length": 48}
    return Optimize(
        model="stories",
        budget=Budget(code_bits=3.0),
        palette=Palette(bits=[2, 3, 4], group_size=32),
        scope=["blocks"],
        quantizer=Gptq(clip=True),
        sensitivity=Fisher(),
        data=Data(
            source="text",
            path=str(folder / "text.txt"),
            calibration=Part(sequences=16, **part),
            search=Part(sequences=4, **part),
            heldout=Part(sequences=8, **part),
        ),
        proof=Proof(random=2),
        search=Search(space="exact"),
        store=str(folder / "store"),
    )


@pytest.fixture(scope="module")
def plan(settings: Optimize) -> Plan:
    return optimize.optimize(settings, Path(settings.store).parent / "run").plan


def test_apply_packs_the_codes_that_were_certified(
    plan: Plan, settings: Optimize, tmp_path: Path
) -> None:
    assert plan.quantizer["name"] == "gptq"
    folder = deploy.apply(plan, tmp_path / "packed", settings.store)
    session = Session.open("stories", settings.data, settings.store)
    net, ids = packed.load(folder), torch.from_numpy(session.windows("heldout").ids)
    quantizer = bind(settings.quantizer, session)
    with session.model.rounded(quantizer.rounder(plan.choice), plan.choice), torch.no_grad():
        expected, found = session.model.net(ids).logits, net(ids).logits
    assert torch.allclose(expected, found, atol=1e-4)
    with session.model.rounded(Nearest(), plan.choice), torch.no_grad():
        assert not torch.allclose(session.model.net(ids).logits, found, atol=1e-2)


@pytest.mark.parametrize("source", slow_beside(["bundled"], ["self", "bundled"]))
def test_text_is_written_again_by_the_model_that_is_packed(
    source: str, settings: Optimize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store that has neither codes nor tokens, with one model in memory. Stories can't read the
    texts that come with the program, and writes its own."""
    few = Part(sequences=8, length=24)
    written = replace(settings, data=Data(source=source, calibration=few, search=few, heldout=few))
    plan = optimize.optimize(replace(written, proof=Proof(certify=False)), tmp_path / "run").plan
    loaded, own = list[Path](), Model.load.__func__  # type: ignore[attr-defined]

    def load(cls: type[Model], folder: Path, *rest: Any, **more: Any) -> Model:
        if more.get("full", True):
            loaded.append(folder)
        found: Model = own(cls, folder, *rest, **more)
        return found

    for name in ("models", "hashes"):
        if (kept := Path(settings.store) / name).exists():
            shutil.copytree(kept, tmp_path / "store" / name)
    monkeypatch.setattr(Model, "load", classmethod(load))
    again = deploy.apply(plan, tmp_path / "again", str(tmp_path / "store")) / PACKED_FILE
    assert len(loaded) == 1
    assert (deploy.apply(plan, tmp_path / "kept", settings.store) / PACKED_FILE).read_bytes() == (
        again.read_bytes()
    )


@pytest.mark.slow
def test_blocks_of_ggml_are_those_that_were_certified(settings: Optimize, tmp_path: Path) -> None:
    own = replace(
        settings, palette=Palette(bits=["q4_0", "q5_0"]), runtime=profile("torch"),
        scope=["all"], budget=Budget(bits=5.0), quantizer=Gptq(),
    )  # fmt: skip
    made_for = optimize.optimize(own, tmp_path / "run").plan
    assert set(made_for.layers.values()) == {"q4_0", "q5_0"}
    stored = load_file(deploy.apply(made_for, tmp_path / "out", own.store) / PACKED_FILE)
    session = Session.open("stories", own.data, own.store)
    rounder = bind(own.quantizer, session).rounder(made_for.choice)
    for name, precision in made_for.choice.items():
        weight = session.model.weight(name)
        found = ggml.Blocks(precision, stored[f"{name}.blocks"], weight.shape[1]).decode()
        assert torch.equal(found, rounder.round(weight, precision, name)), name
    assert not torch.equal(found, Nearest().round(weight, precision))


def test_apply_again_and_from_the_text_alone_gives_the_same_bytes(
    plan: Plan, settings: Optimize, tmp_path: Path
) -> None:
    first = deploy.apply(plan, tmp_path / "first", settings.store)
    second = deploy.apply(plan, tmp_path / "second", settings.store)
    elsewhere = tmp_path / "store"
    (elsewhere / "models").mkdir(parents=True)
    for model in (Path(settings.store) / "models").iterdir():
        (elsewhere / "models" / model.name).symlink_to(model)
    third = deploy.apply(plan, tmp_path / "third", str(elsewhere))
    files = [(folder / "packed.safetensors").read_bytes() for folder in (first, second, third)]
    assert files[0] == files[1] == files[2]


def test_apply_refuses_another_text(plan: Plan, settings: Optimize, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(corpus(120, seed=1)))
    plan.provenance["data"] = {**plan.provenance["data"], "path": str(other)}
    empty = tmp_path / "store"
    (empty / "models").mkdir(parents=True)
    for model in (Path(settings.store) / "models").iterdir():
        (empty / "models" / model.name).symlink_to(model)
    try:
        with pytest.raises(PlanError, match="calibration tokens"):
            deploy.apply(plan, tmp_path / "packed", str(empty))
        plan.provenance["data"]["path"] = str(tmp_path / "gone.txt")
        with pytest.raises(TextError, match="no text"):
            deploy.apply(plan, tmp_path / "packed", str(empty))
    finally:
        plan.provenance["data"]["path"] = settings.data.path
    assert not (tmp_path / "packed").exists()


def test_the_table_is_made_with_the_quantizers_own_errors(settings: Optimize) -> None:
    from optimizer.sensitivity.fisher import rounding_errors

    session = Session.open("stories", settings.data, settings.store)
    space = search_space(settings, session.inventory)
    quantizer = bind(settings.quantizer, session)
    name = space.scope[3].name
    quantizer.prepare({name: [space.fitted[name, c] for c in space.columns]})
    task = Task(((name,),), space.columns, space.fitted, quantizer)
    for column, error in rounding_errors(session.model, task, session.model.layers[name]):
        own = session.model.weight(name)
        nearest = Nearest().round(own, space.fitted[name, column])
        assert not torch.equal(error, nearest - own)


def test_the_table_reads_other_text_than_the_rounding_was_fitted_to(settings: Optimize) -> None:
    """On its own few windows the fitted rounding seems to lose much less."""
    few = replace(settings.data, calibration=Part(sequences=4, length=48))
    config = replace(settings, data=few, sensitivity=Tokenwise(chunks=2))
    session = Session.open("stories", few, settings.store)
    space = search_space(config, session.inventory)
    table = measure_table(session, config, space)
    quantizer = bind(config.quantizer, session)
    task = Task(space.groups, space.columns, space.fitted, quantizer)
    own = config.sensitivity.score(session.model, task, session.calibration(), [0, 0])
    assert table.loss.sum() > 1.15 * own.sum()
    nearest = replace(config, quantizer=Rtn())
    task = Task(space.groups, space.columns, space.fitted, Nearest())
    own = config.sensitivity.score(session.model, task, session.calibration(), [0, 0])
    assert measure_table(session, nearest, space).loss.sum() == pytest.approx(own.sum(), rel=0.3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": "rows"},
        {"damping": 0.0},
        {"inputs": "none"},
        {"weighting": "none"},
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"quantizer.{next(iter(wrong))}"):
        Gptq(**wrong).check()


def test_awq_refuses_blocks_of_llama_cpp(settings: Optimize) -> None:
    palette, awq = Palette(bits=["q4_0"]), Awq()
    with pytest.raises(ConfigError, match="rtn or gptq"):
        replace(settings, palette=palette, quantizer=awq).check()


@pytest.mark.parametrize("kind", [kind for kind in GGML if kind not in NATIVE])
def test_grids_of_blocks_are_searched_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The second quantizer reads them and gives the same bits; other weights get others."""
    torch.manual_seed(4)
    weight, precision = torch.randn(300, 512) * 0.1, Precision.ggml(kind)
    monkeypatch.setattr(ggml, "CHUNK", 2**16)  # several slices
    store = Store(tmp_path)
    plain, first = Nearest().round(weight, precision), Keeping(store=store)
    assert torch.equal(first.round(weight, precision, "layer"), plain)
    monkeypatch.setattr(ggml, "fit", lambda *_: pytest.fail("searched again"))
    again = Keeping(store=Store(tmp_path))
    assert torch.equal(again.round(weight, precision, "layer"), plain)
    blocks = again.encode(weight, precision, "other name")
    assert torch.equal(blocks.decode(), plain)
    with pytest.raises(pytest.fail.Exception):
        again.round(weight * 1.5, precision, "layer")


# ---------------------------------------------------------------- gains, heads, what is told


def test_gains_are_foretold_from_each_layers_own_inputs(made: Maker) -> None:
    """By hand from the inputs of the last block and of the head; layers without inputs gain nothing,
    and the second time no token is read."""
    material = made("llama")
    model, ids = material.model, material.calibration()
    down = "model.layers.2.mlp.down_proj.weight"
    names = [x.name for x in model.inventory.layers]
    material.asked.clear()
    found = gptq(material, damping=0.2).gains(names)
    assert set(found) == set(names) and len(material.asked) == 1
    x: dict[str, list[torch.Tensor]] = {"down": [], "head": []}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, key=key: x[key].append(args[0]))
        for key, module in (
            ("down", model.net.model.layers[2].mlp.down_proj),
            ("head", model.net.lm_head),
        )
    ]
    with torch.no_grad():
        model.net(torch.from_numpy(ids))
    for hook in hooks:
        hook.remove()
    for key, name in (("down", down), ("head", "lm_head.weight")):
        flat = x[key][0].flatten(0, 1)
        h = flat.T @ flat
        wanted = gain(h, 0.2, h.diagonal().argsort(descending=True))
        assert found[name] == pytest.approx(wanted, rel=1e-3), name
        assert 0.05 < wanted < 0.98
    assert found["model.embed_tokens.weight"] == 1.0
    same = [found[down.replace("down", which)] for which in ("up", "gate")]
    assert same[0] == same[1] != found[down]  # they read one tensor
    assert gptq(material, damping=0.2).gains([down, "other"]) == {down: found[down], "other": 1.0}
    assert len(material.asked) == 1
    assert gptq(material, damping=0.1).gains([down])[down] != found[down]
    assert gptq(material, damping=0.2, order="none").gains([down])[down] != found[down]
    blind = bind(Gptq(damping=0.3, head=False), material).gains(["lm_head.weight"])
    assert blind == {"lm_head.weight": 1.0}


@pytest.mark.parametrize(("bits", "chained"), [(3, True), (4, False)])
def test_layers_see_rounded_ones_below_four_bits_a_weight(
    made: Maker, bits: int, chained: bool
) -> None:
    """Scales and zeros count: 4 bits in large groups of a symmetric precision are just above."""
    material = made("llama")
    choice = everything(material.model, Precision("int", bits, 32, True))
    choice |= {"model.layers.0.mlp.up_proj.weight": Precision()}  # doesn't count
    auto = gptq(material).rounder(choice)
    other = gptq(material, inputs="rounded" if chained else "reference").rounder(choice)
    one = gptq(material, inputs="reference" if chained else "rounded").rounder(choice)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = material.model.weight(name)
    own, same, unlike = (r.round(weight, choice[name], name) for r in (auto, other, one))
    assert torch.equal(own, same) and not torch.equal(own, unlike)


@pytest.mark.parametrize("precision", [P3, Precision.floating("nvfp4")], ids=lambda p: p.name)
def test_a_long_head_is_rounded_some_rows_at_a_time(
    made: Maker, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    material, head = made("llama"), "lm_head.weight"
    weight = material.model.weight(head)
    whole = gptq(material).rounder({head: precision}).encode(weight, precision, head)
    material.store = Store(material.store.root.parent / "other")
    monkeypatch.setattr("optimizer.quantization.calibrated.TOGETHER", 64 * 40)  # of 96
    pieces = gptq(material).rounder({head: precision}).encode(weight, precision, head)
    for part, value in whole.pack().items():
        assert pieces.pack()[part].shape == value.shape
    assert (pieces.decode() != whole.decode()).float().mean() < 0.01


def _of_experts(material: Any, block: int) -> dict[str, Tensor]:
    """Layer -> what its expert is given, sum x x', from the router's own choice."""
    net, layers = material.model.net, material.inventory.layers
    ids = torch.from_numpy(material.calibration())
    mlp = net.model.layers[block].mlp
    caught: list[Tensor] = []
    hook = mlp.register_forward_pre_hook(lambda _m, args: caught.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        net(ids)
    hook.remove()
    chosen = (caught[0] @ mlp.gate.weight.T).topk(2).indices
    found = {}
    for layer in (x for x in layers if x.kind == "experts" and x.block == block):
        x = caught[0][(chosen == layer.expert).any(1)]
        if "w2" in layer.name or "down" in layer.name:
            gate, up = mlp.experts.gate_up_proj[layer.expert].chunk(2)
            x = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        found[layer.name] = x.T @ x
    return found


def test_experts_in_one_tensor_are_rounded_with_what_each_is_given(
    made: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    material = made("mixtral")
    hessians = _of_experts(material, 1)
    with torch.no_grad():
        stream = Stream(material.model, material.calibration(), experts=True)
        stream.advance(0)
        steps = [step for step in stream.steps(1) if step[0][0] in hessians]
        assert [{len(names) for names in step} for step in steps] == [{2}, {1}]  # down comes last
        sets = [names for step in steps for names in step]
        assert {name for names in sets for name in names} == hessians.keys()
        for names, own in zip(sets, stream.hessians(1, sets), strict=True):
            for name in names:
                assert torch.allclose(own, hessians[name], rtol=1e-3, atol=1e-3)
    choice = dict.fromkeys(hessians, P3)
    rounder = gptq(material).rounder(choice, joint=False)
    assert not material.notes
    lost = {"gptq": 0.0, "rtn": 0.0}
    for name, h in hessians.items():
        weight = material.model.weight(name)
        for key, value in (
            ("gptq", rounder.round(weight, P3, name)),
            ("rtn", Nearest().round(weight, P3)),
        ):
            error = value - weight
            lost[key] += float((error @ h * error).sum())
    assert lost["gptq"] < 0.9 * lost["rtn"]
    material.store = Store(material.store.root.parent / "other")
    monkeypatch.setattr("optimizer.models.blockwise.HESSIANS", 1)  # one by one
    again = gptq(material).rounder(choice, joint=False)
    for name in hessians:
        weight = material.model.weight(name)
        assert torch.equal(again.round(weight, P3, name), rounder.round(weight, P3, name))


def test_experts_are_rounded_jointly_too(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `down` is given comes from the rounded experts then."""
    material = made("mixtral")
    choice = {x.name: P3 for x in material.inventory.layers if x.block is not None}
    ids = torch.from_numpy(material.calibration())

    def off(rounder: Any) -> float:
        net = material.model.net
        with torch.no_grad():
            exact = net.model(ids).last_hidden_state
            with material.model.rounded(rounder, choice):
                return float((net.model(ids).last_hidden_state - exact).norm() / exact.norm())

    own = gptq(material, inputs="rounded")
    with monkeypatch.context() as before:  # whose codes in the store are others
        keys = own._block_keys(choice)
        before.setattr(Gptq, "reads_experts", False)
        assert not keys.items() & gptq(material, inputs="rounded")._block_keys(choice).items()
    jointly = own.rounder(choice)
    alone = gptq(material).rounder(choice, joint=False)
    assert max(off(jointly), off(alone)) < off(Nearest())
    for layer in (x for x in material.inventory.layers if x.kind == "experts" and x.block == 0):
        weight = material.model.weight(layer.name)
        one, other = (x.round(weight, P3, layer.name) for x in (jointly, alone))
        assert 0 < float((one == other).float().mean()) < 1


def test_experts_that_nobody_visits_are_told(made: Maker) -> None:
    material = made("mixtral")
    with torch.no_grad():
        for block in material.model.net.model.layers:
            block.mlp.gate.weight[3] = 0
            block.mlp.gate.weight[:3] = 0
            block.mlp.gate.weight[:2, 0] = 1e-3
    layers = [x for x in material.inventory.layers if x.kind == "experts" and x.block == 0]
    rounder = gptq(material).rounder({x.name: P3 for x in layers}, joint=False)
    for layer in layers:
        weight = material.model.weight(layer.name)
        assert torch.isfinite(rounder.round(weight, P3, layer.name)).all()


def test_who_is_rounded_to_nearest_is_told_once_with_three_names(
    made: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimizer.plan.inventory.Layer.fused", False)  # as transposed ones aren't
    material = made("mixtral")
    experts = sorted(x.name for x in material.inventory.layers if x.kind == "experts")[:6]
    rounder = gptq(material)
    rounder.rounder(dict.fromkeys(experts[:1], P3))
    rounder.rounder(dict.fromkeys(experts[:1], P3))
    rounder.rounder(dict.fromkeys(experts, P3) | {experts[5]: Precision()})
    rounder.rounder(dict.fromkeys(experts, P3))
    why = "to nearest: they lie in one tensor, whose inputs can't be watched one by one."
    assert material.notes == [
        f"gptq rounds {experts[0]} {why}",
        f"gptq rounds {', '.join(experts[1:4])} and 1 more {why}",
        f"gptq rounds {experts[5]} {why}",
    ]


def test_a_choice_that_is_rounded_jointly_is_not_made_ready_layer_by_layer(made: Maker) -> None:
    material = made("llama")
    low = everything(material.model, Precision("int", 3, 32, True))
    gptq(material).ready([low])
    assert not material.asked
    gptq(material).ready([{}, everything(material.model, Precision("int", 6, 16))])
    assert len(material.asked) == 1


def test_only_what_is_missing_is_made(made: Maker) -> None:
    material = made("llama")
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2)]
    rounder = gptq(material)
    entries = lambda: len(list(material.store.root.glob("codes/*.safetensors")))  # noqa: E731
    rounder.prepare({names[0]: [P3, P3, Precision()], "model.embed_tokens.weight": [P3]})
    assert (entries(), len(material.asked)) == (1, 1)
    rounder.prepare({names[0]: [P3]})
    assert (entries(), len(material.asked)) == (1, 1)
    rounder.prepare({names[0]: [P3, Precision("int", 4, 16)], names[1]: [P3]})
    assert (entries(), len(material.asked)) == (3, 2)
    weight = material.model.weight(names[0])
    assert torch.equal(rounder.round(weight, Precision(), names[0]), weight)
    embedding = material.model.weight("model.embed_tokens.weight")
    assert torch.equal(
        rounder.round(embedding, P3, "model.embed_tokens.weight"), Nearest().round(embedding, P3)
    )
