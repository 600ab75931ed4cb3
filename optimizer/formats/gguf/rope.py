"""Scaled rotary positions, as a GGUF file says them: a context that was stretched after training.

linear and yarn are metadata (Peng et al., arXiv:2309.00071); llama3 is a tensor `rope_freqs.weight`
[head width / 2] by which llama.cpp divides the frequencies, and which it reads for `llama` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

FREQUENCIES = "rope_freqs.weight"
KNOWN = ("default", "linear", "llama3", "yarn")


def parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and the rest, in the words of transformers 5; checkpoints written by 4
    have `rope_scaling` with `type` or `rope_type`, and rope_theta outside."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_type", found.pop("type", None) or "default")
    found.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    return found


def check(config: Mapping[str, Any], architecture: str) -> None:
    """Raises ModelError for positions that the file has no word for."""
    rope = parameters(config)
    kind = rope["rope_type"]
    odd = None
    if kind not in KNOWN or (kind == "llama3" and architecture != "llama"):
        odd = f"this model's are scaled as {kind}"
    elif float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1) != 1:
        odd = "this model turns only a part of each head"
    elif kind == "yarn" and not _plain_yarn(rope):
        odd = "this model's yarn has an attention factor of its own"
    if odd:
        raise ModelError(
            f"The GGUF converter knows rotary embeddings that are plain or scaled as "
            f"{', '.join(KNOWN[1:])} (llama3 for Llama only), and {odd}. Convert it with llama.cpp's "
            "own script and take to=llama-quantize."
        )


def _plain_yarn(rope: Mapping[str, Any]) -> bool:
    """llama.cpp multiplies by 1 + 0.1 ln(factor), as transformers does unless told otherwise."""
    own, factor = rope.get("attention_factor"), rope.get("factor")
    told = own is not None and not math.isclose(own, 1 + 0.1 * math.log(factor or 1), rel_tol=1e-6)
    return bool(factor) and not told and not rope.get("mscale") and rope.get("truncate", True)


def add_fields(writer: Any, config: Mapping[str, Any]) -> None:
    rope = parameters(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        original = (
            rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
        writer.add_rope_scaling_orig_ctx_len(int(original))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def has_frequencies(config: Mapping[str, Any]) -> bool:
    return bool(parameters(config)["rope_type"] == "llama3")


def frequencies(folder: Path) -> Tensor:
    """What the plain frequencies are divided by [head width / 2], from transformers' own."""
    import torch
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: Any = AutoConfig.from_pretrained(folder)
    rope = config.rope_parameters
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
    return plain / scaled
