"""The first factor of a low-rank trunk."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .predictor_file import quantize


class Projection(nn.Module):
    """Maps a hidden state to the `trunk_rank` numbers that the trunk sees of it.

    It holds most of a low-rank predictor's bytes. Layers of a bundle may share one: then a token
    reads it from memory once and from a cache afterwards.
    """

    def __init__(self, hidden_size: int, trunk_rank: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, trunk_rank, bias=False)

    def __call__(self, h: mx.array) -> mx.array:
        """[..., trunk_rank] of states h [..., hidden_size]."""
        return self.linear(h)

    def quantized(self, bits: int, group_size: int = 64) -> Projection:
        """A copy with its matrix in MLX's affine format."""
        rank, hidden_size = self.linear.weight.shape
        copy = Projection(hidden_size, rank)
        copy.update(self.parameters())
        quantize(copy, bits, group_size)
        return copy
