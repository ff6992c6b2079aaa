"""The predictor's forward in C++, made from the trained one."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ._ext import NativePredictor, load_bundle, pack_bundle
from .predictor_file import named

if TYPE_CHECKING:
    from .shadow_model import ExpertPredictor

__all__ = ["FORMATS", "NativePredictor", "load_bundle", "make_native", "make_native_bundle"]

FORMATS = ("f32", "f16", "bf16", "int8", "int4")


def make_native(predictor: ExpertPredictor, format: str, threads: int) -> NativePredictor:
    """Pack a predictor's weights for the CPU; see ExpertPredictor.native."""
    tensors = named(predictor, "predictor.")
    for d, router in enumerate(predictor.routers):
        tensors |= named(router, f"routers.{d}.")
    quantization = predictor.quantization
    return NativePredictor(
        tensors,
        dataclasses.asdict(predictor.config),
        [dataclasses.asdict(router.config) for router in predictor.routers],
        quantization.bits if quantization else 0,
        quantization.group_size if quantization else 0,
        format,
        threads,
    )


def make_native_bundle(
    tensors: dict[str, mx.array], metadata: dict[str, Any], format: str, threads: int
) -> dict[int, NativePredictor]:
    """Pack a bundle's predictors into one allocation; see PredictorBundle.native."""
    text = {key: json.dumps(value) for key, value in metadata.items()}
    return pack_bundle(tensors, text, format, threads)
