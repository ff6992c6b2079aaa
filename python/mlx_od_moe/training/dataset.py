"""Recorded traces as training and evaluation samples of one MoE layer.

Nothing needs the whole data set in memory: shards are read in groups that fit `memory_bytes`. What
comes depends only on the traces; in which order, on the seed and on `memory_bytes` too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..model_routers import LayerRouter
from .losses import Teacher, log_probs
from .traces import TraceInfo

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """n tokens at one layer.

    hidden_states: float16 [n, hidden_size], the MoE block's input.
    chosen: int16 [n, lookahead, top_k], the experts of the target layers.
    previous: the same of the previous token of the sequence; -1 at its first.
    routed: int16 [n, top_k], this layer's own experts.
    taught: float16 [n, lookahead, num_experts] by the target layers' routers, or [n, 0, 0].
    """

    hidden_states: Array
    chosen: Array
    previous: Array
    routed: Array
    taught: Array

    def __len__(self) -> int:
        return len(self.hidden_states)

    def take(self, rows: Array | slice) -> Samples:
        """Those rows, in that order."""
        return Samples(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def batches(self, batch_size: int) -> Iterator[Samples]:
        """Cut into batches, the last one as small as it comes."""
        return (self.take(slice(i, i + batch_size)) for i in range(0, len(self), batch_size))

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take, in bytes."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))


def split_documents(
    traces: TraceInfo, validation_fraction: float, seed: int
) -> tuple[set[int], set[int]]:
    """Training and validation documents; no document is in both.

    Raises ValueError where the traces hold fewer than two documents.
    """
    documents = np.unique(np.concatenate([read_array(s, "document") for s in traces.shards]))
    if len(documents) < 2:
        raise ValueError(
            f"[{traces.path}] a split by document needs at least 2 documents, got {len(documents)}"
        )
    count = min(max(1, round(validation_fraction * len(documents))), len(documents) - 1)
    shuffled = np.random.default_rng([seed, len(documents)]).permutation(documents)
    return set(map(int, shuffled[count:])), set(map(int, shuffled[:count]))


class LayerDataset:
    """The samples of one MoE layer that belong to `documents` (None: to any).

    Args:
        traces: what `open_traces` returned.
        layer: index of the MoE layer, as in the model.
        documents: ids of the documents to read.
        routers: {layer: its router}; given, `taught` is filled with what `teacher` makes of them.
        memory_bytes: how much decoded data is held at once, roughly.
    """

    def __init__(
        self,
        traces: TraceInfo,
        layer: int,
        documents: set[int] | None = None,
        routers: Mapping[int, LayerRouter] | None = None,
        memory_bytes: int = 1 << 30,
        teacher: Teacher | None = log_probs,
    ):
        if layer not in traces.recorded_layers:
            raise ValueError(
                f"[{traces.path}] has no states of layer {layer}, only of {traces.recorded_layers}"
            )
        after = traces.moe_layers[traces.moe_layers.index(layer) + 1 :]
        self.traces, self.layer = traces, layer
        self.targets = after[: traces.lookahead]
        self._documents = None if documents is None else np.array(sorted(documents))
        self._routers, self._teacher, self._memory_bytes = routers, teacher, memory_bytes

    def __len__(self) -> int:
        """Number of samples."""
        if self._documents is None:
            return self.traces.samples
        counts = [self._of_split(read_array(s, "document")).sum() for s in self.traces.shards]
        return int(sum(counts))

    def _of_split(self, document: Array) -> Array:
        return np.isin(document, [] if self._documents is None else self._documents)

    @cached_property
    def _whole(self) -> Samples | None:
        """Everything, where it fits the memory; None where it must be streamed."""
        parts, size = [], 0
        for path in self.traces.shards:
            part = self._read(path)
            size += part.nbytes
            if size > self._memory_bytes:
                return None
            parts.append(part)
        return _concatenate(parts)

    def groups(self, rng: np.random.Generator | None = None) -> Iterator[Samples]:
        """All samples once, in groups that fit the memory, of shards that `rng` puts in order."""
        if self._whole is not None:
            yield self._whole
            return
        order = self.traces.shards
        if rng is not None:
            order = tuple(order[i] for i in rng.permutation(len(order)))
        parts: list[Samples] = []
        for path in order:
            parts.append(self._read(path))
            if sum(part.nbytes for part in parts) + parts[-1].nbytes > self._memory_bytes:
                yield _concatenate(parts)
                parts = []
        if parts:
            yield _concatenate(parts)

    def batches(self, batch_size: int, rng: np.random.Generator | None = None) -> Iterator[Samples]:
        """All samples once, in batches; each group of them shuffled by `rng`."""
        for group in self.groups(rng):
            if rng is None:
                yield from group.batches(batch_size)
                continue
            order = rng.permutation(len(group))
            for i in range(0, len(group), batch_size):
                yield group.take(order[i : i + batch_size])

    def _read(self, shard: Path) -> Samples:
        ahead = len(self.targets)
        chosen = read_array(shard, f"expert_choices_{self.layer}")[:, :ahead]
        document, position = read_array(shard, "document"), read_array(shard, "position")
        previous = np.full_like(chosen, -1)
        follows = np.flatnonzero(position[1:] > 0) + 1
        previous[follows] = chosen[follows - 1]
        states = read_states(shard, self.layer)
        routed = read_array(shard, f"routed_experts_{self.layer}")
        samples = Samples(states, chosen, previous, routed, self._taught(shard, len(states)))
        if self._documents is None:
            return samples
        return samples.take(np.flatnonzero(self._of_split(document)))

    def _taught(self, shard: Path, rows: int) -> Array:
        if self._routers is None or self._teacher is None:
            return np.empty((rows, 0, 0), np.float16)
        parts = []
        for target in self.targets:
            states = mx.array(read_states(shard, target)).astype(mx.float32)
            taught = self._teacher(self._routers[target].router, states, self.traces.top_k)
            parts.append(np.array(taught.astype(mx.float16)))
        return np.stack(parts, axis=1)


def read_array(shard: Path, name: str) -> Array:
    """One array of a shard. Raises ValueError naming the file where it cannot be read."""
    try:
        with np.load(shard) as archive:
            array: Array = archive[name]
            return array
    except Exception as error:
        raise ValueError(f"[{shard}] {name} cannot be read: {error}") from error


def read_states(shard: Path, layer: int) -> Array:
    """A layer's states of a shard. Raises ValueError naming the file where they are not finite."""
    states = read_array(shard, f"hidden_states_{layer}")
    if not np.isfinite(states).all():
        raise ValueError(f"[{shard}] hidden_states_{layer} hold NaN or infinity")
    return states


def _concatenate(parts: list[Samples]) -> Samples:
    if len(parts) == 1:
        return parts[0]
    return Samples(
        **{f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Samples)}
    )
