"""Tiny random models of many architectures."""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
}
# name: (model type, settings over BASE, MoE layers, scoring)
MODELS: dict[str, tuple[str, dict[str, Any], list[int], str]] = {
    "qwen3_moe": (
        "qwen3_moe",
        {"decoder_sparse_step": 1, "mlp_only_layers": [1], "norm_topk_prob": True},
        [0, 2],
        "softmax",
    ),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK, [1, 2], "sigmoid"),
    "deepseek_v3 with groups": (
        "deepseek_v3",
        {**DEEPSEEK, "n_group": 4, "topk_group": 2},
        [1, 2],
        "sigmoid",
    ),
    "mixtral": ("mixtral", {"num_local_experts": 8}, [0, 1, 2], "softmax"),
    "olmoe": ("olmoe", {}, [0, 1, 2], "softmax"),
    "gpt_oss": (
        "gpt_oss",
        {"num_hidden_layers": 2, "num_local_experts": 8, "sliding_window": 16},
        [0, 1],
        "softmax",
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "hybrid_override_pattern": ["M", "*", "E", "E"],
            "attention_bias": False,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "mamba_proj_bias": False,
            "ssm_state_size": 8,
            "conv_kernel": 4,
            "n_groups": 1,
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-5,
            "use_bias": False,
            "use_conv_bias": True,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 32,
            "moe_latent_size": 48,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        [2, 3],
        "sigmoid",
    ),
    "phixtral": (
        "phixtral",
        {"num_vocab": 128, "model_dim": 64, "num_heads": 2, "num_layers": 2, "rotary_dim": 16},
        [0, 1],
        "softmax",
    ),
    "llama4": (
        "llama4",
        {
            "text_config": {
                **BASE,
                "model_type": "llama4_text",
                "num_hidden_layers": 4,
                "attention_bias": False,
                "attention_chunk_size": 64,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 96,
                "num_experts_per_tok": 1,
                "num_local_experts": 8,
                "rope_scaling": None,
                "use_qk_norm": False,
            }
        },
        [1, 3],
        "softmax",
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            "global_head_dim": 16,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 16,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        [0, 1, 2],
        "softmax",
    ),
    "longcat_flash": (
        "longcat_flash",
        {
            **DEEPSEEK,
            "attention_method": "MLA",
            "zero_expert_type": "identity",
            "moe_topk": 3,
            "zero_expert_num": 4,
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "attention_bias": False,
        },
        [0, 1],
        "",
    ),
}


def build(name: str) -> nn.Module:
    """A tiny model whose parameters are all random: zeros would make every choice a tie."""
    model_type, settings, _, _ = MODELS[name]
    arch = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(1)
    model = arch.Model(arch.ModelArgs.from_dict({**BASE, "model_type": model_type, **settings}))
    model.update(tree_map_with_path(_randomise, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()


def _randomise(path: str, value: mx.array) -> mx.array:
    if not mx.issubdtype(value.dtype, mx.floating):
        return value
    scale = 0.1 if any(s in path for s in ("bias", "norm", "scale")) else 0.3
    return value + scale * mx.random.normal(value.shape)
