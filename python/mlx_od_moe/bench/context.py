"""What a context costs a native prediction, and what it costs beside the critical path.

Rows of one format, in one process and in turns, all by C++'s clock for one token:
    plain            a prediction without context
    previous state   with the previous token's states: one kept vector is added
    attention        with heads over the last tokens at each target
    both             with both
    observing        beside the path: what a token leaves at a layer, and the vector then complete
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .._ext import NativePredictor, SequenceContext, time_observe, time_predict
from ..context import ContextConfig, TokenMemory
from ..native_predictor import FORMATS
from ..predictor_bundle import PredictorBundle
from ..predictor_config import PredictorConfig
from ..shadow_model import ExpertPredictor
from .predictor import make_matrices
from .timing import Run, in_turns, machine, summary

PLAIN, OBSERVING = "plain", "observing"


def contexts(options: argparse.Namespace) -> dict[str, ContextConfig | None]:
    """The rows' contexts."""
    window, key_size, state_size = options.window, options.key_size, options.state_size
    return {
        PLAIN: None,
        "previous state": ContextConfig(0, 0, state_size),
        "attention": ContextConfig(window, key_size, 0),
        "both": ContextConfig(window, key_size, state_size),
    }


def make_natives(
    config: PredictorConfig, format: str, threads: int, layers: int
) -> dict[int, NativePredictor]:
    """The same predictor for each of so many layers, packed as a model's are."""
    predictor = ExpertPredictor(config)
    predictor.trunk.weight, predictor.heads.weight = map(mx.array, make_matrices(config))
    memories = {}
    if config.context is not None:
        memory = TokenMemory(config.context, config.hidden_size)
        memories = dict.fromkeys(range(1, layers + config.lookahead), memory)
    bundle = PredictorBundle(
        list(range(layers + config.lookahead)),
        dict.fromkeys(range(layers), predictor),
        memories=memories,
    )
    return bundle.native(format, threads)


def filled(natives: dict[int, NativePredictor], states: np.ndarray) -> SequenceContext:
    """A context that has seen so many tokens at every layer."""
    sequence = SequenceContext(natives)
    for layer in range(len(natives) + natives[0].lookahead):
        sequence.observe(layer, states)
    return sequence


def predicting(
    natives: dict[int, NativePredictor], sequence: SequenceContext | None, x: np.ndarray
) -> Run:
    """Predictions that go round the layers."""
    choices = itertools.cycle(natives.values())
    k = natives[0].top_k
    return lambda: time_predict(next(choices), x, k, sequence)


def observing(natives: dict[int, NativePredictor], sequence: SequenceContext, x: np.ndarray) -> Run:
    """Observations that go round the layers which are the last target of one."""
    ahead = natives[0].lookahead
    choices = itertools.cycle(range(ahead, ahead + len(natives)))
    for layer in range(1, ahead):  # else the vectors wait for these
        sequence.observe(layer, x)
    return lambda: time_observe(sequence, next(choices), x)


def measure(config: PredictorConfig, format: str, options: argparse.Namespace) -> dict[str, Any]:
    """One block of rows."""
    rng = np.random.default_rng(1)
    states = rng.standard_normal((2 * options.window, config.hidden_size), dtype=np.float32)
    runs: dict[str, Run] = {}
    held = {}
    for name, context in contexts(options).items():
        own = dataclasses.replace(config, context=context)
        natives = make_natives(own, format, options.threads, options.layers)
        sequence = filled(natives, states) if context else None
        runs[name] = predicting(natives, sequence, states[:1])
        if sequence is not None:
            held[name] = sequence.nbytes
            copy = sequence.fork()
            runs[f"{OBSERVING}, {name}"] = observing(natives, copy, states[:1])
    times = in_turns(
        runs,
        rounds=400,
        seconds=options.seconds,
        warm_up=1 if options.layers > 1 else 3,
        calls=11 if options.layers > 1 else 17,
        rest=0.01 if options.threads > 1 else 0.0,
    )
    found = {name: summary(t) for name, t in times.items()}
    keys = ("min", "p50")
    plain = found[PLAIN]
    return {
        "format": format,
        "microseconds": found,
        "bytes_per_sequence": held,
        "ratio": {name: {k: own[k] / plain[k] for k in keys} for name, own in found.items()},
        "added": {name: {k: own[k] - plain[k] for k in keys} for name, own in found.items()},
    }


def lines(row: dict[str, Any]) -> list[str]:
    """What is printed of a block."""
    out = []
    for name, times in row["microseconds"].items():
        columns = "".join(f"{times[key]:10.1f}" for key in ("min", "p50", "p99"))
        text = f"{row['format']:5}{name:26}{columns}"
        if not name.startswith(OBSERVING):
            text += f"{row['ratio'][name]['p50']:9.2f}x{row['added'][name]['p50']:+9.1f}"
        out.append(text)
    kept = ", ".join(f"{name} {n / 1e6:.2f}" for name, n in row["bytes_per_sequence"].items())
    return [*out, f"{'':5}MB per sequence: {kept}"]


def add_flags(flag: Callable[..., Any]) -> None:
    """The command's own flags."""
    flag("--threads", type=int, default=1, help="that a prediction may use")
    flag("--formats", nargs="+", choices=FORMATS, default=["int4"])
    flag("--layers", type=int, default=1, help="to go round: 60 leave no weights in caches")
    flag("--seconds", type=float, default=15.0, help="at most, for a format")
    flag("--window", type=int, default=256, help="earlier tokens that attention sees")
    flag("--key-size", type=int, default=64)
    flag("--state-size", type=int, default=64)
    flag("--hidden-size", type=int, default=4096)
    flag("--predictor-size", type=int, default=1024)
    flag("--num-experts", type=int, default=384)
    flag("--lookahead", type=int, default=4)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print each block as it comes, return all."""
    if options.layers < 1:
        raise ValueError(f"--layers must be 1 or more, got {options.layers}")
    names = ("hidden_size", "predictor_size", "num_experts", "lookahead")
    sizes: dict[str, Any] = {name: getattr(options, name) for name in names}
    config = PredictorConfig(**sizes)
    print(f"{options.hidden_size} -> {options.predictor_size} -> {options.lookahead} x "
          f"{options.num_experts}, window {options.window}, key {options.key_size}, state "
          f"{options.state_size}, {options.threads} thread(s), {options.layers} layer(s), load "
          f"{machine()['load']}; microseconds: min p50 p99, and p50 to plain's")  # fmt: skip
    results = []
    for format in tqdm(options.formats, leave=False, disable=None):
        results.append(measure(config, format, options))
        tqdm.write("\n".join(lines(results[-1])))
    own = ("threads", "layers", "window", "key_size", "state_size")
    return {**sizes, **{name: getattr(options, name) for name in own}, "results": results}
