"""Timing in turns: whatever else the machine does meanwhile, it does to all rows."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from .._blas import set_blas_threads

# Does something once; returns the microseconds that it took.
Run = Callable[[], float]


def timed_in_turn(calls: Sequence[Callable[..., object]], *arguments: object) -> Run:
    """The next of them at each call; neither its choice nor a function between is timed."""
    choices = itertools.cycle(calls)
    clock = time.perf_counter

    def run() -> float:
        call = next(choices)
        start = clock()
        call(*arguments)
        return (clock() - start) * 1e6

    return run


def in_turns(
    runs: Mapping[str, Run],
    rounds: int,
    seconds: float,
    warm_up: int = 3,
    calls: int = 7,
    rest: float = 0.0,
) -> dict[str, list[float]]:
    """Microseconds of each run, in at most so many rounds and so many seconds, one round at least.

    In a round each has its turn: `rest` seconds of sleep, in which the last one's threads calm
    down, `warm_up` calls that do not count and `calls` that do.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    for _ in range(rounds):
        for name, run in runs.items():
            if rest:
                time.sleep(rest)
            for _ in range(warm_up):
                run()
            times[name] += [run() for _ in range(calls)]
        if time.perf_counter() > end:
            break
    return times


def summary(times: list[float]) -> dict[str, float]:
    """{"min", "p50", "p99"}."""
    return {
        name: float(np.percentile(times, q)) for name, q in (("min", 0), ("p50", 50), ("p99", 99))
    }


def machine() -> dict[str, Any]:
    """What the figures were taken on: CPU, cores, system, and the load just now (None: unknown)."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


@contextmanager
def blas_threads(threads: int) -> Iterator[None]:
    """Hold numpy (where threadpoolctl is installed) and MLX to so many threads."""
    with ExitStack() as stack:
        stack.callback(set_blas_threads, set_blas_threads(threads))
        with suppress(ImportError):
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(threads, "blas"))
        yield
