"""Small models of every architecture: sizes by the names that configs give them, and what some
architectures ask for besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from optimizer.models.source import quiet

WIDTH = 64
# value -> the names of sizes that have it
SIZES: dict[int, str] = {
    WIDTH: """hidden_size n_embd d_model dim embed_dim word_embed_proj_dim embedding_size emb_dim
        dim_model hidden_dim output_dim lru_width width out_hidden_size text_hidden_size
        decoder_hidden_size kv_width embedding_dim pronunciation_embed_dim shape_embed_dim
        pronunciation_vocab_size shape_vocab_size adapter_dim""",
    2 * WIDTH: """attention_hidden_size max_position_embeddings n_positions n_ctx max_seq_len
        max_sequence_length model_max_length max_source_positions max_target_positions mamba_d_ssm
        d_inner""",
    96: """intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff
        d_ff dff intermediate_size_mlp feed_forward_size""",
    320: "vocab_size vocab_size_per_layer_input",
    32: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        shared_intermediate_size moe_shared_expert_intermediate_size dim_model_base q_lora_rank
        kv_lora_rank o_lora_rank qk_head_dim index_head_dim sliding_window attention_window_size
        attention_chunk_size window_size image_size""",
    16: """head_dim dim_head kv_channels d_kv attention_head_size global_head_dim qk_nope_head_dim
        qk_rope_head_dim v_head_dim mamba_d_state mamba_d_head mamba_headdim mamba_head_dim
        state_size ssm_state_size chunk_size mamba_chunk_size linear_key_head_dim
        linear_value_head_dim num_mel_bins attention_head_dim hidden_size_per_layer_input laurel_rank
        num_position_embeddings d_head""",
    8: "index_topk mamba_n_heads n_mamba_heads mamba_num_heads adapter_rank patch_size",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts mamba_dt_rank time_step_rank conv_kernel
        linear_num_value_heads mm_tokens_per_image""",
    3: "num_channels in_channels",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers depth num_key_value_heads num_kv_heads
        num_global_key_value_heads num_experts_per_tok top_k_experts moe_k moe_topk
        num_experts_per_token top_k index_n_heads mamba_expand linear_num_key_heads num_codebooks
        type_vocab_size altup_num_inputs eos_token_id""",
    1: """n_group topk_group n_shared_experts moe_num_shared_experts num_shared_expert
        num_shared_experts mamba_ngroups mamba_n_groups n_groups n_shared_head bos_token_id""",
    0: "num_kv_shared_layers pad_token_id",
}
SMALL = {name: value for value, names in SIZES.items() for name in names.split()}
ENDS = ("pad_token_id", "bos_token_id", "eos_token_id")  # given also where the default is None

OUT = "left out"  # in place of a value: the architecture takes none
LATENT = {"num_key_value_heads": 4}  # latent attention has no groups of heads
SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": LATENT,
    "dots3_note_text": LATENT,
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "kimi_linear": {
        **LATENT,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_num_heads": 4,
        "linear_head_dim": 16,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**LATENT, "num_layers": 2, "num_hidden_layers": 4, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "prophetnet": {"num_hidden_layers": OUT, "is_decoder": True},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "xlnet": {"n_ctx": OUT, "max_position_embeddings": OUT},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 2,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}

ENCODER = " encoder"  # ends the names of those that are built without a head that predicts tokens
ENCODERS = """albert bert camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie
    fnet nomic_bert rembert roberta roberta-prelayernorm xlm-roberta"""


def kinds() -> list[str]:
    """Model types of all causal language models."""
    return sorted(CAUSAL)


def encoders() -> list[str]:
    return [kind + ENCODER for kind in ENCODERS.split()]


def config(kind: str) -> Any:
    """Raises whatever the architecture's own code raises."""
    kind = kind.removesuffix(ENCODER)
    given = _sizes(AutoConfig.for_model(kind))
    _merge(given, SPECIAL.get(kind, {}))
    return AutoConfig.for_model(kind, **{k: v for k, v in given.items() if v is not OUT})


def _sizes(default: Any) -> dict[str, Any]:
    given = {name: value for name, value in SMALL.items() if _takes(default, name)}
    for name in getattr(type(default), "sub_configs", None) or {}:
        part = getattr(default, name, None)
        if hasattr(part, "to_dict"):
            given[name] = {**_sizes(part), "model_type": part.model_type}
    return given


def _takes(default: Any, name: str) -> bool:
    own = getattr(type(default), name, None)
    if isinstance(own, property) and own.fset is None:
        return False
    try:
        value = getattr(default, name)
    except AttributeError:
        return False
    except Exception:  # noqa: BLE001  a size that differs between layers
        return True
    return not isinstance(value, list | dict) and (value is not None or name in ENDS)


def _merge(given: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(given.get(name), dict):
            _merge(given[name], value)
        else:
            given[name] = value


def build(kind: str) -> Any:
    """The model with random weights, large enough for rounding to matter."""
    torch.manual_seed(7)
    with quiet():
        factory = AutoModel if kind.endswith(ENCODER) else AutoModelForCausalLM
        net = factory.from_config(config(kind)).float().eval()
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in net.named_parameters():
            _fill(name, value, rng)
        for name, value in net.named_buffers():
            if "correction_bias" in name:
                value.normal_(0, 0.3, generator=rng)
    return net


def _fill(name: str, value: Tensor, rng: torch.Generator) -> None:
    if any(word in name for word in ("A_log", "dt_bias", "norm", "ln_")) or name.endswith(".D"):
        return
    if value.ndim > 1 and "conv" not in name:
        value.normal_(0, 0.08, generator=rng)
    elif value.ndim == 1:
        value.normal_(0, 0.02, generator=rng)


transformers.utils.logging.disable_progress_bar()
