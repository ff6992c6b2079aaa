"""The shadow model: a small MLP per MoE layer that predicts what the next layers will route to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .calibration import boundary_ranks, calibrated, check_calibration
from .context import ContextReader
from .native_predictor import NativePredictor, make_native
from .predictor_config import ACTIVATIONS, PredictorConfig
from .predictor_file import (
    Quantization,
    described_by,
    named,
    quantize,
    read_tensors,
    restore,
    write_tensors,
)
from .projection import Projection
from .router import Router, RouterConfig


class ExpertPredictor(nn.Module):
    """Predicts the experts of the next `lookahead` MoE layers from one layer's block input.

    logits[d] = heads[d](act(norm(trunk(projection(h)) + previous(e) + c)))
              + gate_scale[d] * routers[d].scores(h * s[d])

    with each part present where `config` asks for it. `routers` are the target layers' own, frozen;
    s = `gate_input_scale` maps this layer's state to the target's norm (see router.input_scale);
    c is the context vector that `context` made of earlier tokens. `projection`: given where layers
    share it; like the routers it is then not among this predictor's parameters.

    `calibration` [lookahead, 2] makes probabilities' logits of these (see calibration.py); None:
    they are the scores as they are. It is set by `calibrate`, after training.
    """

    def __init__(
        self,
        config: PredictorConfig,
        routers: Sequence[Router] = (),
        projection: Projection | None = None,
    ):
        super().__init__()
        self.config = config
        self.quantization: Quantization | None = None
        self.calibration: mx.array | None = None
        outputs = config.lookahead * config.num_experts
        if config.has_mlp:
            if config.trunk_rank and projection is None:
                self.projection = Projection(config.hidden_size, config.trunk_rank)
            inputs = config.trunk_rank or config.hidden_size
            self.trunk = nn.Linear(inputs, config.predictor_size)
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
        self._shared = (projection,) if config.has_projection and projection is not None else ()
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

    @property
    def shared_projection(self) -> Projection | None:
        """The projection that it was given; None where it has its own or none."""
        shared: tuple[Projection, ...] = self._shared
        return shared[0] if shared else None

    def named_parameters(self) -> dict[str, mx.array]:
        """All that it computes with, by the names that a predictor file uses."""
        tensors = named(self, "predictor.")
        if self.shared_projection is not None:
            tensors |= named(self.shared_projection, "predictor.projection.")
        for d, router in enumerate(self.routers):
            tensors |= named(router, f"routers.{d}.")
        return tensors

    def __call__(
        self, h: mx.array, previous: mx.array | None = None, context: mx.array | None = None
    ) -> mx.array:
        """Logits [..., lookahead, num_experts] for block inputs h [..., hidden_size].

        Calibrated ones where there is a calibration. `previous` [..., lookahead, top_k]: the
        previous token's experts at the target layers, -1 where there are none; None where none are
        known. `context` [..., predictor_size]: the context vector, None where there are no earlier
        tokens.
        """
        config = self.config
        if h.shape[-1] != config.hidden_size:
            raise ValueError(
                f"[ExpertPredictor] the hidden state has {h.shape[-1]} features, but this "
                f"predictor is for hidden_size {config.hidden_size}"
            )
        logits = self._distances(h.astype(mx.float32), previous, context)
        if self.calibration is None:
            return logits
        return calibrated(logits, self.calibration, config.top_k)

    def _distances(
        self, h: mx.array, previous: mx.array | None, context: mx.array | None
    ) -> mx.array:
        config = self.config
        mlp = self._mlp(h, previous, context) if config.has_mlp else None
        if mlp is not None and not config.has_gate:
            return mlp
        if mlp is not None and set(config.terms) == {
            "mlp+gate"
        }:  # while it trains: no parts to cut
            gates = mx.stack([self.gate_scores(h, d) for d in range(config.lookahead)], axis=-2)
            return mlp + self.gate_scale[:, None] * gates
        return mx.stack([self._logits(h, mlp, d) for d in range(config.lookahead)], axis=-2)

    def _logits(self, h: mx.array, mlp: mx.array | None, d: int) -> mx.array:
        term = self.config.terms[d]
        if mlp is not None and term == "mlp":
            return mlp[..., d, :]
        gate = self.gate_scale[d] * self.gate_scores(h, d)
        return gate if mlp is None or term == "gate" else mlp[..., d, :] + gate

    def calibrate(self, calibration: mx.array | None) -> None:
        """Take this calibration [lookahead, 2], a factor and an offset per distance; None: none.

        Raises ValueError for another shape, values that are not finite, and factors not above 0.
        """
        self._calibrate(calibration, "[ExpertPredictor] calibration")

    def _calibrate(self, calibration: mx.array | None, name: str) -> None:
        if calibration is not None:
            check_calibration(calibration, self.config.lookahead, name)
            boundary_ranks(self.config.top_k, self.config.num_experts)
        self.calibration = calibration
        self.freeze(keys=["calibration"], recurse=False)

    def restore(
        self,
        tensors: dict[str, mx.array],
        prefix: str,
        quantization: Quantization | None,
        path: str | Path,
    ) -> None:
        """Take the tensors named `prefix`… of the file `path`; see predictor_file.restore."""
        self._calibrate(tensors.get(f"{prefix}calibration"), f"[{path}] {prefix}calibration")
        restore(self, tensors, prefix, quantization, path)

    def gate_scores(self, h: mx.array, d: int) -> mx.array:
        """Gate lookahead: the scores of the router d + 1 layers ahead, [..., num_experts]."""
        return self.routers[d].scores(h * self.gate_input_scale[d])

    def _mlp(self, h: mx.array, previous: mx.array | None, context: mx.array | None) -> mx.array:
        config = self.config
        if config.trunk_rank:
            h = self._shared[0](h) if self._shared else self.projection(h)
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
        self,
        bits: int,
        group_size: int = 64,
        routers: Sequence[Router] | None = None,
        projection: Projection | None = None,
    ) -> ExpertPredictor:
        """A copy with its matrices in MLX's affine format, routers included (see `nn.quantize`).

        A matrix whose input width is no multiple of `group_size` stays as it is. `routers` and
        `projection`: quantised already, where a bundle's layers share them.
        """
        if self.quantization:
            raise ValueError(f"[ExpertPredictor] is quantised already: {self.quantization}")
        if routers is None:
            routers = [router.quantized(bits, group_size) for router in self.routers]
        if projection is None and self.shared_projection is not None:
            projection = self.shared_projection.quantized(bits, group_size)
        copy = ExpertPredictor(self.config, routers, projection)
        copy.calibrate(self.calibration)
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
        metadata: dict[str, Any] = {
            "config": dataclasses.asdict(self.config),
            "routers": [dataclasses.asdict(router.config) for router in self.routers],
            "quantization": predictor.quantization and dataclasses.asdict(predictor.quantization),
        }
        write_tensors(path, predictor.named_parameters(), "predictor", metadata)

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
            predictor.restore(tensors, "predictor.", quantization, path)
            return predictor


def top_k_ids(logits: mx.array, k: int) -> mx.array:
    """Ids of the k largest along the last axis, best first."""
    return mx.argsort(-logits, axis=-1)[..., :k]


def multi_hot(ids: mx.array, num_experts: int) -> mx.array:
    """Expert ids [..., k] as [..., num_experts] of 0 and 1 (float32); ids of -1 count nowhere."""
    ids = mx.where(ids < 0, num_experts, ids)
    hot = mx.zeros((*ids.shape[:-1], num_experts + 1))
    return mx.put_along_axis(hot, ids, mx.array(1.0), axis=-1)[..., :num_experts]
