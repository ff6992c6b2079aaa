"""How well predicted experts match the experts that the model chose.

All counts are over (token, distance) pairs; `n` is how many ids are predicted, `top_k` how many the
model runs. |predicted n ∩ true top_k| / top_k is recall@n; the specification's top-n accuracy
divides by min(n, top_k) instead, so that a perfect prediction scores 1 at every n. Chosen ids of -1
are absent: neither hits nor misses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .confidence import Confidence

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.floating[Any]]

ACCURACIES = (1, 4, 8)  # the n of the top-n accuracies in a report


def reads(top_k: int) -> list[int]:
    """How many experts a token may read ahead of a layer: where a fixed number is compared."""
    return sorted({max(1, top_k * n // 2) for n in (1, 2, 3, 4)})


def rank(scores: FloatArray, n: int) -> IntArray:
    """Ids of the n highest scores along the last axis, best first; [..., num] → [..., n]."""
    n = min(n, scores.shape[-1])
    best = np.argpartition(scores, -n, axis=-1)[..., -n:]
    order = np.argsort(-np.take_along_axis(scores, best, -1), axis=-1, kind="stable")
    return np.take_along_axis(best, order, -1)


def hits(predicted: IntArray, chosen: IntArray) -> npt.NDArray[np.bool_]:
    """Which of the predicted ids [..., n] are among the chosen ones [..., top_k]: [..., n]."""
    return (predicted[..., :, None] == chosen[..., None, :]).any(axis=-1)


def compute_top_k_accuracy(scores: FloatArray, chosen: IntArray, k: int = 8) -> float:
    """|predicted top-k ∩ chosen| / min(k, number chosen), over all tokens.

    Args:
        scores: [..., num_experts], any scores that rank experts.
        chosen: [..., top_k], the ids that the model chose.
        k: how many of the highest scores count as predicted.

    Raises ValueError where the leading shapes differ or k is out of range.
    """
    scores, chosen = np.asarray(scores), np.asarray(chosen)
    if scores.shape[:-1] != chosen.shape[:-1]:
        raise ValueError(
            f"[compute_top_k_accuracy] scores {scores.shape} and chosen {chosen.shape} must agree "
            "in all but the last axis"
        )
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(f"[compute_top_k_accuracy] k must be 1 … {scores.shape[-1]}, got {k}")
    possible = np.minimum(k, (chosen >= 0).sum(-1)).sum()
    return float(hits(rank(scores, k), chosen).sum() / max(1, possible))


def absent(chosen: IntArray, num_experts: int, capacity: int) -> npt.NDArray[np.bool_]:
    """Which chosen ids [tokens, top_k] a cache of `capacity` experts does not hold when demanded.

    The cache starts empty, keeps the most recently used experts (LRU), and takes a token's experts
    all at once. These are what a prediction is needed for: the rest is there without.
    """
    last_use = np.full(num_experts + 1, -1)
    last_use[-1] = chosen.size  # of the id -1, which is never missing
    missing = np.empty(chosen.shape, bool)
    for i, ids in enumerate(chosen):
        oldest = np.partition(last_use[:num_experts], num_experts - capacity)
        kept_since = max(0, oldest[num_experts - capacity])
        missing[i] = last_use[ids] < kept_since
        # Distinct times, so that exactly `capacity` are the most recent.
        last_use[ids] = i * chosen.shape[1] + np.arange(chosen.shape[1])
        last_use[-1] = chosen.size
    return missing


@dataclass
class Recall:
    """Counts hits as batches come, per distance.

    `hit_counts` [lookahead, ranks]: how often the j-th ranked id was a hit. Fewer experts than
    that, and the last columns stay 0. `chosen_counts` [lookahead, top_k]: how many tokens have more
    than j chosen experts.
    """

    lookahead: int
    top_k: int
    tokens: int = 0
    hit_counts: FloatArray = field(init=False)
    chosen_counts: FloatArray = field(init=False)
    exact_sets: FloatArray = field(init=False)
    # {name: [lookahead, 3]}: of what add's `shares` weigh, all, found among k and among 2k.
    shares: dict[str, FloatArray] = field(default_factory=dict)
    confidence: Confidence | None = None

    def __post_init__(self) -> None:
        self.hit_counts = np.zeros((self.lookahead, self.ranks))
        self.chosen_counts = np.zeros((self.lookahead, self.top_k))
        self.exact_sets = np.zeros(self.lookahead)

    @property
    def ranks(self) -> int:
        """How many predicted ids the report looks at."""
        return max(2 * self.top_k, *ACCURACIES)

    def add(
        self, predicted: IntArray, chosen: IntArray, shares: Mapping[str, FloatArray] | None = None
    ) -> None:
        """Count a batch: predicted [tokens, lookahead, ≤ ranks], best first, and chosen ids.

        `shares`: {name: weights of the chosen ids, 0 where they do not count}; the report then has
        the share of that weight which was predicted.
        """
        found = hits(predicted, chosen)
        k = self.top_k
        self.exact_sets += (found[..., :k].sum(axis=-1) == (chosen >= 0).sum(axis=-1)).sum(axis=0)
        for name, weights in (shares or {}).items():
            known = weights * (chosen >= 0)
            among = [known, *(known * hits(chosen, predicted[..., :n]) for n in (k, 2 * k))]
            counts = np.stack([part.sum(axis=(0, 2), dtype=np.float64) for part in among], axis=1)
            self.shares[name] = self.shares.get(name, 0.0) + counts
        self.hit_counts[:, : found.shape[-1]] += found.sum(axis=0)
        number = (chosen >= 0).sum(axis=-1, keepdims=True)
        self.chosen_counts += (number > np.arange(self.top_k)).sum(axis=0)
        self.tokens += len(predicted)

    def add_scores(
        self, scores: FloatArray, chosen: IntArray, shares: Mapping[str, FloatArray] | None = None
    ) -> None:
        """Count a batch of scores [tokens, lookahead, num_experts]; for the rest see `add`."""
        self.add(rank(scores, self.ranks), chosen, shares)
        if self.confidence is not None:
            self.confidence.add(scores, chosen)

    def at(self, n: int) -> list[float]:
        """recall@n for each distance."""
        return self._share(n, self.top_k)

    def top_n_accuracy(self, n: int) -> list[float]:
        """The specification's top-n accuracy for each distance."""
        return self._share(n, n)

    def _share(self, predicted: int, chosen: int) -> list[float]:
        possible = self.chosen_counts[:, :chosen].sum(axis=1)
        found = self.hit_counts[:, :predicted].sum(axis=1) / np.maximum(1, possible)
        return [float(x) for x in found]

    def report(self) -> dict[str, list[float]]:
        """Every metric by name, each a list over the distances."""
        accuracies = {f"top_{n}_accuracy": self.top_n_accuracy(n) for n in ACCURACIES}
        report = {"recall_at_k": self.at(self.top_k), "recall_at_2k": self.at(2 * self.top_k)}
        report["exact_set_rate"] = [float(x) for x in self.exact_sets / max(1, self.tokens)]
        for name, counts in self.shares.items():
            for i, n in enumerate(("k", "2k"), start=1):
                share = counts[:, i] / np.maximum(counts[:, 0], 1e-30)
                report[f"{name}_recall_at_{n}"] = [float(x) for x in share]
        if self.confidence is not None:
            report |= self.confidence.report()
            for width in reads(self.top_k):
                report[f"recall_at_{width}"] = self.at(width)
                report[f"threshold_recall_at_{width}"] = self.confidence.recall_by_threshold(width)
        return report | accuracies


def mean_over_layers(reports: Iterable[dict[str, list[float]]]) -> dict[str, list[float]]:
    """The mean of each metric per distance, over the layers that have that distance."""
    reports = list(reports)
    lookahead = max((len(next(iter(r.values()))) for r in reports), default=0)
    return {
        name: [
            float(np.mean([r[name][d] for r in reports if d < len(r[name])]))
            for d in range(lookahead)
        ]
        for name in (reports[0] if reports else {})
    }
