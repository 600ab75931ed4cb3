"""What GPTQ of experts that lie in one tensor brings, on a small Mixtral that is trained here.

python experiments/14-scale/gptq_experts.py OUT.csv [STEPS]

Three roundings of all layers of its blocks at 3 and 4 bits: to nearest; GPTQ with experts to nearest,
as before they were read; GPTQ of experts, too. KL to the reference on stories that neither training
nor calibration saw, mean and standard error over windows, for three seeds of the training.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest.mock import PropertyMock, patch

import numpy as np
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from experiments.rows import append
from optimizer.data.text import Data, Part
from optimizer.models.source import locate
from optimizer.models.stories import corpus
from optimizer.plan import Precision
from optimizer.quantization.methods import Gptq, Rtn, bind
from optimizer.stages.session import Session
from optimizer.store import Store

LENGTH, BATCH = 64, 16
PART = Part(sequences=32, length=LENGTH)


def train(folder: Path, words: Path, seed: int, steps: int) -> None:
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, output_router_logits=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(words)
    ids = [i for text in corpus(3000, 11) for i in [1, *tokenizer(text).input_ids, 2]]
    data = torch.tensor(ids)
    torch.manual_seed(seed)
    net = MixtralForCausalLM(config)
    optimiser = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(data) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([data[s : s + LENGTH] for s in starts])
        net(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    net.config.output_router_logits = False
    net.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(out: Path, steps: int) -> None:
    stories = locate("stories", Store.open("~/.cache/mezzotint", print), None).folder
    for seed in range(3):
        with tempfile.TemporaryDirectory() as scratch:
            folder, text = Path(scratch) / "model", Path(scratch) / "text.txt"
            train(folder, stories, seed, steps)
            text.write_text("\n\n\n".join(corpus(1200, 5)), encoding="utf-8")
            data = Data(source="text", path=str(text), calibration=PART, search=PART, heldout=PART)
            for name, settings, reads in (
                ("rtn", Rtn(), False),
                ("gptq, experts to nearest", Gptq(inputs="reference"), False),
                ("gptq", Gptq(inputs="reference"), True),
            ):
                session = Session.open(str(folder), data, f"{scratch}/{name}")
                layers = [x for x in session.inventory.layers if x.block is not None]
                for bits in (3, 4):
                    choice = {x.name: Precision("int", bits, 32) for x in layers}
                    shown = PropertyMock(return_value=reads)
                    with patch.object(Gptq, "reads_experts", shown):
                        scores = session.score(choice, "heldout", bind(settings, session))
                    each = scores.kl.mean(1)
                    error = each.std(ddof=1) / np.sqrt(len(each))
                    figures = {"kl": f"{each.mean():.5f}", "stderr": f"{error:.5f}"}
                    append(out, {"seed": seed, "bits": bits, "rounding": name} | figures, steps)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int((sys.argv[2:] or ["400"])[0]))
