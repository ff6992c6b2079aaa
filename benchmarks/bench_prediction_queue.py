"""PredictionQueue beside Python's own queues, and what a prediction costs its caller.

    pytest benchmarks/bench_prediction_queue.py --benchmark-enable
    python benchmarks/bench_prediction_queue.py [--binary FILE] [--rounds N] [--json FILE]

The second measures round trips between two threads, in turns. --binary names the program built from
bench_prediction_queue.cpp: the same round trip between native threads, which is how the prefetcher
uses the queue. Two threads of Python hand the GIL to and fro whatever the queue.
"""

from __future__ import annotations

import argparse
import json
import queue
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_od_moe import ExpertPredictor, Prediction, PredictionQueue, PredictorConfig, ShadowRunner

RECORD = Prediction(0, 1, 2, 1, list(range(8)))
TRIPS = 300
# name: (make a queue, put, get and wait)
QUEUES: dict[str, tuple[Callable[[], Any], Callable[..., Any], Callable[..., Any]]] = {
    "PredictionQueue": (PredictionQueue, PredictionQueue.try_push, PredictionQueue.wait_pop),
    "queue.SimpleQueue": (queue.SimpleQueue, queue.SimpleQueue.put, queue.SimpleQueue.get),
    "queue.Queue": (queue.Queue, queue.Queue.put, queue.Queue.get),
}


@pytest.mark.parametrize("name", QUEUES)
def test_put_and_get(benchmark, name):
    make, put, get = QUEUES[name]
    q = make()

    def put_and_get():
        put(q, RECORD)
        get(q)

    benchmark(put_and_get)


@pytest.mark.parametrize("kind", ["numpy", "mx.array", "lazy mx.array"])
def test_predict_async(benchmark, kind):
    import mlx.core as mx

    x = np.random.default_rng(0).standard_normal(4096, dtype=np.float32)
    ready = mx.array(x)
    mx.eval(ready)
    with ShadowRunner(ExpertPredictor(PredictorConfig()).native()) as runner:

        def setup():
            runner.get_predictions_for_layer(4, timeout=None)
            return (x if kind == "numpy" else ready if kind == "mx.array" else ready * 1, 0), {}

        benchmark.pedantic(runner.predict_async, setup=setup, rounds=1000)


def round_trip_us(name: str) -> float:
    """There and back between two threads of Python, the mean of some."""
    make, put, get = QUEUES[name]
    there, back = make(), make()

    def echo() -> None:
        for _ in range(TRIPS):
            put(back, get(there))

    thread = threading.Thread(target=echo)
    thread.start()
    start = time.perf_counter()
    for _ in range(TRIPS):
        put(there, RECORD)
        get(back)
    took = time.perf_counter() - start
    thread.join()
    return took / TRIPS * 1e6


def native_round_trip_us(binary: Path) -> float:
    command = [binary, "--only", "PredictionQueue", "--rounds", "1"]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[
        -1
    ]
    return float(re.split(r"\s+/?\s*", line)[-1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", type=Path, help="build/bench/benchmarks/bench_prediction_queue")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs: dict[str, Callable[[], float]] = {
        name: lambda n=name: round_trip_us(n) for name in QUEUES
    }
    if options.binary:
        runs["PredictionQueue, native threads"] = lambda: native_round_trip_us(options.binary)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(run())
    found = {n: {"min": min(t), "median": statistics.median(t)} for n, t in times.items()}
    print(f"round trip, microseconds: min and median of {options.rounds} rounds")
    for name, row in sorted(found.items(), key=lambda item: item[1]["min"]):
        print(f"{name:34} {row['min']:9.2f} {row['median']:9.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
