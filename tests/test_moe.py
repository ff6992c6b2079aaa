"""The routing hook and the router reading, on tiny random models of many architectures."""

import importlib
import warnings
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_od_moe.model_routers import read_routers
from mlx_od_moe.moe import find_moe_layers, load_model, record_routing
from tiny_models import BASE, MODELS, build

TOKENS = mx.array(np.random.default_rng(0).integers(0, 128, (2, 40)))


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
