"""What one predictor is made of: its sizes and parts."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn

from .context import ContextConfig

TERMS = ("mlp", "mlp+gate", "gate")
ACTIVATIONS = {"silu": nn.silu, "relu": nn.relu}


@dataclass(frozen=True)
class PredictorConfig:
    """Sizes and parts of one predictor.

    Args:
        hidden_size: width of the model's hidden state (Kimi-K2: 7168).
        predictor_size: width of the predictor's inner layer.
        num_experts: routed experts per MoE layer.
        lookahead: MoE layers ahead that are predicted: distances 1 … lookahead.
        top_k: experts that the model runs per token, and the default number predicted.
        activation: "relu" or "silu".
        layer_norm: LayerNorm between the first matrix and the activation.
        terms: per distance, what its logits are made of: "mlp", "mlp+gate" (plus the target
            layer's router on this layer's state) or "gate" (that alone). Default: all "mlp".
        previous_experts: the previous token's experts at the target layers are an input too.
        context: sizes of what is read from earlier tokens' states at the target layers (see
            context.py); None: nothing.
        trunk_rank: the first matrix as two, hidden_size → trunk_rank → predictor_size: fewer bytes
            for less than hidden_size * predictor_size / (hidden_size + predictor_size); 0: as one.
    """

    hidden_size: int = 4096
    predictor_size: int = 1024
    num_experts: int = 384
    lookahead: int = 4
    top_k: int = 8
    activation: str = "relu"
    layer_norm: bool = False
    terms: tuple[str, ...] = ()
    previous_experts: bool = False
    context: ContextConfig | None = None
    trunk_rank: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "predictor_size", "num_experts", "lookahead", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"[PredictorConfig] {name} must be positive, got {getattr(self, name)}"
                )
        if self.trunk_rank < 0:
            raise ValueError(
                f"[PredictorConfig] trunk_rank can't be negative, got {self.trunk_rank}"
            )
        object.__setattr__(self, "terms", tuple(self.terms) or ("mlp",) * self.lookahead)
        if isinstance(self.context, dict):  # as read from a file
            object.__setattr__(self, "context", ContextConfig.read(self.context))
        if self.top_k > self.num_experts:
            raise ValueError(
                f"[PredictorConfig] top_k {self.top_k} exceeds num_experts {self.num_experts}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"[PredictorConfig] activation is one of {[*ACTIVATIONS]}, not {self.activation!r}"
            )
        if len(self.terms) != self.lookahead or not set(self.terms) <= set(TERMS):
            raise ValueError(
                f"[PredictorConfig] terms needs one of {TERMS} for each of {self.lookahead} "
                f"distances, got {self.terms}"
            )

    @property
    def has_mlp(self) -> bool:
        """Whether any distance uses the MLP."""
        return any(term != "gate" for term in self.terms)

    @property
    def has_projection(self) -> bool:
        """Whether the trunk is of low rank."""
        return self.has_mlp and self.trunk_rank > 0

    @property
    def has_context(self) -> bool:
        """Whether it reads what earlier tokens left."""
        return self.has_mlp and self.context is not None

    @property
    def has_gate(self) -> bool:
        """Whether any distance uses the target layer's router."""
        return any(term != "mlp" for term in self.terms)
