"""Shadow models beside a running model: its hidden states in, prefetches of the store out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ._ext import PassObserver, PredictionQueue, Prefetcher
from .cache_rows import Place
from .expert_store import ExpertStore
from .next_token_runner import next_token_runner
from .predictor_bundle import PredictorBundle
from .sequences import MOST_KEPT, Sequences
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
        settle: waits until what MLX tells the observer itself has been told; called before a
            context is changed.
        format, threads: see ShadowRunner.

    Attributes:
        observer: what MLX may tell of passes itself; else `begin` and `observe` do.
    """

    def __init__(
        self,
        store: ExpertStore,
        bundle: PredictorBundle | None = None,
        settle: Callable[[], object] = lambda: None,
        format: str = "int4",
        threads: int = 1,
    ):
        queue = PredictionQueue()
        self._native = Prefetcher(store.native, queue)
        self._runner: ShadowRunner | None = None
        self._next: ShadowRunner | None = None
        self._layers: list[int] = []
        self._sources: dict[int, list[int]] = {}
        self._previous: dict[int, list[int]] = {}
        self._settle = settle
        self._lock = Lock()
        self._context = None if bundle is None else bundle.context
        # Whether the context missed tokens; the step that it saw last, and whose that was.
        self._gap, self._step, self._sequences_now = False, -1, [0]
        tokens: TokenExperts | None = None
        if bundle is not None:
            # Of layers that are resident as a whole nothing is to be read.
            wanted = {n for n in store.layers if store.slots(n) < store.file.num_experts(n)}
            self._sources = {n: t for n in bundle if wanted & set(t := bundle.targets(n))}
        if bundle is not None and self._sources:
            tokens, self._layers = bundle.token_experts, bundle.moe_layers
            k = min(WIDTH, min(p.config.num_experts for p in bundle.values()))
            self._runner = ShadowRunner(
                bundle, format, threads, k=k, queue=queue, on_prediction=self._native
            )
            self._sequences = Sequences(self._runner)
            self._next = next_token_runner(bundle, self._native, format, threads)
            if self._context is None:
                takes = {n for n in self._sources if bundle[n].config.previous_experts}
                self._previous = {n: self._sources[n] for n in takes}
        self.knows_tokens = tokens is not None
        self.observer = PassObserver(
            store.native,
            queue,
            self._native,
            self._runner,
            list(self._sources) if self._context is None else self._layers,
            self._previous,
            self._layers[: tokens.layers] if tokens else [],
            tokens and tokens.tokens,
            tokens and tokens.experts,
            tokens and tokens.probabilities,
            self._next,
            self._layers[-1] if self._layers else -1,
        )

    @property
    def predicts(self) -> bool:
        """Whether there is anything to predict."""
        return self._runner is not None

    def begin(self, token_ids: NDArray[np.int32], step: int) -> None:
        """A pass begins, with one token of each sequence: what will the first layers choose?"""
        self.observer.begin(token_ids, step)

    def place(self, tokens: Any, cache: Any) -> Place:
        """Where a pass with these token ids [sequences, tokens] and prompt cache begins."""
        if self._context is None or not isinstance(tokens, mx.array) or tokens.ndim != 2:
            return Place()
        return Place.of(tokens.shape[0], cache)

    def follow(self, step: int, place: Place) -> int:
        """The sequence of a pass of one token, whose layers the observer will be told of."""
        with self._lock:
            return 0 if self._context is None else self._enter(step, place, 1)[0]

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
        with self._lock:
            self._settle()
            if not predict:
                self._miss()
            elif self._sources:
                self._predict(layer, hidden, step, place)
            if self._previous:
                last = ids.reshape(-1, *ids.shape[-2:])[:, -1]
                self.observer.remember(layer, np.ascontiguousarray(last))

    def skip(self) -> None:
        """What a layer computes now is not observed."""
        if self._runner is not None:
            with self._lock:
                self._miss()

    def _miss(self) -> None:
        self._gap = True  # what comes after it must not be taken for what follows
        self.observer.miss()

    def count(self, layer: int, ids: NDArray[np.int32], step: int) -> None:
        """The same where nothing is predicted of it."""
        self._native.reached(layer, ids, step)

    def _predict(self, layer: int, hidden: mx.array, step: int, place: Place) -> None:
        assert self._runner is not None
        try:
            if self._context is not None:
                self._predict_in_context(self._runner, layer, hidden, step, place)
            elif layer in self._sources and _is_decoding(hidden.shape[:-1]):
                previous = self._previous_experts(layer, hidden)
                self._runner.predict_async(hidden, layer, step, previous)
            if self._next and layer == self._layers[-1] and _is_decoding(hidden.shape[:-1]):
                self._next.predict_async(hidden, 0, step)
        except (RuntimeError, ValueError) as error:
            self._stop(f"layer {layer}: {error}")

    def _predict_in_context(
        self, runner: ShadowRunner, layer: int, hidden: mx.array, step: int, place: Place
    ) -> None:
        """Of a prompt the runner sees as many of its last tokens as a context reads.

        Of a batch whose sequences are not known none is remembered: its tokens are predicted for as
        if they were the first.
        """
        assert self._context is not None
        rows = hidden.reshape(-1, *hidden.shape[-2:]) if hidden.ndim > 2 else hidden[:, None]
        batch, tokens, most = *rows.shape[:2], self._context.rows
        if batch > 1 and (batch > MOST_KEPT or batch != len(place.rows)):
            self._enter(step, Place(), 2)
            runner.predict_async(rows.reshape(-1, rows.shape[-1]), layer, step)
            return
        sequences = self._enter(step, place, tokens)
        if batch > 1 and tokens == 1:
            runner.predict_async(rows[:, 0], layer, step, sequence=sequences)
            return
        padding = [max(-offset, 0) for offset in place.offsets or (0,)]
        for row, sequence, padded in zip(rows, sequences, padding, strict=True):
            if padded < tokens:
                runner.predict_async(row[padded:][-most:], layer, step, sequence=sequence)

    def _enter(self, step: int, place: Place, tokens: int) -> list[int]:
        """A layer of the pass of that step: its sequences, whose contexts fit it."""
        if step == self._step and not self._gap:
            return self._sequences_now
        if self._gap or not self._sequences.follows(place, tokens):
            self._settle()
        if self.observer.take_missed() or self._gap:
            self._sequences.forget()
        self._sequences_now = self._sequences.enter(place, tokens)
        self._gap, self._step = False, step
        return self._sequences_now

    def _stop(self, error: str) -> None:
        # The model computes on without predictions; its text is the same.
        log.error("prediction is switched off: %s", error)
        self._sources = {}

    def _previous_experts(self, layer: int, hidden: mx.array) -> NDArray[np.int32] | None:
        """Of the token before at the layers ahead [..., lookahead, top_k]; None: not known."""
        if layer not in self._previous:
            return None
        shape = hidden.shape[:-1]
        known = np.array(self.observer.previous(layer, int(np.prod(shape))), np.int32)
        return known.reshape(*shape, len(self._previous[layer]), -1) if known.size else None

    def uses(self, layer: int) -> list[int]:
        """For each expert of the layer, the passes that chose it."""
        return list(self._native.uses(layer))

    def log_changes(self) -> None:
        """Say which predictions have been switched on or off, and why none are made any more."""
        if error := self.observer.take_error():
            self._stop(error)
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
        i at distance i + 1: see "by_token", {layer: recall@k}. "next_token", {layer: its counts}:
        of the first layers, predicted at the token before.
        """
        judged = [r for r in self._native.recalls() if r["predictions"]]
        rows = [r for r in judged if r["distance"]]
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
            "next_token": {
                r["layer"]: r | {"recall_at_k": _recall([r])} for r in judged if not r["distance"]
            },
            "off": [(r["layer"], r["distance"]) for r in rows if not r["on"]],
            "runner": self._runner.statistics() if self._runner else {},
        }

    def close(self) -> None:
        """End the runners' threads. Twice is once."""
        with ExitStack() as stack:  # both, whatever one raises
            for runner in (self._next, self._runner):
                if runner is not None:
                    stack.callback(runner.close)


def _is_decoding(rows: tuple[int, ...]) -> bool:
    return rows[-1] == 1 if len(rows) > 1 else rows[0] <= MOST_SEQUENCES


def _recall(rows: list[dict[str, Any]]) -> float:
    chosen = sum(r["chosen"] for r in rows)
    return float(sum(r["named"] for r in rows) / chosen) if chosen else 0.0
