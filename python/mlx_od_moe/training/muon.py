"""Muon as bundles are trained with it: one operation on CPUs that multiply in bfloat16."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from .._ext import bf16_muon
from .fast_layers import fast

ITERATIONS = 3  # of Newton-Schulz: as good as the usual 5 here, and cheaper


class Muon(optim.Muon):
    """MLX's Muon (Jordan et al., 2024) without weight decay, for matrices in float32.

    Where it can, it multiplies in bfloat16, as Muon's authors do: the iterations need no more.
    """

    def __init__(self, learning_rate: Any):
        super().__init__(learning_rate, weight_decay=0.0, ns_steps=ITERATIONS)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        """The parameter [n, m] after a step; `state` holds its velocity, "v" [n, m]."""
        if not fast():
            return super().apply_single(gradient, parameter, state)
        velocity, weight = bf16_muon(
            gradient, state["v"], parameter, self.learning_rate, self.momentum, self.ns_steps
        )
        state["v"] = velocity
        return weight
