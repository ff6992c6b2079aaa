"""The routing hook and the router reading, on tiny random models of many architectures."""

import importlib
import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_od_moe.model_routers import read_routers
from mlx_od_moe.moe import find_moe_layers, load_model, record_routing

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
TOKENS = mx.array(np.random.default_rng(0).integers(0, 128, (2, 40)))


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


@pytest.mark.parametrize("name", MODELS)
def test_recording_sees_every_moe_layer_and_changes_no_output(name: str) -> None:
    model = build(name)
    layers = find_moe_layers(model)
    assert [layer.index for layer in layers] == MODELS[name][2]
    classes = [type(module) for _, module in model.named_modules()]
    names = [path for path, _ in tree_flatten(model.parameters())]
    plain = model(TOKENS)
    with record_routing(model) as recorder:
        recorded = model(TOKENS)
        routings = recorder.take()
        assert recorder.take() == []
        assert [path for path, _ in tree_flatten(model.parameters())] == names
    assert mx.array_equal(plain, recorded).item()
    assert [type(module) for _, module in model.named_modules()] == classes
    assert [routing.layer for routing in routings] == MODELS[name][2]
    for routing, layer in zip(routings, layers, strict=True):
        assert routing.hidden.size == TOKENS.size * BASE["hidden_size"]
        assert routing.expert_ids.size == TOKENS.size * layer.top_k
        assert layer.num_experts == (4 if name == "phixtral" else 8)
        assert routing.expert_ids.max().item() < layer.num_experts + 4 * (name == "longcat_flash")


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][3]])
def test_the_routers_own_scores_rank_first_what_the_model_chose(name: str) -> None:
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routers = read_routers(model, TOKENS[:1])
    assert list(routers) == MODELS[name][2]
    with record_routing(model) as recorder:
        model(TOKENS)
        routings = recorder.take()
    for routing in routings:
        router = routers[routing.layer].router
        assert router.config.scoring == MODELS[name][3]
        scores = np.array(router.scores(routing.hidden.reshape(-1, BASE["hidden_size"])))
        chosen = np.array(routing.expert_ids).reshape(len(scores), -1)
        ranked = np.argsort(-scores, axis=1)[:, : chosen.shape[1]]
        assert np.array_equal(np.sort(ranked, axis=1), np.sort(chosen, axis=1))


def test_correction_and_groups_are_read_where_a_model_has_them() -> None:
    entry = read_routers(build("deepseek_v3 with groups"), TOKENS[:1])[1]
    assert (entry.router.config.n_group, entry.router.config.topk_group) == (4, 2)
    assert mx.abs(entry.router.correction).max().item() > 0


def test_the_norm_is_the_one_that_made_the_blocks_input() -> None:
    model = build("qwen3_moe")
    for layer, entry in read_routers(model).items():
        expected = model.layers[layer].post_attention_layernorm.weight
        assert entry.norm is not None
        assert mx.allclose(entry.norm, expected, rtol=1e-5).item()
    # gemma4's router sees the residual stream itself, phixtral's a LayerNorm: no RMSNorm weight.
    for name in ("gemma4_text", "phixtral"):
        assert all(entry.norm is None for entry in read_routers(build(name)).values())


def test_a_quantised_router_is_read_dequantised() -> None:
    model = build("qwen3_moe")
    nn.quantize(model, group_size=32, bits=8)
    assert "scales" in model.layers[0].mlp.gate
    routers = read_routers(model, TOKENS[:1])
    assert list(routers) == [0, 2]
    assert routers[0].router.linear.weight.shape == (8, 64)


def test_an_unprovable_router_is_left_out_and_named() -> None:
    model = build("qwen3_moe")
    model.layers[2].mlp.gate.e_score_correction_bias = mx.zeros((8,))

    class Shifted(nn.Linear):
        def __call__(self, x: mx.array) -> mx.array:
            return -super().__call__(x)

    model.layers[2].mlp.gate.__class__ = Shifted
    with pytest.warns(UserWarning, match="layer 2: its router is left out"):
        assert list(read_routers(model, TOKENS[:1])) == [0]


def test_the_classes_come_back_after_an_error() -> None:
    model = build("mixtral")
    block = type(model.layers[0].block_sparse_moe)
    context = record_routing(model)
    context.__enter__()
    assert type(model.layers[0].block_sparse_moe) is not block
    assert not context.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert type(model.layers[0].block_sparse_moe) is block


def test_a_dense_model_is_refused() -> None:
    arch = importlib.import_module("mlx_lm.models.llama")
    model = arch.Model(arch.ModelArgs.from_dict({**BASE, "model_type": "llama"}))
    with pytest.raises(ValueError, match="llama has no MoE layers"):
        find_moe_layers(model)


def test_a_missing_model_directory_is_named(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_model(tmp_path / "nowhere")
