"""Encoders: every measure against its definition, padding that doesn't count, and the commands."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

import optimizer
from optimizer.data import short_texts
from optimizer.data.short_texts import PADDING, TEXTS
from optimizer.data.text import Data, Part, Windows
from optimizer.errors import ModelError, TextError
from optimizer.metrics import divergence
from optimizer.metrics import embeddings as encoder
from optimizer.metrics.embeddings import NEAREST, Teacher
from optimizer.models.embedding import TEMPERATURE, embed
from optimizer.models.model import Model, take_inventory
from optimizer.models.source import fingerprint, is_encoder, pooling, quiet
from optimizer.plan import Precision
from optimizer.quantization.uniform import Nearest
from optimizer.sensitivity import Task
from optimizer.sensitivity.fisher import diagonal, directional
from optimizer.sensitivity.slope import slopes
from optimizer.stages.prefix import Prefix, Shortcut
from optimizer.store import Store
from tests.conftest import Command

WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in "rstx"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
CLS = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}


def describe(folder: Path, flags: dict[str, Any], *more: str) -> Path:
    """sentence-transformers' files; more: further modules."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", **{f"2_{kind}": kind for kind in more}}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"}
               for path, kind in kinds.items()]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    return folder


def live(net: Any) -> Any:
    """Weights so large that texts differ."""
    torch.manual_seed(3)
    for value in net.parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=0.12)
    return net


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of random weights with a tokenizer of 160 words."""
    folder = tmp_path_factory.mktemp("bert")
    names = SPECIAL + WORDS
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    net = BertModel(
        BertConfig(
            vocab_size=len(names), hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=128, max_position_embeddings=64, pad_token_id=0,
        )
    )  # fmt: skip
    live(net).save_pretrained(folder)
    return describe(folder, MEAN)


@pytest.fixture(scope="session")
def model(bert: Path) -> Model:
    return Model.load(bert, take_inventory(bert))


def windows(count: int = 3, seed: int = 0) -> Windows:
    """Texts of 3 to 12 words, padded to 16 columns: more than the longest needs."""
    rng = np.random.default_rng(seed)
    ids = np.full((count * TEXTS, 16), PADDING, dtype=np.int64)
    for row in ids:
        words = rng.integers(len(SPECIAL), len(SPECIAL) + len(WORDS), rng.integers(3, 13))
        row[: len(words) + 2] = [2, *words, 3]
    return Windows(ids.reshape(count, -1), np.arange(count))


def alone(model: Model, text: np.ndarray, how: str = "mean") -> np.ndarray:
    """The embedding of one text without padding, by the definition, in float64."""
    with torch.no_grad():
        ids = torch.from_numpy(text[text >= 0])[None]
        hidden = model.net(input_ids=ids).last_hidden_state[0].double().numpy()
    z = hidden.mean(0) if how == "mean" else hidden[0]
    return z / np.linalg.norm(z)


def embeddings(model: Model, text: Windows) -> np.ndarray:
    return np.array([alone(model, row) for row in text.ids.reshape(len(text.ids) * TEXTS, -1)])


LOW = Precision("int", 3, 32)


def rounded(model: Model, precision: Precision = LOW) -> dict[str, Precision]:
    return {x.name: precision for x in model.inventory.layers if x.block is not None}


# ---------------------------------------------------------------- measures


@pytest.mark.parametrize("how", ["mean", "cls"])
def test_padding_does_not_change_an_embedding(model: Model, how: str) -> None:
    rows = windows(1).ids.reshape(TEXTS, -1)
    with torch.no_grad():
        found = embed(model.net, torch.from_numpy(rows), how).numpy()
    expected = np.array([alone(model, row, how) for row in rows])
    assert np.allclose(found, expected, atol=1e-5)


def test_scores_are_what_they_are_defined_to_be(model: Model) -> None:
    text = windows()
    teacher = Teacher(model.net, text, "mean")
    before = embeddings(model, text)
    with model.rounded(Nearest(), rounded(model)):
        scores = teacher.score(model.net)
        after = embeddings(model, text)
    assert scores.flip.max() == 1 and scores.overlap.min() < 1  # or nothing is compared
    for w in range(3):
        own = range(w * TEXTS, (w + 1) * TEXTS)
        changes = []
        for n, i in enumerate(own):
            others = [j for j in own if j != i]
            c, d = before[i] @ before[others].T, after[i] @ after[others].T
            p, q = np.exp(c / TEMPERATURE), np.exp(d / TEMPERATURE)
            p, q = p / p.sum(), q / q.sum()
            assert scores.kl[w, n] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-3, abs=1e-5)
            changes += list(abs(d - c))
            everyone = [j for j in range(3 * TEXTS) if j != i]
            near = sorted(everyone, key=lambda j: -before[i] @ before[j])
            now = sorted(everyone, key=lambda j: -after[i] @ after[j])
            assert scores.flip[w, n] == (near[0] != now[0])
            shared = len(set(near[:NEAREST]) & set(now[:NEAREST]))
            assert scores.overlap[w, n] == pytest.approx(shared / NEAREST)
        assert np.allclose(scores.cosine[w], changes, atol=1e-5)


def test_a_trial_and_a_certificate_measure_the_same(model: Model) -> None:
    text = windows()
    teacher = Teacher(model.net, text, "mean")
    with model.rounded(Nearest(), rounded(model)):
        scores = teacher.score(model.net)
        single = [teacher.window(model.net, w) for w in range(3)]
    assert np.allclose(single, scores.kl.mean(1), rtol=1e-4)
    assert teacher.score(model.net).mean_kl < 1e-9  # put back


def test_the_reference_against_itself_is_nearly_the_same(model: Model) -> None:
    found = Teacher(model.net, windows(), "mean").noise(model.net)
    assert 0 <= found["reference, one text at a time"].mean_kl < 1e-7
    assert 1e-6 < found["reference in bf16"].mean_kl < 0.01


def test_the_shortcut_gives_what_a_whole_pass_gives(model: Model) -> None:
    text, choice = windows(), rounded(model)
    teacher = Teacher(model.net, text, "mean")
    shortcut = Shortcut(model, teacher)
    last = {name: p for name, p in choice.items() if ".2." in name}
    assert shortcut._blocks  # BERT's blocks are a chain
    whole = Prefix({})
    for w in range(3):
        shortcut.window(w, None, whole)
    with model.rounded(Nearest(), last):
        for w in range(3):
            expected = teacher.window(model.net, w)
            assert expected > 1e-4
            assert shortcut.window(w, whole, Prefix(last)) == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- sensitivity


def task(model: Model, *columns: Precision) -> Task:
    names = list(rounded(model))
    fitted = {(n, c.name): c for n in names for c in columns}
    return Task(tuple((n,) for n in names), tuple(c.name for c in columns), fitted, Nearest())


@pytest.mark.slow
def test_fisher_foretells_the_loss_of_one_layer(model: Model) -> None:
    """At 6 bits the loss is quadratic; the directional estimate is unbiased for it."""
    text, six = windows(60, seed=1), Precision("int", 6, 32)
    wanted = task(model, six)
    predicted = directional(model, wanted, text.ids, [0])[:, 0]
    teacher = divergence.teacher(model, text)
    measured = []
    for group in wanted.groups:
        with model.rounded(Nearest(), {group[0]: six}):
            measured.append(teacher.score(model.net).mean_kl)
    assert predicted.sum() == pytest.approx(sum(measured), rel=0.2)
    assert np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.9


def test_slopes_are_the_derivative_of_the_measured_loss(model: Model) -> None:
    text, wanted = windows(), task(model, LOW)
    teacher = Teacher(model.net, text, "mean")
    layer = model.layers[wanted.groups[4][0]]
    with model.rounded(Nearest(), rounded(model)):
        own = model.weight(layer.name).clone()
        found = slopes(model, wanted, teacher, [np.arange(3)])[0, 4, 0]
        losses = []
        for step in (0.01, -0.01):
            model.net.get_parameter(layer.parameter).data.copy_(own * (1 + step))
            losses.append(np.mean([teacher.window(model.net, w) for w in range(3)]))
        model.net.get_parameter(layer.parameter).data.copy_(own)
    assert found == pytest.approx((losses[0] - losses[1]) / 0.02, rel=0.02)  # <g, W'>, W' rounded


# ---------------------------------------------------------------- texts


def lines(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 9))) for _ in range(count)]


def small(path: Path, sequences: int = 2, length: int = 16) -> Data:
    part = Part(sequences=sequences, length=length)
    return Data(source="text", path=str(path), calibration=part, search=part, heldout=part)


def rows(found: Windows) -> list[tuple[int, ...]]:
    return [
        tuple(i for i in row if i >= 0)
        for row in found.ids.reshape(-1, found.ids.shape[1] // TEXTS)
    ]


@pytest.fixture(scope="session")
def tokenizer(bert: Path) -> Any:
    from optimizer.models.tokenizer import load_tokenizer

    return load_tokenizer(bert)


def test_no_text_and_no_document_is_in_two_parts(tokenizer: Any, tmp_path: Path) -> None:
    given = lines(150)
    file = tmp_path / "my.txt"
    file.write_text("\n\n".join("\n".join(given[i : i + 3]) for i in range(0, 150, 3)))
    found = short_texts.cut(small(file), tokenizer).parts
    owner = {tuple(tokenizer(line)["input_ids"]): n // 3 for n, line in enumerate(given)}
    parts = {name: rows(windows) for name, windows in found.items()}
    assert all(len(set(part)) == 2 * TEXTS for part in parts.values())
    documents = [{owner[row] for row in part} for part in parts.values()]
    assert not documents[0] & documents[1] and not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    again = short_texts.cut(small(file), tokenizer).parts
    assert all(np.array_equal(found[name].ids, again[name].ids) for name in found)


def test_a_repeated_text_counts_once(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "my.txt"
    file.write_text("\n".join(lines(75) * 2))
    assert short_texts.cut(small(file), tokenizer).texts == len(set(lines(75)))


def test_a_text_that_is_too_long_is_cut_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    long = " ".join(WORDS[:30])
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in [*lines(71), long]))
    cut = short_texts.cut(small(file), tokenizer)
    assert cut.shortened == 1
    longest = max((row for part in cut.parts.values() for row in rows(part)), key=len)
    assert len(longest) == 16 and longest[0] == 2 and longest[-1] == 3
    assert "1 were longer" in short_texts.told(cut.texts, cut.shortened, cut.skipped)


def test_too_few_texts(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "my.txt"
    file.write_text("\n".join(lines(60)))
    with pytest.raises(TextError, match=r"2 batches, 24 different texts.*of the 60 texts it got"):
        short_texts.cut(small(file), tokenizer)


def test_an_empty_text(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text("\n \n")
    with pytest.raises(TextError, match="holds no text"):
        short_texts.cut(small(tmp_path / "my.txt"), tokenizer)


def test_the_own_sentences_are_enough_for_the_defaults() -> None:
    """Counted without a tokenizer: English alone, for encoders that know no other language."""
    english = {t for d in short_texts.own() for t in d if not any("а" <= c <= "я" for c in t)}
    needed = sum(part.sequences for part in Data().parts.values()) * TEXTS
    assert len(english) > 1.1 * needed


# ---------------------------------------------------------------- where it comes from


def test_pooling_is_read(bert: Path, tmp_path: Path) -> None:
    assert is_encoder(bert) and pooling(bert) == "mean"
    copy = Path(shutil.copytree(bert, tmp_path / "copy"))
    assert pooling(describe(copy, CLS)) == "cls"
    store = Store(tmp_path / "store")
    assert fingerprint(copy, store) != fingerprint(bert, store)  # another geometry, another model


@pytest.mark.parametrize(
    ("flags", "more", "words"),
    [
        ({"pooling_mode_max_tokens": True}, [], "max_tokens pooling"),
        (MEAN | CLS | {"pooling_mode_mean_tokens": True}, [], "cls_token and mean_tokens"),
        (MEAN, ["Dense"], "module Dense"),
    ],
)
def test_another_pooling_is_refused(
    bert: Path, tmp_path: Path, flags: dict[str, Any], more: list[str], words: str
) -> None:
    copy = describe(Path(shutil.copytree(bert, tmp_path / "copy")), flags, *more)
    with pytest.raises(ModelError, match=words):
        pooling(copy)


@pytest.mark.parametrize(
    ("named", "expected"),
    [(["BertModel"], True), (["BertForMaskedLM"], True), (["BertLMHeadModel"], False)],
)
def test_what_counts_as_an_encoder(
    bert: Path, tmp_path: Path, named: list[str], expected: bool
) -> None:
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": named}))
    assert is_encoder(tmp_path) is expected


SIZES = {
    "vocab_size": 200, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 66, "pad_token_id": 1,
}  # fmt: skip
DISTIL = {
    "vocab_size": 200, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128,
    "max_position_embeddings": 66, "pad_token_id": 1,
}  # fmt: skip
ENDS = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}


@pytest.mark.parametrize(
    ("kind", "sizes", "layers"),
    [
        ("roberta", SIZES, 12),
        ("mpnet", SIZES, 12),
        ("distilbert", DISTIL, 12),
        ("modernbert", SIZES | ENDS, 8),
        ("albert", SIZES | {"embedding_size": 32}, 6),  # its blocks share their weights
    ],
)
def test_other_encoders(kind: str, sizes: dict[str, Any], layers: int, tmp_path: Path) -> None:
    """Their layers are found, and rounding them moves embeddings as the table says, roughly."""
    with quiet():
        live(AutoModel.from_config(AutoConfig.for_model(kind, **sizes))).save_pretrained(tmp_path)
    net = Model.load(tmp_path, take_inventory(tmp_path))
    text, five = windows(8), Precision("int", 5, 32)
    choice = {x.name: five for x in net.inventory.layers if x.block is not None}
    assert len(choice) == layers
    names = tuple(choice)
    wanted = Task((names,), (five.name,), {(n, five.name): five for n in names}, Nearest())
    predicted = diagonal(net, wanted, text.ids, [0])[0, 0]
    teacher = divergence.teacher(net, text)
    with net.rounded(Nearest(), choice):
        measured = teacher.score(net.net).mean_kl
    print(kind, measured, predicted)
    assert measured > 1e-4 and 0.5 < measured / predicted < 2


def test_the_pooler_takes_no_part(bert: Path, model: Model) -> None:
    assert not any("pooler" in layer.name for layer in take_inventory(bert).layers)
    assert model.net.pooler is None


# ---------------------------------------------------------------- the commands

QUICK = [
    "data.calibration.sequences=6", "data.search.sequences=8", "data.heldout.sequences=8",
    "data.calibration.length=16", "data.search.length=16", "data.heldout.length=16",
    "palette.group_size=32", "sensitivity.chunks=3", "proof.random=2", "wandb=off",
]  # fmt: skip


@pytest.fixture
def optimized(mezzotint: Command, bert: Path, tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "my.txt").write_text("\n".join(lines(320)))

    def call(*more: str) -> Any:
        return mezzotint(
            "optimize", f"model={bert}", "budget.bits=5", "data=text", "data.path=my.txt",
            "hydra.run.dir=run", *QUICK, *more,
        )  # fmt: skip

    return call


def test_optimize_show_apply_evaluate_and_load(
    optimized: Callable[..., Any], mezzotint: Command, tmp_path: Path
) -> None:
    ended = optimized("search=moves", "search.tokens=12000", "meaning.cvar=0.5")
    assert ended.code == 0, ended.err
    plan = optimizer.Plan.load(tmp_path / "run" / "plan.json")
    row = plan.certificate["rows"][0]
    assert {"cosine", "cosine_p99", "overlap"} <= row.keys() and "perplexity" not in row
    assert plan.certificate["unit"] == "text" and plan.certificate["tokens"] == 8 * TEXTS
    shown = mezzotint("show", "run/plan.json")
    assert shown.code == 0
    report = (tmp_path / "run" / "report.html").read_text()
    assert "10 nearest" in shown.out and "10 nearest" in report
    for said in (ended.out, shown.out, report):
        assert "perplexity" not in said
        assert not re.search(r"nats.per.token|per token|next-token|\d documents", said)
    assert mezzotint("apply", "run/plan.json", "out=packed").code == 0
    file = tmp_path / "packed" / "packed.safetensors"
    assert file.stat().st_size == plan.bytes["total"]
    small = ["data=text", "data.path=my.txt", *(q for q in QUICK if q.startswith("data"))]
    for wrong in ("speed=8", "generate=8", "domains=[code]"):
        assert mezzotint("evaluate", "model=packed", wrong, *small).code == 2
    evaluated = mezzotint("evaluate", "model=packed", *small)
    assert evaluated.code == 0, evaluated.err
    assert f"{row['kl']['value']:.4f}" in evaluated.out and "nearest" in evaluated.out
    net = optimizer.load(tmp_path / "packed")
    text = windows()
    with torch.no_grad():
        ids = torch.from_numpy(text.ids[0]).view(TEXTS, -1)
        assert embed(net, ids, "mean").shape == (TEXTS, 64)


def test_the_packed_encoder_computes_what_was_certified(
    optimized: Callable[..., Any], mezzotint: Command, model: Model, tmp_path: Path
) -> None:
    assert optimized("search=exact").code == 0
    assert mezzotint("apply", "run/plan.json", "out=packed").code == 0
    plan = optimizer.Plan.load(tmp_path / "run" / "plan.json")
    net = optimizer.load(tmp_path / "packed")
    ids = torch.from_numpy(windows().ids[0]).view(TEXTS, -1)
    with model.rounded(Nearest(), plan.choice), torch.no_grad():
        expected = encoder.embed(model.net, ids, "mean")
    with torch.no_grad():
        assert torch.allclose(encoder.embed(net, ids, "mean"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["proof.generate=8"], ["is an encoder", "writes no text"]),
        (["proof.domains=[long]"], ["is an encoder", "has no domains"]),
        (["proof.domains=[code]"], ["is an encoder", "has no domains"]),
        (["budget.kv=8"], ["keeps no cache"]),
        (["quantizer=gptq"], ["quantizer=rtn"]),
        (["search=front", "search.third=read"], ["is an encoder", "search.third"]),
        (["meaning=probes"], ["is an encoder", "meaning.probes=0"]),
        (["meaning=domains"], ["is an encoder", "meaning.domain=0"]),
        (["data.calibration.sequences=200"], ["200 batches"]),
    ],
)
def test_what_an_encoder_cannot_do(
    optimized: Callable[..., Any], tmp_path: Path, more: list[str], words: list[str]
) -> None:
    ended = optimized(*more)
    assert ended.code == 2 and not (tmp_path / "run" / "plan.json").exists()
    assert all(word in ended.err for word in words), ended.err
    assert len(ended.err.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_sweep_is_compared_in_nats_per_text(
    optimized: Callable[..., Any], mezzotint: Command, tmp_path: Path
) -> None:
    more = ["search=exact", "proof.certify=false", "hydra.sweep.dir=sweep"]
    assert optimized("budget.bits=4,5", *more, "-m").code == 0
    ended = mezzotint("compare", "sweep")
    assert ended.code == 0, ended.err
    page = (tmp_path / "sweep" / "compare.html").read_text()
    assert "KL, nats per text" in page and "per token" not in page


def test_commands_for_language_models(
    optimized: Callable[..., Any], mezzotint: Command, tmp_path: Path
) -> None:
    assert optimized("search=exact", "proof.certify=false").code == 0
    for call in (
        ["probe", "run/plan.json"],
        ["blur", "run/plan.json", "my.txt"],
        ["export", "run/plan.json", "to=vllm", "out=there"],
        ["check", "run/plan.json", "to=gguf"],
        ["fit", "run"],
    ):
        ended = mezzotint(*call)
        assert ended.code == 2 and "encoder" in ended.err, (call, ended)
        assert f"mezzotint {call[0]}`" in ended.err
    assert not (tmp_path / "there").exists()


def test_stored_scores_come_back_as_what_they_were(model: Model) -> None:
    scores = Teacher(model.net, windows(), "mean").score(model.net)
    assert isinstance(divergence.stored(scores.arrays()), encoder.Scores)
