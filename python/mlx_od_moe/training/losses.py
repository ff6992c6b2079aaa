"""Training losses: logits of a predictor against what the target layers did.

Each takes logits [n, lookahead, num_experts], chosen ids [n, lookahead, top_k] (-1 where there is
none) and what the target routers teach beside them [n, lookahead, num_experts] (see TEACHERS; empty
where a loss has none), and returns a scalar.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .._ext import cross_entropy
from .._ext import soft_labels as native_soft_labels
from ..router import Router
from ..row_ops import logsumexp, on_cpu, sigmoid
from ..row_ops import softmax as shares_of

Loss = Callable[[mx.array, mx.array, mx.array], mx.array]
# Of a router, block inputs [..., hidden_size] and top_k: [..., num_experts].
Teacher = Callable[[Router, mx.array, int], mx.array]

# Of soft labels: how many deviations of a token's scores the step from 0 to 1 is wide.
TEMPERATURE = 0.3


def bce(logits: mx.array, chosen: mx.array, taught: mx.array) -> mx.array:
    """Binary cross-entropy of each expert against "is chosen", mean over experts.

    Written as softplus(z) - y z, with y z summed over the chosen ids: exact for any logit, and no
    multi-hot target is built. On a CPU that is one operation, and its gradient one pass.
    """
    if on_cpu():
        return cross_entropy(logits, chosen)
    return (_softplus(logits).sum() - _of_chosen(logits, chosen).sum()) / logits.size


def soft(logits: mx.array, chosen: mx.array, taught: mx.array) -> mx.array:
    """Binary cross-entropy of each expert against its soft label, mean over experts."""
    if on_cpu():
        return cross_entropy(logits, taught)
    return (_softplus(logits).sum() - (taught * logits).sum()) / logits.size


def soft_labels(router: Router, h: mx.array, top_k: int) -> mx.array:
    """How far above the bar each expert's score is, [..., num_experts], from 0 to 1.

        sigmoid((score - bar) / (TEMPERATURE * the deviation of the token's scores))

    The bar is halfway between the last chosen and the first other expert: ½ where hard labels jump
    from 0 to 1. They say nothing of how near a choice it was, and most of what a predictor gets
    wrong are near ones. A teacher's scores as labels: Hinton, Vinyals and Dean (2015).
    """
    scores = router.scores(h)
    if on_cpu():
        return native_soft_labels(scores, top_k, TEMPERATURE)
    best = mx.sort(mx.topk(scores, top_k + 1, axis=-1), axis=-1)
    bar = 0.5 * (best[..., :1] + best[..., 1:2])
    spread = TEMPERATURE * mx.sqrt(mx.var(scores, axis=-1, keepdims=True)) + 1e-20
    return mx.stop_gradient(mx.sigmoid((scores - bar) / spread))


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


def kl(logits: mx.array, chosen: mx.array, taught: mx.array) -> mx.array:
    """KL divergence from the router's distribution over experts to the predictor's."""
    own = logits - logsumexp(logits)
    return (shares_of(taught) * (taught - own)).sum(axis=-1).mean()


def log_probs(router: Router, h: mx.array, top_k: int) -> mx.array:
    """Log of the router's distribution over experts, [..., num_experts]."""
    return router.log_probs(h)


def softmax(logits: mx.array, chosen: mx.array, taught: mx.array) -> mx.array:
    """Cross-entropy against the uniform distribution over the chosen experts."""
    own = logits - logsumexp(logits)
    return -_of_chosen(own, chosen).sum() / mx.maximum(1, (chosen >= 0).sum())


LOSSES: dict[str, Loss] = {"soft": soft, "bce": bce, "kl": kl, "softmax": softmax}
# What target routers teach, of the losses that need them.
TEACHERS: dict[str, Teacher] = {"soft": soft_labels, "kl": log_probs}
