"""What a context costs a native prediction, and what it costs beside the critical path.

Rows of one format, in one process and in turns, all by C++'s clock for one token:
    plain            a prediction without context
    previous state   with the previous token's states: one kept vector is added
    attention        with heads over the last tokens at each target, asked by the layer before
    both             with both
    late             with both, asked by the layer's own state: attention is left to the prediction
    observing        beside the path: what a token leaves at a layer, and the vectors then complete
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
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
        "late": ContextConfig(window, key_size, state_size, early_query=False),
    }


def make_natives(
    config: PredictorConfig, format: str, threads: int, layers: int
) -> dict[int, NativePredictor]:
    """The same predictor for each of so many layers, packed as a model's are.

    Layer 0 has none: it is before the first that has one, as most are.
    """
    predictor = ExpertPredictor(config)
    predictor.trunk.weight, predictor.heads.weight = map(mx.array, make_matrices(config))
    memories = {}
    if config.context is not None:
        memory = TokenMemory(config.context, config.hidden_size)
        memories = dict.fromkeys(range(2, layers + 1 + config.lookahead), memory)
    bundle = PredictorBundle(
        list(range(layers + 1 + config.lookahead)),
        dict.fromkeys(range(1, layers + 1), predictor),
        memories=memories,
    )
    return bundle.native(format, threads)


def filled(natives: dict[int, NativePredictor], states: np.ndarray) -> SequenceContext:
    """A context that has seen so many tokens at every layer."""
    sequence = SequenceContext(natives)
    for layer in layers_of(natives):
        sequence.observe(layer, states)
    return sequence


def layers_of(natives: dict[int, NativePredictor]) -> range:
    """All MoE layers of the model that they are of."""
    return range(1 + len(natives) + natives[1].lookahead)


def predicting(
    natives: dict[int, NativePredictor], sequence: SequenceContext | None, x: np.ndarray
) -> Run:
    """The predictions of one pass after the other; what is beside them is not timed."""

    def passes() -> Iterator[float]:
        while True:
            for layer in layers_of(natives):
                if layer in natives:
                    yield time_predict(natives[layer], x, natives[1].top_k, sequence)
                if sequence is not None:
                    sequence.observe(layer, x)

    return passes().__next__


def observing(
    natives: dict[int, NativePredictor], sequence: SequenceContext, timed: range, x: np.ndarray
) -> Run:
    """Observations at the layers `timed` of one pass after the other."""

    def passes() -> Iterator[float]:
        while True:
            for layer in layers_of(natives):
                if layer in timed:
                    yield time_observe(sequence, layer, x)
                else:
                    sequence.observe(layer, x)

    return passes().__next__


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
            # So many more that a layer is the last target of one and stands before another.
            first = 1 + config.lookahead
            more = make_natives(own, format, options.threads, first + options.layers)
            timed = range(first, first + options.layers)
            runs[f"{OBSERVING}, {name}"] = observing(more, filled(more, states), timed, states[:1])
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
