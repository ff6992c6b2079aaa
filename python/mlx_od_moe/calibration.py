"""Makes logits into those of probabilities: score = a (z - boundary) + b.

What a loss leaves free in a token's logits, their sum with `kl` and `softmax`, says nothing of a
probability. What all tokens share is that k experts of a layer are chosen. So the scale's origin is
where the k-th logit ends: `boundary` is the mean of the logits ranked around it, from k/2 above it
to k/2 below. The factor a > 0 and the offset b of each distance are fitted as Platt did (1999).
A token's ranking stays as it was. In place of the boundary the logits' logsumexp would calibrate as
well over all tokens, but a threshold on it finds less: docs/evaluation.md.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Losses whose logits are not those of "is chosen": two stay the same whatever is added to a token's
# logits, and soft labels are no probabilities.
UNCALIBRATED = frozenset({"kl", "soft", "softmax"})

# Bins are as wide as 1/200 of what they hold, and 5e-6 at 0; each is then taken at its mean.
_BINS_PER_UNIT, _BINS = 200, 10_000
# Of the logits' deviation. Where logits say nothing about the choices, their order stays even so.
_LEAST_FACTOR = 1e-3


def check_calibration(calibration: mx.array, lookahead: int, name: str) -> None:
    """Raise ValueError, beginning with `name`, unless it is floats [lookahead, 2], a above 0."""
    if calibration.shape != (lookahead, 2) or not mx.issubdtype(calibration.dtype, mx.floating):
        raise ValueError(
            f"{name} must be floats [{lookahead}, 2], but is {calibration.dtype} "
            f"{list(calibration.shape)}"
        )
    for d, (factor, offset) in enumerate(np.array(calibration.astype(mx.float32)).tolist()):
        if not (0 < factor < np.inf and np.isfinite(offset)):
            raise ValueError(
                f"{name} must be a factor above 0 and an offset for each distance, both finite, "
                f"got {factor} and {offset} at distance {d + 1}"
            )


def boundary_ranks(top_k: int, num_experts: int) -> tuple[int, int]:
    """The ranks [first, end) whose logits' mean is the boundary, 0 the largest.

    As many among the k largest as below them. Raises ValueError where all experts are chosen.
    """
    half = min(max(1, top_k // 2), num_experts - top_k)
    if half < 1:
        raise ValueError(
            f"[calibration] top_k must be below num_experts ({num_experts}), got {top_k}"
        )
    return top_k - half, top_k + half


def calibrated(logits: mx.array, calibration: mx.array, top_k: int) -> mx.array:
    """Scores of logits [..., lookahead, num_experts], whose sigmoid is a probability; float32."""
    first, end = boundary_ranks(top_k, logits.shape[-1])
    boundary = -mx.sort(-logits, axis=-1)[..., first:end].mean(axis=-1, keepdims=True)
    # Beyond float32 there are no probabilities, but an order.
    boundary = mx.where(mx.isfinite(boundary), boundary, 0.0)
    return calibration[:, :1] * (logits - boundary) + calibration[:, 1:]


class CalibrationFit:
    """Counts logits and what was chosen as batches come, and fits a calibration to them."""

    def __init__(self, lookahead: int, top_k: int):
        self.top_k = top_k
        # Per bin: how many logits, how many of them of chosen experts, and the logits' sum.
        self._counts, self._hits, self._sums = np.zeros((3, lookahead, 2 * _BINS + 1))

    def add(self, logits: Array, chosen: Array) -> None:
        """Count logits [tokens, lookahead, num_experts], not calibrated, and ids [..., top_k].

        Where a token has no chosen experts (-1) at a distance, nothing is known and counted.
        """
        first, end = boundary_ranks(self.top_k, logits.shape[-1])
        ranked = -np.sort(-logits, axis=-1)[..., first:end]
        above = logits.astype(np.float64) - ranked.mean(axis=-1, keepdims=True, dtype=np.float64)
        bins = np.rint(np.arcsinh(above * 1e3) * _BINS_PER_UNIT)
        bins = np.clip(bins, -_BINS, _BINS).astype(np.int64) + _BINS
        taken = np.take_along_axis(bins, np.maximum(chosen, 0).astype(np.int64), axis=-1)
        for d in range(len(self._counts)):
            known = (chosen[:, d] >= 0).any(axis=-1)
            own, hits = bins[known, d].ravel(), taken[:, d][chosen[:, d] >= 0]
            size = 2 * _BINS + 1
            self._counts[d] += np.bincount(own, minlength=size)
            self._hits[d] += np.bincount(hits, minlength=size)
            self._sums[d] += np.bincount(own, above[known, d].ravel(), minlength=size)

    def result(self) -> mx.array:
        """The likeliest calibration [lookahead, 2], float32."""
        parts = zip(self._counts, self._hits, self._sums, strict=True)
        return mx.array([_fit(*part) for part in parts], mx.float32)


def _fit(counts: Array, hits: Array, sums: Array) -> list[float]:
    """Platt's logistic regression on the bins: factor and offset."""
    seen = counts > 0
    counts, hits, x = counts[seen], hits[seen], sums[seen] / counts[seen]
    # His targets are not quite 0 and 1: where logits leave no doubt the factor stays finite.
    yes, no = (hits.sum() + 1) / (hits.sum() + 2), 1 / ((counts - hits).sum() + 2)
    wanted = hits * yes + (counts - hits) * no
    deviation = np.sqrt((counts * x**2).sum() / max(1, counts.sum())) or 1.0
    x = x / deviation
    factor, offset = _newton(np.stack([x, np.ones_like(x)]), counts, wanted, np.zeros_like(x))
    if factor < _LEAST_FACTOR:
        factor = _LEAST_FACTOR
        (offset,) = _newton(np.ones((1, len(x))), counts, wanted, factor * x)
    return [float(factor / deviation), float(offset)]


def _newton(features: Array, counts: Array, wanted: Array, base: Array) -> Array:
    """Weights of `features` [n, bins] for which sigmoid(base + weights features) fits best."""

    def cost(weights: Array) -> float:
        score = base + weights @ features
        return float((counts * np.logaddexp(0, score) - wanted * score).sum())

    weights = np.zeros(len(features))
    best = cost(weights)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(base + weights @ features, -500, 500)))
        slope = features @ (counts * p - wanted)
        curvature = (features * (counts * p * (1 - p))) @ features.T
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(weights)), slope)
        while (lower := cost(weights - step)) > best and np.abs(step).max() > 1e-9:
            step = step / 2
        if lower >= best:
            break
        weights, best = weights - step, lower
    return weights
