"""Shadow models beside a running model: its hidden states in, prefetches of the store out."""

from __future__ import annotations

import logging
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ._ext import Prediction, PredictionQueue, Prefetcher
from .expert_store import ExpertStore
from .predictor_bundle import PredictorBundle
from .sequences import Place, Sequences
from .shadow_runner import ShadowRunner
from .token_experts import WIDTH, TokenExperts

log = logging.getLogger("mlx_od_moe")

# A hidden state has one row per sequence in decoding. More rows than this are a prompt.
MOST_SEQUENCES = 64
# Of each layer and distance; named / chosen is recall@k.
_COUNTED = ("layer", "distance", "predictions", "chosen", "named", "useful", "wasted")


class ShadowPrefetcher:
    """Judges predictions at every layer, and with a bundle makes them.

    This is the one place where a runner is given hidden states, per layer and sequence.

    Args:
        store: whose experts are prefetched.
        bundle: the predictors; None: only uses are counted.
        format, threads: see ShadowRunner.
    """

    def __init__(
        self,
        store: ExpertStore,
        bundle: PredictorBundle | None = None,
        format: str = "int4",
        threads: int = 1,
    ):
        queue = PredictionQueue()
        self._native = Prefetcher(store.native, queue)
        self._queue = queue
        self._runner: ShadowRunner | None = None
        self._tokens: TokenExperts | None = None
        self._layers: list[int] = []
        self._sources: dict[int, list[int]] = {}
        self._last: dict[int, NDArray[np.int32]] = {}
        self._lock = Lock()
        self._context = None if bundle is None else bundle.context
        # Whether the context missed tokens; the step that it saw last, and whose that was.
        self._gap, self._step, self._sequence = False, -1, 0
        if bundle is None:
            return
        # Of layers that are resident as a whole nothing is to be read.
        wanted = {n for n in store.layers if store.slots(n) < store.file.num_experts(n)}
        self._sources = {n: t for n in bundle if wanted & set(t := bundle.targets(n))}
        self._previous = {n for n in self._sources if bundle[n].config.previous_experts}
        if self._sources:
            self._tokens, self._layers = bundle.token_experts, bundle.moe_layers
            self._num_experts = max(p.config.num_experts for p in bundle.values())
            k = min(WIDTH, min(p.config.num_experts for p in bundle.values()))
            self._runner = ShadowRunner(
                bundle, format, threads, k=k, queue=queue, on_prediction=self._native
            )
            self._sequences = Sequences(self._runner)

    @property
    def predicts(self) -> bool:
        """Whether there is anything to predict."""
        return self._runner is not None

    @property
    def knows_tokens(self) -> bool:
        """Whether `begin` predicts anything."""
        return self._tokens is not None

    def begin(self, token_ids: NDArray[np.int64], step: int) -> None:
        """A pass begins, with one token of each sequence: what will the first layers choose?"""
        assert self._tokens is not None
        likely = self._tokens.predict(token_ids, self._num_experts)
        several = len(likely) > 1
        for i, of_layer in enumerate(likely.sum(axis=0)):
            best = np.argsort(-of_layer)[:WIDTH]
            scores = of_layer[best] if several else _logit(of_layer[best])
            target = self._layers[i]
            made = Prediction(
                step, -1, target, i + 1, best.tolist(), scores.tolist(), batch=several
            )
            self._queue.try_push(made)
        self._native.drain()

    def observe(
        self,
        layer: int,
        hidden: mx.array,
        ids: NDArray[np.int32],
        step: int,
        predict: bool,
        place: Place,
    ) -> None:
        """A layer has chosen `ids` [..., top_k] for `hidden` [..., hidden_size] in that step.

        With `predict` the runner is given the state, where it is one of decoding. `place`: where in
        its sequence the pass began.
        """
        self.count(layer, ids, step)
        if self._runner is None:
            return
        rows = hidden.shape[:-1]
        with self._lock:
            if self._context is not None and self._sources:
                if predict:
                    hidden = self._for_context(hidden, step, place)
                    self._predict(self._runner, layer, hidden, step)
                else:
                    self._gap = True  # what comes after it must not be taken for what follows
            elif predict and layer in self._sources and _is_decoding(rows):
                self._predict(self._runner, layer, hidden, step)
            self._last[layer] = ids.reshape(*rows, ids.shape[-1])[..., -1:, :]

    def skip(self) -> None:
        """What a layer computes now is not observed."""
        if self._runner is not None:
            with self._lock:
                self._gap = True
                self._last.clear()

    def count(self, layer: int, ids: NDArray[np.int32], step: int) -> None:
        """The same where nothing is predicted of it."""
        self._native.reached(layer, ids, step)

    def _for_context(self, hidden: mx.array, step: int, place: Place) -> mx.array:
        """What the runner is to see, [tokens, hidden_size], of the pass's sequence.

        Of a prompt as many of its last tokens as a context reads. Of a batch none is remembered:
        its tokens are predicted for as if they were the first.
        """
        assert self._context is not None
        tokens = hidden.shape[-2] if hidden.ndim > 2 else 1
        several = hidden.size != tokens * hidden.shape[-1]
        if self._gap:
            self._sequences.forget()
        if several:
            self._sequences.enter(Place(), 2)
            self._sequence = 0
        elif step != self._step or self._gap:
            self._sequence = self._sequences.enter(place, tokens)
        self._gap, self._step = False, step
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return hidden if several else hidden[-self._context.rows :]

    def _predict(self, runner: ShadowRunner, layer: int, hidden: mx.array, step: int) -> None:
        try:
            previous = self._previous_experts(layer, hidden)
            runner.predict_async(hidden, layer, step, previous, sequence=self._sequence)
        except (RuntimeError, ValueError):
            # The model computes on without predictions; its text is the same.
            log.exception("prediction is switched off: layer %d", layer)
            self._sources = {}

    def _previous_experts(self, layer: int, hidden: mx.array) -> NDArray[np.int32] | None:
        """Of the token before at the layers ahead [..., lookahead, top_k]; None: not known."""
        if layer not in self._previous or self._context is not None:
            return None
        known = [self._last.get(target) for target in self._sources[layer]]
        shape = hidden.shape[:-1]
        if any(ids is None or ids.shape[:-1] != shape for ids in known):
            return None
        return np.stack(known, axis=-2)  # type: ignore[arg-type]

    def uses(self, layer: int) -> list[int]:
        """For each expert of the layer, the passes that chose it."""
        return list(self._native.uses(layer))

    def log_changes(self) -> None:
        """Say which predictions have been switched on or off."""
        for layer, distance, on, share in self._native.take_changes():
            log.info(
                "predictions of layer %d from %d before are switched %s: %.0f%% of the experts "
                "that they would have read were chosen",
                layer,
                distance,
                "on" if on else "off",
                share * 100,
            )

    def report(self) -> dict[str, Any]:
        """Recall per distance and layer, what is switched off, and the runner's counts.

        "recall_at_k" is that of the predictors. The first layers are predicted by the token, layer
        i at distance i + 1: see "by_token", {layer: recall@k}.
        """
        rows = [r for r in self._native.recalls() if r["predictions"]]
        first = {layer: i + 1 for i, layer in enumerate(self._layers)}
        by_token = [r for r in rows if r["distance"] == first.get(r["layer"])]
        predicted = [r for r in rows if r not in by_token]
        distances = sorted({r["distance"] for r in predicted})
        return {
            "recall_at_k": {
                d: _recall([r for r in predicted if r["distance"] == d]) for d in distances
            },
            "by_token": {r["layer"]: _recall([r]) for r in by_token},
            "layers": [
                {
                    **{name: r[name] for name in _COUNTED},
                    "recall_at_k": _recall([r]),
                    "by_token": r in by_token,
                    "on": r["on"],
                }
                for r in rows
            ],
            "off": [(r["layer"], r["distance"]) for r in rows if not r["on"]],
            "runner": self._runner.statistics() if self._runner else {},
        }

    def close(self) -> None:
        """End the runner's thread. Twice is once."""
        if self._runner is not None:
            self._runner.close()


def _logit(probability: NDArray[np.float32]) -> NDArray[np.float32]:
    p = np.clip(probability, 1e-3, 1 - 1e-3)
    return np.log(p / (1 - p))


def _is_decoding(rows: tuple[int, ...]) -> bool:
    return rows[-1] == 1 if len(rows) > 1 else rows[0] <= MOST_SEQUENCES


def _recall(rows: list[dict[str, Any]]) -> float:
    chosen = sum(r["chosen"] for r in rows)
    return float(sum(r["named"] for r in rows) / chosen) if chosen else 0.0
