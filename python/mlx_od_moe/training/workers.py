"""Runs one function per layer, in this process or in several, under one progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, TypeVar

from tqdm import tqdm

from .._blas import set_blas_threads

Result = TypeVar("Result")
# Called with a number of samples done since the last call.
Advance = Callable[[int], None]

_done: Any = None  # in a worker process: the counter that the parent's bar follows


def run_layers(
    function: Callable[..., Result],
    arguments: tuple[Any, ...],
    layers: Sequence[int],
    jobs: int,
    bar: tqdm[Any],
) -> Iterator[tuple[int, Result]]:
    """Yield (layer, function(*arguments, layer, advance)) as they finish, `jobs` at a time.

    With more than one job, function and arguments must be picklable: processes are spawned, since
    MLX's threads do not survive a fork. A worker's exception is raised here, and all workers end.
    """
    if jobs == 1:
        for layer in layers:
            yield layer, function(*arguments, layer, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(jobs, context, _start_worker, (counter,)) as pool:
        waiting = {pool.submit(_run, function, arguments, layer): layer for layer in layers}
        try:
            while waiting:
                finished, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(counter.value - bar.n)
                for future in finished:
                    yield waiting.pop(future), future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _start_worker(counter: Any) -> None:
    global _done
    _done = counter
    set_blas_threads(1)  # the layers share the cores already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches every process: the parent speaks for all, and checkpoints are written whole.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers: they would train on for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(function: Callable[..., Result], arguments: tuple[Any, ...], layer: int) -> Result:
    return function(*arguments, layer, _count)


def _count(samples: int) -> None:
    with _done.get_lock():
        _done.value += samples
