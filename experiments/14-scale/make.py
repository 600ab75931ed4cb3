"""A random Llama or Qwen3-MoE in bf16, written a block at a time, with the stories model's tokenizer.

python experiments/14-scale/make.py FOLDER [500m|1b|1.5b|3b|8b|moe [DEVICE]]
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from optimizer.models.source import locate
from optimizer.store import Store


@dataclass(frozen=True)
class Size:
    """Widths, blocks, heads, heads of keys and values, words, experts of a block."""

    width: int
    inner: int
    blocks: int
    heads: int
    pairs: int
    words: int = 32_000
    experts: int = 0


SIZES = {
    "tiny": Size(128, 256, 3, 4, 2),  # to try a script out
    "blocks": Size(4096, 14_336, 2, 32, 8, words=512),  # two of 8B's blocks
    "experts": Size(1024, 384, 2, 16, 4, words=512, experts=128),  # two of moe's
    "ends": Size(1536, 8960, 2, 12, 2, words=151_936),  # of 1.5b, as Qwen2.5's
    "500m": Size(1280, 3520, 24, 20, 4),
    "1b": Size(2048, 5632, 22, 32, 4),
    "1.5b": Size(1536, 8960, 28, 12, 2),
    "3b": Size(3072, 8192, 28, 24, 8),
    "8b": Size(4096, 14_336, 32, 32, 8, words=128_256),
    "moe": Size(1024, 384, 24, 16, 4, words=151_936, experts=128),  # 4 billion, .5 at work
}
CHOSEN = 8  # experts a token visits


def main(out: Path, size: str, device: str = "cpu") -> None:
    shape = SIZES[size]
    width, inner = shape.width, shape.inner
    out.mkdir(parents=True)
    narrow = width // shape.heads * shape.pairs
    rng = torch.Generator(device).manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        found = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return found.normal_(0, 0.02, generator=rng).cpu()

    one = torch.ones(width, dtype=torch.bfloat16)
    where: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, out / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    for i in range(shape.blocks):
        stem = f"model.layers.{i}"
        mlps = [f"{stem}.mlp.experts.{e}" for e in range(shape.experts)] or [f"{stem}.mlp"]
        sparse = {
            f"{stem}.mlp.gate.weight": made(shape.experts, width),
            f"{stem}.self_attn.q_norm.weight": one[: width // shape.heads].clone(),
            f"{stem}.self_attn.k_norm.weight": one[: width // shape.heads].clone(),
        }
        write(
            f"model-{i + 1:05}.safetensors",
            {
                f"{stem}.self_attn.q_proj.weight": made(width, width),
                f"{stem}.self_attn.k_proj.weight": made(narrow, width),
                f"{stem}.self_attn.v_proj.weight": made(narrow, width),
                f"{stem}.self_attn.o_proj.weight": made(width, width),
                **{f"{mlp}.gate_proj.weight": made(inner, width) for mlp in mlps},
                **{f"{mlp}.up_proj.weight": made(inner, width) for mlp in mlps},
                **{f"{mlp}.down_proj.weight": made(width, inner) for mlp in mlps},
                **(sparse if shape.experts else {}),
                f"{stem}.input_layernorm.weight": one.clone(),
                f"{stem}.post_attention_layernorm.weight": one.clone(),
            },
        )
    write("model-00000.safetensors", {
        "model.embed_tokens.weight": made(shape.words, width),
        "model.norm.weight": one,
        "lm_head.weight": made(shape.words, width),
    })  # fmt: skip
    index = {"metadata": {}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if shape.experts else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if shape.experts else "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.pairs,
        "head_dim": width // shape.heads,
        "vocab_size": shape.words,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if shape.experts:
        config |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": CHOSEN,
            "moe_intermediate_size": inner,
            "norm_topk_prob": True,
        }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    stories = locate(
        "stories", Store.open(os.environ.get("MEZZOTINT_STORE", "~/.cache/mezzotint"), print), None
    ).folder
    for file in stories.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    words = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8").split()
    draws = torch.Generator().manual_seed(1)
    order = torch.randint(len(words), (200, 400), generator=draws).tolist()
    text = "\n\n\n".join(" ".join(words[i] for i in row) for row in order)
    (out / "words.txt").write_text(text, encoding="utf-8")  # of random words, as the weights are


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(sys.argv[2:] or ["1b"]))
