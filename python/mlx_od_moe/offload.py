"""Runs an mlx-lm model whose routed experts stay on disk, but for those that memory holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .expert_file import ExpertFile
from .expert_store import ExpertStore
from .model_shell import directory, load_shell
from .moe import MoELayer, hooked
from .switch import StoredExperts


def load(
    path: str | Path,
    predictor: str | Path | None = None,
    capacity: str | int = "25%",
    policy: str = "lru",
    disk: str | None = None,
    direct_io: bool = False,
    verify: bool = False,
    readers: int = 2,
) -> tuple[nn.Module, Any, Runtime]:
    """Load (model, tokenizer, runtime): everything but the routed experts, which come from disk.

    The model is mlx-lm's own, for mlx_lm.generate and all else that takes one; on a CPU its outputs
    are bit for bit those of the model in memory. Each forward pass waits once per MoE layer, for
    the router's choice. Not for training or mx.compile.
    """
    file = ExpertFile(directory(path))
    model, tokenizer, layers = load_shell(file)
    top_k = max(layer.top_k for layer in layers)
    store = ExpertStore(file, capacity, policy, readers, direct_io, verify, disk, top_k=top_k)
    runtime = Runtime(layers, store)
    mx.eval(model.parameters())
    return model, tokenizer, runtime


class Runtime:
    """What runs a loaded model's experts. Close it, or use it in a `with`."""

    def __init__(self, layers: list[MoELayer], store: ExpertStore):
        self.store = store
        self.layers = layers
        self._inputs = threading.local()
        self._hooks = ExitStack()
        self._experts = [StoredExperts(layer, store) for layer in layers]
        for i, layer in enumerate(layers):
            self._install(layer, self._experts[i], self._experts[i - 1])

    def _install(self, layer: MoELayer, experts: StoredExperts, before: StoredExperts) -> None:
        def block(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._inputs.hidden = args[0] if args else next(iter(kwargs.values()))
            return call(*args, **kwargs)

        def switch(call: Callable[..., Any], x: mx.array, ids: mx.array) -> mx.array:
            hidden, self._inputs.hidden = self._inputs.hidden, None
            mx.eval(ids, hidden)
            before.settle()
            return experts(call, x, np.ascontiguousarray(ids, np.int32))

        self._hooks.enter_context(hooked(layer.block, block))
        self._hooks.enter_context(hooked(layer.experts, switch))

    def close(self) -> None:
        """End the store's threads. The model computes no more. Twice is once."""
        self.store.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()
