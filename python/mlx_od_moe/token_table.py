"""Which experts the first MoE layers choose, by the token alone.

The state that enters the first MoE layers is little more than the token's embedding, and no earlier
MoE layer could have predicted them. A count per token and expert predicts them well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A token seen n times counts n against this many uses at the layer's average.
PRIOR_TOKENS = 1.0


class TokenTable:
    """Counts of the experts that each token chose at the first `layers` MoE layers.

    It learns as it goes: `observe` what a token chose after `predict` of it. Only tokens that came
    take memory, layers · num_experts · 4 bytes each.
    """

    def __init__(self, layers: int, num_experts: int):
        self._layers = np.arange(layers)[:, None]
        self._shape = (layers, num_experts)
        self._all = np.zeros(self._shape)
        self._tokens = 0
        self._counts: dict[int, NDArray[np.float32]] = {}
        self._seen: dict[int, int] = {}

    def observe(self, token_ids: NDArray[Any], experts: NDArray[Any]) -> None:
        """Learn the choices [n, layers, top_k] of n tokens; ids below 0 are none."""
        tokens, row = np.unique(token_ids, return_inverse=True)
        shape = len(tokens), *self._shape
        places = (row[:, None, None] * shape[1] + self._layers) * shape[2] + experts
        found = np.bincount(places[experts >= 0], minlength=math.prod(shape))
        counts = found.reshape(shape).astype(np.float32)
        for token, seen, own in zip(tokens.tolist(), np.bincount(row), counts, strict=True):
            self._counts[token] = self._counts.get(token, 0) + own
            self._seen[token] = self._seen.get(token, 0) + int(seen)
        self._all += counts.sum(axis=0)
        self._tokens += len(token_ids)

    def tokens(self) -> list[int]:
        """All that were observed."""
        return [*self._counts]

    def predict(self, token_id: int) -> NDArray[np.float32]:
        """The probability [layers, num_experts] that the token chooses each expert."""
        prior = self._all / max(self._tokens, 1)
        counts = self._counts.get(token_id)
        if counts is None:
            return prior.astype(np.float32)
        seen = self._seen[token_id]
        return ((counts + PRIOR_TOKENS * prior) / (seen + PRIOR_TOKENS)).astype(np.float32)
