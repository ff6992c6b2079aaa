"""The rivals of a predictor: what can be known about the next layers' experts at less cost.

Each is a scorer, (hidden states float32 [n, hidden_size], previous experts [n, lookahead, top_k]) →
scores [n, lookahead, num_experts].
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .model_routers import LayerRouter
from .predictor_config import PredictorConfig
from .shadow_model import multi_hot
from .training.dataset import LayerDataset
from .training.fit import FitOptions, Scorer, fit
from .training.layer_trainer import gate_predictor


def random(config: PredictorConfig, seed: int) -> Scorer:
    """Any experts: recall@n is n / num_experts."""
    generator = np.random.default_rng(seed)
    shape = config.lookahead, config.num_experts
    return lambda h, previous: mx.array(generator.random((len(h), *shape), np.float32))


def frequency(counts: mx.array) -> Scorer:
    """The experts chosen most often in training, `counts` [lookahead, num_experts]."""
    return lambda h, previous: mx.broadcast_to(counts, (len(h), *counts.shape))


def previous_token(config: PredictorConfig, counts: mx.array | None) -> Scorer:
    """The previous token's experts at the target layer, then the most frequent ones."""
    filler = mx.zeros(()) if counts is None else counts / (counts.sum() + 1)
    return lambda h, previous: multi_hot(previous, config.num_experts) + filler


def gate_lookahead(
    config: PredictorConfig,
    layer: int,
    targets: Sequence[int],
    routers: Mapping[int, LayerRouter],
    raw: bool,
) -> Scorer:
    """The target layer's own router on this layer's state; `raw` leaves out the target's norm."""
    predictor = gate_predictor(config, layer, targets, routers)
    if raw:
        predictor.gate_input_scale = mx.ones_like(predictor.gate_input_scale)
    return predictor


class LinearProbe(nn.Module):
    """One matrix from the state to all logits: what an MLP must beat to be worth its depth."""

    def __init__(self, config: PredictorConfig):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.hidden_size, config.lookahead * config.num_experts)

    def __call__(self, h: mx.array, previous: mx.array) -> mx.array:
        """Logits [n, lookahead, num_experts]."""
        return mx.unflatten(self.linear(h), -1, (self.config.lookahead, self.config.num_experts))


def linear_probe(config: PredictorConfig, training: LayerDataset, epochs: int = 3) -> Scorer:
    """A linear probe trained by binary cross-entropy on the same samples as the predictor."""
    mx.random.seed(training.layer)
    probe = LinearProbe(config)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "probe.safetensors"
        fit(probe, training, training, FitOptions(epochs=epochs), checkpoint, lambda samples: None)
    return probe


def count_experts(config: PredictorConfig, training: LayerDataset) -> mx.array:
    """How often each expert was chosen, float32 [lookahead, num_experts]."""
    counts = np.zeros((config.lookahead, config.num_experts), np.float32)
    for samples in training.groups():
        for d in range(config.lookahead):
            counts[d] += np.bincount(samples.chosen[:, d].ravel(), minlength=config.num_experts)
    return mx.array(counts)
