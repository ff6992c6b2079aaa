"""The native predictor beside other runtimes, and beside the time that reading its weights takes.

Rows of one format and number of tokens, in one process and in turns:
    mlx-od-moe             a call of predict from Python, all its top-8s included
    mlx-od-moe, C++        the same by C++'s clock: a call costs Python the difference
    reading the weights    loads as many bytes with as many threads, and no more: the floor
    the peers of `peers`   from Python, without top-k; those that are installed
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .._ext import ReadProbe, time_predict
from ..native_predictor import FORMATS, NativePredictor
from ..predictor_bundle import PredictorBundle
from ..predictor_config import PredictorConfig
from ..shadow_model import ExpertPredictor
from .peers import PEERS, Maker, Matrices
from .timing import Run, blas_threads, in_turns, machine, summary, timed_in_turn

OURS, NATIVE, READ = "mlx-od-moe", "mlx-od-moe, C++", "reading the weights"
Times = dict[str, dict[str, float]]


def make_matrices(config: PredictorConfig) -> Matrices:
    """Gaussian trunk and heads whose outputs have about the deviation of their inputs."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)

    outputs = config.lookahead * config.num_experts
    return Matrices(
        matrix(config.predictor_size, config.hidden_size), matrix(outputs, config.predictor_size)
    )


def make_natives(
    config: PredictorConfig, matrices: Matrices, format: str, threads: int, layers: int = 1
) -> list[NativePredictor]:
    """The same predictor for each of so many layers, packed as a model's are."""
    predictor = ExpertPredictor(config)
    predictor.trunk.weight, predictor.heads.weight = map(mx.array, matrices)
    bundle = PredictorBundle(
        list(range(layers + config.lookahead)), dict.fromkeys(range(layers), predictor)
    )
    return list(bundle.native(format, threads).values())


def native_runs(natives: list[NativePredictor], x: np.ndarray) -> dict[str, Run]:
    """Ours from Python and from C++, and the floor; each goes round the layers by itself."""
    first = natives[0]
    size, layers = first.weight_bytes, len(natives)
    out = np.empty((len(x), first.lookahead, first.top_k), np.int32)
    probe = ReadProbe(size * layers, first.threads)
    native, offset = itertools.cycle(natives), itertools.cycle(range(0, size * layers, size))
    return {
        OURS: timed_in_turn([native.predict for native in natives], x, None, None, None, out),
        NATIVE: lambda: time_predict(next(native), x, first.top_k),
        READ: lambda: probe.read(next(offset), size),
    }


def make_peers(
    makers: dict[str, Maker], matrices: Matrices, x: np.ndarray, threads: int, layers: int
) -> tuple[dict[str, Run], dict[str, str]]:
    """({name: a forward of x, by Python's clock}, {name: why it is left out}).

    Each peer has `layers` copies of the weights and goes round them.
    """
    runs, left_out = {}, {}
    for name, maker in makers.items():
        if name == "onnxruntime" and threads > 1 and layers > 1:
            left_out[name] = "each copy would spin with threads of its own"
            continue
        try:
            forwards = [maker(matrices, threads) for _ in range(layers)]
            forwards[0](x)
        except Exception as error:  # a peer that can't do it here is no reason to stop
            left_out[name] = f"{type(error).__name__}: {error!s:.200}"
        else:
            runs[name] = timed_in_turn(forwards, x)
    return runs, left_out


def measure(
    config: PredictorConfig, format: str, tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One block of rows."""
    matrices = make_matrices(config)
    x = np.random.default_rng(1).standard_normal((tokens, config.hidden_size), dtype=np.float32)
    natives = make_natives(config, matrices, format, options.threads, options.layers)
    runs = native_runs(natives, x)
    wanted = PEERS[format].keys() if options.peers is None else options.peers
    makers = {name: maker for name, maker in PEERS[format].items() if name in wanted}
    peers, left_out = make_peers(makers, matrices, x, options.threads, options.layers)
    runs |= peers
    times = in_turns(
        runs,
        rounds=400,
        seconds=options.seconds,
        warm_up=1 if options.layers > 1 else 3,
        calls=11 if options.layers > 1 else 17,
        rest=0.01 if options.threads > 1 else 0.0,
    )
    found = {name: summary(t) for name, t in times.items()}
    return {
        "format": format,
        "tokens": tokens,
        "megabytes": natives[0].weight_bytes / 1e6,
        "kernel": natives[0].kernel,
        "microseconds": found,
        "fraction_of_floor": ratios(found[READ], found[NATIVE]),
        "python_overhead": {key: found[OURS][key] - found[NATIVE][key] for key in ("min", "p50")},
        "best_peer": best_peer({name: found[name] for name in peers}, found[OURS]),
        "left_out": left_out,
    }


def ratios(times: dict[str, float], ours: dict[str, float]) -> dict[str, float]:
    """Above 1: ours is faster."""
    return {key: times[key] / ours[key] for key in ("min", "p50")}


def best_peer(peers: Times, ours: dict[str, float]) -> dict[str, Any] | None:
    """The peer with the lowest median and its ratios; None without peers."""
    if not peers:
        return None
    name = min(peers, key=lambda peer: peers[peer]["p50"])
    return {"name": name, **ratios(peers[name], ours)}


def lines(row: dict[str, Any]) -> list[str]:
    """What is printed of a block."""
    found = row["microseconds"]
    out = []
    for name, times in found.items():
        columns = "".join(f"{times[key]:10.1f}" for key in ("min", "p50", "p99"))
        out.append(f"{row['format']:5}{row['tokens']:5} {name:20}{columns}"
                   f"{times['p50'] / found[OURS]['p50']:9.2f}x")  # fmt: skip
    floor, overhead, best = row["fraction_of_floor"], row["python_overhead"], row["best_peer"]
    out.append(f"{'':11}floor / C++: {floor['min']:.2f} min, {floor['p50']:.2f} p50; "
               f"Python adds {overhead['min']:.1f} min, {overhead['p50']:.1f} p50 µs")  # fmt: skip
    if best:
        out.append(f"{'':11}best peer {best['name']}: {best['p50']:.2f}x our p50, "
                   f"{best['min']:.2f}x our min")  # fmt: skip
    return out + [f"{'':11}{name} left out: {why}" for name, why in row["left_out"].items()]


def add_flags(flag: Callable[..., Any]) -> None:
    """The command's own flags."""
    flag("--threads", type=int, default=1, help="of ours, of the reading and of the peers")
    flag("--tokens", type=int, nargs="+", default=[1], help="tokens in a call")
    flag("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    flag("--layers", type=int, default=1, help="copies to go round: 60 leave no weights in caches")
    flag(
        "--peers", nargs="*", default=None, help="only these (none: `--peers` alone); default: all"
    )
    flag("--seconds", type=float, default=15.0, help="at most, for a format and number of tokens")
    flag("--hidden-size", type=int, default=4096)
    flag("--predictor-size", type=int, default=1024)
    flag("--num-experts", type=int, default=384)
    flag("--lookahead", type=int, default=4)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print each block as it comes, return all."""
    if min(options.tokens) < 1 or options.layers < 1:
        raise ValueError("--tokens and --layers must be 1 or more")
    known = {name for makers in PEERS.values() for name in makers}
    if unknown := set(options.peers or ()) - known:
        raise ValueError(
            f"no peer is named {', '.join(sorted(unknown))}: {', '.join(sorted(known))}"
        )
    sizes = ("hidden_size", "predictor_size", "num_experts", "lookahead")
    config = PredictorConfig(**{name: getattr(options, name) for name in sizes})
    print(f"{config.hidden_size} -> {config.predictor_size} -> {config.lookahead} x "
          f"{config.num_experts}, {options.threads} thread(s), {options.layers} layer(s), load "
          f"{machine()['load']}; microseconds: min p50 p99, and p50 / ours")  # fmt: skip
    blocks = list(itertools.product(options.formats, options.tokens))
    results = []
    with blas_threads(options.threads):
        for format, tokens in tqdm(blocks, leave=False, disable=None):
            results.append(measure(config, format, tokens, options))
            tqdm.write("\n".join(lines(results[-1])))
    return {
        **{name: getattr(options, name) for name in (*sizes, "threads", "layers")},
        "results": results,
    }
