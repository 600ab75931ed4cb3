"""What the tests of exports share: a random Llama whose rows take every engine's blocks."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from optimizer.models.model import Model, take_inventory
from optimizer.models.source import locate, quiet
from optimizer.plan import Inventory, Layer, Plan, Precision, assemble
from optimizer.quantization.uniform import Nearest
from optimizer.store import Store

WORDS = 288


@dataclass(frozen=True)
class Wide:
    """A random Llama whose rows take K-quants."""

    folder: Path
    store: Path
    model: Model
    inventory: Inventory
    fingerprint: str

    def plan(self, choice: Mapping[str, Precision], runtime: str) -> Plan:
        return assemble(
            self.inventory,
            self.inventory.scoped(["blocks"]),
            choice,
            model={"name": str(self.folder), "fingerprint": self.fingerprint},
            runtime=runtime,
            quantizer={"name": "rtn"},
            predicted={"kl": 0.1, "stderr": 0.01},
        )

    def log_p(self, plan: Plan | None, ids: torch.Tensor) -> torch.Tensor:
        choice = {} if plan is None else plan.choice
        with self.model.rounded(Nearest(), choice), torch.inference_mode():
            return torch.log_softmax(self.model.net(input_ids=ids).logits, -1)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    path = tmp_path_factory.mktemp("wide")
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    net = LlamaForCausalLM(config)
    for value in net.parameters():
        if value.ndim == 2:
            torch.nn.init.normal_(value, std=0.06)
    fast = byte_tokenizer()
    with quiet():
        net.half().save_pretrained(path)
        fast.save_pretrained(path)
    store = tmp_path_factory.mktemp("store")
    inventory = take_inventory(path)
    fingerprint = locate(str(path), Store(store)).fingerprint
    return Wide(path, store, Model.load(path, inventory), inventory, fingerprint)


def byte_tokenizer(
    before: pre_tokenizers.PreTokenizer | None = None, size: int = WORDS - 8
) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text as GPT-2 does, or as `before`."""
    words = Tokenizer(models.BPE(unk_token=None))
    words.pre_tokenizer = before or pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    text = ["the quick brown fox and the lazy dog, then another one: 12345 hello world"] * 3
    kept = ["<unk>", "<s>", "</s>"]
    words.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=size, special_tokens=kept, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def random_model(kind: str, body: dict, std: float, path: Path, wide: Wide) -> Wide:
    """A seeded model of another architecture, with `wide`'s tokenizer."""
    torch.manual_seed(5)
    with quiet():
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **body))
        for value in net.parameters():
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=std)
        net.half().save_pretrained(path)
    for file in wide.folder.glob("tokenizer*"):
        shutil.copy(file, path)
    return opened_with(wide, path)


def opened_with(wide: Wide, path: Path) -> Wide:
    """The folder `path`, in `wide`'s store."""
    inventory = take_inventory(path)
    fingerprint = locate(str(path), Store(wide.store)).fingerprint
    return Wide(path, wide.store, Model.load(path, inventory), inventory, fingerprint)


class LlamaCpp:
    """A GGUF file in llama.cpp: a server inside this process, on the loopback address."""

    def __init__(self, file: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), 128, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity = False, 0
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, body: Mapping[str, object]) -> dict:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def log_p(self, prompt: list[int]) -> torch.Tensor:
        """Of the next word [WORDS]."""
        body = {"prompt": prompt, "n_predict": 1, "n_probs": WORDS, "logit_bias": [[PLAIN, 1e4]]}
        top = self.ask("completion", body)["completion_probabilities"][0]["top_logprobs"]
        return torch.tensor([t["logprob"] for t in sorted(top, key=lambda t: t["id"])])


PLAIN = 70  # a letter: the server tells probabilities only with what it can write
IDS = torch.arange(5, 85).view(4, 20)
FUSED = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2}


def dealt(layers: tuple[Layer, ...], kinds: list[Precision]) -> dict[str, Precision]:
    """Precisions in turn, the same for what vLLM joins."""
    return {
        x.name: kinds[(4 * x.block + FUSED.get(x.role, 3)) % len(kinds)]
        for x in layers
        if x.block is not None
    }


def uniform(wide: Wide, precision: Precision, **other: Precision) -> dict[str, Precision]:
    return {
        x.name: other.get(x.role, precision) for x in wide.inventory.layers if x.block is not None
    }


G64 = Precision("int", 4, 64, True)
