"""Products in bfloat16 and what training computes with them, against float64."""

import os

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_od_moe._ext import (
    available_kernels,
    bf16_linear,
    bf16_muon,
    bf16_two_layers,
    has_bf16_products,
)

from mlx_od_moe.context import ContextConfig, ContextReader
from mlx_od_moe.predictor_config import PredictorConfig
from mlx_od_moe.router import Router, RouterConfig
from mlx_od_moe.shadow_model import ExpertPredictor
from mlx_od_moe.training import fast_layers
from mlx_od_moe.training.fast_layers import fast_logits, is_fast
from mlx_od_moe.training.muon import Muon


def kernels() -> list[str]:
    """Those that have the products."""
    before, found = os.environ.get("MLX_OD_MOE_KERNEL"), []
    for name in available_kernels():
        os.environ["MLX_OD_MOE_KERNEL"] = name
        found += [name] * has_bf16_products()
    os.environ.pop("MLX_OD_MOE_KERNEL")
    if before is not None:
        os.environ["MLX_OD_MOE_KERNEL"] = before
    return found


KERNELS = kernels()
needs_products = pytest.mark.skipif(not KERNELS, reason="this CPU has no products in bfloat16")


@pytest.fixture(params=KERNELS or [""])
def kernel(request, monkeypatch) -> str:
    if not request.param:
        pytest.skip("this CPU has no products in bfloat16")
    monkeypatch.setenv("MLX_OD_MOE_KERNEL", request.param)
    return request.param


def rounded(x: mx.array) -> np.ndarray:
    """To bfloat16."""
    return np.array(x.astype(mx.bfloat16).astype(mx.float32)).astype(np.float64)


def check_product(found: mx.array, a: mx.array, b: mx.array) -> None:
    """`found` is a b: within float32's sum of rounded operands, and within bfloat16 of them."""
    exact, size = rounded(a) @ rounded(b), a.shape[-1]
    of_sums = size * 2.0**-23 * (np.abs(rounded(a)) @ np.abs(rounded(b)))
    assert (np.abs(np.array(found) - exact) <= of_sums + 1e-30).all()
    whole = np.array(a).astype(np.float64), np.array(b).astype(np.float64)
    of_operands = (2.0**-7 + 2.0**-16) * (np.abs(whole[0]) @ np.abs(whole[1]))
    assert (np.abs(np.array(found) - whole[0] @ whole[1]) <= of_operands + of_sums + 1e-30).all()


@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (5, 7, 3), (33, 70, 45), (1500, 64, 100)])
def test_linear_and_its_gradients_are_within_rounding(kernel, n, k, m):
    mx.random.seed(n)
    x, weight, dy = (mx.random.normal(shape) for shape in ((n, k), (m, k), (n, m)))
    (y,), (dx, dweight) = mx.vjp(bf16_linear, [x, weight], [dy])
    check_product(y, x, weight.T)
    check_product(dx, dy, weight)
    check_product(dweight, dy.T, x)


def test_linear_takes_any_layout_and_float16(kernel):
    x, weight = mx.random.normal((6, 2, 40)), mx.random.normal((40, 9))
    mixed = x.swapaxes(0, 1)
    check_product(bf16_linear(mixed, weight.T)[1], mixed[1], weight)
    halves = x.astype(mx.float16)
    (y,), (dx,) = mx.vjp(lambda a: bf16_linear(a, weight.T), [halves], [mx.ones((6, 2, 9))])
    check_product(y[3], halves[3].astype(mx.float32), weight)
    assert dx.dtype == mx.float16


def test_two_layers_have_the_gradients_of_finite_differences(kernel):
    # Of halves of small integers, so that nothing is rounded but the differences.
    rng = np.random.default_rng(0)
    shapes = [(7, 5), (7, 3), (11, 5), (11, 3), (11,), (6, 11), (6,), (6, 5)]
    values = [rng.integers(-2, 3, shape) / 2 for shape in shapes]
    values[4] = np.full(11, 0.125)  # no hidden value is zero
    cotangent = rng.integers(-2, 3, (7, 6)) / 2

    def loss(x, z, v, w, bias, heads, head_bias, skip):
        hidden = np.maximum(x @ v.T + z @ w.T + bias, 0)
        return ((hidden @ heads.T + head_bias + x @ skip.T) * cotangent).sum()

    def run(x, z, v, w, bias, heads, head_bias, skip):
        return bf16_two_layers([x, z], [v, w], bias, heads, head_bias, skip)

    _, gradients = mx.vjp(run, [mx.array(v, mx.float32) for v in values], [mx.array(cotangent)])
    step = 2.0**-10
    for i, value in enumerate(values):
        expected = np.zeros_like(value)
        for at in np.ndindex(*value.shape):
            parts = [0.0, 0.0]
            for side, sign in enumerate((1, -1)):
                moved = [v.copy() for v in values]
                moved[i][at] += sign * step
                parts[side] = loss(*moved)
            expected[at] = (parts[0] - parts[1]) / (2 * step)
        np.testing.assert_allclose(gradients[i], expected, atol=1e-9, err_msg=str(i))


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (33, 40), (1, 5)])
def test_muon_steps_as_mlx_does(kernel, shape):
    mx.random.seed(1)
    gradient, velocity, weight = (mx.random.normal(shape) for _ in range(3))
    plain, own = optim.Muon(0.02, weight_decay=0.0, ns_steps=3), Muon(0.02)
    states = [{"v": velocity + 0}, {"v": velocity + 0}]
    found = []
    for optimizer, state in zip((plain, own), states, strict=True):
        optimizer.init({"w": weight})
        found.append(optimizer.apply_single(gradient, weight + 0, state) - weight)
    np.testing.assert_allclose(states[1]["v"], states[0]["v"], rtol=1e-6, atol=1e-7)
    assert mx.linalg.norm(found[1] - found[0]) < 0.04 * mx.linalg.norm(found[0])


def predictor(lookahead: int, router: RouterConfig | None, **options) -> ExpertPredictor:
    config = PredictorConfig(
        hidden_size=12,
        predictor_size=20,
        num_experts=router.num_experts if router else 10,
        lookahead=lookahead,
        top_k=2,
        terms=("mlp+gate" if router else "mlp",) * lookahead,
        **options,
    )
    routers = [Router(router) for _ in range(lookahead)] if router else ()
    made = ExpertPredictor(config, routers)
    made.heads.weight = 0.2 * mx.random.normal(made.heads.weight.shape)
    if router:
        made.gate_scale = mx.random.normal((lookahead,))
        made.gate_input_scale = mx.random.normal((lookahead, 12))
    return made


@pytest.mark.parametrize(
    ("router", "options"),
    [
        (None, {}),
        (RouterConfig(12, 10), {"context": ContextConfig(4, 3, 2)}),
        (RouterConfig(12, 10, bias=True), {"context": ContextConfig(4, 3, 0)}),
        (RouterConfig(12, 10, scoring="sigmoid"), {"context": ContextConfig(0, 0, 2)}),
        (RouterConfig(12, 10), {"trunk_rank": 6}),
    ],
)
def test_fast_logits_are_the_predictors_own(kernel, router, options):
    mx.random.seed(2)
    made = predictor(3, router, **options)
    assert is_fast(made)
    h, asking = mx.random.normal((2, 2, 9, 12))
    context, memories, sequence = None, [], mx.zeros((2, 9))
    if (config := made.config.context) is not None:
        rows = (2, 9 + config.rows, config.memory_size)
        memories = [mx.random.normal(rows) for _ in range(3)]
        sequence = mx.zeros(rows[:2], mx.int32)
        context = made.context(asking, memories, sequence)
    expected, found = made(h, context=context), fast_logits(made, h, asking, memories, sequence)
    np.testing.assert_allclose(found, expected, atol=0.03 * float(mx.abs(expected).max()))


def test_what_the_fast_layers_do_not_compute_is_left_to_mlx(kernel):
    for options in ({"activation": "silu"}, {"layer_norm": True}, {"previous_experts": True}):
        assert not is_fast(predictor(2, None, **options))
    assert not is_fast(predictor(2, None).quantized(8, group_size=32))
    calibrated = predictor(2, None)
    calibrated.calibrate(mx.ones((2, 2)))
    assert not is_fast(calibrated)


def test_other_devices_and_cpus_train_in_float32(monkeypatch):
    monkeypatch.setattr(fast_layers, "on_cpu", lambda: False)
    assert not fast_layers.fast()
    monkeypatch.undo()
    monkeypatch.setenv("MLX_OD_MOE_KERNEL", "scalar")
    assert not fast_layers.fast()
    with pytest.raises(ValueError, match="no instructions for products in bfloat16"):
        bf16_linear(mx.ones((2, 2)), mx.ones((2, 2)))
    weight, state = mx.eye(3), {"v": mx.zeros((3, 3))}
    plain = optim.Muon(0.1, weight_decay=0.0, ns_steps=3)
    for optimizer in (plain, Muon(0.1)):
        optimizer.init({"w": weight})
    expected = plain.apply_single(mx.eye(3), weight, {"v": mx.zeros((3, 3))})
    assert mx.array_equal(Muon(0.1).apply_single(mx.eye(3), weight, state), expected)


@needs_products
def test_wrong_shapes_are_refused():
    x, w, b, h = mx.ones((4, 3)), mx.ones((5, 3)), mx.ones((5,)), mx.ones((2, 5))
    for call, rule in (
        (lambda: bf16_linear(x, mx.ones((5, 4))), "the same last dimension"),
        (lambda: bf16_linear(mx.ones((0, 3)), w), "neither empty"),
        (lambda: bf16_two_layers([x], [], b, h, mx.ones((2,))), "one weight for each input"),
        (lambda: bf16_two_layers([x], [h], b, h, mx.ones((2,))), "weights are"),
        (lambda: bf16_two_layers([x], [w], h, h, mx.ones((2,))), "bias is"),
        (lambda: bf16_two_layers([x], [w], b, h, b), "head_bias is"),
        (lambda: bf16_two_layers([x, x[1:]], [w, w], b, h, mx.ones((2,))), "but for the last"),
        (lambda: bf16_two_layers([x], [w], b, h, mx.ones((2,)), w), "skip is"),
        (lambda: bf16_muon(x, x, w, mx.array(1.0), 0.9, 3), "have one shape"),
        (lambda: bf16_muon(b, b, b, mx.array(1.0), 0.9, 3), "takes matrices"),
        (lambda: bf16_muon(w, w, w, mx.ones((2,)), 0.9, 3), "rate is a number"),
    ):
        with pytest.raises(ValueError, match=rule):
            call()


def test_readers_vectors_are_the_sum_of_what_they_read():
    config = ContextConfig(4, 3, 2)
    reader = ContextReader(config, 12, 20, 2)
    h, sequence = mx.random.normal((1, 5, 12)), mx.zeros((1, 9), mx.int32)
    memories = [mx.random.normal((1, 9, config.memory_size)) for _ in range(2)]
    parts = [m(read) for m, read in reader.read(reader.query(h), memories, sequence)]
    np.testing.assert_allclose(reader(h, memories, sequence), parts[0] + parts[1], atol=1e-6)
