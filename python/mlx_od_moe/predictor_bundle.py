"""The predictors of a whole model: one per MoE layer, in one file."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from .calibration import UNCALIBRATED
from .context import ContextConfig, TokenMemory
from .native_predictor import NativePredictor, make_native_bundle
from .next_token import check_next_token, next_token_contents, read_next_token
from .predictor_config import PredictorConfig
from .predictor_file import Quantization, described_by, named, read_tensors, restore, write_tensors
from .projection import Projection
from .router import Router, RouterConfig
from .shadow_model import ExpertPredictor
from .token_experts import TokenExperts

_TOKEN_EXPERTS = "token_experts."  # before the names of its tensors


class PredictorBundle(Mapping[int, ExpertPredictor]):
    """{MoE layer: its ExpertPredictor}, by the model's layer index.

    The predictor of the i-th MoE layer predicts the (i + 1)-th … (i + lookahead)-th; the last MoE
    layer has none. Predictors of neighbouring layers share the routers of their targets, so each is
    kept and written once; so are the memories that their contexts read, and the projection where
    they share one.

    Args:
        moe_layers: all MoE layers of the model, in order.
        predictors: of those layers that have one.
        training: how they were trained, kept in the file; any JSON values.
        memories: {MoE layer: its TokenMemory}, of all targets of predictors with a context.
        token_experts: what the first MoE layers choose by the token alone; None: not known.
        next_token: an MLP on the last MoE layer's input; distance d is the d-th MoE layer of the
            next token of the sequence. Not among the mapping's items. None: there is none.
    """

    def __init__(
        self,
        moe_layers: list[int],
        predictors: Mapping[int, ExpertPredictor],
        training: dict[str, Any] | None = None,
        memories: Mapping[int, TokenMemory] | None = None,
        token_experts: TokenExperts | None = None,
        next_token: ExpertPredictor | None = None,
    ):
        self.moe_layers = list(moe_layers)
        self.training = training or {}
        self.memories = dict(sorted((memories or {}).items()))
        self.token_experts = token_experts
        self.next_token = next_token
        self._predictors = {layer: predictors[layer] for layer in sorted(predictors)}
        if not self._predictors:
            raise ValueError("[PredictorBundle] needs the predictor of at least one layer")
        if len({predictor.quantization for predictor in self._predictors.values()}) > 1:
            raise ValueError("[PredictorBundle] its predictors must all be quantised alike")
        for layer, predictor in self._predictors.items():
            if len(self.targets(layer)) < predictor.config.lookahead:
                raise ValueError(
                    f"[PredictorBundle] layer {layer} predicts {predictor.config.lookahead} layers "
                    f"ahead, but only {self.targets(layer)} follow among {self.moe_layers}"
                )
        self._check_memories()
        self._check_projection()
        self._check_token_experts()
        if next_token is not None:
            check_next_token(next_token, self.moe_layers, self._predictors.values())

    def _check_memories(self) -> None:
        configs = {p.config.context for p in self._predictors.values() if p.config.has_context}
        if len(configs) > 1:
            raise ValueError(f"[PredictorBundle] layers share one context, got {configs}")
        needed = {
            target
            for layer, predictor in self._predictors.items()
            if predictor.config.has_context
            for target in self.targets(layer)
        }
        if needed != set(self.memories):
            raise ValueError(
                f"[PredictorBundle] contexts read the memories of layers {sorted(needed)}, "
                f"got those of {[*self.memories]}"
            )

    def _check_projection(self) -> None:
        low_rank = [p for p in self._predictors.values() if p.config.has_projection]
        if len({id(p.shared_projection) for p in low_rank}) > 1:
            raise ValueError("[PredictorBundle] all layers share one projection, or none")
        sizes = {(p.config.hidden_size, p.config.trunk_rank) for p in low_rank}
        if self.projection is not None and len(sizes) > 1:
            raise ValueError(
                "[PredictorBundle] layers that share a projection have one hidden_size and "
                f"trunk_rank, got {sorted(sizes)}"
            )

    def _check_token_experts(self) -> None:
        found = self.token_experts
        if found is None:
            return
        num_experts = min(p.config.num_experts for p in self._predictors.values())
        if found.layers > len(self.moe_layers) or found.experts.max() >= num_experts:
            raise ValueError(
                f"[PredictorBundle] token experts are of {found.layers} layers, ids up to "
                f"{found.experts.max()}; the model has {len(self.moe_layers)} with {num_experts}"
            )

    @property
    def projection(self) -> Projection | None:
        """The first factor of all trunks; None where layers have their own, or none."""
        found = (p.shared_projection for p in self._predictors.values())
        return next((projection for projection in found if projection is not None), None)

    @property
    def context(self) -> ContextConfig | None:
        """The sizes that all contexts share; None where no predictor has one."""
        return next(iter(self.memories.values())).config if self.memories else None

    def warn_without_calibration(self, name: str) -> None:
        """Warn where its training's loss left scores whose sigmoid is no probability."""
        loss = self.training.get("options", {}).get("fit", {}).get("loss")
        missing = [layer for layer, p in self.items() if p.calibration is None]
        if missing and loss in UNCALIBRATED:
            warnings.warn(
                f"[{name}] was trained with the loss {loss} and has no calibration for layers "
                f"{missing}: thresholds on its scores mean nothing; see mlx-od-moe calibrate",
                stacklevel=3,
            )

    def context_vectors(
        self, layer: int, asking: mx.array, states: Mapping[int, mx.array], sequence: mx.array
    ) -> mx.array | None:
        """Context vectors [n, predictor_size] of the tokens of recorded sequences, in order.

        Args:
            layer: whose predictor they are for.
            asking: the tokens' states at `query_layer(layer)`, [n, hidden_size].
            states: {target layer: its [n, hidden_size]}.
            sequence: which sequence each token belongs to, int [n], none negative.

        None where the layer's predictor has no context.
        """
        predictor = self[layer]
        if self.context is None or not predictor.config.has_context:
            return None
        before = self.context.rows
        memories = [
            mx.pad(self.memories[target](states[target].astype(mx.float32)), [(before, 0), (0, 0)])
            for target in self.targets(layer)
        ]
        own = mx.pad(sequence, [(before, 0)], constant_values=-1)
        return predictor.context(
            asking.astype(mx.float32)[None], [memory[None] for memory in memories], own[None]
        )[0]

    def __getitem__(self, layer: int) -> ExpertPredictor:
        return self._predictors[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._predictors)

    def __len__(self) -> int:
        return len(self._predictors)

    def targets(self, layer: int) -> list[int]:
        """The MoE layers that `layer`'s predictor may speak of, nearest first."""
        if layer not in self.moe_layers:
            raise ValueError(f"[PredictorBundle] {layer} is not one of {self.moe_layers}")
        after = self.moe_layers[self.moe_layers.index(layer) + 1 :]
        known = self._predictors.get(layer)
        return after[: known.config.lookahead] if known else after

    def query_layer(self, layer: int) -> int:
        """The MoE layer with whose state `layer`'s context is asked for; without one its own."""
        return layer if self.context is None else self.context.query_layer(layer, self.moe_layers)

    def routers(self) -> dict[int, Router]:
        """{target layer: its router} of all layers that some predictor looks ahead to."""
        return {
            target: router
            for layer, predictor in self.items()
            for target, router in zip(self.targets(layer), predictor.routers, strict=False)
        }

    def quantized(self, bits: int, group_size: int = 64) -> PredictorBundle:
        """A copy with all matrices in MLX's affine format."""
        routers = {t: r.quantized(bits, group_size) for t, r in self.routers().items()}

        def shared(layer: int, predictor: ExpertPredictor) -> list[Router]:
            return [routers[target] for target in self.targets(layer)] if predictor.routers else []

        projection = self.projection and self.projection.quantized(bits, group_size)
        predictors = {
            layer: predictor.quantized(bits, group_size, shared(layer, predictor), projection)
            for layer, predictor in self.items()
        }
        memories = {layer: m.quantized(bits, group_size) for layer, m in self.memories.items()}
        next_token = self.next_token and self.next_token.quantized(bits, group_size)
        return PredictorBundle(
            self.moe_layers, predictors, self.training, memories, self.token_experts, next_token
        )

    def save(self, path: str | Path, bits: int | None = None) -> None:
        """Write all predictors to one safetensors file; `bits` 4 or 8 quantises."""
        bundle = self if bits is None else self.quantized(bits)
        tensors, metadata = bundle._contents()
        if self.token_experts is not None:
            found = self.token_experts.tensors().items()
            tensors |= {_TOKEN_EXPERTS + name: tensor for name, tensor in found}
        next_tensors, config = next_token_contents(bundle.next_token)
        write_tensors(path, tensors | next_tensors, "bundle", metadata | config)

    def native(self, format: str = "int4", threads: int = 1) -> dict[int, NativePredictor]:
        """{MoE layer: its predictor's forward in C++}; see ExpertPredictor.native.

        All share one allocation, their routers, and one set of helper threads.
        """
        return make_native_bundle(*self._contents(), format, threads)

    def native_next_token(self, format: str = "int4", threads: int = 1) -> NativePredictor | None:
        """`next_token` in C++, None where there is none; see ExpertPredictor.native."""
        return None if self.next_token is None else self.next_token.native(format, threads)

    def _contents(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """What a file holds of predictors: tensors and metadata."""
        routers = self.routers()
        tensors: dict[str, mx.array] = {}
        for layer, predictor in self.items():
            tensors |= named(predictor, f"layers.{layer}.")
        for target, router in routers.items():
            tensors |= named(router, f"routers.{target}.")
        if self.projection is not None:
            tensors |= named(self.projection, "projection.")
        for target, memory in self.memories.items():
            tensors |= named(memory, f"memories.{target}.")
        quantization = next(iter(self.values())).quantization
        metadata = {
            "moe_layers": self.moe_layers,
            "layers": {layer: dataclasses.asdict(p.config) for layer, p in self.items()},
            "routers": {target: dataclasses.asdict(r.config) for target, r in routers.items()},
            "memories": [*self.memories],
            "quantization": quantization and dataclasses.asdict(quantization),
            "training": self.training,
        }
        return tensors, metadata

    @classmethod
    def load(cls, path: str | Path) -> PredictorBundle:
        """Read a file that `save` wrote: every parameter comes back bit for bit."""
        tensors, metadata = read_tensors(path, kind="bundle")
        with described_by(path):
            moe_layers = metadata["moe_layers"]
            quantization = metadata["quantization"] and Quantization(**metadata["quantization"])
            routers = {}
            for target, options in metadata["routers"].items():
                routers[int(target)] = router = Router(RouterConfig(**options))
                restore(router, tensors, f"routers.{target}.", quantization, path)
            configs = {int(n): PredictorConfig(**c) for n, c in metadata["layers"].items()}
            projection = None
            if any(name.startswith("projection.") for name in tensors):
                config = min(configs.values(), key=lambda c: not c.has_projection)
                projection = Projection(config.hidden_size, config.trunk_rank)
                restore(projection, tensors, "projection.", quantization, path)
            predictors = {}
            for layer, config in configs.items():
                ahead = moe_layers[moe_layers.index(layer) + 1 :][: config.lookahead]
                predictors[layer] = ExpertPredictor(
                    config, [routers[t] for t in ahead] if config.has_gate else [], projection
                )
                predictors[layer].restore(tensors, f"layers.{layer}.", quantization, path)
            memories = {}
            sizes = {p.config.context: p.config.hidden_size for p in predictors.values()}
            for target in metadata.get("memories", []):
                context, hidden_size = next((c, n) for c, n in sizes.items() if c is not None)
                memories[target] = TokenMemory(context, hidden_size)
                restore(memories[target], tensors, f"memories.{target}.", quantization, path)
            own = _TOKEN_EXPERTS
            found = {n[len(own) :]: t for n, t in tensors.items() if n.startswith(own)}
            token_experts = TokenExperts.from_tensors(found) if found else None
            next_token = read_next_token(tensors, metadata, quantization, path)
            training = metadata["training"]
            return cls(moe_layers, predictors, training, memories, token_experts, next_token)
