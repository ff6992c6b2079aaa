"""The model's own routers, used to look ahead: what layer l's state would choose at layer l + d."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .predictor_file import quantize
from .row_ops import logsumexp


@dataclass(frozen=True)
class RouterConfig:
    """What a router is besides its weights.

    `scoring` says what it ranks experts by: "softmax" by the logits; "sigmoid" by
    sigmoid(logits) + correction (DeepSeek-V3, Kimi-K2), where with `n_group` > 1 only experts of
    the best `topk_group` groups take part.
    """

    hidden_size: int
    num_experts: int
    bias: bool = False
    correction: bool = False
    scoring: str = "softmax"
    n_group: int = 1
    topk_group: int = 1

    def __post_init__(self) -> None:
        if self.scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"[RouterConfig] scoring is softmax or sigmoid, not {self.scoring!r}")
        if not 1 <= self.topk_group <= self.n_group or self.num_experts % self.n_group:
            raise ValueError(
                f"[RouterConfig] topk_group {self.topk_group} of n_group {self.n_group} groups of "
                f"{self.num_experts} experts is not possible"
            )


class Router(nn.Module):
    """A MoE layer's router: `linear` [num_experts, hidden_size] and its scoring. Never trained."""

    def __init__(self, config: RouterConfig):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.hidden_size, config.num_experts, bias=config.bias)
        if config.correction:
            self.correction = mx.zeros((config.num_experts,))
        self.freeze()

    def quantized(self, bits: int, group_size: int = 64) -> Router:
        """A copy with its matrix in MLX's affine format."""
        copy = Router(self.config)
        copy.update(self.parameters())
        quantize(copy, bits, group_size)
        return copy

    def scores(self, x: mx.array) -> mx.array:
        """What experts are ranked by, [..., num_experts], for block inputs x [..., hidden_size]."""
        logits = self.linear(x)
        if self.config.scoring == "softmax":
            return logits
        scores = mx.sigmoid(logits)
        if self.config.correction:
            scores = scores + self.correction
        return self._without_weak_groups(scores) if self.config.n_group > 1 else scores

    def _without_weak_groups(self, scores: mx.array) -> mx.array:
        """Zero the experts of all but the `topk_group` groups with the highest two best scores."""
        config = self.config
        groups = mx.unflatten(scores, -1, (config.n_group, -1))
        strength = mx.topk(groups, 2, axis=-1).sum(axis=-1, keepdims=True)
        dropped = config.n_group - config.topk_group
        weak = mx.argpartition(strength, dropped - 1, axis=-2)[..., :dropped, :]
        return mx.flatten(mx.put_along_axis(groups, weak, mx.array(0.0), axis=-2), -2, -1)

    def log_probs(self, x: mx.array) -> mx.array:
        """Log of the routing distribution over experts, [..., num_experts]: the target of KL."""
        if self.config.scoring == "softmax":
            logits = self.linear(x)
            return logits - logsumexp(logits)
        scores = mx.maximum(self.scores(x), 1e-6)
        return mx.log(scores / scores.sum(axis=-1, keepdims=True))


def input_scale(source_norm: mx.array | None, target_norm: mx.array | None) -> mx.array | None:
    """What turns the source layer's block input into the target's norm of the same state.

    A block's input is h / rms(h) * norm, so times (target_norm / source_norm) it is exactly the
    target layer's RMSNorm of the source's state. Returns [hidden_size], None where one is unknown.
    """
    if source_norm is None or target_norm is None:
        return None
    usable = mx.abs(source_norm) > 1e-6
    return mx.where(usable, target_norm / mx.where(usable, source_norm, 1.0), 0.0)
