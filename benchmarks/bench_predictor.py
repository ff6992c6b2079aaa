"""The native predictor, called from Python: holds every quantised format to the specified < 1 ms.

    pytest benchmarks/bench_predictor.py --benchmark-enable

Beside other runtimes, and beside the time to read its weights: mlx-od-moe bench predictor.
"""

import numpy as np
import pytest

from mlx_od_moe import PredictorConfig
from mlx_od_moe.bench.predictor import make_matrices, make_natives
from mlx_od_moe.native_predictor import FORMATS


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_latency(benchmark, format, threads):
    config = PredictorConfig()
    (native,) = make_natives(config, make_matrices(config), format, threads)
    x = np.random.default_rng(1).standard_normal((1, config.hidden_size), dtype=np.float32)
    out = np.empty((1, config.lookahead, config.top_k), np.int32)
    benchmark(native.predict, x, out=out)
    if benchmark.enabled and format != "f32":
        assert benchmark.stats.stats.median < 1e-3
