"""The predictors' forward for training on CPUs that multiply in bfloat16: products are most of it.

Operands are rounded to bfloat16 and summed in float32; weights, gradients and the optimisers'
states stay float32. `is_fast` says whether these functions serve; elsewhere the modules' own
forward does, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .._ext import bf16_linear, bf16_two_layers, has_bf16_products
from ..context import TokenMemory
from ..row_ops import on_cpu
from ..shadow_model import ExpertPredictor


def fast() -> bool:
    """Whether this device multiplies in bfloat16 faster than in float32, by operations of ours."""
    return on_cpu() and bool(has_bf16_products())


def is_fast(module: ExpertPredictor | TokenMemory) -> bool:
    """Whether this device computes such a module by the functions below."""
    if isinstance(module, TokenMemory):
        return fast() and type(module.encode) is nn.Linear  # a quantised one is of another type
    config = module.config
    return (
        fast()
        and module.quantization is None
        and module.calibration is None
        and config.activation == "relu"
        and not config.layer_norm
        and not config.previous_experts
        and set(config.terms) in ({"mlp"}, {"mlp+gate"})
    )


def fast_memories(memory: TokenMemory, h: mx.array) -> mx.array:
    """Memories [..., memory_size] of states h [..., hidden_size]."""
    return bf16_linear(h, memory.encode.weight)


def fast_logits(
    predictor: ExpertPredictor,
    h: mx.array,
    asking: mx.array,
    memories: Sequence[mx.array],
    sequence: mx.array,
) -> mx.array:
    """Logits [batch, n, lookahead, num_experts] of h [batch, n, hidden_size].

    `asking`, `memories` and `sequence`: see ContextReader. The context's matrices take part in the
    product of the first layer, and the gates in that of the second: what they add is linear in h.
    """
    config = predictor.config
    x = h
    if config.trunk_rank:
        projection = predictor.shared_projection or predictor.projection
        x = bf16_linear(h, projection.linear.weight)
    inputs, weights = [x], [predictor.trunk.weight]
    if config.context is not None:
        reader = predictor.context
        query = bf16_linear(asking, reader.query.weight) if config.context.window else None
        for matrix, read in reader.read(query, memories, sequence, bf16=True):
            inputs.append(read)
            weights.append(matrix.weight)
    gate, bias = _gate(predictor)
    skips = gate is not None and x is h
    head_bias = predictor.heads.bias if bias is None else predictor.heads.bias + bias
    logits = bf16_two_layers(
        inputs,
        weights,
        predictor.trunk.bias,
        predictor.heads.weight,
        head_bias,
        gate if skips else None,
    )
    if gate is not None and not skips:
        logits = logits + bf16_linear(h, gate)
    logits = mx.unflatten(logits, -1, (config.lookahead, config.num_experts))
    if not config.has_gate or gate is not None:
        return logits
    scores = [predictor.gate_scores(h, d) for d in range(config.lookahead)]
    return logits + predictor.gate_scale[:, None] * mx.stack(scores, axis=-2)


def _gate(predictor: ExpertPredictor) -> tuple[mx.array | None, mx.array | None]:
    """All gates as one matrix [lookahead * num_experts, hidden_size] and their bias.

    None where there are none or their scores are not linear.
    """
    routers = predictor.routers
    if not routers or any(router.config.scoring != "softmax" for router in routers):
        return None, None
    matrices = mx.stack([router.linear.weight for router in routers])
    scaled = matrices * predictor.gate_input_scale[:, None] * predictor.gate_scale[:, None, None]
    gate = mx.flatten(scaled, 0, 1)
    if not any(router.config.bias for router in routers):
        return gate, None
    zeros = mx.zeros((predictor.config.num_experts,))
    biases = [router.linear.bias if router.config.bias else zeros for router in routers]
    return gate, mx.flatten(mx.stack(biases) * predictor.gate_scale[:, None])
