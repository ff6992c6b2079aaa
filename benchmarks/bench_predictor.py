"""The native predictor beside other runtimes, in one process and in turns.

    pytest benchmarks/bench_predictor.py --benchmark-enable      the specified < 1 ms
    python benchmarks/bench_predictor.py [--threads N] [--tokens N...] [--json FILE]

Peers that are not installed are left out (pip install 'mlx-od-moe[bench]'). Each call is timed by
itself, from Python; ours includes the four top-8s, the peers' don't. For the floor that reading the
weights sets, see bench_predictor.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

FORMATS = ("f32", "f16", "bf16", "int8", "int4")


def make_matrices() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((1024, 4096), dtype=np.float32) / 64
    second = rng.standard_normal((1536, 1024), dtype=np.float32) / 32
    return first, second


def make_native(first: np.ndarray, second: np.ndarray, format: str, threads: int):
    import mlx.core as mx

    from mlx_od_moe import ExpertPredictor, PredictorConfig

    predictor = ExpertPredictor(PredictorConfig(activation="relu"))
    predictor.trunk.weight, predictor.heads.weight = mx.array(first), mx.array(second)
    return predictor.native(format, threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_latency(benchmark, format, threads):
    native = make_native(*make_matrices(), format, threads)
    x = np.random.default_rng(1).standard_normal((1, 4096), dtype=np.float32)
    out = np.empty((1, 4, 8), np.int32)
    benchmark(native.predict, x, out=out)
    if benchmark.enabled and format != "f32":
        assert benchmark.stats.stats.median < 1e-3


def measure(runs: dict[str, object], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds of each run, in turns: 3 calls to warm up and 7 timed ones a round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for _ in range(rounds):
        for name, run in runs.items():
            for i in range(10):
                start = time.perf_counter()
                run()
                if i >= 3:
                    times[name].append((time.perf_counter() - start) * 1e6)
        if time.perf_counter() > end:
            break
    percentiles = {"min": 0, "p50": 50, "p99": 99}
    return {
        name: {key: float(np.percentile(t, q)) for key, q in percentiles.items()}
        for name, t in times.items()
    }


def compare(format: str, threads: int, tokens: int, seconds: float) -> dict[str, dict[str, float]]:
    """Ours and every installed peer of that format."""
    from predictor_peers import PEERS

    first, second = make_matrices()
    x = np.random.default_rng(1).standard_normal((tokens, 4096), dtype=np.float32)
    native = make_native(first, second, format, threads)
    out = np.empty((tokens, 4, 8), np.int32)
    runs = {"mlx-od-moe": lambda: native.predict(x, out=out)}
    for maker in PEERS.get(format, []):
        try:
            forward = maker(first, second, threads)
            forward(x)
        except ImportError:
            continue
        except Exception as error:  # a peer that can't do it here is no reason to stop
            print(f"  {maker.__name__} left out: {error!s:.100}", file=sys.stderr)
            continue
        runs[maker.__name__.rsplit("_", 1)[0]] = lambda forward=forward: forward(x)
    return measure(runs, rounds=400, seconds=seconds)


def report(format: str, tokens: int, times: dict[str, dict[str, float]]) -> None:
    ours = times["mlx-od-moe"]
    peers = {name: t for name, t in times.items() if name != "mlx-od-moe"}
    for name, t in times.items():
        columns = "".join(f"{t[key]:10.1f}" for key in ("min", "p50", "p99"))
        ratio = "" if name == "mlx-od-moe" else f"{t['p50'] / ours['p50']:8.2f}x"
        print(f"{format:5} {tokens:4} {name:12}{columns}{ratio}")
    if peers:
        best = min(peers, key=lambda name: peers[name]["p50"])
        print(f"{'':10} best peer {best}: {peers[best]['p50'] / ours['p50']:.2f}x our p50, "
              f"{peers[best]['min'] / ours['min']:.2f}x our min")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--seconds", type=float, default=15, help="at most, per row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != str(options.threads):
        # numpy's threads are counted when it loads.
        os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    results = []
    print(f"4096 -> 1024 -> 4 x 384, {options.threads} thread(s); microseconds\n"
          "format tokens                  min       p50       p99   peer / ours")  # fmt: skip
    for format in options.formats:
        for tokens in options.tokens:
            times = compare(format, options.threads, tokens, options.seconds)
            report(format, tokens, times)
            row = {"format": format, "tokens": tokens, "threads": options.threads}
            results.append({**row, "microseconds": times})
    if options.json:
        options.json.write_text(json.dumps({"cores": os.cpu_count(), "results": results}, indent=2))


if __name__ == "__main__":
    # The package comes first: it lends MLX a fast BLAS.
    import mlx_od_moe  # noqa: F401

    main()
