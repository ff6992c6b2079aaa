"""The predictor's forward in C++, made from the trained one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ._ext import NativePredictor
from .predictor_file import named

if TYPE_CHECKING:
    from .shadow_model import ExpertPredictor

__all__ = ["FORMATS", "NativePredictor", "make_native"]

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
