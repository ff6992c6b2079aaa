"""The whole road on the small model that ships: collect, train, evaluate, time."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from . import INSTALL_DIR
from .evaluate import evaluate
from .predictor_bundle import PredictorBundle
from .report import plot, table
from .training import FitOptions, TrainingOptions, collect_expert_usage, train_shadow_model

PREDICTOR_SIZE = 512  # the model's hidden size is 192
# Of the candidates these two always won on this model, and with few samples the router's own
# probabilities teach more than its choices: recall@8 +.02 one layer ahead.
CANDIDATES, LOSS = ("mlp+gate+previous", "gate"), "kl"


def demo(out: Path, tokens: int, epochs: int, jobs: int) -> None:
    """Train a shadow model of the shipped model and measure it on text that neither ever saw.

    Writes traces, predictor.safetensors, recall.png and evaluation.json to `out`. Run again, it
    takes up what is there.
    """
    model = INSTALL_DIR / "examples" / "nano-moe"
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)

    say("nano-moe: 8 MoE layers of 64 experts, 8 per token, on this machine")
    training = collect_expert_usage(
        model, out=out / "traces", text=sorted(model.glob("text/*.train.txt")), tokens=tokens
    )
    unseen = collect_expert_usage(
        model,
        out=out / "unseen-traces",
        text=sorted(model.glob("text/unseen_*")),
        tokens=tokens // 5,
    )
    say(f"recorded {training.samples:,} tokens to train on, {unseen.samples:,} of unseen text")
    predictor = out / "predictor.safetensors"
    options = TrainingOptions(
        predictor_size=PREDICTOR_SIZE,
        candidates=CANDIDATES,
        fit=FitOptions(epochs=epochs, loss=LOSS),
    )
    if not _is_trained(predictor, options):
        train_shadow_model(training.path, predictor, options, jobs=jobs)
    say("trained one predictor per layer")
    result = evaluate(predictor, unseen.path, training.path, jobs=jobs)
    plot(result, out / "recall.png")
    (out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"evaluated on unseen text (fiction and Rust); plot: {out / 'recall.png'}\n")
    print(table(result))
    print(_latency(PredictorBundle.load(predictor)))


def _is_trained(predictor: Path, options: TrainingOptions) -> bool:
    """Whether the file is there, and was made with these options."""
    if not predictor.exists():
        return False
    made_with = PredictorBundle.load(predictor).training["options"]
    return bool(made_with == json.loads(json.dumps(dataclasses.asdict(options))))


def _latency(bundle: PredictorBundle) -> str:
    """How long one prediction takes in native code, from a hidden state to expert ids."""
    layer, predictor = next(iter(bundle.items()))
    native = predictor.native(format="int4", threads=1)
    state = np.random.default_rng(0).standard_normal((1, predictor.config.hidden_size), np.float32)
    times = []
    for _ in range(2000):
        start = time.perf_counter()
        native.predict(state)
        times.append(1e6 * (time.perf_counter() - start))
    median, slow = np.median(times), np.percentile(times, 99)
    return (
        f"One prediction for {predictor.config.lookahead} layers (layer {layer}, int4, one core): "
        f"median {median:.0f} µs, p99 {slow:.0f} µs."
    )
