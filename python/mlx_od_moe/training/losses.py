"""Training losses: logits of a predictor against what the target layers did.

Each takes logits [n, lookahead, num_experts], chosen ids [n, lookahead, top_k] (-1 where there is
none) and the target routers' log probabilities [n, lookahead, num_experts] (empty where unused),
and returns a scalar.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .._ext import cross_entropy
from ..row_ops import logsumexp, on_cpu, sigmoid
from ..row_ops import softmax as shares_of

Loss = Callable[[mx.array, mx.array, mx.array], mx.array]


def bce(logits: mx.array, chosen: mx.array, log_probs: mx.array) -> mx.array:
    """Binary cross-entropy of each expert against "is chosen", mean over experts.

    Written as softplus(z) - y z, with y z summed over the chosen ids: exact for any logit, and no
    multi-hot target is built. On a CPU that is one operation, and its gradient one pass.
    """
    if on_cpu():
        return cross_entropy(logits, chosen)
    return (_softplus(logits).sum() - _of_chosen(logits, chosen).sum()) / logits.size


def _of_chosen(values: mx.array, chosen: mx.array) -> mx.array:
    """The values of the chosen ids, 0 where there is none."""
    taken = mx.take_along_axis(values, mx.maximum(chosen, 0), axis=-1)
    return mx.where(chosen < 0, 0.0, taken)


_softplus: Any = mx.custom_function(lambda z: mx.logaddexp(z, 0.0))


@_softplus.vjp  # type: ignore[untyped-decorator]
def _softplus_vjp(z: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    # The gradient without the value: a training step then never computes the logarithms. Its floor,
    # 1e-7 of the largest, keeps Adam's squares out of the denormal numbers, where a CPU is 4 times
    # slower.
    return cotangent * sigmoid(mx.maximum(z, -16.0))


def kl(logits: mx.array, chosen: mx.array, log_probs: mx.array) -> mx.array:
    """KL divergence from the router's distribution over experts to the predictor's."""
    own = logits - logsumexp(logits)
    return (shares_of(log_probs) * (log_probs - own)).sum(axis=-1).mean()


def softmax(logits: mx.array, chosen: mx.array, log_probs: mx.array) -> mx.array:
    """Cross-entropy against the uniform distribution over the chosen experts."""
    own = logits - logsumexp(logits)
    return -_of_chosen(own, chosen).sum() / mx.maximum(1, (chosen >= 0).sum())


LOSSES: dict[str, Loss] = {"bce": bce, "kl": kl, "softmax": softmax}
