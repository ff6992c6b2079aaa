"""A predictor file's part that speaks of the next token: what it may be, and how it is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .predictor_config import PredictorConfig
from .predictor_file import Quantization, named
from .shadow_model import ExpertPredictor

_PREFIX = "next_token."  # before the names of its tensors
_KEY = "next_token"  # its configuration in the metadata


def check_next_token(
    found: ExpertPredictor, moe_layers: Sequence[int], predictors: Iterable[ExpertPredictor]
) -> None:
    """Raise ValueError where it is no plain MLP on the states of the same model."""
    own = found.config
    for predictor in predictors:
        config = predictor.config
        for name in ("hidden_size", "num_experts", "top_k"):
            if getattr(own, name) != getattr(config, name):
                raise ValueError(
                    f"[PredictorBundle] the next token's predictor is for {name} "
                    f"{getattr(own, name)}, the layers' are for {getattr(config, name)}"
                )
        if found.quantization != predictor.quantization:
            raise ValueError(
                "[PredictorBundle] the next token's predictor must be quantised as the layers' are"
            )
    if own.lookahead > len(moe_layers):
        raise ValueError(
            f"[PredictorBundle] the next token's predictor is of {own.lookahead} layers; the model "
            f"has {len(moe_layers)}"
        )
    if own.has_gate or own.has_context or own.previous_experts or found.shared_projection:
        raise ValueError(
            "[PredictorBundle] the next token's predictor must be an MLP on a state alone, without "
            "gate, context, previous experts or a shared projection"
        )


def next_token_contents(
    found: ExpertPredictor | None,
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The tensors and the metadata that a file holds of it; none of either for None."""
    if found is None:
        return {}, {}
    return named(found, _PREFIX), {_KEY: dataclasses.asdict(found.config)}


def read_next_token(
    tensors: dict[str, mx.array],
    metadata: dict[str, Any],
    quantization: Quantization | None,
    path: str | Path,
) -> ExpertPredictor | None:
    """What the file `path` holds of it; None where that is nothing.

    Raises ValueError naming the file where a tensor is missing or has another shape.
    """
    if _KEY not in metadata:
        return None
    predictor = ExpertPredictor(PredictorConfig(**metadata[_KEY]))
    predictor.restore(tensors, _PREFIX, quantization, path)
    return predictor
