"""Runs an mlx-lm model whose routed experts stay on disk, but for those that memory holds."""

from __future__ import annotations

import json
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
from .expert_store import ExpertStore, equal_slots
from .fingerprint import check_predictor
from .guard import Guard
from .model_shell import directory, load_shell
from .moe import MoELayer, hooked
from .predictor_bundle import PredictorBundle
from .prefetcher import ShadowPrefetcher
from .run_counts import RunCounts
from .slot_shares import favour
from .switch import StoredExperts
from .usage import load_usage, save_usage, warm


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
        runtime = Runtime(layers, store, bundle, guarded)
        mx.eval(model.parameters())
    except BaseException:
        store.close()
        raise
    return model, tokenizer, runtime


def _hidden_size(path: Path) -> int | None:
    config = json.loads((path / "config.json").read_text())
    found: int | None = (config | config.get("text_config", {})).get("hidden_size")
    return found


class Runtime:
    """What runs a loaded model's experts. Close it, or use it in a `with`; then the model is over.

    Made by `load`. Threads may generate at once; each forward pass belongs to one of them.

    Attributes:
        store: the ExpertStore.
        layers: the model's MoE layers.
        on_routing: called at each MoE layer with (layer, hidden state [..., hidden_size], expert
            ids int32 [..., top_k]), once they are computed; None: nobody. It delays the model.
    """

    def __init__(
        self,
        layers: list[MoELayer],
        store: ExpertStore,
        bundle: PredictorBundle | None = None,
        guarded: bool = True,
    ):
        self.store = store
        self.layers = layers
        self.on_routing: Callable[[int, mx.array, np.ndarray[Any, Any]], object] | None = None
        self._prefetcher = ShadowPrefetcher(store, bundle)
        self._guard = Guard() if guarded and self._prefetcher.predicts else None
        self._counts = RunCounts(store)
        self._inputs = threading.local()
        self._step = 0
        self._reached = -1
        self._hooks = ExitStack()
        self._experts = [StoredExperts(layer, store) for layer in layers]
        for i in range(len(layers)):
            self._install(i)

    def _install(self, i: int) -> None:
        layer, experts, before = self.layers[i], self._experts[i], self._experts[i - 1]

        def block(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._inputs.hidden = args[0] if args else next(iter(kwargs.values()))
            return call(*args, **kwargs)

        def switch(call: Callable[..., Any], x: mx.array, indices: mx.array) -> mx.array:
            hidden, self._inputs.hidden = self._inputs.hidden, None
            mx.eval(indices, hidden)
            before.settle()
            ids = np.ascontiguousarray(indices, np.int32)
            self._routed(i, hidden, ids)
            output = experts(call, x, ids)
            if i == len(self.layers) - 1:
                # Of a prompt nobody may ask for it: uncomputed, it would keep its experts leased,
                # and another thread could wait for their slots for ever.
                mx.async_eval(output)  # type: ignore[no-untyped-call]
            return output

        self._hooks.enter_context(hooked(layer.block, block))
        self._hooks.enter_context(hooked(layer.experts, switch))

    def _routed(self, i: int, hidden: mx.array, ids: np.ndarray[Any, Any]) -> None:
        """Before the experts are waited for: what may go on meanwhile is begun."""
        if i <= self._reached:
            self._begin_step(ids.size // ids.shape[-1], hidden.shape)
        self._reached = i
        layer = self.layers[i].index
        predict = self._guard is None or self._guard.predicts()
        self._prefetcher.observe(layer, hidden, ids, self._step, predict)
        if self.on_routing is not None:
            self.on_routing(layer, hidden, ids)

    def _begin_step(self, tokens: int, shape: tuple[int, ...]) -> None:
        self._step += 1
        self.store.cancel(self._step)
        seconds = self._counts.step(tokens, prompt=len(shape) > 2 and shape[-2] > 1)
        if self._guard is not None and seconds is not None:
            self._guard.took(seconds)
        self._prefetcher.log_changes()

    def snapshot(self) -> dict[str, Any]:
        """The counts as they are now, for `report` to begin at."""
        return self._counts.snapshot()

    def report(self, since: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the run was like, since the beginning or a snapshot.

        Returns a dict with `tokens` (of prompts too), `decoded_tokens`, `tokens_per_second` (of
        these), `hit_rate`, `bytes_per_token`, `stall_seconds`, `stall_per_token` (seconds),
        `capacity_bytes`, `store` (its counters; "layers": since the beginning), and `prediction`,
        also since the beginning: see ShadowPrefetcher.report; `on`: whether the guard lets it.
        """
        guard = self._guard
        prediction = {**self._prefetcher.report(), "on": guard.predicting if guard else None}
        return {**self._counts.report(since), "prediction": prediction}

    def save_usage(self, path: str | Path) -> None:
        """Keep which experts were used, for `load(usage=path)`."""
        layers = self.store.layers
        save_usage(path, {layer: self._prefetcher.uses(layer) for layer in layers})

    def close(self) -> None:
        """End the threads. Twice is once."""
        self._prefetcher.close()
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
