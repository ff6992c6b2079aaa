"""AdamW's step in one operation against MLX's own."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_od_moe._ext import adamw

from mlx_od_moe.training import adam
from mlx_od_moe.training.adam import AdamW


@pytest.mark.parametrize("shape", [(), (1,), (5,), (16,), (33, 7)])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_steps_are_those_of_mlx(monkeypatch, shape, on_cpu):
    monkeypatch.setattr(adam, "on_cpu", lambda: on_cpu)
    mx.random.seed(0)
    weight = mx.random.normal(shape)
    schedule = optim.cosine_decay(0.1, 10)
    ours, theirs = AdamW(schedule, 0.03), optim.AdamW(schedule, weight_decay=0.03)
    found = expected = {"w": weight}
    for step in range(5):
        gradient = {"w": mx.random.normal(shape) * 10.0**-step}
        found = ours.apply_gradients(gradient, found)
        expected = theirs.apply_gradients(gradient, expected)
        np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5, atol=1e-6)
        for name in ("m", "v"):
            np.testing.assert_allclose(
                ours.state["w"][name], theirs.state["w"][name], rtol=1e-4, atol=1e-9
            )


def test_a_step_leaves_what_others_hold():
    weight, gradient = mx.ones((3, 20)), mx.ones((3, 20))
    first, second = mx.zeros((3, 20)), mx.zeros((3, 20))
    mx.eval(weight, first, second)
    found = adamw(gradient, first, second, weight, mx.array(0.1), [0.9, 0.999], 1e-8, 0.0)
    mx.eval(found)
    assert (weight == 1).all().item()
    assert (first == 0).all().item()
    assert (found[2] < 1).all().item()


def test_wrong_shapes_are_refused():
    x, y = mx.zeros((2, 3)), mx.zeros((3, 2))
    rate, rest = mx.array(0.1), ([0.9, 0.999], 1e-8, 0.0)
    with pytest.raises(ValueError, match="have one shape"):
        adamw(x, x, y, x, rate, *rest)
    with pytest.raises(ValueError, match="rate is one number"):
        adamw(x, x, x, x, mx.zeros((2,)), *rest)
