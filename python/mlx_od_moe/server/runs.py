"""Requests under way: how many there may be, and what becomes of each."""

from __future__ import annotations

import math
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Condition
from time import perf_counter
from typing import TYPE_CHECKING, Any

from mlx_lm.server import GenerationContext, Response

from .request_checks import RequestError

if TYPE_CHECKING:
    from argparse import Namespace

    from .generator import Generator
    from .metrics_page import Numbers

_POLL_SECONDS = 0.25  # how often a run without news looks for its client


class ClientGoneError(ConnectionError):
    """Nobody waits for the answer any more."""


class StopTexts:
    """Finds stop texts that begin or end within a token; mlx-lm's generator finds the others.

    Its handler strips what is found here from the answer.
    """

    def __init__(self, stops: list[str]):
        self._stops, self._tail = stops, ""
        self._kept = max(map(len, stops), default=1) - 1

    def cut(self, text: str) -> str | None:
        """The text up to the end of the first stop; None where none ends in it."""
        whole = self._tail + text
        ends = [at + len(stop) for stop in self._stops if (at := whole.find(stop)) >= 0]
        if ends:
            return text[: min(ends) - len(self._tail)]
        self._tail = whole[len(whole) - self._kept :] if self._kept < len(whole) else whole
        return None


class Run(Queue[Any]):
    """One request under way, and the queue of what the generator says of it.

    To mlx-lm's handler it is the generator. Once it is over, what the generator still does for it
    ends, whoever of the two comes first.
    """

    def __init__(
        self, generator: Generator, connection: socket.socket, collect: bool, numbers: Numbers
    ):
        super().__init__()
        self.collect = collect
        self.over = False
        self.prompt_tokens = self.cached_tokens = 0
        self.first_token_seconds: float | None = None
        self._generator, self._numbers = generator, numbers
        self._poll = select.poll()
        self._connection = connection
        self._poll.register(connection, select.POLLIN)
        self._context: Any = None
        self._stops = StopTexts([])
        self._began = perf_counter()

    @property
    def cli_args(self) -> Namespace:
        """As mlx-lm's handler asks for it."""
        args: Namespace = self._generator.cli_args
        return args

    def generate(
        self, request: Any, args: Any, progress_callback: Callable[[int, int], None] | None = None
    ) -> tuple[Any, Iterator[Any]]:
        """As mlx-lm's ResponseGenerator, but ends with the client or the server."""
        args.collect = self.collect
        self._stops = StopTexts(args.stop_words)
        self._generator.requests.put((self, request, args))
        context = self._next()
        return context, self._responses(progress_callback)

    def _responses(self, progress: Callable[[int, int], None] | None) -> Iterator[Any]:
        while (response := self._next()) is not None:
            if isinstance(response, tuple):
                if progress is not None:
                    progress(*response)
                continue
            self._numbers.token()
            if self.first_token_seconds is None:
                self.first_token_seconds = perf_counter() - self._began
            rest = self._stops.cut(response.text)
            if rest is not None:
                response.text = rest
                yield response
                return  # which mlx-lm's handler takes for a stop
            yield response

    def _next(self) -> Any:
        while True:
            self._check_client()
            try:
                item = self.get(timeout=_POLL_SECONDS)
            except Empty:
                continue
            if isinstance(item, Exception):
                raise item
            return item

    def _check_client(self) -> None:
        """A connection that can be read has more to say, which it should not, or was closed."""
        if self._poll.poll(0):
            try:
                there = self._connection.recv(1, socket.MSG_PEEK)
            except OSError:
                there = b""
            if not there:
                raise ClientGoneError("the client closed the connection")

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """What the generator's thread says."""
        if isinstance(item, GenerationContext):
            self._context = item
            self.prompt_tokens = len(item.prompt)
            if self.over:
                item.stop()
        elif isinstance(item, Response) and self._context is not None:
            self.cached_tokens = max(self._context.prompt_cache_count, 0)
        super().put(item, block, timeout)

    def stop(self) -> None:
        """The generator is to do no more for it."""
        self.over = True
        if self._context is not None:
            self._context.stop()

    def fail(self, error: Exception) -> None:
        """End it with an error instead of an answer."""
        self.stop()
        super().put(error)


class Runs:
    """All runs. At most `running` + `waiting` of them at a time."""

    def __init__(self, running: int, waiting: int):
        self.running, self.waiting = running, waiting
        self._under_way: set[Run] = set()
        self._changed = Condition()
        self._closed = False
        self._seconds = 1.0  # that a run takes, of late

    def __len__(self) -> int:
        return len(self._under_way)

    @contextmanager
    def admitted(self, run: Run) -> Iterator[Run]:
        """Let it run. RequestError 429 where there are too many, 503 after `close`."""
        with self._changed:
            if self._closed:
                raise shutting_down()
            if len(self._under_way) >= self.running + self.waiting:
                raise RequestError(
                    429,
                    f"{self.running + self.waiting} requests are under way: try again later",
                    code="queue_full",
                    retry_after=self._retry_after(),
                )
            self._under_way.add(run)
        began = perf_counter()
        try:
            yield run
        finally:
            run.stop()
            with self._changed:
                self._seconds += 0.2 * (perf_counter() - began - self._seconds)
                self._under_way.discard(run)
                self._changed.notify_all()

    def _retry_after(self) -> int:
        """Seconds until a place is free, about."""
        return min(max(math.ceil(self._seconds / self.running), 1), 60)

    def close(self) -> None:
        """Admit no more."""
        with self._changed:
            self._closed = True

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until none is under way, or `until` says so. Returns whether there is none."""
        end = perf_counter() + seconds
        with self._changed:
            while self._under_way and perf_counter() < end and not until():
                self._changed.wait(min(0.1, max(end - perf_counter(), 0)))
            return not self._under_way

    def fail(self, error: Exception) -> None:
        """End all of them with that error."""
        with self._changed:
            for run in self._under_way:
                run.fail(error)


def shutting_down() -> RequestError:
    """What requests are told that come, or are not finished, when the server ends."""
    return RequestError(503, "the server is shutting down", code="shutting_down")
