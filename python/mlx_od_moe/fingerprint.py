"""Whether predictors were trained for a model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .model_routers import dense_weight, router_weight
from .moe import MoELayer
from .predictor_bundle import PredictorBundle

# Cosine of a model's router weights and the predictors' copy. Quantised to 4 bits it is above .99,
# of another model near 0.
SAME_ROUTER = 0.9


def check_predictor(
    bundle: PredictorBundle, name: str, layers: list[MoELayer], hidden_size: int | None, model: str
) -> None:
    """Raise ValueError naming both, and what differs, where the bundle is of another model."""
    config = next(iter(bundle.values())).config
    own = {layer.index: layer for layer in layers}
    facts = [
        ("MoE layers", bundle.moe_layers, list(own)),
        ("experts", config.num_experts, layers[0].num_experts),
        ("hidden size", config.hidden_size, hidden_size or config.hidden_size),
    ]
    for what, predicted, actual in facts:
        if predicted != actual:
            _refuse(bundle, name, model, f"{what} {predicted}", f"{what} {actual}")
    for target, router in bundle.routers().items():
        weight = router_weight(own[target], config.hidden_size)
        if weight is not None and _cosine(dense_weight(router.linear), weight) < SAME_ROUTER:
            _refuse(bundle, name, model, f"another router in layer {target}", "its own")


def _refuse(bundle: PredictorBundle, name: str, model: str, theirs: str, ours: str) -> None:
    of = bundle.training.get("model")
    trained = f" (trained for {of})" if of else ""
    raise ValueError(
        f"[load] the predictor {name}{trained} is of another model than {model}: "
        f"it has {theirs}, the model {ours}"
    )


def _cosine(a: mx.array, b: mx.array) -> float:
    a, b = a.reshape(-1).astype(mx.float32), b.reshape(-1).astype(mx.float32)
    cosine: Any = (mx.inner(a, b) / (mx.linalg.norm(a) * mx.linalg.norm(b))).item()
    return float(cosine)
