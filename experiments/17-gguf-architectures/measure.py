"""Small random models of many architectures: does a GGUF of each hold the model's rows, and does
llama.cpp predict from it what transformers predicts?

measure.py SCRATCH [ARCHITECTURE ...]     appends to results.csv, which is replaced for the named ones
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as T
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.rows import read, stamped, write
from optimizer.errors import MezzotintError
from optimizer.formats.gguf import base, converter, llamacpp, placement
from optimizer.models.model import Model, take_inventory

HERE = Path(__file__).parent
RESULTS, POSITIONS, WORDS = HERE / "results.csv", [7, 30, 45, 59], 420
TEXT = "the quick brown fox jumps over the lazy dog; 12345 apples, def foo(x):\n    return x + 1\n"
SENTENCEPIECE = ("gemma", "gemma2", "gemma3_text", "phi3", "nemotron", "ernie4_5", "ernie4_5_moe")


def tokenizer() -> T.PreTrainedTokenizerFast:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS - 20,
        special_tokens=["<s>", "</s>", "<unk>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words.train_from_iterator([TEXT] * 20, trainer)
    return T.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentencepieces(folder: Path) -> None:
    """tokenizer.model, which the converter asks some architectures for."""
    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 20),
            model_writer=stream,
            model_type="bpe",
            vocab_size=WORDS - 20,
            byte_fallback=True,
            bos_id=0,
            eos_id=1,
            unk_id=2,
            hard_vocab_limit=False,
            minloglevel=2,
        )


def build(kind: str, settings: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    net = T.AutoModelForCausalLM.from_config(T.AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.ndim >= 2 and "A_log" not in name and "conv" not in name:
                value.normal_(0, 0.08)
            elif not name.endswith((".A_log", ".D", "dt_bias")):
                value.add_(torch.randn_like(value) * 0.05)
    net.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if kind in SENTENCEPIECE:
        sentencepieces(folder)


def measure(kind: str, settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    folder = scratch / kind
    file = folder / "base.gguf"
    build(kind, settings, folder)
    inventory = take_inventory(folder)
    converter.convert(folder, file, "bf16", kind)
    stored = Model.load(folder, inventory, full=False)
    tensors = {t.name: t for t in GGUFReader(file).tensors}
    read = lambda layer: stored.weight(layer.name)  # noqa: E731
    found = placement.place(tensors, inventory.layers, read, "BF16")
    row = {
        "tensors": len(found.pieces),
        "layers": len(inventory.layers),
        "left out": len(found.refused),
    }
    ids = torch.randint(3, 390, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = Model.load(folder, inventory).net(input_ids=ids).logits[0].float()
    log_p = torch.log_softmax(logits, -1).double().numpy()
    log_q = llamacpp.log_probabilities(file, ids[0].tolist(), POSITIONS, log_p.shape[1])
    worst = max(base.divergence(log_p[p], q) for p, q in zip(POSITIONS, log_q, strict=True))
    return row | {"worst kl": f"{worst:.5f}"}


def main(scratch: str, *kinds: str) -> None:
    T.logging.set_verbosity_error()
    settings = json.loads((HERE / "architectures.json").read_text())
    rows = {r["architecture"]: r for r in read(RESULTS)}
    for kind in kinds or settings:
        try:
            row = measure(kind, settings[kind], Path(scratch))
        except MezzotintError as error:
            row = {"refused": str(error).replace(f"{scratch}/", "")[:160]}
        except Exception as error:  # noqa: BLE001  the experiment's model can't be built or run
            said = f"not built: {type(error).__name__}: {error}"
            row = {"refused": said.replace(f"{scratch}/", "")[:160]}
        rows[kind] = stamped({"architecture": kind} | row, kind, settings[kind])
        print(rows[kind], flush=True)
        write(RESULTS, rows.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
