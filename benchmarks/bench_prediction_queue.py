"""PredictionQueue from Python, and what a prediction costs its caller.

    pytest benchmarks/bench_prediction_queue.py --benchmark-enable

Between threads of Python: mlx-od-moe bench queue. Between native ones: bench_prediction_queue.cpp.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_od_moe import ExpertPredictor, PredictorConfig, ShadowRunner
from mlx_od_moe.bench.queue import QUEUES, RECORD


@pytest.mark.parametrize("name", QUEUES)
def test_put_and_get(benchmark, name):
    kind = QUEUES[name]
    q = kind.make()

    def put_and_get():
        kind.put(q, RECORD)
        kind.get(q)

    benchmark(put_and_get)


@pytest.mark.parametrize("kind", ["numpy", "mx.array", "lazy mx.array"])
def test_predict_async(benchmark, kind):
    x = np.random.default_rng(0).standard_normal(4096, dtype=np.float32)
    ready = mx.array(x)
    mx.eval(ready)
    with ShadowRunner(ExpertPredictor(PredictorConfig()).native()) as runner:

        def setup():
            runner.get_predictions_for_layer(4, timeout=None)
            return (x if kind == "numpy" else ready if kind == "mx.array" else ready * 1, 0), {}

        benchmark.pedantic(runner.predict_async, setup=setup, rounds=1000)
