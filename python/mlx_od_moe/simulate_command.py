"""The flags of `mlx-od-moe simulate`, and what they mean."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .routing_trace import Predictions, RoutingTrace
    from .simulate import Machine, Prefetching


def add_flags(flag: Any) -> None:
    """Declare the command's flags by calls of `flag`."""
    flag("--trace", help="a directory that collect wrote, or an .npz file with `experts`")
    flag("--assume-routes", metavar="LxExK", help="no trace: random routing, say 60x384x8")
    flag("--tokens", type=int, default=None, help="only the first so many; 2000 if assumed")
    flag("--num-experts", type=int, default=None, help="of one layer, where an .npz needs it")
    flag("--capacity", default="25%", help="resident: 25%%, experts per layer, or 8GB in all")
    flag("--first-capacity", type=int, help="experts of the first layer, at the others' expense")
    flag("--policy", nargs="+", default=["lru"], help="lru lfuda lrfu s3fifo score belady")
    flag("--predictor", help="file that train wrote; the trace must hold hidden states")
    flag("--format", default="int4", help="that the predictor runs in")
    flag("--assume-recall", type=float, nargs="+", metavar="R", help="no predictor: its recall@2k")
    flag("--fit-traces", help="learn the first layers' experts by token from these traces")
    flag("--no-token-table", action="store_true", help="predict no layer from the token alone")
    flag("--no-oracles", action="store_true", help="replay no prefetch of the true routes")
    flag("--widths", type=int, nargs="+", default=[16] * 4, help="experts read ahead per distance")
    flag("--thresholds", type=float, nargs="+", default=[0.1] * 4, help="least probability")
    flag("--discount", type=float, default=0.3, help="of priority, per layer of distance")
    flag("--margin", type=float, default=0.1, help="evicted for p: what has less than margin x p")
    flag("--experts-per-layer-time", type=float, nargs="+", default=[6.0], help="the disk's speed")
    flag("--latency", type=float, default=0.0, help="of a read: layer times, or ms with --layer-ms")
    flag("--token-time", type=float, default=0.0, help="between tokens, in the same unit")
    flag("--first-attention", type=float, default=0.5, help="layer times that a token is known for")
    flag("--layer-ms", type=float, help="absolute times: computing one MoE layer takes this")
    flag("--bandwidth", type=float, nargs="+", metavar="GB/s", help="of the disk; needs --layer-ms")
    flag("--expert-bytes", type=float, default=0, help="of one expert; needed with --bandwidth")
    flag("--json", help="also write the result to this file")
    flag("--plot", help="write a PNG of the hit rate per disk")


def run(options: argparse.Namespace) -> None:
    """Replay, print the table, and write what was asked for."""
    from .simulate import plot, simulate, table

    trace, prefetching = _trace(options), _prefetching(options)
    result = simulate(
        trace,
        _capacity(options, trace),
        options.policy,
        _machines(options),
        _predictions(options, trace, prefetching),
        prefetching,
        oracles=not options.no_oracles,
    )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if options.plot:
        plot(result, options.plot)


def _trace(options: argparse.Namespace) -> RoutingTrace:
    from .assumed_routing import assume_routes
    from .routing_trace import open_routing

    if bool(options.trace) == bool(options.assume_routes):
        raise ValueError("give either --trace or --assume-routes")
    if options.tokens is not None and options.tokens < 1:
        raise ValueError(f"--tokens must be positive, got {options.tokens}")
    if options.trace:
        return open_routing(options.trace, options.tokens, options.num_experts)
    try:
        layers, experts, top_k = map(int, options.assume_routes.split("x"))
    except ValueError:
        raise ValueError(
            f"--assume-routes {options.assume_routes}: give layers x experts x top_k, as 60x384x8"
        ) from None
    return assume_routes(options.tokens or 2000, layers, experts, top_k)


def _capacity(options: argparse.Namespace, trace: RoutingTrace) -> list[int]:
    from .simulate import parse_capacity

    _, layers, top_k = trace.experts.shape
    size = int(options.expert_bytes)
    each = parse_capacity(options.capacity, layers, trace.num_experts, size)
    first = options.first_capacity
    if first is None or layers == 1:
        return [each] * layers
    others = (each * layers - first) // (layers - 1)
    if others < top_k:
        raise ValueError(
            f"--first-capacity {first} leaves {others} for each other layer, and a token needs "
            f"{top_k}"
        )
    return [first] + [others] * (layers - 1)


def _prefetching(options: argparse.Namespace) -> Prefetching:
    from .simulate import Prefetching

    return Prefetching(
        tuple(options.widths), tuple(options.thresholds), options.discount, options.margin
    )


def _machines(options: argparse.Namespace) -> list[Machine]:
    from .simulate import Machine

    if bool(options.bandwidth) != bool(options.layer_ms):
        raise ValueError("--bandwidth and --layer-ms go together: both, or neither")
    if options.bandwidth and not options.expert_bytes > 0:
        raise ValueError("--bandwidth needs --expert-bytes")
    speeds = options.bandwidth or options.experts_per_layer_time
    if min(speeds) <= 0:
        raise ValueError(f"a disk's speed must be positive, got {min(speeds)}")
    layer = options.layer_ms / 1e3 if options.layer_ms else 1.0
    unit = 1e-3 if options.layer_ms else 1.0
    read = [
        options.expert_bytes / (speed * 1e9) if options.bandwidth else layer / speed
        for speed in speeds
    ]
    between = unit * options.latency, unit * options.token_time, options.first_attention
    size = int(options.expert_bytes) if options.layer_ms else 0
    return [Machine(layer, time, *between, size) for time in read]


def _predictions(
    options: argparse.Namespace, trace: RoutingTrace, prefetching: Prefetching
) -> Predictions | None:
    from .assumed_routing import assume_predictions
    from .predictor_bundle import PredictorBundle
    from .routing_trace import (
        Predictions,
        open_routing,
        predict_known_tokens,
        predict_layers,
        predict_tokens,
    )

    recall = options.assume_recall
    if options.predictor and recall:
        raise ValueError("give either --predictor or --assume-recall")
    if not (options.predictor or recall):
        return None
    tokens, layers, _ = trace.experts.shape
    into = Predictions.empty(trace, prefetching.lookahead, max(prefetching.widths))
    if options.predictor:
        with _bar(tokens * (layers - 1), "predict", "state") as bar:
            predict_layers(into, trace, options.predictor, options.format, bar.update)
    if trace.token_ids is not None and not options.no_token_table:
        known = PredictorBundle.load(options.predictor).token_experts if options.predictor else None
        with _bar(tokens, "token table", "token") as bar:
            if known is not None and not options.fit_traces:
                predict_known_tokens(into, trace, known, bar.update)
            else:
                fit = open_routing(options.fit_traces) if options.fit_traces else None
                predict_tokens(into, trace, fit, bar.update)
    if options.predictor:
        return into
    # Routing that was assumed has no tokens: its source 0 is assumed too.
    sources = range(0 if trace.token_ids is None and not options.no_token_table else 1, layers)
    with _bar(tokens, "assume", "token") as bar:
        assume_predictions(into, trace, recall[: prefetching.lookahead], sources, bar.update)
    return into


def _bar(total: int, text: str, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=text, unit=unit, leave=False, disable=None)
