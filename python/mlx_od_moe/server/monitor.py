"""What the dashboard shows: the last minutes, second by second."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from time import time
from typing import Any

from ..runtime import Runtime
from .metrics_page import Numbers
from .runs import Runs

log = logging.getLogger("mlx_od_moe")

_SAMPLES = 300
_WINDOW = 60  # samples over which recall and hit rates are taken
_SHORT = 5  # and what is to be of now

Pair = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """All counts at one time: (of it, of all) pairs.

    `recall` is of all predictions, by layer and distance; `promised` without those that the token
    alone made: validation measured the others.
    """

    time: float
    tokens: int
    hits: dict[int, Pair]
    recall: dict[Pair, Pair]
    promised: dict[Pair, Pair]
    stall_ns: int
    bytes_read: int


class Monitor:
    """Takes a sample each second, on a thread of its own."""

    def __init__(
        self,
        runtime: Runtime,
        runs: Runs,
        numbers: Numbers,
        model: str,
        expected_recall: Sequence[float],
        seconds: float = 1.0,
    ):
        self.collected: Callable[[], dict[str, int]] | None = None
        self._runtime, self._runs, self._numbers = runtime, runs, numbers
        self._model, self._expected = model, list(expected_recall)
        self._began = time()
        self._samples = deque([self._sample()], _SAMPLES)
        self._series: deque[dict[str, Any]] = deque(maxlen=_SAMPLES)
        self._closed = Event()
        self._thread = Thread(target=self._watch, args=(seconds,), name="monitor", daemon=True)
        self._thread.start()

    def _watch(self, seconds: float) -> None:
        while not self._closed.wait(seconds):
            try:
                self._take()
            except Exception:
                log.exception("a sample failed")

    def _take(self) -> None:
        before, sample = self._samples[-1], self._sample()
        self._samples.append(sample)
        self._series.append(
            {
                "time": sample.time,
                "tokens_per_second": _rate(before, sample),
                "hit_rate": _share(sample.hits, before.hits),
                "recall": _share(sample.promised, self._back(_SHORT).promised),
            }
        )

    def _back(self, samples: int) -> Sample:
        return self._samples[-min(samples + 1, len(self._samples))]

    def _sample(self) -> Sample:
        report = self._runtime.report()
        store, rows = report["store"], report["prediction"]["layers"]
        recall = {(row["layer"], row["distance"]): (row["named"], row["chosen"]) for row in rows}
        by_token = {(row["layer"], row["distance"]) for row in rows if row["by_token"]}
        return Sample(
            time(),
            self._numbers.generated,
            {n: (c["hits"], c["lookups"]) for n, c in store["layers"].items()},
            recall,
            {at: counts for at, counts in recall.items() if at not in by_token},
            store["stall_ns"],
            store["demand_bytes"] + store["prefetch_bytes"],
        )

    def page(self) -> dict[str, Any]:
        """All that the dashboard shows, as JSON values; null where nothing happened."""
        now, then = self._samples[-1], self._back(_WINDOW)
        report = self._runtime.report()
        prediction, store = report["prediction"], self._runtime.store
        rows = {(row["layer"], row["distance"]): row for row in prediction["layers"]}
        distances = sorted({d for _, d in rows} | set(range(1, len(self._expected) + 1)))
        return {
            "model": self._model,
            "uptime_seconds": time() - self._began,
            "capacity_bytes": report["capacity_bytes"],
            "requests": len(self._runs),
            "most_requests": self._runs.running + self._runs.waiting,
            "tokens": self._numbers.generated,
            "tokens_per_second": _rate(self._back(_SHORT), now),
            "hit_rate": _share(now.hits, then.hits),
            "stall_share": (now.stall_ns - then.stall_ns) / 1e9 / max(now.time - then.time, 1e-9),
            "bytes_read": now.bytes_read,
            "predicting": prediction["on"],
            "distances": distances,
            "recall": {
                "expected": self._expected,
                "realised": [
                    _recall(now.promised, then.promised, store.layers, d) for d in distances
                ],
            },
            "layers": [
                {
                    "layer": layer,
                    "slots": store.slots(layer),
                    "experts": store.file.num_experts(layer),
                    "hit_rate": _share({layer: now.hits[layer]}, then.hits),
                    "recall": [_recall(now.recall, then.recall, [layer], d) for d in distances],
                    "on": [rows[layer, d]["on"] if (layer, d) in rows else None for d in distances],
                }
                for layer in store.layers
            ],
            "series": list(self._series),
            "collected": self.collected() if self.collected else None,
        }

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()


def _rate(then: Sample, now: Sample) -> float:
    return (now.tokens - then.tokens) / max(now.time - then.time, 1e-9)


def _share(now: dict[Any, Pair], then: dict[Any, Pair]) -> float | None:
    """Of what was added since, the share of the first in the second."""
    part = sum(a - then.get(key, (0, 0))[0] for key, (a, _) in now.items())
    whole = sum(b - then.get(key, (0, 0))[1] for key, (_, b) in now.items())
    return part / whole if whole else None


def _recall(
    now: dict[Pair, Pair], then: dict[Pair, Pair], layers: list[int], distance: int
) -> float | None:
    return _share({at: n for at, n in now.items() if at[0] in layers and at[1] == distance}, then)
