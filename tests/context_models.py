"""Bundles with a context, every weight random, and what the oracle makes of them."""

import mlx.core as mx
import numpy as np

from mlx_od_moe import ExpertPredictor, PredictorBundle, PredictorConfig
from mlx_od_moe.context import ContextConfig, TokenMemory

HIDDEN, INNER, EXPERTS = 20, 24, 10
LAYERS = [0, 2, 3, 5]
AHEAD = {0: 2, 2: 2, 3: 1}


def make_bundle(context: ContextConfig | None, seed: int = 0, **options) -> PredictorBundle:
    """Every weight random; the last layer has no predictor."""
    mx.random.seed(seed)
    predictors = {}
    for layer, lookahead in AHEAD.items():
        config = PredictorConfig(HIDDEN, INNER, EXPERTS, lookahead, 3, context=context, **options)
        predictors[layer] = ExpertPredictor(config)
        if context and context.window:
            reader = predictors[layer].context
            reader.position_bias = mx.random.normal(reader.position_bias.shape)
            reader.attended.weight = 3 * reader.attended.weight
    memories = {t: TokenMemory(context, HIDDEN) for t in LAYERS[1:]} if context else {}
    for memory in memories.values():
        memory.encode.weight = 3 * memory.encode.weight
    return PredictorBundle(LAYERS, predictors, memories=memories)


def make_states(tokens: int, seed: int = 1) -> dict[int, np.ndarray]:
    """{layer: [tokens, HIDDEN]}."""
    rng = np.random.default_rng(seed)
    return {layer: rng.standard_normal((tokens, HIDDEN), dtype=np.float32) for layer in LAYERS}


def vectors(
    bundle: PredictorBundle, layer: int, states: dict[int, mx.array], sequence: mx.array
) -> mx.array:
    """The oracle's context vectors [tokens, INNER] of recorded states."""
    found = bundle.context_vectors(layer, states[bundle.query_layer(layer)], states, sequence)
    assert found is not None
    return found


def oracle(bundle: PredictorBundle, states: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """{layer: logits [tokens, ...] of one sequence}."""
    arrays = {layer: mx.array(h) for layer, h in states.items()}
    sequence = mx.zeros(len(states[0]), mx.int32)
    return {
        layer: np.array(
            bundle[layer](
                arrays[layer],
                context=vectors(bundle, layer, arrays, sequence),
            )
        )
        for layer in bundle
    }
