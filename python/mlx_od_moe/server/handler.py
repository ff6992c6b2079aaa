"""One connection: mlx-lm's handler behind checks, and the pages of this server."""

from __future__ import annotations

import hmac
import io
import json
import logging
import sys
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlx_lm.server import APIHandler

from .request_checks import RequestError, check, parse_body
from .runs import ClientGoneError, Run

if TYPE_CHECKING:
    from .http_server import Server

log = logging.getLogger("mlx_od_moe")

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_DRAINED_BYTES = 16 << 20  # of a body that is refused, so that its sender gets to read why
_COMPLETIONS = {"/v1/completions": False, "/v1/chat/completions": True, "/chat/completions": True}


class Handler(APIHandler):
    """Answers one request.

    mlx-lm's handler computes and words the completions. What it refuses, or fails to do, becomes
    an error in OpenAI's form.
    """

    path: str
    timeout = 60  # seconds that a client may take to send, or to read, the next bytes
    server_version = "mlx-od-moe"

    def __init__(self, serving: Server, *args: Any, **kwargs: Any):
        self._serving = serving
        self._status = 0
        self._sent_headers = False
        self._unread = 0
        self.stream = False
        super().__init__(serving.generator, *args, **kwargs)

    def do_GET(self) -> None:  # noqa: N802
        """A page."""
        self._answer(self._get)

    def do_POST(self) -> None:  # noqa: N802
        """A completion."""
        self._answer(self._post)

    def do_OPTIONS(self) -> None:  # noqa: N802
        """What a page of another origin may ask."""
        self._answer(super().do_OPTIONS)

    def _answer(self, answer: Callable[[], None]) -> None:
        began = perf_counter()
        path = urlsplit(self.path).path
        try:
            self._check_origin()
            answer()
        except (ConnectionError, TimeoutError):
            self._status = 499  # as nginx counts clients that left
            self.close_connection = True
        except RequestError as error:
            self._refuse(error)
        except Exception:
            log.exception("%s failed", path)
            self._refuse(RequestError(500, "the server failed; its log says why"))
        known = path if path in _COMPLETIONS or path in self._pages() else "other"
        self._serving.numbers.answered(known, self._status, perf_counter() - began)

    def _pages(self) -> dict[str, Callable[[], None]]:
        return {
            "/health": self.handle_health_check,
            "/v1/models": self.handle_models_request,
            "/metrics": self._metrics,
            "/dashboard": self._dashboard,
            "/dashboard/data": self._data,
        }

    def _get(self) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        pages = self._pages()
        if path == f"/v1/models/{self._serving.settings.model}":
            path = "/v1/models"
        if path not in pages:
            raise RequestError(404, f"there is no {path}")
        # A page without figures, and a sign of life, are everybody's.
        if path not in ("/health", "/dashboard"):
            self._check_key()
        pages[path]()

    def _post(self) -> None:
        self.path = urlsplit(self.path).path
        if self.path not in _COMPLETIONS:
            raise RequestError(404, f"there is no {self.path} to POST to")
        body = self._body()
        serving = self._serving
        check(body, serving.limits, chat=_COMPLETIONS[self.path])
        body["model"] = serving.settings.model
        if "stream_options" in body:
            body["stream_options"] = {"include_usage": False} | body["stream_options"]
        raw = json.dumps(body).encode()
        self.headers.replace_header("Content-Length", str(len(raw)))
        self.rfile = io.BytesIO(raw)
        # `store` is OpenAI's word for it.
        collect = body.get("store") is not False and serving.collects()
        run = Run(serving.generator, self.connection, collect, serving.numbers)
        with serving.runs.admitted(run):
            self.response_generator = run
            try:
                super().do_POST()
            finally:
                serving.numbers.ran(run)

    def _body(self) -> dict[str, Any]:
        most = self._serving.settings.max_request_bytes
        text = self.headers.get("Content-Length")
        if text is None:
            raise RequestError(411, "a request needs a Content-Length")
        if not (text.isascii() and text.isdigit()):
            raise RequestError(400, f"Content-Length must be a number of bytes, got {text!r}")
        self._unread = int(text)
        self._check_key()
        if self._unread > most:
            raise RequestError(
                413, f"a body may have {most} bytes, got {text}", code="request_too_large"
            )
        raw = self.rfile.read(self._unread)
        if len(raw) < self._unread:
            raise ClientGoneError("the body ends early")
        self._unread = 0
        return parse_body(raw)

    def _check_key(self) -> None:
        keys = self._serving.settings.api_keys
        if not keys:
            return
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        found = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
        if scheme.lower() != "bearer" or not any(found):
            raise RequestError(
                401,
                "this server needs an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    def _check_origin(self) -> None:
        """A web page of elsewhere may not use what runs on its reader's machine.

        It would come with its own Origin or, through a name that it had pointed here, its own Host.
        """
        host = self.headers.get("Host", "")
        name = urlsplit(f"//{host}").hostname
        if self._serving.on_loopback and name is not None and name not in _LOOPBACK:
            raise RequestError(403, f"this server is not called {name!r}")
        origin = self.headers.get("Origin")
        allowed = self._serving.settings.allowed_origins
        own = origin is not None and urlsplit(origin).netloc == host
        if origin is not None and not own and not {"*", origin} & set(allowed):
            raise RequestError(403, f"pages of {origin} may not ask this server")

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """Where mlx-lm's handler begins to say what is wrong, the error is said in our form."""
        if status_code < 400:
            super()._set_completion_headers(status_code)
            return
        cause = sys.exc_info()[1]
        if cause is None:
            raise RequestError(status_code, "mlx-lm's server refuses the request")
        # 404 is what it calls all that goes wrong in generation.
        if isinstance(cause, RequestError | ConnectionError) or status_code == 404:
            raise cause
        raise RequestError(status_code, str(cause)) from cause

    def _refuse(self, error: RequestError) -> None:
        body = json.dumps(error.body())
        try:
            if self._sent_headers:
                # In mid-stream, where OpenAI's clients look for it.
                if self.stream:
                    self.wfile.write(f"data: {body}\n\n".encode())
                return
            self._headers_buffer: list[bytes] = []
            self.send_response(error.status)
            if error.retry_after is not None:
                self.send_header("Retry-After", str(error.retry_after))
            if error.status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self._send("application/json", body.encode())
            self._drain()
        except OSError:
            pass
        finally:
            self.close_connection = True

    def _drain(self) -> None:
        """Take what is still being sent: closed on unread bytes, a connection loses the answer."""
        left = min(self._unread, _DRAINED_BYTES)
        self.connection.settimeout(2)
        while left > 0 and (data := self.rfile.read1(min(left, 1 << 16))):
            left -= len(data)

    def _send(self, kind: str, body: bytes) -> None:
        """The rest of an answer, after its status."""
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self._set_cors_headers()
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def _page(self, kind: str, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self._send(kind, body)

    def _json(self, value: Any) -> None:
        self._page("application/json", json.dumps(value).encode())

    def handle_models_request(self) -> None:
        """The one model; mlx-lm's server lists all that were ever downloaded."""
        entry = {
            "id": self._serving.settings.model,
            "object": "model",
            "created": self._serving.created,
            "owned_by": "mlx-od-moe",
        }
        one = self.path.rstrip("/") != "/v1/models"
        self._json(entry if one else {"object": "list", "data": [entry]})

    def handle_health_check(self) -> None:
        """200 while requests are answered."""
        if not self._serving.healthy:
            raise RequestError(503, "the server does not generate")
        self._json({"status": "ok", "model": self._serving.settings.model})

    def _metrics(self) -> None:
        text, kind = self._serving.numbers.page(self.headers.get("Accept", ""))
        self._page(kind, text)

    def _dashboard(self) -> None:
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "connect-src 'self'; frame-ancestors 'none'"
        )
        page = self._serving.dashboard
        self._page("text/html; charset=utf-8", page, Content_Security_Policy=policy)

    def _data(self) -> None:
        self._json(self._serving.monitor.page())

    def send_response(self, code: int, message: str | None = None) -> None:
        """Remember what was answered."""
        self._status = int(code)
        super().send_response(code, message)

    def end_headers(self) -> None:
        """Remember that nothing can be taken back."""
        super().end_headers()
        self._sent_headers = True

    def log_message(self, format: str, *args: Any) -> None:
        """To the package's log, without the query."""
        log.debug("%s %s", self.address_string(), format % args)
