"""Dummy traces: no model, but a planted structure that a predictor can learn and guessing cannot.

A low-dimensional latent of each token, which drifts through its document, drives both the hidden
state (a random projection, plus noise) and every layer's expert scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .plan import Shard
from .traces import Arrays

# An MLP 4096-1024-4x384 learns 0.89 of the top 8 from 4,000 samples in 15 epochs: most, not all.
LATENT_SIZE = 5
STATE_NOISE = 0.1
SCORE_NOISE = 0.01
_DOCUMENTS = 50
_VOCABULARY = 32_000

FloatArray = NDArray[np.float32]


class DummyTraces:
    """Makes the shards that `collection` describes: same seed, same rows."""

    def __init__(self, collection: Mapping[str, Any]):
        """Draw the projections from the collection's seed."""
        self.collection = collection
        rng = np.random.default_rng([collection["seed"], 0])
        layers = len(collection["recorded_layers"])
        hidden, experts = collection["hidden_size"], collection["num_experts"]
        self._project = _normal(rng, layers, LATENT_SIZE, hidden) / np.float32(LATENT_SIZE**0.5)
        self._score = _normal(rng, layers + collection["lookahead"], LATENT_SIZE, experts)
        # Experts of equal length: none is favoured, so that frequency alone predicts nothing.
        self._score /= np.linalg.norm(self._score, axis=1, keepdims=True)

    def skip(self, shard: Shard) -> None:
        """Shards are drawn independently: nothing to do."""

    def collect(self, shard: Shard, advance: Callable[[int], None]) -> Arrays:
        """The arrays of one shard; `advance` is told its rows."""
        collection, n = self.collection, shard.rows
        rng = np.random.default_rng([collection["seed"], 1, shard.index])
        length = -(-collection["tokens"] // _DOCUMENTS)
        rows = np.arange(shard.first_row, shard.first_row + n)
        starts = np.flatnonzero((rows % length == 0) | (rows == rows[0]))
        position = np.arange(n) - np.repeat(starts, np.diff([*starts, n]))
        latent = _drift(rng, n, starts)
        routed = [_choose(rng, latent @ score, collection["top_k"]) for score in self._score]
        arrays: Arrays = {
            "token_ids": rng.integers(_VOCABULARY, size=n).astype(np.int32),
            "document": (rows // length).astype(np.int32),
            "position": position.astype(np.int32),
            "phase": np.full(n, shard.phase, np.uint8),
        }
        for i, layer in enumerate(collection["recorded_layers"]):
            state = latent @ self._project[i]
            state += STATE_NOISE * _normal(rng, *state.shape)
            arrays[f"hidden_states_{layer}"] = state.astype(np.float16)
            arrays[f"routed_experts_{layer}"] = routed[i]
            ahead = routed[i + 1 : i + 1 + collection["lookahead"]]
            arrays[f"expert_choices_{layer}"] = np.stack(ahead, axis=1)
        advance(n)
        return arrays


def _normal(rng: np.random.Generator, *shape: int) -> FloatArray:
    return rng.standard_normal(shape, np.float32)


def _drift(rng: np.random.Generator, n: int, starts: NDArray[np.intp]) -> FloatArray:
    """Latents [n, LATENT_SIZE] of unit variance, each near the one before in its sequence."""
    keep = np.float32(0.5)
    latent = _normal(rng, n, LATENT_SIZE)
    fresh = np.zeros(n, bool)
    fresh[starts] = True
    for row in np.flatnonzero(~fresh):
        latent[row] = keep * latent[row - 1] + np.sqrt(1 - keep**2) * latent[row]
    return latent


def _choose(rng: np.random.Generator, scores: FloatArray, top_k: int) -> NDArray[np.int16]:
    noisy = scores + np.float32(SCORE_NOISE) * _normal(rng, *scores.shape)
    return np.argpartition(-noisy, top_k - 1, axis=1)[:, :top_k].astype(np.int16)
