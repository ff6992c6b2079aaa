"""The predictor as an MLX operation on a GPU: the same ids as native code, and how long it takes.

    python benchmarks/predictor_on_gpu.py

Absolute times, from a Python call until the ids are ready, at 4096→1024→4×384 with top-8.
"""

import time
from functools import partial

import mlx.core as mx
import numpy as np

import mlx_od_moe
from mlx_od_moe.native_predictor import make_op

CALLS = 2_000


def microseconds(call) -> str:
    """Minimum, median and 99th percentile of many calls, in µs."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    middle, slow = np.percentile(times, (50, 99))
    return f"min {min(times):6.1f}  median {middle:6.1f}  p99 {slow:7.1f} µs"


def main() -> None:
    if mx.default_device() != mx.Device(mx.gpu):
        raise SystemExit("no GPU: MLX's default device here is the CPU")
    print(mx.device_info().get("device_name", "GPU"), "with MLX", mx.__version__)
    mx.random.seed(0)
    predictor = mlx_od_moe.ExpertPredictor(mlx_od_moe.PredictorConfig())
    states = np.random.default_rng(0).standard_normal((256, 4096), np.float32)
    expected = predictor.native("f32").predict(states, k=8)
    op = make_op(predictor, "f32")
    found = np.array(op.predict(mx.array(states), 8))
    overlap = (found[..., :, None] == expected[..., None, :]).any(-1).mean()
    identical = (found == expected).all(-1).mean()
    print(f"top-8 ids against native f32 on the CPU, 1,024 heads: overlap {overlap:.5f}")
    print(f"identical in order: {identical:.4f}")
    for name, model in (("f32", predictor), ("4 bits", predictor.quantized(4))):
        op = make_op(model)
        for batch in (1, 256):
            x = mx.array(states[:batch])
            call = partial(evaluate_ids, op, x)
            for _ in range(50):
                call()
            print(f"{name:6} on the GPU, batch {batch:3}:    {microseconds(call)}")
    for format in ("int4", "int8", "f32"):
        native = predictor.native(format)
        print(
            f"{format:6} native, CPU, one core: {microseconds(partial(native.predict, states[:1]))}"
        )


def evaluate_ids(op, x) -> None:
    mx.eval(op.predict(x, 8))


if __name__ == "__main__":
    main()
