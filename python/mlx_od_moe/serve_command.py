"""`mlx-od-moe serve`: OpenAI's API over a model that does not fit in memory."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from threading import Event
from typing import Any

from .expert_store import parse_bytes
from .generate_command import add_model_flags, load_model
from .runtime import Runtime

KEY_VARIABLE = "MLX_OD_MOE_API_KEY"


def add_flags(flag: Any) -> None:
    """The command's flags, as mlx-lm spells them."""
    add_model_flags(flag)
    flag("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: other machines too")
    flag("--port", type=int, default=8080, help="0: any that is free")
    flag("--name", help="what the model is called in answers; default: its directory's name")
    flag("--max-tokens", type=int, default=4096, help="most tokens of one answer")
    flag("--max-request-bytes", default="1MiB", help="longest request")
    flag("--concurrency", type=int, default=4, help="answers that are generated at once")
    flag("--queue", type=int, default=16, help="requests that may wait beyond these; more get 429")
    flag("--prompt-cache", default="1GiB", help="memory for what earlier prompts left")
    flag("--temp", type=float, default=0.0, help="temperature, where a request names none")
    flag("--top-p", type=float, default=1.0, help="nucleus, where a request names none")
    flag("--api-key-file", help=f"file with a key per line; a key may be in ${KEY_VARIABLE} too")
    flag("--allowed-origins", nargs="+", default=[], help="web pages elsewhere that may ask")
    flag("--grace", type=float, default=30.0, help="seconds that SIGTERM lets requests finish in")
    flag("--collect", help="directory: record requests as traces for train (holds users' text)")
    flag("--collect-share", type=float, default=0.1, help="share of the requests to record")
    flag("--collect-tokens", type=int, default=50_000, help="tokens to record at most")
    flag("--log-level", choices=("debug", "info", "warning", "error"), default="info")


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C; then requests under way finish, and the status is 0."""
    from .server import Settings
    from .server.http_server import Listener

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("mlx_od_moe").setLevel(options.log_level.upper())
    settings = Settings(
        model=options.name or Path(options.model).resolve().name,
        max_tokens=options.max_tokens,
        max_request_bytes=parse_bytes(options.max_request_bytes),
        concurrency=options.concurrency,
        queue=options.queue,
        api_keys=api_keys(options.api_key_file),
        allowed_origins=tuple(options.allowed_origins),
        prompt_cache_bytes=parse_bytes(options.prompt_cache),
        temp=options.temp,
        top_p=options.top_p,
    )
    listener = Listener(options.host, options.port)
    try:
        model, tokenizer, runtime = load_model(options)
        with runtime:
            _serve(listener, model, tokenizer, runtime, settings, options)
    finally:
        listener.server_close()


def _serve(
    listener: Any,
    model: Any,
    tokenizer: Any,
    runtime: Runtime,
    settings: Any,
    options: argparse.Namespace,
) -> None:
    from .server import Server
    from .training.traffic_traces import TrafficTraces

    signals, collector = _Signals(), None
    if options.collect:
        collector = TrafficTraces(
            options.collect, model, runtime, options.collect_share, options.collect_tokens
        )
    try:
        recall = expected_recall(options.predictor)
        server = Server(listener, model, tokenizer, runtime, settings, collector, recall)
        _say(f"{settings.model} at http://{options.host}:{server.port}, see /dashboard")
        if not server.on_loopback and not settings.api_keys:
            _say(f"anyone who reaches {options.host} may ask: see --api-key-file")
        if collector:
            _say(f"{options.collect_share:.0%} of the requests are recorded in {options.collect}")
        signals.first.wait()
        _say(f"ending: requests under way have {options.grace:g} s; a second signal ends them now")
        finished = server.close(options.grace, signals.second.is_set)
        _say("ended" if finished else "ended; some requests were cut off")
    finally:
        if collector:
            collector.close()
    if options.save_usage:
        runtime.save_usage(options.save_usage)


class _Signals:
    """SIGTERM and Ctrl-C, which first ask and then urge."""

    def __init__(self) -> None:
        self.first, self.second = Event(), Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)

    def _heard(self, *_: object) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _say(text: str) -> None:
    print(f"mlx-od-moe serve: {text}", file=sys.stderr, flush=True)


def api_keys(path: str | None) -> tuple[str, ...]:
    """The keys of a file and of the environment. Raises ValueError for a file without keys."""
    keys = [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    if path is not None:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"[serve] {path} holds no API key: one per line")
        keys += found
    return tuple(keys)


def expected_recall(predictor: str | None) -> list[float]:
    """Recall@k by distance that validation measured; [] where the file does not say."""
    if predictor is None:
        return []
    from .predictor_bundle import PredictorBundle

    validation = PredictorBundle.load(predictor).training.get("validation", {})
    return [float(recall) for recall in validation.get("recall_at_k", [])]
