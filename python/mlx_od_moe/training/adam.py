"""AdamW as predictors are trained with it: one operation on a CPU, for a dozen of MLX's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from .._ext import adamw
from ..row_ops import on_cpu


class AdamW(optim.AdamW):
    """MLX's AdamW without bias correction, for parameters in float32."""

    def __init__(self, learning_rate: Any, weight_decay: float):
        super().__init__(learning_rate, weight_decay=weight_decay)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]
    ) -> mx.array:
        """The parameter after a step; `state` holds its moments, "m" and "v", in its shape."""
        if not on_cpu():
            return super().apply_single(gradient, parameter, state)
        state["m"], state["v"], weight = adamw(
            gradient,
            state["m"],
            state["v"],
            parameter,
            self.learning_rate,
            self.betas,
            self.eps,
            self.weight_decay,
        )
        return weight
