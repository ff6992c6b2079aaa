"""What a running model has done: tokens, time, and what its store has counted."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from .expert_store import ExpertStore

# A longer pause between two steps is no computation: someone was reading, or nobody asked.
PAUSE_SECONDS = 2.0
# What the store has now, not what it has counted.
GAUGES = ("queued", "pending")


class RunCounts:
    """Counts forward passes as they begin; a pass's time ends where the next one begins."""

    def __init__(self, store: ExpertStore):
        self._store = store
        self._began: float | None = None
        self._tokens_under_way = 0
        self._numbers = {"tokens": 0, "decoded_tokens": 0, "decoding_seconds": 0.0, "timed": 0}

    def step(self, tokens: int, prompt: bool) -> float | None:
        """A pass begins. Returns the seconds of the one before, if that was one of decoding."""
        now, before = perf_counter(), self._began
        self._numbers["tokens"] += tokens
        seconds = None
        if before is not None and not prompt and now - before < PAUSE_SECONDS:
            seconds = now - before
            self._numbers["decoding_seconds"] += seconds
            self._numbers["timed"] += self._tokens_under_way
        if not prompt:
            self._numbers["decoded_tokens"] += tokens
        self._began, self._tokens_under_way = None if prompt else now, tokens
        return seconds

    def snapshot(self) -> dict[str, Any]:
        """All counts."""
        counters = self._store.counters()
        counters.pop("non_resident_recall")
        layers = counters.pop("layers")
        return {**self._numbers, "store": counters, "layers": layers}

    def report(self, since: dict[str, Any] | None) -> dict[str, Any]:
        """See Runtime.report."""
        now = self.snapshot()
        before = since or {"store": {}}
        gone = {name: n for name, n in before["store"].items() if name not in GAUGES}
        run = {name: now[name] - before.get(name, 0) for name in self._numbers}
        store = {name: n - gone.get(name, 0) for name, n in now["store"].items()}
        seconds, timed = run.pop("decoding_seconds"), run.pop("timed")
        read = store["demand_bytes"] + store["prefetch_bytes"]
        tokens = max(run["tokens"], 1)
        return {
            **run,
            "tokens_per_second": timed / seconds if seconds else 0.0,
            "hit_rate": store["hits"] / max(store["lookups"], 1),
            "bytes_per_token": read / tokens,
            "stall_seconds": store["stall_ns"] / 1e9,
            "stall_per_token": store["stall_ns"] / 1e9 / tokens,
            "capacity_bytes": self._store.capacity_bytes,
            "store": {**store, "layers": now["layers"]},
        }
