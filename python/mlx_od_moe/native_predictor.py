"""The predictor's forward in C++, made from the trained one."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ._ext import NativePredictor, PredictorOp, SequenceContext, load_bundle, pack_bundle

if TYPE_CHECKING:
    from .shadow_model import ExpertPredictor

__all__ = [
    "FORMATS",
    "NativePredictor",
    "PredictorOp",
    "SequenceContext",
    "load_bundle",
    "make_native",
    "make_native_bundle",
    "make_op",
]

FORMATS = ("f32", "f16", "bf16", "int8", "int4")


def make_native(predictor: ExpertPredictor, format: str, threads: int) -> NativePredictor:
    """Pack a predictor's weights for the CPU; see ExpertPredictor.native."""
    return NativePredictor(*_parts(predictor), format, threads)


def make_op(predictor: ExpertPredictor, format: str = "int4", threads: int = 1) -> PredictorOp:
    """The predictor as a lazy MLX operation, for composing with others.

    On a CPU stream it runs as NativePredictor does, on a GPU stream as MLX operations.
    """
    return PredictorOp(*_parts(predictor), format, threads)


def _parts(
    predictor: ExpertPredictor,
) -> tuple[dict[str, mx.array], dict[str, Any], list[dict[str, Any]], int, int]:
    """What the native constructors take: tensors, configurations, bits and group size."""
    routers = [dataclasses.asdict(router.config) for router in predictor.routers]
    quantization = predictor.quantization
    bits, group_size = (quantization.bits, quantization.group_size) if quantization else (0, 0)
    return (
        predictor.named_parameters(),
        dataclasses.asdict(predictor.config),
        routers,
        bits,
        group_size,
    )


def make_native_bundle(
    tensors: dict[str, mx.array], metadata: dict[str, Any], format: str, threads: int
) -> dict[int, NativePredictor]:
    """Pack a bundle's predictors into one allocation; see PredictorBundle.native."""
    text = {key: json.dumps(value) for key, value in metadata.items()}
    return pack_bundle(tensors, text, format, threads)
