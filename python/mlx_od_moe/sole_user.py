"""Whether one thread alone computes with a model: only then MLX may acquire its experts itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock, get_ident
from time import monotonic, sleep

from ._ext import LeaseChain

# How long the second thread waits for what the first has begun to compute.
PATIENCE = 10.0


class SoleUser:
    """The first thread that computes, for as long as there is no second.

    Where two threads' passes want the same slots, one waits for the other's Python to go on. MLX's
    thread must not be what waits then: MLX waits for all streams while it keeps Python from running
    (`mx.clear_cache`). So from the second thread on, all threads wait for their experts in Python.

    Attributes:
        leases: those that the first thread's graphs have.
    """

    def __init__(self) -> None:
        self.leases = LeaseChain()
        self._thread: int | None = None
        self._several = self._over = False
        self._building, self._ending = Lock(), Lock()

    def enter(self) -> None:
        """This thread is going to need experts.

        The second thread waits until the first one's graphs have none. What is not evaluated until
        PATIENCE is over, can't be any more (RuntimeError).
        """
        if self._thread is None:
            with self._building:
                self._thread = self._thread or get_ident()
        if self._over or self._thread == get_ident():
            return
        with self._ending:
            if not self._over:
                self._end()

    def _end(self) -> None:
        with self._building:
            self._several = True
            self.leases.forget()
        end = monotonic() + PATIENCE
        while self.leases.count() and monotonic() < end:
            sleep(0.001)
        self.leases.revoke()
        self._over = True

    @contextmanager
    def building(self) -> Iterator[bool]:
        """Whether this thread is the only one, and stays it until the end of the block."""
        with self._building:
            yield not self._several

    def settle(self) -> None:
        """Wait for what this thread has begun to compute, and let it fail."""
        if self._thread == get_ident():
            with suppress(RuntimeError):
                self.leases.settle()
