"""Trains what the last MoE layer's input says about the next token's first MoE layers.

At the end of a token nothing is known of the next one, and a disk would be idle: this predictor
fills that gap. Its distance d is the d-th MoE layer of the next token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..predictor_config import PredictorConfig
from ..shadow_model import ExpertPredictor
from .dataset import Array, LayerDataset, Samples, read_array, read_states
from .fast_layers import fast_logits, is_fast
from .fit import fit
from .layer_trainer import LayerTrainer, TrainingOptions
from .traces import TraceInfo
from .workers import Advance

# Tokens: larger batches, as layers together train in, leave Adam too few steps. Those above
# _BATCH_OF_RATE take steps longer by as much.
_BATCH, _BATCH_OF_RATE = 1024, 512


class NextTokenDataset(LayerDataset):
    """Tokens that another follows in the same sequence, each with what that one's layers choose.

    Samples of `documents` (None: of any), as LayerDataset's but for what is named below.
    `lookahead`: how many first layers; None: as many as the traces look ahead.

        hidden_states: of the last MoE layer.
        chosen: int16 [n, lookahead, top_k], the following token's experts at the first layers.
        previous: the same of the token itself: for the following one it is the previous.

    Raises ValueError where the traces lack the last layer's states or the first layers' experts.
    """

    def __init__(
        self,
        traces: TraceInfo,
        documents: set[int] | None = None,
        lookahead: int | None = None,
        memory_bytes: int = 1 << 30,
    ):
        super().__init__(traces, traces.moe_layers[-1], documents, memory_bytes=memory_bytes)
        self.targets = traces.moe_layers[: lookahead or traces.lookahead]
        missing = sorted(set(self.targets) - set(traces.recorded_layers))
        if missing:
            raise ValueError(f"[{traces.path}] has no experts of the first layers {missing}")

    def __len__(self) -> int:
        """Number of samples."""
        return sum(len(self._pairs(shard)) for shard in self.traces.shards)

    def _pairs(self, shard: Path) -> Array:
        """The rows that the next row follows in the same sequence."""
        document, position = read_array(shard, "document"), read_array(shard, "position")
        follows = (document[1:] == document[:-1]) & (position[1:] == position[:-1] + 1)
        if self._documents is not None:
            follows &= self._of_split(document[:-1])
        return np.flatnonzero(follows)

    def _read(self, shard: Path) -> Samples:
        rows = self._pairs(shard)
        routed = [read_array(shard, f"routed_experts_{layer}") for layer in self.targets]
        experts = np.stack(routed, axis=1)
        return Samples(
            hidden_states=read_states(shard, self.layer)[rows],
            chosen=experts[rows + 1],
            previous=experts[rows],
            routed=read_array(shard, f"routed_experts_{self.layer}")[rows],
            taught=np.empty((len(rows), 0, 0), np.float16),
        )


def next_token_datasets(
    trainer: LayerTrainer,
) -> tuple[NextTokenDataset, NextTokenDataset] | str:
    """Samples to train and to validate on; why not, where the traces do not allow it."""
    info = trainer.info
    needed = {info.moe_layers[-1], *info.moe_layers[: info.lookahead]}
    missing = sorted(needed - set(info.recorded_layers))
    if missing:
        return f"the traces do not record the MoE layers {missing}"
    training, validation = (
        NextTokenDataset(info, documents, memory_bytes=trainer.memory_bytes)
        for documents in trainer.split
    )
    if not len(training) or not len(validation):
        return "no document of one part of the split has two tokens in a row"
    return training, validation


def train_next_token(
    trainer: LayerTrainer,
    datasets: tuple[NextTokenDataset, NextTokenDataset],
    advance: Advance,
) -> tuple[ExpertPredictor, dict[str, list[float]]]:
    """Train the predictor by binary cross-entropy; returns it and its validation metrics.

    Goes on from next-token.safetensors in the trainer's checkpoint where that exists. `advance`
    hears of `epochs` times the training samples in all.
    """
    options = trainer.options.fit
    batch_size = min(options.batch_size, _BATCH)
    rate = options.learning_rate * max(1.0, batch_size / _BATCH_OF_RATE)
    options = dataclasses.replace(options, loss="bce", batch_size=batch_size, learning_rate=rate)
    training, validation = datasets
    predictor = build_next_token(trainer.info, trainer.options)
    checkpoint = trainer.checkpoint / "next-token.safetensors"
    forward = _fast_forward(predictor) if is_fast(predictor) else None
    recall = fit(predictor, training, validation, options, checkpoint, advance, forward)
    return predictor, recall.report()


def build_next_token(info: TraceInfo, options: TrainingOptions) -> ExpertPredictor:
    """The predictor before training: an MLP of the options' width and activation, no more."""
    config = PredictorConfig(
        hidden_size=info.hidden_size,
        predictor_size=options.predictor_size,
        num_experts=info.num_experts,
        lookahead=len(info.moe_layers[: info.lookahead]),
        top_k=info.top_k,
        activation=options.activation,
    )
    mx.random.seed(1_000_003 * options.fit.seed + info.moe_layers[-1])
    return ExpertPredictor(config)


def _fast_forward(predictor: ExpertPredictor) -> Callable[[mx.array, mx.array], mx.array]:
    sequence = mx.zeros((1, 1), mx.int32)  # only a context reads it

    def forward(h: mx.array, previous: mx.array) -> mx.array:
        return mx.flatten(fast_logits(predictor, h[None], h[None], (), sequence), 0, 1)

    return forward
