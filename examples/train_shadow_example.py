"""Trains a shadow model on 5,000 planted samples for 20 epochs and shows what it learned.

    python examples/train_shadow_example.py

The samples have the specification's sizes (hidden size 4096, 384 experts, 8 per token) and a hidden
structure that can be learned, so the accuracy is measured, on documents that training never saw.
With a real model instead: `mlx-od-moe demo`, and docs/shadow_model_training.md.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import mlx_od_moe  # before mlx: on Linux it lends MLX's CPU backend a fast BLAS
from mlx_od_moe.training import (
    FitOptions,
    TrainingOptions,
    collect_expert_usage,
    train_shadow_model,
)


def main() -> None:
    """Collect, train, save, load, time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=5_000)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        traces, file = Path(directory) / "traces", Path(directory) / "predictor.safetensors"

        print(f"1. Recording {options.samples:,} planted samples")
        collect_expert_usage(out=traces, samples=options.samples)

        print(f"2. Training for up to {options.epochs} epochs")
        start = time.perf_counter()
        settings = TrainingOptions(candidates=("mlp",), fit=FitOptions(epochs=options.epochs))
        bundle = train_shadow_model(traces, file, settings, bits=4)
        print(f"   {time.perf_counter() - start:.0f} s, file {file.stat().st_size / 1e6:.2f} MB")

        print("3. Accuracy on validation documents, 1 … 4 layers ahead")
        for n in (1, 4, 8):
            accuracy = bundle.training["validation"][f"top_{n}_accuracy"]
            print(f"   top-{n}: " + "  ".join(f"{x:6.1%}" for x in accuracy))

        print("4. Latency of one prediction, hidden state to expert ids (int4, one core)")
        loaded = mlx_od_moe.PredictorBundle.load(file)
        print_latency(next(iter(loaded.values())))


def print_latency(predictor: mlx_od_moe.ExpertPredictor) -> None:
    """Print median and 99th percentile over 1,000 calls."""
    native = predictor.native(format="int4", threads=1)
    states = np.random.default_rng(0).standard_normal((1, predictor.config.hidden_size), np.float32)
    times = []
    for _ in range(1_000):
        start = time.perf_counter()
        native.predict(states)
        times.append(1e3 * (time.perf_counter() - start))
    print(f"   median {np.median(times):.3f} ms, p99 {np.percentile(times, 99):.3f} ms")


if __name__ == "__main__":
    main()
