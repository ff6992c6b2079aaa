"""What a TokenTable has learned, as predictor files keep it and a running model looks it up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .token_table import TokenTable

# Experts of a layer that a prediction names: the width that was measured in docs/planning.md.
WIDTH = 16
# A probability is stored in one byte.
_STEPS = 255


@dataclass(frozen=True)
class TokenExperts:
    """The likeliest experts of the first MoE layers for each token that was seen.

    Attributes:
        tokens: their ids, ascending, int32 [n].
        experts: likeliest first, [n + 1, layers, width]; the last row is for any other token.
        probabilities: 0 … 255 for 0 … 1, uint8, of the same shape.
    """

    tokens: NDArray[np.int32]
    experts: NDArray[np.uint16]
    probabilities: NDArray[np.uint8]

    def __post_init__(self) -> None:
        rows = len(self.tokens) + 1
        shapes = self.experts.shape, self.probabilities.shape
        if self.experts.ndim != 3 or shapes[0] != shapes[1] or shapes[0][0] != rows:
            raise ValueError(
                f"[TokenExperts] {len(self.tokens)} tokens need experts and probabilities "
                f"[{rows}, layers, width], got {shapes[0]} and {shapes[1]}"
            )
        if not len(self.tokens) or (np.diff(self.tokens) <= 0).any():
            raise ValueError("[TokenExperts] tokens must ascend, and be at least one token")

    @classmethod
    def learned(cls, table: TokenTable) -> TokenExperts:
        """The best of all tokens that the table has seen."""
        tokens = np.array(sorted(table.tokens()), np.int32)
        likely = [table.predict(token) for token in [*tokens.tolist(), -1]]
        best = [np.argsort(-p, axis=-1, kind="stable")[:, :WIDTH] for p in likely]
        chosen = [np.take_along_axis(p, b, -1) for p, b in zip(likely, best, strict=True)]
        steps = np.rint(np.stack(chosen) * _STEPS).astype(np.uint8)
        return cls(tokens, np.stack(best).astype(np.uint16), steps)

    @property
    def layers(self) -> int:
        """How many MoE layers, from the first."""
        return self.experts.shape[1]

    def predict(self, token_ids: NDArray[Any], num_experts: int) -> NDArray[np.float32]:
        """The probability [n, layers, num_experts] that each of n tokens chooses each expert."""
        row = self._rows(token_ids)
        out = np.zeros((*self.experts[row].shape[:2], num_experts), np.float32)
        likely = self.probabilities[row].astype(np.float32) / _STEPS
        np.put_along_axis(out, self.experts[row].astype(np.int64), likely, axis=-1)
        return out

    def likeliest(self, token_ids: NDArray[Any]) -> NDArray[np.int64]:
        """The experts [n, layers, width] that n tokens choose most probably, likeliest first."""
        return self.experts[self._rows(token_ids)].astype(np.int64)

    def _rows(self, token_ids: NDArray[Any]) -> NDArray[np.int64]:
        row = np.searchsorted(self.tokens, token_ids)
        known = self.tokens[np.minimum(row, len(self.tokens) - 1)] == token_ids
        return np.where(known, row, len(self.tokens))

    def tensors(self) -> dict[str, mx.array]:
        """As a file holds them; experts in one byte where their ids fit."""
        experts = self.experts.astype(np.uint8) if self.experts.max() < 256 else self.experts
        found = {"tokens": self.tokens, "experts": experts, "probabilities": self.probabilities}
        return {name: mx.array(array) for name, array in found.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, mx.array]) -> TokenExperts:
        """What `tensors` gave. Raises ValueError where they do not fit each other."""
        tokens, experts, probabilities = (
            np.array(tensors[name]) for name in ("tokens", "experts", "probabilities")
        )
        return cls(tokens, experts.astype(np.uint16), probabilities)
