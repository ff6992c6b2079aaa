"""The shadow model: a small MLP per MoE layer that predicts what the next layers will route to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .context import ContextConfig, ContextReader
from .native_predictor import NativePredictor, make_native
from .predictor_file import (
    Quantization,
    described_by,
    named,
    quantize,
    read_tensors,
    restore,
    write_tensors,
)
from .router import Router, RouterConfig

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

    def __post_init__(self) -> None:
        for name in ("hidden_size", "predictor_size", "num_experts", "lookahead", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"[PredictorConfig] {name} must be positive, got {getattr(self, name)}"
                )
        object.__setattr__(self, "terms", tuple(self.terms) or ("mlp",) * self.lookahead)
        if isinstance(self.context, dict):  # as read from a file
            object.__setattr__(self, "context", ContextConfig(**self.context))
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
    def has_context(self) -> bool:
        """Whether it reads what earlier tokens left."""
        return self.has_mlp and self.context is not None

    @property
    def has_gate(self) -> bool:
        """Whether any distance uses the target layer's router."""
        return any(term != "mlp" for term in self.terms)


class ExpertPredictor(nn.Module):
    """Predicts the experts of the next `lookahead` MoE layers from one layer's block input.

    logits[d] = heads[d](act(norm(trunk(h) + previous(e) + c)))
              + gate_scale[d] * routers[d].scores(h * s[d])

    with each part present where `config` asks for it. `routers` are the target layers' own, frozen;
    s = `gate_input_scale` maps this layer's state to the target's norm (see router.input_scale);
    c is the context vector that `context` made of earlier tokens.
    """

    def __init__(self, config: PredictorConfig, routers: Sequence[Router] = ()):
        super().__init__()
        self.config = config
        self.quantization: Quantization | None = None
        outputs = config.lookahead * config.num_experts
        if config.has_mlp:
            self.trunk = nn.Linear(config.hidden_size, config.predictor_size)
            self.heads = nn.Linear(config.predictor_size, outputs)
            if config.layer_norm:
                self.norm = nn.LayerNorm(config.predictor_size)
            if config.previous_experts:
                self.previous = nn.Linear(outputs, config.predictor_size, bias=False)
            if config.context is not None:
                self.context = ContextReader(
                    config.context, config.hidden_size, config.predictor_size, config.lookahead
                )
        if len(routers) != config.lookahead * config.has_gate:
            raise ValueError(
                f"[ExpertPredictor] terms {config.terms} take "
                f"{config.lookahead * config.has_gate} routers, got {len(routers)}"
            )
        # A tuple with an underscore: not among the parameters, since a bundle's layers share them.
        self._routers = tuple(routers)
        if config.has_gate:
            self.gate_scale = mx.ones((config.lookahead,))
            self.gate_input_scale = mx.ones((config.lookahead, config.hidden_size))
            self.freeze(keys=["gate_input_scale"], recurse=False)
            if config.has_mlp:  # training starts at the free baseline
                self.heads.weight = mx.zeros_like(self.heads.weight)

    @property
    def routers(self) -> tuple[Router, ...]:
        """The target layers' routers, one per distance, or none."""
        routers: tuple[Router, ...] = self._routers
        return routers

    def __call__(
        self, h: mx.array, previous: mx.array | None = None, context: mx.array | None = None
    ) -> mx.array:
        """Logits [..., lookahead, num_experts] for block inputs h [..., hidden_size].

        `previous` [..., lookahead, top_k]: the previous token's experts at the target layers, -1
        where there are none; None where none are known. `context` [..., predictor_size]: the
        context vector, None where there are no earlier tokens.
        """
        config = self.config
        if h.shape[-1] != config.hidden_size:
            raise ValueError(
                f"[ExpertPredictor] the hidden state has {h.shape[-1]} features, but this "
                f"predictor is for hidden_size {config.hidden_size}"
            )
        h = h.astype(mx.float32)
        if not config.has_gate:
            return self._mlp(h, previous, context)
        mlp = self._mlp(h, previous, context) if config.has_mlp else None
        return mx.stack([self._logits(h, mlp, d) for d in range(config.lookahead)], axis=-2)

    def _logits(self, h: mx.array, mlp: mx.array | None, d: int) -> mx.array:
        term = self.config.terms[d]
        if mlp is not None and term == "mlp":
            return mlp[..., d, :]
        gate = self.gate_scale[d] * self.gate_scores(h, d)
        return gate if mlp is None or term == "gate" else mlp[..., d, :] + gate

    def gate_scores(self, h: mx.array, d: int) -> mx.array:
        """Gate lookahead: the scores of the router d + 1 layers ahead, [..., num_experts]."""
        return self.routers[d].scores(h * self.gate_input_scale[d])

    def _mlp(self, h: mx.array, previous: mx.array | None, context: mx.array | None) -> mx.array:
        config = self.config
        x = self.trunk(h)
        if context is not None:
            x = x + context
        if config.previous_experts and previous is not None:
            x = x + self.previous(mx.flatten(multi_hot(previous, config.num_experts), -2, -1))
        if config.layer_norm:
            x = self.norm(x)
        x = self.heads(ACTIVATIONS[config.activation](x))
        return mx.unflatten(x, -1, (config.lookahead, config.num_experts))

    def predict(
        self,
        h: mx.array,
        k: int | None = None,
        previous: mx.array | None = None,
        context: mx.array | None = None,
    ) -> mx.array:
        """Expert ids [..., lookahead, k] (uint32), best first. Default k: the model's top_k.

        Raises ValueError for k out of range, and for NaN or infinity in `h`, which it evaluates.
        """
        k = self.config.top_k if k is None else k
        if not 1 <= k <= self.config.num_experts:
            raise ValueError(
                f"[ExpertPredictor] k must be 1 … num_experts ({self.config.num_experts}), got {k}"
            )
        if not mx.isfinite(h).all().item():
            raise ValueError("[ExpertPredictor] the hidden state holds NaN or infinity")
        return top_k_ids(self(h, previous, context), k)

    def quantized(
        self, bits: int, group_size: int = 64, routers: Sequence[Router] | None = None
    ) -> ExpertPredictor:
        """A copy with its matrices in MLX's affine format, routers included (see `nn.quantize`).

        A matrix whose input width is no multiple of `group_size` stays as it is. `routers`:
        quantised already, where a bundle's layers share them.
        """
        if self.quantization:
            raise ValueError(f"[ExpertPredictor] is quantised already: {self.quantization}")
        if routers is None:
            routers = [router.quantized(bits, group_size) for router in self.routers]
        copy = ExpertPredictor(self.config, routers)
        copy.update(self.parameters())
        copy.quantization = quantize(copy, bits, group_size)
        return copy

    def native(self, format: str = "int4", threads: int = 1) -> NativePredictor:
        """A copy whose forward runs in C++ on CPU threads, apart from MLX.

        Args:
            format: of its weights: "f32", "f16", "bf16", "int8" or "int4".
            threads: CPU threads that one call may use, its own among them.
        """
        return make_native(self, format, threads)

    def save(self, path: str | Path, bits: int | None = None) -> None:
        """Write to a safetensors file, configuration in its metadata; `bits` 4 or 8 quantises."""
        predictor = self if bits is None else self.quantized(bits)
        tensors = named(predictor, "predictor.")
        for d, router in enumerate(predictor.routers):
            tensors |= named(router, f"routers.{d}.")
        metadata: dict[str, Any] = {
            "config": dataclasses.asdict(self.config),
            "routers": [dataclasses.asdict(router.config) for router in self.routers],
            "quantization": predictor.quantization and dataclasses.asdict(predictor.quantization),
        }
        write_tensors(path, tensors, "predictor", metadata)

    @classmethod
    def load(cls, path: str | Path) -> ExpertPredictor:
        """Read a file that `save` wrote: every parameter comes back bit for bit."""
        tensors, metadata = read_tensors(path, kind="predictor")
        with described_by(path):
            routers = [Router(RouterConfig(**options)) for options in metadata["routers"]]
            quantization = metadata["quantization"] and Quantization(**metadata["quantization"])
            for d, router in enumerate(routers):
                restore(router, tensors, f"routers.{d}.", quantization, path)
            predictor = cls(PredictorConfig(**metadata["config"]), routers)
            restore(predictor, tensors, "predictor.", quantization, path)
            return predictor


def top_k_ids(logits: mx.array, k: int) -> mx.array:
    """Ids of the k largest along the last axis, best first."""
    return mx.argsort(-logits, axis=-1)[..., :k]


def multi_hot(ids: mx.array, num_experts: int) -> mx.array:
    """Expert ids [..., k] as [..., num_experts] of 0 and 1 (float32); ids of -1 count nowhere."""
    ids = mx.where(ids < 0, num_experts, ids)
    hot = mx.zeros((*ids.shape[:-1], num_experts + 1))
    return mx.put_along_axis(hot, ids, mx.array(1.0), axis=-1)[..., :num_experts]
