"""How far a predictor's probabilities can be believed, and what prefetching by them is worth.

The sigmoid of a logit is taken for the probability that the expert is chosen, as the loss bce or a
calibration makes it. Prefetching all experts above a threshold reads more where the predictor is
unsure and less where it is sure; beside a fixed number per token it is compared at the same number
of reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_BINS = 1000


@dataclass
class Confidence:
    """Counts (token, distance, expert) triples by probability.

    `counts`, `hits` [lookahead, bins]: all, and those whose expert was chosen. `total` [lookahead]:
    the sum of all probabilities; `tokens` that were counted.
    """

    lookahead: int
    tokens: int = 0
    counts: Array = field(init=False)
    hits: Array = field(init=False)
    total: Array = field(init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros((self.lookahead, _BINS))
        self.hits = np.zeros((self.lookahead, _BINS))
        self.total = np.zeros(self.lookahead)

    def add(self, scores: Array, chosen: Array) -> None:
        """Count a batch: logits [tokens, lookahead, num_experts] and chosen ids [..., top_k]."""
        probabilities = 1 / (1 + np.exp(-np.clip(scores, -30, 30)))
        bins = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
        self.total += probabilities.sum(axis=(0, 2), dtype=np.float64)
        self.tokens += len(scores)
        taken = np.take_along_axis(bins, np.maximum(chosen, 0).astype(np.int64), axis=-1)
        for d in range(self.lookahead):
            self.counts[d] += np.bincount(bins[:, d].ravel(), minlength=_BINS)
            self.hits[d] += np.bincount(taken[:, d][chosen[:, d] >= 0], minlength=_BINS)

    def calibration_error(self) -> list[float]:
        """Expected calibration error per distance (Naeini et al., 2015), over 20 bins.

        The mean distance between a probability and how often it came true.
        """
        middles = (np.arange(_BINS) + 0.5) / _BINS
        groups = (self.lookahead, 20, _BINS // 20)
        said = (self.counts * middles).reshape(groups).sum(-1)
        true = self.hits.reshape(groups).sum(-1)
        error = np.abs(said - true).sum(-1) / np.maximum(1, self.counts.sum(-1))
        return [float(x) for x in error]

    def recall_by_threshold(self, width: float) -> list[float]:
        """Recall per distance where the threshold lets `width` experts a token pass on average."""
        result = []
        for counts, hits in zip(self.counts, self.hits, strict=True):
            read = np.concatenate([[0.0], np.cumsum(counts[::-1])]) / max(1, self.tokens)
            found = np.concatenate([[0.0], np.cumsum(hits[::-1])]) / max(1.0, hits.sum())
            result.append(float(np.interp(width, read, found)))
        return result

    def report(self) -> dict[str, list[float]]:
        """Every figure by name, each a list over the distances."""
        return {
            "calibration_error": self.calibration_error(),
            "expected_over_chosen": [
                float(x) for x in self.total / np.maximum(1, self.hits.sum(axis=1))
            ],
        }
