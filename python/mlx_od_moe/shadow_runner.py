"""Runs predictors beside the model: hidden states in, predictions out, on a thread of their own."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from . import _ext
from ._ext import (
    NativePredictor,
    NextTokenPrefetcher,
    Prediction,
    PredictionQueue,
    Prefetcher,
)
from .predictor_bundle import PredictorBundle
from .predictor_file import kind_of
from .shadow_model import ExpertPredictor

OnPrediction: TypeAlias = Callable[[Prediction], object] | Prefetcher | NextTokenPrefetcher
# A single predictor names no layers: it may stand for any of these.
_ANY_LAYERS = range(256)


class ShadowRunner(_ext.ShadowRunner):
    """Predicts which experts the coming layers will use while the model computes.

    Per MoE layer of a forward pass call `predict_async`, which returns at once. Predictions are
    then had in three ways: `get_predictions_for_layer`, the `queue`, or `on_prediction`. All are of
    the current step (forward pass) only: there is no answer rather than a stale one.

    predict_async: one thread at a time. All else: any thread. Close it, or use it in a `with`; at
    the interpreter's exit it is closed too. After os.fork() the child must make a new one.

    Args:
        source: a PredictorBundle, or one predictor for all layers, or the path of either's file.
        format: of the weights: "f32", "f16", "bf16", "int8" or "int4". Ignored for a
            NativePredictor.
        threads: CPU threads that one prediction may use, the runner's own among them.
        moe_layers: the model's MoE layers, rising; by default the bundle's, or 0 … 255 for a single
            predictor.
        k: experts predicted per layer and token, up to 32; default: the model's top_k.
        capacity: hidden states that may wait. One more, and the oldest of them is dropped.
        queue: where predictions go; default: one of its own, closed with the runner.
        on_prediction: called on the runner's thread for each prediction, after it is in the queue.
            What it raises is raised by a later call of the runner. A Prefetcher of that queue is
            called without Python.
    """

    def __init__(
        self,
        source: str | Path | PredictorBundle | ExpertPredictor | NativePredictor,
        format: str = "int4",
        threads: int = 1,
        *,
        moe_layers: Sequence[int] | None = None,
        k: int | None = None,
        capacity: int = 8,
        queue: PredictionQueue | None = None,
        on_prediction: OnPrediction | None = None,
    ):
        layers, predictors = _predictors(source, format, threads, moe_layers)
        super().__init__(predictors, layers, k, capacity, queue, on_prediction)
        _running.add(self)

    def close(self) -> None:
        """End the thread; states that wait are dropped. Raises what no call has raised yet."""
        self._close()
        _running.discard(self)
        self._check()

    def __enter__(self) -> ShadowRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def _predictors(
    source: str | Path | PredictorBundle | ExpertPredictor | NativePredictor,
    format: str,
    threads: int,
    moe_layers: Sequence[int] | None,
) -> tuple[list[int], dict[int, tuple[NativePredictor, list[int]]]]:
    """(MoE layers, {layer: (its predictor, the layers that it speaks of)})."""
    if isinstance(source, str | Path):
        bundled = kind_of(source) == "bundle"
        source = PredictorBundle.load(source) if bundled else ExpertPredictor.load(source)
    if isinstance(source, PredictorBundle):
        if moe_layers is not None and list(moe_layers) != source.moe_layers:
            raise ValueError(
                f"[ShadowRunner] moe_layers must be the bundle's {source.moe_layers}, "
                f"got {list(moe_layers)}"
            )
        native = source.native(format, threads)
        return source.moe_layers, {at: (native[at], source.targets(at)) for at in native}
    if isinstance(source, ExpertPredictor):
        source = source.native(format, threads)
    if not isinstance(source, NativePredictor):
        raise TypeError(
            "[ShadowRunner] source must be a path, a PredictorBundle or a predictor, "
            f"got {type(source).__name__}"
        )
    layers = list(_ANY_LAYERS if moe_layers is None else moe_layers)
    ahead = source.lookahead
    return layers, {
        layer: (source, layers[i + 1 : i + 1 + ahead]) for i, layer in enumerate(layers[:-1])
    }


_running: weakref.WeakSet[ShadowRunner] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before the interpreter goes: a thread that then asks for it would never return."""
    _ext._begin_exit()
    running = list(_running)
    for runner in running:
        runner._close()
    for runner in running:
        runner._check()
