"""A Llama of random numbers in bf16, written a block at a time, with the stories model's tokenizer.

python experiments/14-scale/make.py FOLDER [1b|3b]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from optimizer.models.source import locate
from optimizer.store import Store

SIZES = {  # width, feed-forward, blocks, heads, heads of keys and values
    "1b": (2048, 5632, 22, 32, 4),
    "3b": (3072, 8192, 28, 24, 8),
}
WORDS = 32_000


def main(out: Path, size: str) -> None:
    width, inner, blocks, heads, pairs = SIZES[size]
    out.mkdir(parents=True)
    narrow = width // heads * pairs
    rng = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=rng)

    one = torch.ones(width, dtype=torch.bfloat16)
    where: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, out / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    for i in range(blocks):
        stem = f"model.layers.{i}"
        write(
            f"model-{i + 1:05}.safetensors",
            {
                f"{stem}.self_attn.q_proj.weight": made(width, width),
                f"{stem}.self_attn.k_proj.weight": made(narrow, width),
                f"{stem}.self_attn.v_proj.weight": made(narrow, width),
                f"{stem}.self_attn.o_proj.weight": made(width, width),
                f"{stem}.mlp.gate_proj.weight": made(inner, width),
                f"{stem}.mlp.up_proj.weight": made(inner, width),
                f"{stem}.mlp.down_proj.weight": made(width, inner),
                f"{stem}.input_layernorm.weight": one.clone(),
                f"{stem}.post_attention_layernorm.weight": one.clone(),
            },
        )
    write("model-00000.safetensors", {
        "model.embed_tokens.weight": made(WORDS, width),
        "model.norm.weight": one,
        "lm_head.weight": made(WORDS, width),
    })  # fmt: skip
    index = {"metadata": {}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": pairs, "vocab_size": WORDS, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1))
    stories = locate(
        "stories", Store.open(os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint"), print), None
    ).folder
    for file in stories.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    words = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8").split()
    order = torch.randint(len(words), (40, 200), generator=rng).tolist()
    text = "\n\n\n".join(" ".join(words[i] for i in row) for row in order)
    (out / "words.txt").write_text(text, encoding="utf-8")  # of random words, as the weights are


if __name__ == "__main__":
    main(Path(sys.argv[1]), (sys.argv[2:] or ["1b"])[0])
