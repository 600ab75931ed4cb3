"""A text in a small model's own words. sampled.py FOLDER OUT.txt [DOCUMENTS] [TOKENS]; seeded."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, out: str, documents: str = "160", tokens: str = "300") -> None:
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder)
    start = torch.full((int(documents), 1), words.bos_token_id)
    found = net.generate(
        start, do_sample=True, top_k=0, min_new_tokens=int(tokens), max_new_tokens=int(tokens)
    )
    texts = words.batch_decode(found, skip_special_tokens=True)
    Path(out).write_text("\n\n".join(" ".join(x.split()) for x in texts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
