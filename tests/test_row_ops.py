"""Exponentials over rows, and what reads memories natively, against MLX's own operations."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_od_moe._ext import has_bf16_products, read_memories

from mlx_od_moe import context, row_ops
from mlx_od_moe.context import ContextConfig, ContextReader, TokenMemory

WINDOW, KEY, AHEAD, HIDDEN, INNER = 6, 5, 3, 8, 7


@pytest.fixture(params=[True, False], ids=["native", "composed"])
def native(request, monkeypatch) -> bool:
    for module in (row_ops, context):
        monkeypatch.setattr(module, "on_cpu", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(1,), (3, 40), (2, 3, 64)])
def test_rows_are_what_numpy_says(native, shape):
    x = np.random.default_rng(0).standard_normal(shape) * 20
    x.flat[0] = 3e4
    powers = np.exp(x - x.max(-1, keepdims=True))
    total = powers.sum(-1, keepdims=True)
    for found, expected in (
        (row_ops.softmax(mx.array(x)), powers / total),
        (row_ops.sigmoid(mx.array(x)), 1 / (1 + np.exp(-np.clip(x, -80, 80)))),
        (row_ops.logsumexp(mx.array(x)), np.log(total) + x.max(-1, keepdims=True)),
        (mx.grad(lambda a: row_ops.logsumexp(a).sum())(mx.array(x)), powers / total),
    ):
        np.testing.assert_allclose(np.array(found), expected, rtol=2e-6, atol=1e-6)


def test_rows_need_not_lie_one_after_the_other():
    x = mx.random.normal((4, 6))
    np.testing.assert_allclose(row_ops.softmax(x.T), mx.softmax(x.T, axis=-1), rtol=1e-5)
    halves = x.astype(mx.float16)
    np.testing.assert_allclose(row_ops.sigmoid(halves), mx.sigmoid(x), rtol=1e-2)


@pytest.mark.parametrize("state_size", [0, 4])
@pytest.mark.parametrize("tokens", [1, 40])
def test_reading_natively_changes_neither_vectors_nor_gradients(monkeypatch, state_size, tokens):
    mx.random.seed(0)
    config = ContextConfig(WINDOW, KEY, state_size)
    reader = ContextReader(config, HIDDEN, INNER, AHEAD)
    memories = [TokenMemory(config, HIDDEN) for _ in range(AHEAD)]
    rows = (2, WINDOW + tokens, HIDDEN)
    states = [mx.random.normal(rows) for _ in range(AHEAD)]
    h, weights = mx.random.normal((2, tokens, HIDDEN)), mx.random.normal((2, tokens, INNER))
    sequence = mx.array(np.arange(WINDOW + tokens) // 11 - 1 + np.array([[0], [50]]))

    def loss(parameters):
        reader.update(parameters["reader"])
        for memory, own in zip(memories, parameters["memories"], strict=True):
            memory.update(own)
        read = [memory(s) for memory, s in zip(memories, states, strict=True)]
        return (reader(h, read, sequence) * weights).sum()

    parameters = tree_map(
        lambda p: p + 0.1 * mx.random.normal(p.shape),
        {"reader": reader.parameters(), "memories": [m.parameters() for m in memories]},
    )
    found = {}
    for on_cpu in (True, False):
        monkeypatch.setattr(context, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        value, gradients = mx.value_and_grad(loss)(parameters)
        found[on_cpu] = {"value": value, **dict(tree_flatten(gradients))}
    assert found[True].keys() == found[False].keys()
    for name, expected in found[False].items():
        np.testing.assert_allclose(found[True][name], expected, atol=3e-5, err_msg=name)


@pytest.mark.skipif(not has_bf16_products(), reason="this CPU has no products in bfloat16")
@pytest.mark.parametrize("shape", [(2, 40, 64, 33), (1, 256, 64, 64), (2, 7, 6, 5)])
def test_attention_in_bfloat16_is_that_in_float32_but_for_rounding(shape):
    batch, tokens, window, key = shape
    mx.random.seed(0)
    bias = mx.random.normal((AHEAD, window + 1))
    query = mx.random.normal((batch, tokens, AHEAD * key))
    weights = mx.random.normal(query.shape)
    rows = (batch, window + tokens)
    memories = [mx.random.normal((*rows, 2 * key + 3)) for _ in range(AHEAD)]
    sequence = mx.broadcast_to(mx.arange(rows[1]) // 50, rows)

    def read(bf16, query, bias, *memories):
        states, attended = read_memories(query, bias, sequence, list(memories), bf16=bf16)
        return (attended * weights).sum() + states.sum()

    found = {}
    for bf16 in (True, False):
        places = range(1, 3 + AHEAD)
        _, found[bf16] = mx.value_and_grad(read, argnums=list(places))(bf16, query, bias, *memories)
    for ours, exact in zip(found[True], found[False], strict=True):
        assert (ours - exact).square().mean() < 1e-4 * exact.square().mean()


def test_wrong_shapes_are_refused():
    query, bias = mx.zeros((2, 4, 6)), mx.zeros((2, 4))
    sequence, memory = mx.zeros((2, 7), mx.int32), mx.zeros((2, 7, 8))
    states, read = read_memories(query, bias, sequence, [memory] * 2)
    assert states.shape == (2, 4, 4)
    assert read.shape == (2, 4, 6)
    for wrong, rule in (
        ((query[0], bias, sequence, [memory] * 2), "query is"),
        ((query, bias, sequence, [memory]), "one memory for each distance"),
        ((query, mx.zeros((4, 4)), sequence, [memory] * 4), "one key for each distance"),
        ((query, bias, sequence, [memory[:, 1:]] * 2), "memories are"),
        ((query, bias, sequence[:, 1:], [memory] * 2), "sequence is"),
        ((query, bias, sequence, [memory[..., :5]] * 2), "a key, a value and a state"),
    ):
        with pytest.raises(ValueError, match=rule):
            read_memories(*wrong)
