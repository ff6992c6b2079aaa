"""Recorded routing for the simulator, and what predictors say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .native_predictor import NativePredictor, load_bundle
from .predictor_bundle import PredictorBundle
from .token_experts import TokenExperts
from .token_table import TokenTable
from .training.dataset import read_array, read_states
from .training.traces import TraceInfo, open_traces

Advance = Callable[[int], Any]


@dataclass(frozen=True)
class RoutingTrace:
    """experts int16 [tokens, layers, top_k]; token_ids [tokens], or None where they are unknown.

    `recorded`: the traces it was read from, where they hold hidden states too.
    """

    experts: NDArray[np.int16]
    num_experts: int
    token_ids: NDArray[Any] | None = None
    recorded: TraceInfo | None = None


@dataclass(frozen=True)
class Predictions:
    """ids int16 and probabilities float32 [tokens, layers + 1, lookahead, width], likeliest first.

    Source 0 is the token itself, source s the state before MoE layer s - 1; distance d (from 1)
    speaks of MoE layer s + d - 1. Id -1: none.
    """

    ids: NDArray[np.int16]
    probabilities: NDArray[np.float32]

    @classmethod
    def empty(cls, trace: RoutingTrace, lookahead: int, width: int) -> Predictions:
        """Nothing predicted yet."""
        tokens, layers, _ = trace.experts.shape
        shape = (tokens, layers + 1, lookahead, width)
        return cls(np.full(shape, -1, np.int16), np.zeros(shape, np.float32))

    def put(self, rows: slice, source: int, probabilities: NDArray[Any]) -> None:
        """Keep the likeliest of probabilities [rows, distances, num_experts] of a source."""
        _, _, lookahead, width = self.ids.shape
        p = probabilities[:, :lookahead]
        best = np.argsort(-p, axis=-1, kind="stable")[..., :width]
        to = (rows, source, slice(p.shape[1]), slice(best.shape[-1]))
        self.ids[to] = best
        self.probabilities[to] = np.take_along_axis(p, best, axis=-1)


def open_routing(
    path: str | Path, tokens: int | None = None, num_experts: int | None = None
) -> RoutingTrace:
    """Read the first `tokens` of a trace directory, or of an .npz file.

    The file holds `experts` [tokens, layers, top_k], and may hold `tokens` [tokens]; it does not
    say how many experts a layer has: by default as many as its largest id needs. Raises ValueError
    naming file and rule.
    """
    path = Path(path)
    return _from_directory(path, tokens) if path.is_dir() else _from_npz(path, tokens, num_experts)


def _from_directory(path: Path, tokens: int | None) -> RoutingTrace:
    info = open_traces(path)
    if info.recorded_layers != info.moe_layers:
        raise ValueError(
            f"[{path}] a replay needs the routes of all MoE layers {list(info.moe_layers)}, but "
            f"only {list(info.recorded_layers)} are recorded"
        )
    parts, ids, left = [], [], info.samples if tokens is None else tokens
    for shard, rows in zip(info.shards, info.shard_samples, strict=True):
        if left <= 0:
            break
        routed = [read_array(shard, f"routed_experts_{layer}")[:left] for layer in info.moe_layers]
        parts.append(np.stack(routed, axis=1))
        ids.append(read_array(shard, "token_ids")[:left])
        left -= rows
    experts = np.ascontiguousarray(np.concatenate(parts), np.int16)
    return RoutingTrace(experts, info.num_experts, np.concatenate(ids), info)


def _from_npz(path: Path, tokens: int | None, num_experts: int | None) -> RoutingTrace:
    experts = read_array(path, "experts")[:tokens]
    if experts.ndim != 3 or not experts.size or not np.issubdtype(experts.dtype, np.integer):
        raise ValueError(
            f"[{path}] experts must be integers [tokens, layers, top_k], but is {experts.dtype} "
            f"{list(experts.shape)}"
        )
    with np.load(path) as archive:
        token_ids = archive["tokens"][:tokens] if "tokens" in archive.files else None
    largest = int(experts.max()) + 1
    if largest > np.iinfo(np.int16).max:
        raise ValueError(f"[{path}] expert ids must fit int16, but reach {largest - 1}")
    experts = np.ascontiguousarray(experts, np.int16)
    return RoutingTrace(experts, num_experts or largest, token_ids)


def predict_layers(
    into: Predictions, trace: RoutingTrace, predictor: str | Path, format: str, advance: Advance
) -> None:
    """Fill sources 1 … layers from a bundle file, run natively in `format` on recorded states.

    The logits' sigmoid is taken for a probability, as the loss bce or a calibration makes it.
    `advance` is called with the number of tokens x layers done.
    """
    info = trace.recorded
    if info is None:
        raise ValueError(
            "[simulate] a predictor needs hidden states, which routes alone do not hold: give a "
            "directory that collect wrote as the trace"
        )
    bundle = PredictorBundle.load(predictor)
    bundle.warn_without_calibration(str(predictor))
    for layer, native in load_bundle(str(predictor), format, 1).items():
        _check(native, info, layer, predictor)
        done = 0
        for shard, rows in zip(info.shards, info.shard_samples, strict=True):
            n = min(rows, len(trace.experts) - done)
            if n <= 0:
                break
            logits = _logits(native, bundle, shard, layer, n)
            source = info.moe_layers.index(layer) + 1
            into.put(slice(done, done + n), source, 1 / (1 + np.exp(-logits)))
            done += n
            advance(n)


def _check(native: NativePredictor, info: TraceInfo, layer: int, path: str | Path) -> None:
    for name in ("hidden_size", "num_experts", "top_k"):
        if getattr(native, name) != getattr(info, name):
            raise ValueError(
                f"[{path}] is for {name} {getattr(native, name)}, but the traces in {info.path} "
                f"have {name} {getattr(info, name)}"
            )
    if layer not in info.moe_layers:
        raise ValueError(f"[{path}] predicts from layer {layer}, which {info.path} does not have")


def _logits(
    native: NativePredictor, bundle: PredictorBundle, shard: Path, layer: int, rows: int
) -> NDArray[np.float32]:
    """[rows, lookahead, num_experts] of the first rows of a shard."""
    states = read_array(shard, f"hidden_states_{layer}")[:rows].astype(np.float32)
    chosen = read_array(shard, f"expert_choices_{layer}")[:rows, : native.lookahead]
    previous = np.full(chosen.shape, -1, np.int32)
    follows = np.flatnonzero(read_array(shard, "position")[1:rows] > 0) + 1
    previous[follows] = chosen[follows - 1]
    context = _context(bundle, shard, layer, states)
    return native.logits(states, previous=previous, context=context)


def _context(
    bundle: PredictorBundle, shard: Path, layer: int, states: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    """What earlier tokens of a shard add, [rows, predictor_size]; None without a context."""
    if bundle.context is None:
        return None
    rows = len(states)
    ahead = {t: mx.array(read_states(shard, t)[:rows]) for t in bundle.targets(layer)}
    sequence = mx.array(np.cumsum(read_array(shard, "position")[:rows] == 0).astype(np.int32))
    asks = bundle.query_layer(layer)
    asking = states if asks == layer else read_states(shard, asks)[:rows]
    vectors = bundle.context_vectors(layer, mx.array(asking), ahead, sequence)
    return None if vectors is None else np.array(vectors)


def predict_known_tokens(
    into: Predictions, trace: RoutingTrace, known: TokenExperts, advance: Advance
) -> None:
    """Fill source 0 from what a predictor file knows of tokens, as a running model does."""
    assert trace.token_ids is not None
    for begin in range(0, len(trace.token_ids), 1024):
        rows = slice(begin, begin + 1024)
        token_ids = trace.token_ids[rows]
        into.put(rows, 0, known.predict(token_ids, trace.num_experts))
        advance(len(token_ids))


def predict_tokens(
    into: Predictions, trace: RoutingTrace, learn_from: RoutingTrace | None, advance: Advance
) -> None:
    """Fill source 0 from a TokenTable that learns as the replay goes, first from `learn_from`."""
    assert trace.token_ids is not None
    lookahead = min(into.ids.shape[2], trace.experts.shape[1])
    table = TokenTable(lookahead, trace.num_experts)
    if learn_from is not None and learn_from.token_ids is not None:
        _check_alike(learn_from, trace)
        table.observe(learn_from.token_ids, learn_from.experts[:, :lookahead])
    for i in range(len(trace.experts)):
        row = slice(i, i + 1)
        into.put(row, 0, table.predict(int(trace.token_ids[i]))[None])
        table.observe(trace.token_ids[row], trace.experts[row, :lookahead])
        advance(1)


def _check_alike(learned: RoutingTrace, trace: RoutingTrace) -> None:
    for name, a, b in (
        ("MoE layers", learned.experts.shape[1], trace.experts.shape[1]),
        ("experts in a layer", learned.num_experts, trace.num_experts),
    ):
        if a != b:
            raise ValueError(f"[simulate] the traces to learn from have {a} {name}, not {b}")
