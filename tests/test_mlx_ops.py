"""The predictor as a lazy MLX operation, against its twin of plain operations and the module."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_od_moe import PredictorConfig
from mlx_od_moe.native_predictor import make_op
from test_native_predictor import make_predictor, relative_error


@pytest.fixture(params=[("softmax", 0), ("sigmoid", 0), ("softmax", 32)])
def predictor(request):
    scoring, trunk_rank = request.param
    return make_predictor(
        scoring=scoring, hidden_size=96, predictor_size=48, num_experts=20, lookahead=3, top_k=4,
        trunk_rank=trunk_rank, terms=("mlp", "mlp+gate", "gate"), layer_norm=True,
        previous_experts=True,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [None, 4])
def test_agrees_with_its_twin_and_the_module(predictor, bits):
    predictor = predictor if bits is None else predictor.quantized(bits, group_size=32)
    op = make_op(predictor, "f32")
    x = mx.random.normal((2, 3, 96))
    previous = mx.random.randint(-1, 20, (2, 3, 3, 4))
    expected = np.array(predictor(x, previous))
    assert relative_error(np.array(op(x, previous)), expected) < 1e-5
    assert relative_error(np.array(op.from_ops(x, previous)), expected) < 1e-5
    context = mx.random.normal((2, 3, 48))
    with_context = np.array(op.from_ops(x, context=context))
    assert relative_error(np.array(op(x, context=context)), with_context) < 1e-5


def test_is_lazy_and_composes(predictor):
    op = make_op(predictor, "f32")
    x = mx.random.normal((4, 96))
    expected = np.array(predictor(x * 2)) + 1
    composed = op(mx.contiguous((x * 2).T).T) + 1
    mx.async_eval(composed)
    assert relative_error(np.array(composed), expected) < 1e-5
    compiled = mx.compile(lambda h: op(h * 2) + 1)
    for _ in range(2):
        assert relative_error(np.array(compiled(x)), expected) < 1e-5
    assert relative_error(np.array(op(x * 2, stream=mx.new_stream(mx.cpu)) + 1), expected) < 1e-5


def test_predicts_the_same_experts(predictor):
    op = make_op(predictor, "f32", threads=2)
    x = mx.random.normal((5, 96))
    ids = np.array(op.predict(x, 4))
    assert (ids == predictor.native("f32").predict(x)).all()


def test_half_precision_states_and_nan():
    predictor = make_predictor(hidden_size=64, predictor_size=32, num_experts=16, lookahead=2)
    op = make_op(predictor, "f32")
    x = mx.random.normal((3, 64)).astype(mx.bfloat16)
    assert relative_error(np.array(op(x)), np.array(predictor(x))) < 1e-5
    x[1, 7] = mx.nan
    logits = np.array(op(x))
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[[0, 2]]).all()


def test_refuses_wrong_shapes(predictor):
    op = make_op(predictor)
    with pytest.raises(ValueError, match="must have 96 features"):
        op(mx.zeros((2, 95)))
    with pytest.raises(ValueError, match="context must be"):
        op(mx.zeros((2, 96)), context=mx.zeros((2, 47)))
    with pytest.raises(ValueError, match=r"k must be 1 \.\.\. 20, got 21"):
        op.predict(mx.zeros((2, 96)), 21)
    assert PredictorConfig().hidden_size == 4096
