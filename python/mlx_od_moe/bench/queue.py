"""PredictionQueue beside Python's own queues: what a record costs to hand over.

Native threads are measured by benchmarks/bench_prediction_queue.cpp, beside boost and others.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .._ext import Prediction, PredictionQueue
from .timing import Run, in_turns, machine, summary

RECORD = Prediction(0, 1, 2, 1, list(range(8)))


class Queue(NamedTuple):
    """How to make one, put a record in, and take one out, waiting for it."""

    make: Callable[[], Any]
    put: Callable[..., Any]
    get: Callable[..., Any]


QUEUES = {
    "PredictionQueue": Queue(PredictionQueue, PredictionQueue.try_push, PredictionQueue.wait_pop),
    "queue.SimpleQueue": Queue(queue.SimpleQueue, queue.SimpleQueue.put, queue.SimpleQueue.get),
    "queue.Queue": Queue(queue.Queue, queue.Queue.put, queue.Queue.get),
}


def put_and_get(kind: Queue, records: int) -> Run:
    """One thread puts a record and takes it; the mean of some."""
    q = kind.make()

    def run() -> float:
        start = time.perf_counter()
        for _ in range(records):
            kind.put(q, RECORD)
            kind.get(q)
        return (time.perf_counter() - start) / records * 1e6

    return run


def round_trip(kind: Queue, records: int) -> Run:
    """There and back between two threads of Python; the mean of some."""

    def run() -> float:
        there, back = kind.make(), kind.make()

        def echo() -> None:
            for _ in range(records):
                kind.put(back, kind.get(there))

        thread = threading.Thread(target=echo)
        thread.start()
        start = time.perf_counter()
        for _ in range(records):
            kind.put(there, RECORD)
            kind.get(back)
        took = time.perf_counter() - start
        thread.join()
        return took / records * 1e6

    return run


def add_flags(flag: Callable[..., Any]) -> None:
    """The command's own flags."""
    flag("--rounds", type=int, default=11, help="turns of each queue")
    flag("--records", type=int, default=300, help="in a turn")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a row per queue, return all."""
    if options.rounds < 1 or options.records < 1:
        raise ValueError("--rounds and --records must be 1 or more")
    print(f"load {machine()['load']}; microseconds: min p50 p99, and p50 / ours")
    result: dict[str, Any] = {"records": options.records, "rounds": options.rounds}
    for name, bench in (("put_and_get", put_and_get), ("round_trip", round_trip)):
        runs = {name: bench(kind, options.records) for name, kind in QUEUES.items()}
        times = in_turns(runs, options.rounds, float("inf"), warm_up=1, calls=1)
        result[name] = rows = {name: summary(t) for name, t in times.items()}
        ours = rows["PredictionQueue"]["p50"]
        print(name.replace("_", " "))
        for queue_name, row in sorted(rows.items(), key=lambda item: item[1]["p50"]):
            columns = "".join(f"{row[key]:10.2f}" for key in ("min", "p50", "p99"))
            print(f"  {queue_name:20}{columns}{row['p50'] / ours:8.2f}x")
    return result
