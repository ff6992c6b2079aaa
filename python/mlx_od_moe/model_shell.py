"""An mlx-lm model without the memory of its routed experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .expert_file import ExpertFile
from .expert_store import pool_dtype
from .moe import MoELayer, find_moe_layers


def load_shell(file: ExpertFile) -> tuple[nn.Module, Any, list[MoELayer]]:
    """(model, tokenizer, its MoE layers) of the file's directory; nothing is evaluated.

    mlx-lm builds the model and decides what is quantised. In place of the experts' tensors, which a
    packed directory does not have, it is given zeros of their shapes: they take no memory unless
    evaluated, which is not to happen.

    Raises FileNotFoundError for an incomplete directory and ValueError, naming what is wrong, for a
    model that mlx-lm does not know, that has no MoE layers, or others than the file.
    """
    from mlx_lm.utils import _get_classes, load_model, load_tokenizer

    if not (file.path / "config.json").is_file():
        raise FileNotFoundError(f"[load] {file.path} must be a model directory with config.json")
    layers: list[MoELayer] = []

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], Any]:
        model_class, arguments = _get_classes(config)

        def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            known = getattr(model_class, "sanitize", None)
            weights = known(self, weights) if known else weights
            layers.extend(_checked(find_moe_layers(self), file))
            return weights | _zeros(layers, file)

        names = {"sanitize": sanitize, "__module__": model_class.__module__}
        return type(model_class.__name__, (model_class,), names), arguments

    try:
        model, config = load_model(file.path, lazy=True, get_model_classes=classes)
    except ValueError as error:
        raise ValueError(f"[load] {file.path}: {error}") from error
    model.__class__ = type(model).__bases__[0]
    tokenizer = load_tokenizer(file.path, eos_token_ids=config.get("eos_token_id"))
    return model, tokenizer, layers


def _checked(layers: list[MoELayer], file: ExpertFile) -> list[MoELayer]:
    own = [layer.index for layer in layers]
    if own != file.layers:
        raise ValueError(f"the model has experts in layers {own}, its files in {file.layers}")
    for layer in layers:
        if layer.num_experts != file.num_experts(layer.index):
            raise ValueError(
                f"layer {layer.index} has {layer.num_experts} experts, its "
                f"files {file.num_experts(layer.index)}"
            )
    return layers


def _zeros(layers: list[MoELayer], file: ExpertFile) -> dict[str, mx.array]:
    return {
        f"{layer.path}.{part.name}": mx.zeros(
            (layer.num_experts, *part.shape), pool_dtype(part.dtype)
        )
        for layer in layers
        for part in file.parts(layer.index)
    }


def directory(path: str | Path) -> Path:
    """The path, if it is a directory. Raises FileNotFoundError."""
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"[load] {path} must be a model directory")
    return path
