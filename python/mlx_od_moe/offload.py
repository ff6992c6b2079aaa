"""Runs an mlx-lm model whose routed experts stay on disk, but for those that memory holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .expert_file import ExpertFile
from .expert_store import ExpertStore, equal_slots
from .fingerprint import check_predictor
from .model_shell import directory, load_shell
from .predictor_bundle import PredictorBundle
from .runtime import Runtime
from .slot_shares import favour
from .usage import load_usage, warm


def load(
    path: str | Path,
    predictor: str | Path | PredictorBundle | None = None,
    capacity: str | int = "25%",
    policy: str = "lrfu",
    disk: str | None = None,
    direct_io: bool = False,
    *,
    verify: bool = False,
    readers: int = 2,
    slots: dict[int, int] | None = None,
    usage: str | Path | None = None,
    guarded: bool = True,
    threads: int | None = None,
    progress: bool = False,
) -> tuple[nn.Module, Any, Runtime]:
    """Load (model, tokenizer, runtime): everything but the routed experts, which come from disk.

    The model is mlx-lm's own, for mlx_lm.generate and all else that takes one; on a CPU its outputs
    are bit for bit those of the model in memory. Each forward pass waits once per MoE layer, for
    the router's choice. Not for training or mx.compile.

    Args:
        path: a directory as mlx-lm saves it, or as `mlx-od-moe pack` writes it.
        predictor: a bundle that `train` wrote, or its file: experts are prefetched with it.
        capacity, policy, disk, direct_io, verify, readers: see ExpertStore.
        slots: {layer: experts it may hold} in place of capacity; default: as many for each layer,
            but with a predictor more for those that it does not predict.
        usage: a file that Runtime.save_usage wrote: begin with the experts that were used most.
        guarded: stop predicting while that makes tokens slower; False for measurements.
        threads: CPU threads that compute a call's experts, if it is a CPU that computes; None: as
            many as there are CPUs, at most 2. The rest of the model has one, as in mlx-lm.
        progress: show how far reading is.

    Raises FileNotFoundError for an incomplete directory, and ValueError for a model that mlx-lm
    does not know or that has no MoE layers, for a capacity that is too small (it names the least),
    and for a predictor or usage of another model.
    """
    file = ExpertFile(directory(path))
    model, tokenizer, layers = load_shell(file)
    bundle = PredictorBundle.load(predictor) if isinstance(predictor, str | Path) else predictor
    if bundle is not None:
        name = str(predictor) if bundle is not predictor else "that was given"
        check_predictor(bundle, name, layers, _hidden_size(file.path), str(file.path))
        bundle.warn_without_calibration(name)
    top_k = max(layer.top_k for layer in layers)
    if slots is None:
        slots = equal_slots(file, capacity, top_k)
        if bundle is not None:
            predicted = {target for layer in bundle for target in bundle.targets(layer)}
            slots = favour(slots, set(file.layers) - predicted, file, top_k)
    store = ExpertStore(
        file, capacity, policy, readers, direct_io, verify, disk, top_k=top_k, slots=slots
    )
    try:
        if usage is not None:
            warm(store, load_usage(usage, store), progress)
        runtime = Runtime(model, layers, store, bundle, guarded, threads)
        runtime.read_whole_layers(progress)
        mx.eval(model.parameters())
    except BaseException:
        store.close()
        raise
    return model, tokenizer, runtime


def _hidden_size(path: Path) -> int | None:
    config = json.loads((path / "config.json").read_text())
    found: int | None = (config | config.get("text_config", {})).get("hidden_size")
    return found
