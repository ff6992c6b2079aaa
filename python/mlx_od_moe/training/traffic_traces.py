"""Traces of what a running model is asked: the same format that `collect` writes.

A sampled request runs alone, and what every MoE layer saw and chose is kept as the model computes;
nothing is computed for it. What a prompt cache held is not run again, so not recorded.
"""

from __future__ import annotations

import logging
import os
import random
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..durable_file import locked
from ..model_routers import read_routers, save_routers
from ..runtime import Runtime
from .model_traces import identify
from .plan import row_bytes
from .traces import (
    DECODE,
    PREFILL,
    ShardRows,
    check_shard,
    read_collection,
    shard_path,
    write_collection,
    write_shard,
)

log = logging.getLogger("mlx_od_moe")

LOOKAHEAD = 4
_WINDOW = 2048  # tokens of one request at most: its last
_SHARD_ROWS, _SHARD_BYTES = 4096, 256 << 20  # what is lost at most, and held in memory


class TrafficTraces:
    """Records a share of the requests of a model that runs from the store, up to a limit of tokens.

    `begin` and `end` are called on the thread that runs the model. An error, of the disk say, ends
    the recording, never a request. A directory that was begun for the same model is gone on with.

    Args:
        out: the trace directory.
        model, runtime: what mlx_od_moe.load returned.
        share: of the requests, 0 … 1.
        tokens: recorded at most, those that are there already among them.

    Raises ValueError for a directory of other traces, or one that another process writes to.
    """

    def __init__(
        self,
        out: str | Path,
        model: nn.Module,
        runtime: Runtime,
        share: float = 0.1,
        tokens: int = 50_000,
    ):
        if not 0 < share <= 1 or tokens < 1:
            raise ValueError(
                "[collect] share must be over 0 and up to 1, and tokens 1 or more; "
                f"got {share} and {tokens}"
            )
        self._out, self._runtime, self._share, self._tokens = Path(out), runtime, share, tokens
        self._out.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds what users wrote
        self._lock = locked(self._out)
        self._lock.__enter__()
        try:
            self._collection, self._recorded = self._begin(model)
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        self._failed = False
        self._shard = self._next_shard()
        self._document = self._shard << 16  # no number is used twice
        self._rows: ShardRows | None = None
        self._seen: dict[int, _Last] = {}
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def _begin(self, model: nn.Module) -> tuple[dict[str, Any], int]:
        """(collection.json's contents, tokens that are there)."""
        layers = self._runtime.layers
        own = identify(self._runtime.store.file.path) | {"mode": "traffic", "lookahead": LOOKAHEAD}
        if (self._out / "collection.json").exists():
            begun = read_collection(self._out)
            for name, value in own.items():
                if begun.get(name) != value:
                    raise ValueError(
                        f"[collect] {self._out} was begun with {name}={begun.get(name)!r}, so "
                        f"{value!r} is not possible: use another directory"
                    )
            return begun, sum(check_shard(s, begun) for s in self._out.glob("shard-*.npz"))
        if any(self._out.glob("shard-*.npz")):
            raise ValueError(f"[collect] {self._out} holds shards but no collection.json: not ours")
        states: list[int] = []
        self._runtime.on_routing = lambda layer, hidden, ids: states.append(hidden.shape[-1])
        try:
            routers = read_routers(model, moe_layers=layers)
        finally:
            self._runtime.on_routing = None
        save_routers(self._out / "routers.safetensors", routers)
        collection = own | {
            "moe_layers": [layer.index for layer in layers],
            "num_experts": max(layer.num_experts for layer in layers),
            "top_k": max(layer.top_k for layer in layers),
            "hidden_size": states[0],
            "tokens": self._tokens,
            "window": _WINDOW,
            "seed": 0,
        }
        write_collection(self._out, collection)
        return collection, 0

    def _next_shard(self) -> int:
        numbers = [int(path.stem.partition("-")[2]) for path in self._out.glob("shard-*.npz")]
        return max(numbers, default=-1) + 1

    def wants(self) -> bool:
        """Whether the next request is to be recorded: drawn by chance."""
        full = self._recorded >= self._tokens
        return not full and not self._failed and random.random() < self._share

    def counts(self) -> dict[str, int]:
        """`tokens` recorded so far, and the `limit`."""
        return {"tokens": self._recorded, "limit": self._tokens}

    def begin(self) -> None:
        """What the model computes from now on is one request's."""
        self._seen = {}
        self._runtime.on_routing = self._see

    def _see(self, layer: int, hidden: mx.array, ids: NDArray[np.int32]) -> None:
        state = np.array(hidden.astype(mx.float32)).reshape(-1, hidden.shape[-1])
        chosen = np.where(ids < self._collection["num_experts"], ids, -1)
        self._seen.setdefault(layer, _Last()).add(state, chosen.reshape(-1, ids.shape[-1]))

    def end(self, token_ids: list[int], prompt: int) -> None:
        """The request's tokens that the model was given, the first `prompt` of them its prompt."""
        self._runtime.on_routing = None
        seen, self._seen = self._seen, {}
        layers = self._collection["moe_layers"]
        count = min([len(token_ids), *(seen[n].total if n in seen else 0 for n in layers)])
        if not count or self._failed:
            return
        try:
            self._keep(token_ids, prompt, count, {n: seen[n] for n in layers})
        except (OSError, ValueError):
            log.exception("recording ends")
            self._failed = True

    def _keep(self, token_ids: list[int], prompt: int, count: int, seen: dict[int, _Last]) -> None:
        # Layers may differ by a pass that was broken off: all have seen the first `count`.
        first = max(last.first for last in seen.values())
        rows = {layer: last.rows(first, count) for layer, last in seen.items()}
        at = 0
        while at < count - first and self._recorded < self._tokens:
            shard = self._open_shard()
            cut = slice(at, at + min(shard.room, self._tokens - self._recorded))
            ids = np.array(token_ids[first:count], np.int32)[cut]
            phase = np.where(np.arange(first, count) < prompt, PREFILL, DECODE)[cut]
            states = {layer: state[cut] for layer, (state, _) in rows.items()}
            experts = {layer: chosen[cut] for layer, (_, chosen) in rows.items()}
            shard.add(ids, self._document, phase, states, experts)
            at += len(ids)
            self._recorded += len(ids)
            if not shard.room:
                self._write()
        self._document += 1

    def _open_shard(self) -> ShardRows:
        if self._rows is None:
            most = _SHARD_BYTES // row_bytes(self._collection)
            self._rows = ShardRows(max(1, min(most, _SHARD_ROWS)), self._collection)
        return self._rows

    def _write(self) -> None:
        if self._writing is not None:
            self._writing.result()
        if self._rows is not None and self._rows.rows:
            path = shard_path(self._out, self._shard)
            self._writing = self._writer.submit(_write, path, self._rows)
            self._shard += 1
        self._rows = None

    def close(self) -> None:
        """Write what is recorded. Raises OSError where that can't be."""
        self._runtime.on_routing = None
        try:
            if not self._failed:
                self._write()
            if self._writing is not None:
                self._writing.result()
        finally:
            self._writer.shutdown()
            self._lock.__exit__(None, None, None)


def _write(path: Path, rows: ShardRows) -> None:
    write_shard(path, rows.arrays())
    os.chmod(path, 0o600)


class _Last:
    """The last passes that a layer has seen, with _WINDOW rows or up to a pass more."""

    def __init__(self) -> None:
        self._passes: list[tuple[NDArray[np.float32], NDArray[np.int32]]] = []
        self.first = self.total = 0

    def add(self, states: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        """Rows [n, hidden_size] and [n, top_k]."""
        self._passes.append((states, ids))
        self.total += len(states)
        while self.total - self.first - len(self._passes[0][0]) >= _WINDOW:
            self.first += len(self._passes.pop(0)[0])

    def rows(self, first: int, end: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """(states, ids) of the tokens from `first` to `end`."""
        part = slice(first - self.first, end - self.first)
        states, ids = zip(*self._passes, strict=True)
        return np.concatenate(states)[part], np.concatenate(ids)[part]
