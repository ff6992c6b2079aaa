"""A router's scores against what mlx-lm's own models choose, and the norm between two layers."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_od_moe.router import Router, RouterConfig, input_scale

HIDDEN, EXPERTS, TOP_K = 48, 32, 6


def states(n: int = 300, seed: int = 0) -> mx.array:
    mx.random.seed(seed)
    return mx.random.normal((n, HIDDEN))


def router_of(weight: mx.array, correction: mx.array | None = None, **options) -> Router:
    num_experts, hidden_size = weight.shape
    config = RouterConfig(hidden_size, num_experts, correction=correction is not None, **options)
    router = Router(config)
    router.linear.weight = weight
    if correction is not None:
        router.correction = correction
    return router


def ranked(scores: mx.array, k: int = TOP_K) -> np.ndarray:
    return np.sort(np.array(mx.argsort(-scores, axis=-1)[..., :k]), axis=-1)


def deepseek_gate(n_group: int, topk_group: int, weight: mx.array, correction: mx.array):
    """mlx-lm's DeepSeek-V3 gate."""
    deepseek = importlib.import_module("mlx_lm.models.deepseek_v3")
    args = deepseek.ModelArgs(
        hidden_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        topk_method="noaux_tc",
    )
    gate = deepseek.MoEGate(args)
    gate.weight, gate.e_score_correction_bias = weight, correction
    return gate


def qwen_args(qwen):
    return qwen.ModelArgs(
        model_type="qwen3_moe",
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        intermediate_size=HIDDEN,
        num_attention_heads=1,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=8,
        rms_norm_eps=1e-6,
        vocab_size=8,
        num_key_value_heads=1,
        head_dim=HIDDEN,
        rope_theta=1e4,
        tie_word_embeddings=False,
        max_position_embeddings=8,
        norm_topk_prob=True,
    )


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (8, 3), (8, 2), (4, 4)])
def test_sigmoid_routers_choose_what_deepseeks_gate_chooses(n_group, topk_group, spread):
    mx.random.seed(1)
    weight = mx.random.normal((EXPERTS, HIDDEN)) * 0.2
    correction = mx.random.normal((EXPERTS,)) * spread
    chosen, _ = deepseek_gate(n_group, topk_group, weight, correction)(states())
    groups = {"n_group": n_group, "topk_group": topk_group}
    router = router_of(weight, correction, scoring="sigmoid", **groups)
    assert (ranked(router.scores(states())) == np.sort(np.array(chosen), axis=-1)).all()


def test_softmax_routers_choose_what_qwens_block_chooses():
    qwen = importlib.import_module("mlx_lm.models.qwen3_moe")
    mx.random.seed(2)
    weight = mx.random.normal((EXPERTS, HIDDEN))
    block = qwen.Qwen3MoeSparseMoeBlock(qwen_args(qwen))
    block.gate.weight = weight
    called = []
    block.switch_mlp = lambda x, ids: called.append(ids) or x[..., None, :]
    block(states())
    gates = mx.softmax(states() @ weight.T, axis=-1, precise=True)
    router = router_of(weight)
    expected = np.sort(np.array(called[0]), axis=-1)
    assert expected.shape == (300, TOP_K)
    assert (ranked(router.scores(states())) == expected).all()
    np.testing.assert_allclose(mx.exp(router.log_probs(states())), gates, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_log_probs_are_a_distribution_that_ranks_like_the_scores(scoring, groups):
    mx.random.seed(3)
    weight, correction = mx.random.normal((EXPERTS, HIDDEN)) * 0.3, mx.random.normal((EXPERTS,))
    options = {"n_group": groups[0], "topk_group": groups[1]} if scoring == "sigmoid" else {}
    router = router_of(weight, mx.abs(correction), scoring=scoring, **options)
    log_probs = router.log_probs(states())
    np.testing.assert_allclose(mx.exp(log_probs).sum(axis=-1), 1, rtol=1e-5)
    assert mx.isfinite(log_probs.astype(mx.float16)).all().item()
    assert (ranked(log_probs) == ranked(router.scores(states()))).all()


def test_log_probs_stay_finite_where_corrections_make_scores_negative():
    router = router_of(mx.zeros((4, HIDDEN)), mx.array([-3.0, -3, -3, 1]), scoring="sigmoid")
    log_probs = router.log_probs(states(2))
    assert mx.isfinite(log_probs).all().item()
    np.testing.assert_allclose(mx.exp(log_probs).sum(axis=-1), 1, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 100))
def test_input_scale_turns_one_norm_into_the_other_exactly(seed, scale):
    mx.random.seed(seed)
    source, target = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
    source.weight = mx.random.normal((HIDDEN,)) * scale
    target.weight = mx.random.normal((HIDDEN,))
    source.weight = mx.where(mx.abs(source.weight) < 1e-3, 1.0, source.weight)
    h = mx.random.normal((20, HIDDEN)) * 30
    found = source(h) * input_scale(source.weight, target.weight)
    np.testing.assert_allclose(found, target(h), rtol=1e-5, atol=1e-6)


def test_features_that_the_source_norm_drops_do_not_become_infinite():
    scale = input_scale(mx.array([0.0, 2.0, -1.0]), mx.array([5.0, 1.0, 3.0]))
    assert scale.tolist() == [0.0, 0.5, -3.0]


def test_an_unknown_norm_gives_no_scale():
    assert input_scale(None, mx.ones(3)) is None
    assert input_scale(mx.ones(3), None) is None


def test_a_router_has_nothing_to_train():
    assert router_of(mx.ones((4, 8)), mx.ones(4), scoring="sigmoid").trainable_parameters() == {
        "linear": {}
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scoring": "argmax"}, "argmax"),
        ({"n_group": 3}, "n_group 3 groups of 32"),
        ({"n_group": 4, "topk_group": 5}, "topk_group 5"),
        ({"n_group": 4, "topk_group": 0}, "topk_group 0"),
    ],
)
def test_impossible_rules_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(HIDDEN, EXPERTS, **options)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_router_is_a_copy_that_ranks_nearly_alike(bits):
    mx.random.seed(4)
    router = Router(RouterConfig(64, EXPERTS))
    router.linear.weight = mx.random.normal((EXPERTS, 64))
    before = np.array(router.linear.weight)
    x = mx.random.normal((200, 64))
    pairs = zip(ranked(router.scores(x)), ranked(router.quantized(bits).scores(x)), strict=True)
    agreement = np.mean([len(set(a) & set(b)) / TOP_K for a, b in pairs])
    assert agreement > {4: 0.85, 8: 0.97}[bits]
    assert (np.array(router.linear.weight) == before).all()
