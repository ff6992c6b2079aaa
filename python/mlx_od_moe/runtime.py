"""Runs a loaded model's experts: the store, the predictions, and what they have done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ._ext import is_computed
from .cache_rows import Place
from .compute_threads import ComputeThreads
from .expert_store import ExpertStore
from .forward_pass import ForwardPass, Routed, decoded_tokens
from .guard import Guard
from .moe import MoELayer, hooked
from .predictor_bundle import PredictorBundle
from .prefetcher import ShadowPrefetcher
from .progress import progress_bar
from .run_counts import RunCounts
from .sole_user import SoleUser
from .switch import Sight, StoredExperts
from .usage import save_usage


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
        model: nn.Module,
        layers: list[MoELayer],
        store: ExpertStore,
        bundle: PredictorBundle | None = None,
        guarded: bool = True,
        threads: int | None = None,
    ):
        self._threads = ComputeThreads(threads)
        self.store = store
        self.layers = layers
        self.on_routing: Callable[[int, mx.array, np.ndarray[Any, Any]], object] | None = None
        self._sole_user = SoleUser()
        self._prefetcher = ShadowPrefetcher(store, bundle, self._sole_user.leases.settle)
        self._guard = Guard() if guarded and self._prefetcher.predicts else None
        self._counts = RunCounts(store)
        self._pass = ForwardPass(8 * len(layers))
        self._step = 0
        self._reached = len(layers)
        self._hooks = ExitStack()
        self._experts = [StoredExperts(layer, store) for layer in layers]
        for i in range(len(layers)):
            self._install(i)
        self._hooks.enter_context(hooked(model, self._forward))

    def _install(self, i: int) -> None:
        layer, experts = self.layers[i], self._experts[i]

        def block(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._pass.hidden = args[0] if args else next(iter(kwargs.values()))
            return call(*args, **kwargs)

        def switch(call: Callable[..., Any], x: mx.array, indices: mx.array) -> mx.array:
            routed = Routed(i, self._pass.take_hidden(), indices)
            call = self._threads.spread(call)
            self._finish()
            self._reach(routed)
            if experts.kept and self.on_routing is None and not self._predicts():
                self._prefetcher.skip()
                self._pass.uncounted.append((i, self._step, indices))
                return experts.unwaited(call, x, indices)
            self._sole_user.enter()
            with self._sole_user.building() as alone:
                if alone and self._needs_no_wait(routed):
                    return experts.leased(
                        call, x, indices, self._sole_user.leases, self._sight(routed)
                    )
            if i == 0:
                self._predict_by_token()
            if self._pass.in_pass and experts.certainly_fit(indices.size):
                mx.async_eval(indices, routed.hidden)  # type: ignore[no-untyped-call]
                later = experts.later(call, x, indices.shape)
                self._pass.waiting = routed, later
                return later.output
            output = experts(call, x, self._ids(routed))
            self._complete(i, output)
            return output

        self._hooks.enter_context(hooked(layer.block, block))
        self._hooks.enter_context(hooked(layer.experts, switch))

    def _needs_no_wait(self, routed: Routed) -> bool:
        """Whether MLX can be left to acquire what a layer's router chooses, and to tell of it."""
        i, hidden, indices = routed
        if self.on_routing is not None or not self._experts[i].can_be_leased(indices.size):
            return False
        return not self._predicts() or hidden.size == hidden.shape[-1]

    def _sight(self, routed: Routed) -> Sight:
        """What MLX tells of a layer."""
        if not self._predicts():
            self._prefetcher.skip()
            return Sight(self._prefetcher.observer, self._step)
        sequence = self._prefetcher.follow(self._step, self._pass.place)
        return Sight(self._prefetcher.observer, self._step, routed.hidden, sequence)

    def _forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A forward pass of the whole model.

        Each layer's experts are waited for only when the next layer's graph is built: so Python
        builds while MLX computes, and MLX waits for little more than the router's choice.
        """
        outer, self._pass.in_pass = self._pass.in_pass, True
        self._pass.tokens, self._pass.place = decoded_tokens(args), self._place(*args, **kwargs)
        try:
            if not outer:
                args = self._announced(args)
            output = call(*args, **kwargs)
            self._finish()
            return output
        finally:
            self._pass.in_pass, self._pass.waiting = outer, None
            self._pass.tokens, self._pass.place = None, Place()
            self._pass.announced = False

    def _announced(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A pass's arguments: with predictions, MLX tells of its token as soon as it has it."""
        tokens = self._pass.tokens
        if tokens is None or tokens.size > 1 or self.on_routing is not None or not self._predicts():
            return args
        self._sole_user.enter()
        with self._sole_user.building() as alone:
            if not alone or mx.default_device() != mx.cpu:
                return args
            self._pass.announced = True
            observer, leases = self._prefetcher.observer, self._sole_user.leases
            return observer.begin_in_graph(tokens, self._step + 1, leases), *args[1:]

    def _place(self, tokens: Any = None, cache: Any = None, *args: Any, **kwargs: Any) -> Place:
        """Where a model called with these arguments begins."""
        return self._prefetcher.place(tokens, cache)

    def _finish(self) -> None:
        """Get this thread's last layer its experts, if it waits for them."""
        waiting, self._pass.waiting = self._pass.waiting, None
        if waiting is not None:
            routed, later = waiting
            self._experts[routed.i].begin(later, self._ids(routed))
            self._complete(routed.i, later.output)

    def _complete(self, i: int, output: mx.array) -> None:
        if i == len(self.layers) - 1:
            # Of a prompt nobody may ask for it: uncomputed, it would keep its experts leased,
            # and another thread could wait for their slots for ever.
            mx.async_eval(output)  # type: ignore[no-untyped-call]

    def _ids(self, routed: Routed) -> NDArray[np.int32]:
        """What the router has chosen, for all who want to know, before its experts are there."""
        i, hidden, indices = routed
        mx.eval(indices, hidden)
        self._experts[i - 1].settle()
        ids = np.ascontiguousarray(indices, np.int32)
        layer = self.layers[i].index
        predict = self._predicts()
        self._prefetcher.observe(layer, hidden, ids, self._step, predict, self._pass.place)
        if self.on_routing is not None:
            self.on_routing(layer, hidden, ids)
        return ids

    def _predict_by_token(self) -> None:
        """What the first layers will choose, which no predictor looks at: when decoding begins.

        This waits for the token, which the pass before may still be computing.
        """
        tokens = self._pass.tokens
        if tokens is None or self._pass.announced or not self._prefetcher.knows_tokens:
            return
        if self._predicts():
            mx.eval(tokens)
            self._prefetcher.begin(np.array(tokens, np.int32).ravel(), self._step)

    def _predicts(self) -> bool:
        """Whether predictions are made in this step."""
        return self._prefetcher.predicts and (self._guard is None or self._guard.predicts())

    def _count(self) -> None:
        """Of this thread's layers in memory as a whole: what is computed by now."""
        uncounted = self._pass.uncounted
        while uncounted and is_computed(uncounted[0][2]):
            i, step, indices = uncounted.popleft()
            ids, layer = np.ascontiguousarray(indices, np.int32), self.layers[i].index
            self._prefetcher.count(layer, ids, step)
            self.store.acquire(layer, ids).release()

    def _reach(self, routed: Routed) -> None:
        """A layer's graph is built: perhaps the first of a forward pass."""
        if routed.i <= self._reached:
            indices = routed.indices
            self._begin_step(indices.size // indices.shape[-1], routed.hidden.shape)
        self._reached = routed.i

    def _begin_step(self, tokens: int, shape: tuple[int, ...]) -> None:
        self._count()
        self._sole_user.leases.renew()
        self._step += 1
        if not self._pass.announced:
            self.store.cancel(self._step)
        seconds = self._counts.step(tokens, prompt=len(shape) > 2 and shape[-2] > 1)
        if self._guard is not None and seconds is not None:
            self._guard.took(seconds)
        self._prefetcher.log_changes()

    def read_whole_layers(self, progress: bool = False) -> None:
        """Read the layers that there is room for as a whole: they need no wait for their router."""
        whole = [experts for experts in self._experts if experts.fit]
        with progress_bar(len(whole), "reading", "layer", progress and bool(whole)) as bar:
            for experts in whole:
                experts.keep()
                bar.update()

    def snapshot(self) -> dict[str, Any]:
        """The counts as they are now, for `report` to begin at."""
        self._count()
        return self._counts.snapshot()

    def report(self, since: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the run was like, since the beginning or a snapshot.

        Returns a dict with `tokens` (of prompts too), `decoded_tokens`, `tokens_per_second` (of
        these), `hit_rate`, `bytes_per_token`, `stall_seconds`, `stall_per_token` (seconds),
        `capacity_bytes`, `store` (its counters; "layers": since the beginning), and `prediction`,
        also since the beginning: see ShadowPrefetcher.report; `on`: whether the guard lets it.
        """
        self._count()
        guard = self._guard
        prediction = {**self._prefetcher.report(), "on": guard.predicting if guard else None}
        return {**self._counts.report(since), "prediction": prediction}

    def save_usage(self, path: str | Path) -> None:
        """Keep which experts were used, for `load(usage=path)`."""
        layers = self.store.layers
        save_usage(path, {layer: self._prefetcher.uses(layer) for layer in layers})

    def close(self) -> None:
        """End the threads. Twice is once.

        What this thread has begun to compute is computed before; other threads' passes fail.
        """
        self._sole_user.settle()
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
