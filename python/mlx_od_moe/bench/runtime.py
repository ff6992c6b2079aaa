"""A whole model decoding: in memory, from the store with and without prefetch, and with an oracle.

All decode the same text after the same prompt, in turns. Reads are delayed as a disk would, so that
the figures are not of this machine's disk and page cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from .. import INSTALL_DIR
from ..offload import load
from ..progress import progress_bar
from ..route_recorder import RouteRecorder
from ..runtime import Runtime

NANO = INSTALL_DIR / "examples" / "nano-moe"
ROWS = {
    "stock": "mlx-lm, all in memory",
    "lazy": "mlx-lm, loaded lazily: each weight is read whole at its first use, and stays",
    "resident": "store, all experts resident",
    "lru": "store, lru, no prefetch",
    "no prefetch": "store, no prefetch",
    "prefetch": "store, prefetch",
    "oracle": "store, prefetch of the recorded routes of the next layers",
}
LOOKAHEAD = 4


def add_flags(flag: Callable[..., Any]) -> None:
    """The bench's flags."""
    flag("--model", default=str(NANO), help="model directory")
    flag("--predictor", help="file that train wrote; without it there is no such row")
    flag("--capacity", default="25%", help="memory for experts")
    flag("--policy", default="lrfu", help="who makes room, in all rows but lru")
    flag(
        "--disk",
        default="auto",
        help="like 500MB/s,100us; auto: one at which the row lru waits for half of its time; none",
    )
    flag("--threads", type=int, help="CPU threads that compute a call's experts (default: 2)")
    flag("--readers", type=int, default=2, help="threads that read; all but one of them prefetch")
    flag("--text", default=str(NANO / "text" / "docs_en.val.txt"), help="what is decoded")
    flag("--prompt-tokens", type=int, default=32)
    flag("--tokens", type=int, default=48, help="decoded in each turn")
    flag("--rounds", type=int, default=5, help="turns of each row")
    flag("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    flag("--guarded", action="store_true", help="let the guard switch prediction off")


class Oracle:
    """Prefetches what the next layers of the same token will choose, as was recorded before."""

    def __init__(self, runtime: Runtime):
        self._store = runtime.store
        self._routes = np.empty((0, 0, 0), np.int16)
        self._token = 0
        runtime.on_routing = self._routed

    def begin(self, routes: np.ndarray[Any, Any]) -> None:
        """The tokens of these routes [tokens, layers, top_k] come now."""
        self._routes, self._token = routes, 0

    def _routed(self, layer: int, hidden: Any, ids: np.ndarray[Any, Any]) -> None:
        layers, tokens = self._store.layers, ids.size // ids.shape[-1]
        at = layers.index(layer)
        if tokens == 1 and self._token < len(self._routes):
            for ahead in range(1, min(LOOKAHEAD, len(layers) - 1 - at) + 1):
                chosen = self._routes[self._token, at + ahead]
                self._store.prefetch(layers[at + ahead], chosen.astype(np.int32))
        if at == len(layers) - 1:
            self._token += tokens


@dataclass
class Row:
    """One way to run the model, and what its turns were like."""

    model: Any
    runtime: Runtime | None = None
    oracle: Oracle | None = None
    seconds: list[float] = field(default_factory=list)  # per token
    reports: list[dict[str, Any]] = field(default_factory=list)

    def turn(self, text: list[int], prompt: int, routes: np.ndarray[Any, Any]) -> float:
        """Decode the text after the prompt; what each token is, is known. Seconds per token.

        As mlx-lm generates: a token's graph is built while the one before is computed.
        """
        from mlx_lm.models.cache import make_prompt_cache

        if self.oracle:
            self.oracle.begin(routes)
        cache = make_prompt_cache(self.model)
        mx.eval(self.model(mx.array([text[:prompt]]), cache=cache))
        since = self.runtime.snapshot() if self.runtime else None
        start = perf_counter()
        before: list[mx.array] = []
        for token in text[prompt:]:
            logits = self.model(mx.array([[token]]), cache=cache)
            mx.async_eval(logits)  # type: ignore[no-untyped-call]
            mx.eval(before)
            before = [logits]
        mx.eval(before)
        seconds = (perf_counter() - start) / (len(text) - prompt)
        if self.runtime:
            self.reports.append(self.runtime.report(since))
        return seconds

    def result(self) -> dict[str, Any]:
        """Medians over the turns."""
        out: dict[str, Any] = {
            "tokens_per_second": 1 / median(self.seconds),
            "seconds_per_token": self.seconds,
        }
        for name in ("hit_rate", "stall_per_token", "bytes_per_token"):
            if self.reports:
                out[name] = median(r[name] for r in self.reports)
        if self.reports:
            counts = [r["store"] for r in self.reports]
            used = sum(c["useful"] + c["late"] for c in counts)
            out["wasted_per_useful"] = sum(c["wasted"] for c in counts) / max(used, 1)
            out["late"] = sum(c["late"] for c in counts) / sum(c["lookups"] for c in counts)
            prediction = self.reports[-1]["prediction"]
            out["recall_at_k"], out["off"] = prediction["recall_at_k"], prediction["off"]
            out["predictor_latency_us"] = prediction["runner"].get("latency_p50_us")
        return out


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the rows."""
    disk = None if options.disk == "none" else options.disk
    if disk == "auto":
        disk = _fair_disk(options)
        print(f"disk: {disk}")
    with ExitStack() as stack:
        recording, tokenizer, runtime = load(options.model, capacity="100%")
        stack.enter_context(runtime)
        texts = _texts(tokenizer, options)
        rows = _open(options, disk, stack)
        _measure(rows, (Row(recording, runtime), runtime), texts, options.prompt_tokens)
        result = {name: row.result() for name, row in rows.items()}
        layers = len(runtime.layers)
    _print(result, layers)
    return {"model": options.model, "disk": disk, "layers": layers, "rows": result}


def _texts(tokenizer: Any, options: argparse.Namespace) -> list[list[int]]:
    """One for each round, and the first to warm up with."""
    length, count = options.prompt_tokens + options.tokens, options.rounds + 1
    ids = tokenizer.encode(Path(options.text).read_text(encoding="utf-8")[: 16 * length * count])
    if len(ids) < length * count:
        raise ValueError(f"[bench] {options.text} is too short for {length * count} tokens")
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def _open(options: argparse.Namespace, disk: str | None, stack: ExitStack) -> dict[str, Row]:
    from mlx_lm.utils import load as load_stock

    rows: dict[str, Row] = {}
    for name in options.rows:
        if name in ("stock", "lazy"):
            rows[name] = Row(load_stock(options.model, lazy=name == "lazy")[0])
            continue
        if name == "prefetch" and not options.predictor:
            continue
        settings: dict[str, Any] = {"capacity": options.capacity, "disk": disk}
        if name == "resident":
            settings = {"capacity": "100%"}
        settings |= {"readers": options.readers, "threads": options.threads}
        settings["policy"] = "lru" if name == "lru" else options.policy
        if name == "prefetch":
            settings |= {"predictor": options.predictor, "guarded": options.guarded}
        ours = rows["prefetch"].runtime if "prefetch" in rows else None
        if name == "oracle" and ours:  # it differs in what is predicted, and in nothing else
            settings["slots"] = {n: ours.store.slots(n) for n in ours.store.layers}
        model, _, runtime = load(options.model, **settings)
        stack.enter_context(runtime)
        rows[name] = Row(model, runtime, Oracle(runtime) if name == "oracle" else None)
    return rows


def _measure(
    rows: dict[str, Row], recording: tuple[Row, Runtime], texts: list[list[int]], prompt: int
) -> None:
    recorded, runtime = recording
    bar = progress_bar(len(texts) * len(rows), "decoding", "turn", shown=True)
    for i, text in enumerate(texts):
        recorder = RouteRecorder(runtime.store.layers)
        runtime.on_routing = recorder.record
        recorded.turn(text, prompt, recorder.experts())
        for row in _in_turns(rows, i):
            seconds = row.turn(text, prompt, recorder.experts())
            bar.update()
            if i:  # the first round warms up
                row.seconds.append(seconds)
            else:
                row.reports.clear()
    bar.close()


def _in_turns(rows: dict[str, Row], i: int) -> Iterator[Row]:
    """All rows, another one first each time."""
    values = list(rows.values())
    yield from (values[(i + j) % len(values)] for j in range(len(values)))


def _fair_disk(options: argparse.Namespace) -> str:
    """The bandwidth at which lru without prefetch waits as long as it computes."""
    model, tokenizer, runtime = load(
        options.model, None, options.capacity, "lru", threads=options.threads
    )
    with runtime:
        row = Row(model, runtime)
        turns = [
            row.turn(text, options.prompt_tokens, np.empty((0, 0, 0)))
            for text in _texts(tokenizer, options)[:3]
        ]
    computing = median(
        seconds - report["stall_per_token"]
        for seconds, report in zip(turns[1:], row.reports[1:], strict=True)
    )
    read = median(report["bytes_per_token"] for report in row.reports[1:])
    return f"{max(read, 1) / computing / 1e6:.4f}MB/s"


def _print(result: dict[str, dict[str, Any]], layers: int) -> None:
    print(f"{'':14}{'tokens/s':>9}{'stall':>10}{'hit rate':>10}{'read':>12}{'wasted':>8}  what")
    for name, r in result.items():
        line = f"{name:14}{r['tokens_per_second']:9.2f}"
        if "hit_rate" in r:
            line += f"{r['stall_per_token'] * 1e3:7.2f} ms{r['hit_rate']:10.3f}"
            line += f"{r['bytes_per_token'] / 1e6:9.3f} MB{r['wasted_per_useful']:8.2f}"
        else:
            line += f"{'':40}"
        print(f"{line}  {ROWS[name]}")
    speed = {name: r["tokens_per_second"] for name, r in result.items()}
    if {"stock", "resident"} <= speed.keys():
        overhead = (1 / speed["resident"] - 1 / speed["stock"]) / layers
        share = speed["stock"] / speed["resident"] - 1
        print(f"all resident: {overhead * 1e6:.0f} us a layer over mlx-lm's own ({share:.1%})")
    if "lru" in result:
        waits = result["lru"]["stall_per_token"] * speed["lru"]
        print(f"lru waits for {waits:.0%} of its time")
    for other in ("lru", "no prefetch", "oracle"):
        if {"prefetch", other} <= speed.keys():
            print(f"prefetch: {speed['prefetch'] / speed[other]:.2f} of {other}")
