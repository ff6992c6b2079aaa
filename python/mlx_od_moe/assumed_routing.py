"""Routing and predictions that nobody recorded, for planning: what they are like is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .routing_trace import Advance, Predictions, RoutingTrace

# Shares of the variance of an expert's affinity: of the expert itself, of the passage (with a
# memory of PASSAGE_TOKENS tokens), and of the token. Chosen so that caches do about as well on
# it as on the small model's recorded routing: see docs/planning.md.
EXPERT, PASSAGE, TOKEN = 0.10, 0.25, 0.65
PASSAGE_TOKENS = 30
CHUNK_TOKENS = 32


def assume_routes(
    tokens: int, layers: int, num_experts: int, top_k: int, seed: int = 0
) -> RoutingTrace:
    """Random routing that is as local as a real one: some experts are liked more, for a while."""
    if not (tokens > 0 and layers > 0 and 0 < top_k <= num_experts):
        raise ValueError(
            "[simulate] assumed routing needs tokens, layers and 1 to num_experts experts a token, "
            f"got {tokens}, {layers} and {top_k} of {num_experts}"
        )
    rng = np.random.default_rng(seed)
    shape = (layers, num_experts)
    keep = np.float32(np.exp(-1 / PASSAGE_TOKENS))
    expert = rng.standard_normal(shape, np.float32) * np.float32(EXPERT**0.5)
    passage = rng.standard_normal(shape, np.float32)
    experts = np.empty((tokens, layers, top_k), np.int16)
    for token in range(tokens):
        passage = keep * passage + (1 - keep**2) ** 0.5 * rng.standard_normal(shape, np.float32)
        affinity = expert + np.float32(PASSAGE**0.5) * passage
        affinity += np.float32(TOKEN**0.5) * rng.standard_normal(shape, np.float32)
        experts[token] = np.argpartition(-affinity, top_k - 1, axis=-1)[:, :top_k]
    return RoutingTrace(experts, num_experts)


def assume_predictions(
    into: Predictions,
    trace: RoutingTrace,
    recall_at_2k: Sequence[float],
    sources: range,
    advance: Advance,
    seed: int = 0,
) -> None:
    """Fill `sources` as a predictor of that recall@2k per distance would.

    Each expert has a normal score, shifted up for those that the layer will choose, and its
    probability is the posterior of that score: calibrated. Errors are independent of each other,
    between tokens and distances too, which those of a real predictor are not.
    """
    rng = np.random.default_rng(seed)
    tokens, layers, top_k = trace.experts.shape
    shifts = [_shift(r, trace.num_experts, top_k) for r in recall_at_2k]
    prior = np.log(top_k / (trace.num_experts - top_k))
    for start in range(0, tokens, CHUNK_TOKENS):
        rows = slice(start, min(start + CHUNK_TOKENS, tokens))
        chosen = _one_hot(trace.experts[rows], trace.num_experts)
        for source in sources:
            targets = range(source, min(source + len(shifts), layers))
            if not targets:
                continue
            shift = np.array(shifts[: len(targets)], np.float32)[:, None]
            true = chosen[:, list(targets)]
            score = rng.standard_normal(true.shape, np.float32) + shift * true
            logit = prior + shift * score - shift**2 / 2
            into.put(rows, source, 1 / (1 + np.exp(-logit)))
        advance(rows.stop - rows.start)


def _one_hot(experts: NDArray[np.int16], num_experts: int) -> NDArray[np.float32]:
    """[..., num_experts]; ids below 0 are none."""
    chosen = np.zeros((*experts.shape[:-1], num_experts + 1), np.float32)
    np.put_along_axis(chosen, np.where(experts < 0, num_experts, experts).astype(np.int64), 1, -1)
    return chosen[..., :-1]


def _shift(recall: float, num_experts: int, top_k: int) -> float:
    """How far above the others the chosen ones' mean score lies, in standard deviations.

    Of 2k predicted, k · recall are chosen ones: where the others' tail holds the rest is the
    threshold that chosen ones pass with probability `recall`.
    """
    if not 0 < recall <= 1:
        raise ValueError(f"[simulate] recall: it lies in 0 ... 1, got {recall}")
    recall = min(recall, 0.9999)
    others = (2 * top_k - top_k * recall) / (num_experts - top_k)
    if others >= 1:
        raise ValueError(
            f"[simulate] recall@{2 * top_k} says nothing where a layer has {num_experts} experts"
        )
    normal = NormalDist()
    return normal.inv_cdf(recall) - normal.inv_cdf(others)
