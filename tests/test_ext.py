import mlx.core as mx

import mlx_od_moe


def test_extension_accepts_an_mx_array():
    """Fails at once where nanobind's and MLX's ABI do not match."""
    a = mx.arange(4) + 1
    assert not mlx_od_moe.is_available(a)
    mx.eval(a)
    assert mlx_od_moe.is_available(a)
