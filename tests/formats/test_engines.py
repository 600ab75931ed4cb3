"""Exports, read back by the engines themselves: transformers' compressed-tensors loader and
llama.cpp (the xllamacpp wheel)."""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimizer.cli.main import main
from optimizer.commands import deploy, export
from optimizer.config import profile
from optimizer.errors import ConfigError, MezzotintError, PlanError
from optimizer.formats import folder, rules
from optimizer.formats.gguf import writer
from optimizer.formats.safetensors import autoround, compressed_tensors, gptq
from optimizer.formats.torch import packed
from optimizer.formats.torch import writer as torch_writer
from optimizer.models.source import PACKED_FILE
from optimizer.models.tokenizer import load_tokenizer
from optimizer.plan import UNTOUCHED, Precision
from optimizer.quantization import uniform as uniform_codes
from optimizer.quantization.uniform import Nearest
from tests.formats.conftest import G64, IDS, WORDS, LlamaCpp, Wide, dealt, random_model, uniform

SYMMETRIC = [Precision("int", b, g, True) for b, g in ((3, 64), (5, 32), (2, 128), (6, 64))]
VLLM = [*SYMMETRIC, UNTOUCHED, Precision("int", 4, 64, True), Precision("int", 7, None, True)]
BLOCKS = [Precision.ggml(k) for k in ("q3_k", "q4_0", "iq4_nl", "q5_1", "q2_k", "q6_k", "q8_0")]
OWN = [
    Precision("int", 4, 64, True), Precision("int", 4, 32), Precision("int", 8, 64, True),
    Precision("int", 5, 128), Precision("int", 5, 32, True), UNTOUCHED, Precision.ggml("q5_k"),
    Precision.ggml("q4_k"),
]  # fmt: skip


@pytest.mark.parametrize("source", ["the plan", "a packed folder"])
def test_transformers_computes_what_we_compute(wide: Wide, tmp_path: Path, source: str) -> None:

    plan = wide.plan(dealt(wide.inventory.layers, VLLM), "vllm")
    given = None
    if source == "a packed folder":
        given = deploy.apply(plan, tmp_path / "packed", str(wide.store))
    verdict = export.export(plan, "vllm", tmp_path / "out", str(wide.store), packed=given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        with torch.inference_mode():
            logits = net(input_ids=IDS).logits
    assert torch.equal(torch.log_softmax(logits, -1), wide.log_p(plan, IDS))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == verdict.bytes


def test_the_bit_stream_is_the_packages_own(wide: Wide) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationScheme

    layer = next(x for x in wide.inventory.layers if x.role == "down_proj")
    for bits in range(2, 9):
        for symmetric in (True, False):
            precision = Precision("int", bits, 32, symmetric)
            codes = Nearest().encode(wide.model.weight(layer.name), precision)
            stored = {f"{layer.name}.{k}": v for k, v in codes.pack().items()}
            ours = compressed_tensors._compressed(layer, precision, stored)
            stem = layer.name.removesuffix(".weight")
            signed = (codes.codes.int() - 2 ** (bits - 1)).to(torch.int8)
            assert torch.equal(ours[f"{stem}.weight_packed"], pack_to_int32(signed, bits))
            if not symmetric:
                zeros = (codes.zeros.int() - 2 ** (bits - 1)).to(torch.int8)
                wanted = pack_to_int32(zeros, bits, packed_dim=0)
                assert torch.equal(ours[f"{stem}.weight_zero_point"], wanted)
            scheme = QuantizationScheme(
                targets=["Linear"], weights=compressed_tensors._scheme(precision)
            )
            parts = {name.rsplit(".", 1)[1]: value for name, value in ours.items()}
            parts["weight_scale"] = parts["weight_scale"].float()
            found = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
            assert torch.equal(found, codes.decode())


def test_every_module_is_a_target_or_ignored(wide: Wide) -> None:
    plan = wide.plan(dealt(wide.inventory.layers, VLLM), "vllm")
    config = compressed_tensors.config(plan, wide.inventory)
    named = [t for g in config["config_groups"].values() for t in g["targets"]] + config["ignore"]
    linear = [n for n, m in wide.model.net.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(named) == sorted(linear)


@pytest.mark.parametrize("kinds", [BLOCKS, OWN], ids=["block types", "our grids"])
def test_llama_cpp_computes_what_we_compute(
    wide: Wide, tmp_path: Path, kinds: list[Precision]
) -> None:
    blocks = [x for x in wide.inventory.layers if x.block is not None]
    choice = {x.name: kinds[i % len(kinds)] for i, x in enumerate(blocks)}
    plan = wide.plan(choice, "llamacpp")
    verdict = export.export(plan, "gguf", tmp_path / "out", str(wide.store))
    file = tmp_path / "out" / writer.FILE
    assert file.stat().st_size == verdict.bytes
    engine = LlamaCpp(file)
    ids = IDS[:2]
    ours, reference = wide.log_p(plan, ids)[:, -1], wide.log_p(None, ids)[:, -1]
    for row, prompt in enumerate(ids.tolist()):
        theirs = engine.log_p(prompt)
        p = ours[row].exp()
        noise = float((p * (ours[row] - theirs)).sum())
        moved = float((reference[row].exp() * (reference[row] - theirs)).sum())
        assert noise < 0.002 < moved  # activations in 8 bits; the plan itself moves far more
    text = "the dog 12 café"
    words = engine.ask("tokenize", {"content": text})
    assert words["tokens"] == load_tokenizer(wide.folder)(text)["input_ids"]
    types = (tmp_path / "out" / writer.TYPES_FILE).read_text().splitlines()
    assert r"^blk\.0\.attn_q\.weight$=" + writer.carrier(kinds[0], 256) in types


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("to", "precision", "other", "words"),
    [
        ("vllm", Precision("int", 3, 64), {}, ["int3_g64", "runtime=vllm", "18 more"]),
        ("vllm", G64, {"k_proj": Precision("int", 8, 64, True)}, ["one precision", "k_proj"]),
        ("vllm", Precision.ggml("q4_k"), {}, ["q4_k"]),
        ("llamacpp", Precision("int", 3, 64), {}, ["int3_g64", "runtime=llamacpp"]),
        ("transformers", Precision("ternary", 2, 64, True), {}, ["ternary_g64"]),
    ],
)
def test_a_plan_that_would_fail_is_refused(
    wide: Wide, tmp_path: Path, to: str, precision: Precision, other: dict, words: list[str]
) -> None:
    plan = wide.plan(uniform(wide, precision, **other), "torch")
    with pytest.raises(PlanError) as caught:
        export.export(plan, to, tmp_path / "out", str(wide.store))
    assert all(word in str(caught.value) for word in words)
    assert not list(tmp_path.iterdir())
    assert export.check(plan, to, str(wide.store)).errors


def test_kinds_that_a_format_cannot_hold(wide: Wide) -> None:
    plan = wide.plan({x.name: G64 for x in wide.inventory.layers}, "vllm")
    found = export.check(plan, "vllm", str(wide.store))
    assert "model.embed_tokens" in found.errors[0] and "scope" in found.errors[0]
    one = wide.inventory.layers[1]
    stacked = replace(one, kind="experts", role="w1", expert=0)
    assert "w1" in str(rules.linear_only(stacked, G64))
    assert "fused" in str(rules.linear_only(replace(stacked, expert=None), G64))


@pytest.mark.slow
def test_an_architecture_that_the_converter_refuses(wide: Wide, tmp_path: Path) -> None:
    body = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 1, "num_heads": 2}
    model = random_model("xlstm", body | {"embedding_dim": 64}, 0.1, tmp_path / "odd", wide)
    found = export.check(model.plan({}, "llamacpp"), "gguf", str(wide.store))
    assert (
        "xLSTMForCausalLM is not supported" in found.errors[0] and "gguf=FILE" in found.errors[0]
    )


def test_a_full_folder_is_left_alone(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(uniform(wide, G64), "vllm")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="overwrite=true"):
        export.export(plan, "vllm", tmp_path, str(wide.store))
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("to", ["vllm", "gguf", "gptq", "autoround"])
def test_an_interrupted_export_leaves_nothing(
    wide: Wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "seal", stop)
    plan = wide.plan(uniform(wide, G64), "vllm")
    with pytest.raises(KeyboardInterrupt):
        export.export(plan, to, tmp_path / "out", str(wide.store))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["vllm", "gguf", "gptq", "autoround"])
def test_a_wrong_file_is_noticed_before_it_appears(
    wide: Wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    own = packed.pack

    def damaged(*args: object) -> dict[str, torch.Tensor]:
        tensors = own(*args)
        return {k: v * 0.99 if k.endswith("scales") else v for k, v in tensors.items()}

    plan = wide.plan(uniform(wide, G64), "vllm")
    backend: Any = {
        "vllm": compressed_tensors, "gguf": writer, "gptq": gptq, "autoround": autoround,
    }[to]  # fmt: skip
    write = backend.write
    monkeypatch.setattr(
        backend, "write", lambda p, i, t, *rest: write(p, i, damaged(p, wide.model, track), *rest)
    )
    with pytest.raises(PlanError, match="differs from the plan"):
        export.export(plan, to, tmp_path / "out", str(wide.store))
    assert not list(tmp_path.iterdir())


FORMS = [
    Precision.ggml("q8_0"),
    G64,
    Precision("fp8_block", 8, 128, True),
    Precision("nvfp4", 4, 16, True),
]


@pytest.mark.parametrize("precision", FORMS, ids=str)
def test_a_wrong_number_is_found_in_the_last_rows(
    monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setattr(uniform_codes, "CACHED", 3 * 256)  # rows that are compared at a time
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(1))
    encoded = Nearest().encode(weight, precision)
    read, parts = encoded.decode(), encoded.pack()
    assert export._farthest(read, parts, precision) == (0, float(read.abs().max()))
    read[:3] = torch.nan  # words that the file leaves out
    read[199, 5] += 2
    assert export._farthest(read, parts, precision)[0] == pytest.approx(2)
    assert export._farthest(read * torch.nan, parts, precision)[0] == math.inf
    read[199, 5] = torch.nan  # one number, not a row
    assert math.isnan(export._farthest(read, parts, precision)[0])


def track(items: list, _text: str) -> list:
    return items


def test_the_torch_folder_is_what_apply_writes(wide: Wide, tmp_path: Path) -> None:
    plan, store = wide.plan(uniform(wide, G64), "vllm"), str(wide.store)
    verdict = export.export(plan, "torch", tmp_path / "out", store)
    deploy.apply(plan, tmp_path / "applied", store)
    assert verdict == export.check(plan, "torch", store) and not verdict.errors
    assert packed.verify(tmp_path / "out") == packed.verify(tmp_path / "applied") == plan
    for name in (PACKED_FILE, "README.md", "manifest.json"):
        own, other = (tmp_path / at / name for at in ("out", "applied"))
        assert own.read_bytes() == other.read_bytes()
    assert (tmp_path / "out" / PACKED_FILE).stat().st_size == verdict.bytes == plan.bytes["total"]


def test_a_torch_file_is_read_back(
    wide: Wide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, opened = torch_writer.tensors, list[Path]()

    def damaged(file: Path) -> Any:
        opened.append(file)
        if len(opened) == 2:  # all is written, and is read back now
            with file.open("r+b") as written:
                written.seek(-1, 2)
                last = written.read(1)[0]
                written.seek(-1, 2)
                written.write(bytes([last ^ 1]))
        return own(file)

    monkeypatch.setattr(torch_writer, "tensors", damaged)
    plan = wide.plan(uniform(wide, G64), "vllm")
    with pytest.raises(PlanError, match="Read back"):
        export.export(plan, "torch", tmp_path / "out", str(wide.store))
    assert not list(tmp_path.iterdir())


def test_a_changed_file_is_noticed(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(uniform(wide, G64), "vllm")
    export.export(plan, "vllm", tmp_path / "out", str(wide.store))
    assert folder.manifest(tmp_path / "out")["engine"] == "vllm"
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(PlanError, match="changed"):
        folder.manifest(tmp_path / "out")


def test_the_card_says_what_was_lost(wide: Wide, tmp_path: Path) -> None:
    plan = wide.plan(uniform(wide, G64), "vllm")
    export.export(plan, "vllm", tmp_path / "out", str(wide.store))
    card = (tmp_path / "out" / "README.md").read_text()
    assert plan.id in card and "KL 0.1000 +- 0.0100" in card and "int4_g64_sym | 21" in card


def test_bytes_are_priced_with_fallbacks(wide: Wide) -> None:
    """A row of 256 takes q4_k, one of 512 too; in a model of 64 wide rows it becomes q5_0."""
    plan = wide.plan(uniform(wide, Precision.ggml("q4_k")), "llamacpp")
    found = export.check(plan, "llamacpp", str(wide.store))
    weights = sum(math.prod(s) for k, s in plan.shapes.items() if plan.layers[k] == "q4_k")
    rest = 2 * WORDS * 256 + 4 * 7 * 256
    assert 0 < (found.bytes or 0) - weights * 144 / 256 - rest < 8192
    assert not found.notes


def test_check_on_the_command_line(
    wide: Wide, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = wide.plan(uniform(wide, G64), "vllm").save(tmp_path / "plan.json")
    store = f"store={wide.store}"
    assert main(["check", str(plan), "to=vllm", store]) == 0
    assert "vllm loads and executes this plan" in capsys.readouterr().out
    mixed = uniform(wide, G64, q_proj=Precision("int", 8, 64, True))
    wrong = wide.plan(mixed, "torch").save(tmp_path / "wrong.json")
    assert main(["check", str(wrong), "to=vllm", store]) == 2
    assert "would fail" in capsys.readouterr().out
    assert main(["check", str(plan), "to=cloud", store]) == 2
    assert "llama-quantize" in capsys.readouterr().err


@pytest.mark.parametrize("to", list(export.RECIPES))
def test_recipes(wide: Wide, tmp_path: Path, to: str) -> None:
    plan = wide.plan(uniform(wide, G64), "vllm")
    export.export(plan, to, tmp_path / "out", str(wide.store))
    names = {f.name for f in (tmp_path / "out").iterdir()}
    if to == "llm-compressor":
        text = (tmp_path / "out" / "recipe.yaml").read_text()
        assert text.count("'re:^model") == 21 and "num_bits: 4" in text
    else:
        assert writer.TYPES_FILE in names
    assert "manifest.json" in names


def test_the_search_is_offered_only_what_runs() -> None:
    from optimizer.config import Optimize
    from optimizer.plan import Budget, Palette

    config = Optimize(model="stories", budget=Budget(bits=4), runtime=profile("vllm"))
    with pytest.raises(MezzotintError, match="palette=vllm"):
        config.check()
    replaced = Palette(bits=[2, 3, 4, 5, 6, 8, 16], symmetric=True)
    Optimize(
        model="stories", budget=Budget(bits=4), runtime=profile("vllm"), palette=replaced
    ).check()


MOE = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4},
}


def mixture(kind: str, path: Path, wide: Wide, **settings: object) -> Wide:
    """A random model with experts and `wide`'s tokenizer."""
    body = {"vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "num_experts_per_tok": 2, "bos_token_id": 1,
            "eos_token_id": 2, "sliding_window": None} | MOE[kind] | settings  # fmt: skip
    return random_model(kind, body, 0.15, path, wide)


@pytest.mark.parametrize("kind", ["mixtral"])  # transformers gives Qwen's its own tokenizer
@pytest.mark.slow
def test_llama_cpp_computes_our_experts(wide: Wide, tmp_path: Path, kind: str) -> None:
    model = mixture(kind, tmp_path / kind, wide)
    roles = {"down_proj": "q8_0", "w2": "q8_0"}
    choice = {
        x.name: Precision.ggml(roles.get(x.role, "q5_1" if x.block else "q4_0"))
        for x in model.inventory.layers
        if x.block is not None
    }
    plan = model.plan(choice, "llamacpp")
    verdict = export.export(plan, "gguf", tmp_path / "out", str(wide.store))
    file = tmp_path / "out" / writer.FILE
    assert file.stat().st_size == verdict.bytes
    engine = LlamaCpp(file)
    ours, reference = model.log_p(plan, IDS), model.log_p(None, IDS)
    noise, moved = [], []
    for row, prompt in enumerate(IDS.tolist()):
        for last in (6, 12, 19):
            theirs = engine.log_p(prompt[: last + 1])
            for found, p in ((noise, ours[row, last]), (moved, reference[row, last])):
                found.append(float((p.exp() * (p - theirs)).sum()))
    # the median: 8-bit activations may send a token to another expert where two are nearly tied
    assert statistics.median(noise) < min(0.002, 0.2 * statistics.median(moved))
    types = (tmp_path / "out" / writer.TYPES_FILE).read_text()
    assert r"^blk\.0\.ffn_gate_exps\.weight$=q4_0" in types and "ffn_gate_inp" not in types


@pytest.mark.slow
def test_experts_that_llama_cpp_would_weigh_otherwise(wide: Wide, tmp_path: Path) -> None:
    model = mixture("qwen3_moe", tmp_path / "odd", wide, norm_topk_prob=False)
    plan = model.plan({}, "llamacpp")
    found = export.check(plan, "gguf", str(wide.store)).errors[0]
    assert "llama.cpp" in found and "gguf=FILE" in found
