"""The server as a whole: its socket, its threads, and how it ends."""

from __future__ import annotations

import errno
import json
import logging
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from http.server import ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from socketserver import TCPServer
from threading import BoundedSemaphore, Thread
from types import TracebackType
from typing import Any

import mlx.nn as nn
from mlx_lm.server import get_system_fingerprint

from ..runtime import Runtime
from .generator import Collector, Generator, StoredModel
from .handler import Handler
from .metrics_page import Numbers
from .monitor import Monitor
from .request_checks import Limits
from .runs import Runs, shutting_down
from .settings import Settings

log = logging.getLogger("mlx_od_moe")

_LOOPBACK = ("127.", "::1")
_SPARE_CONNECTIONS = 64  # beyond those of requests under way: pages, and what will be refused


class Listener(ThreadingHTTPServer):
    """A bound port, which refuses connections until `serve` is called.

    Raises OSError naming host and port where it can't be had.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int):
        self._connections = BoundedSemaphore(1)
        try:
            if not 0 <= port < 1 << 16:
                raise OSError("a port is 0 … 65535")
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, _, _, _, address = found[0]
            super().__init__((str(address[0]), int(address[1])), Handler, bind_and_activate=False)
            self.server_bind()
        except OSError as error:
            raise _unusable(host, port, error) from error
        self._host = host

    def server_bind(self) -> None:
        """Without asking for the host's full name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = (
            str(self.server_address[0]),
            int(self.server_address[1]),
        )

    def serve(self, handler: Callable[..., Any], connections: int) -> None:
        """Accept connections, on a thread of its own."""
        self.RequestHandlerClass = handler
        self._connections = BoundedSemaphore(connections)
        try:
            self.server_activate()
        except OSError as error:
            raise _unusable(self._host, self.server_port, error) from error
        Thread(target=self.serve_forever, args=(0.1,), name="listener", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Turn away what would be one thread too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke before it asked for anything."""
        log.debug("connection of %s", client_address, exc_info=True)


def _unusable(host: str, port: int, error: Exception) -> OSError:
    used = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    why = "another process uses it: choose another --port" if used else str(error)
    return OSError(f"[serve] can't listen at {host}:{port}: {why}")


class Server:
    """A loaded model that answers at a listener's port. Close it, or use it in a `with`.

    Args:
        listener: the port.
        model, tokenizer, runtime: what mlx_od_moe.load returned; they stay the caller's.
        settings: its limits.
        collector: what records requests; None: nothing does.
        expected_recall: recall@k of the predictor by distance, as validation measured it.
    """

    def __init__(
        self,
        listener: Listener,
        model: nn.Module,
        tokenizer: Any,
        runtime: Runtime,
        settings: Settings,
        collector: Collector | None = None,
        expected_recall: Sequence[float] = (),
    ):
        self.settings, self._listener, self._collector = settings, listener, collector
        self.created = int(time.time())
        config = _config(runtime)
        vocabulary = config.get("vocab_size") or tokenizer.vocab_size
        self.limits = Limits(settings.model, settings.max_tokens, int(vocabulary))
        self.runs = Runs(settings.concurrency, settings.queue)
        self.numbers = Numbers(runtime, self.runs, expected_recall)
        self.monitor = Monitor(runtime, self.runs, self.numbers, settings.model, expected_recall)
        if collector is not None:
            self.monitor.collected = collector.counts
        self.dashboard = (files(__package__) / "dashboard.html").read_bytes()
        provider = StoredModel(model, tokenizer, settings)
        length = config.get("max_position_embeddings")
        self.generator = Generator(provider, self.runs, length, collector)
        handler = partial(Handler, self, system_fingerprint=get_system_fingerprint())
        try:
            connections = settings.concurrency + settings.queue + _SPARE_CONNECTIONS
            listener.serve(handler, connections)
        except BaseException:
            self.generator.stop_and_join()
            self.monitor.close()
            raise

    @property
    def port(self) -> int:
        """The port that it answers at."""
        return self._listener.server_port

    @property
    def on_loopback(self) -> bool:
        """Whether other machines can't reach it."""
        return str(self._listener.server_address[0]).startswith(_LOOPBACK)

    @property
    def healthy(self) -> bool:
        """Whether it generates."""
        return bool(self.generator.is_healthy)

    def collects(self) -> bool:
        """Whether the next request is to be recorded."""
        return self._collector is not None and self._collector.wants()

    def close(self, grace: float = 30.0, hurry: Callable[[], bool] = lambda: False) -> bool:
        """Take no more requests, let those under way finish for `grace` seconds, end the rest.

        `hurry` ends the wait early. Returns whether all were finished. Twice is once.
        """
        self.runs.close()
        finished = self.runs.wait(grace, hurry)
        self._listener.shutdown()
        self._listener.server_close()
        self.runs.fail(shutting_down())
        self.runs.wait(5.0)
        self.generator.stop_and_join()
        self.monitor.close()
        return finished

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it at once."""
        self.close(grace=0)


def _config(runtime: Runtime) -> dict[str, Any]:
    path = Path(runtime.store.file.path) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    return dict(config | (config.get("text_config") or {}))
