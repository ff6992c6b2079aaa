"""Recorded traces as blocks of tokens in order, with the states of several layers at once.

What reads earlier tokens needs them beside each token. A block is `size` tokens and the `before`
rows that precede them, of whatever sequences lie there; `sequence` says which each belongs to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .dataset import read_array, read_states
from .stored_states import LoadedStates, StoredStates
from .traces import TraceInfo

Array = npt.NDArray[Any]
T = TypeVar("T")
_READERS = 2
_NOWHERE = -1  # the sequence of rows that are not there


@dataclass(frozen=True)
class Block:
    """A batch of blocks.

    states: {layer: [batch, before + size, hidden_size]}, in the `dtype` that was asked for.
    routed: {layer: int [batch, size, top_k]}, the layer's own experts.
    sequence: int [batch, before + size].
    """

    states: dict[int, mx.array]
    routed: dict[int, Array]
    sequence: mx.array
    before: int

    def own_states(self, layer: int) -> mx.array:
        """The tokens' states without the rows before them, [batch, size, hidden_size]."""
        return mx.contiguous(self.states[layer][:, self.before :])

    def chosen(self, targets: Sequence[int]) -> Array:
        """The experts of the target layers, int [batch * size, targets, top_k]."""
        routed = np.stack([self.routed[target] for target in targets], axis=2)
        return routed.reshape(-1, *routed.shape[2:])

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True)
class _Part:
    """Tokens of one shard: row `rows[i]` of `states` is token i's, `routed` and `sequence` [i]."""

    states: StoredStates | LoadedStates
    rows: Array
    routed: dict[int, Array]
    sequence: Array

    @property
    def nbytes(self) -> int:
        """In memory."""
        loaded = self.states.states if isinstance(self.states, LoadedStates) else {}
        return sum(a.nbytes for a in (*loaded.values(), *self.routed.values()))


@dataclass(frozen=True)
class _Rows:
    """Tokens of shards, with `before` empty rows in front: part i's are from ends[i] to [i + 1]."""

    parts: list[_Part]
    ends: list[int]
    sequence: Array

    def read(self, start: int, states: Mapping[int, Array], routed: Mapping[int, Array]) -> None:
        """Fill {layer: zeros [n, hidden_size]}, {layer: zeros [n, top_k]} from row `start` on."""
        end = start + len(next(iter(routed.values())))
        for part, (begins, ends) in zip(self.parts, pairwise(self.ends), strict=True):
            first, last = max(start, begins), min(end, ends)
            if first >= last:
                continue
            own, here = slice(first - begins, last - begins), slice(first - start, last - start)
            part.states.read(part.rows[own], {n: to[here] for n, to in states.items()})
            for layer, to in routed.items():
                to[here] = part.routed[layer][own]


class SequenceBlocks:
    """The tokens of `documents` (None: all) in blocks, with the states of `layers`.

    States that shards store as they are stay on disk until a block needs them. Others are unpacked
    in groups of roughly `memory_bytes`, and kept where all fit. `dtype`: of a block's states, which
    are recorded in float16.
    """

    def __init__(
        self,
        traces: TraceInfo,
        layers: Sequence[int],
        before: int,
        documents: set[int] | None = None,
        memory_bytes: int = 1 << 30,
        dtype: mx.Dtype = mx.float32,
    ):
        self.traces, self.layers, self.before = traces, list(layers), before
        self.dtype = dtype
        self._documents = None if documents is None else np.array(sorted(documents))
        self._memory_bytes = memory_bytes
        self._tokens = [int(self._wanted(shard).sum()) for shard in traces.shards]
        self._stored = [StoredStates.find(shard, self.layers) for shard in traces.shards]

    def __len__(self) -> int:
        """Number of tokens."""
        return sum(self._tokens)

    def batches(self, size: int, batch: int, rng: np.random.Generator) -> Iterator[Block]:
        """Batches of blocks in random order, cut at a random phase: nearly every token once."""
        for rows in self._groups(rng):
            tokens = len(rows.sequence) - self.before
            phase = int(rng.integers(min(size, max(1, tokens - size + 1))))
            starts = np.arange(phase, max(1, tokens - size + 1), size)
            parts = np.array_split(rng.permutation(starts), -(-len(starts) // batch))
            yield from self._blocks(rows, parts, min(size, tokens))
            del rows  # before the next are read

    def in_order(self, size: int = 4096) -> Iterator[Block]:
        """Every token once, in order, in batches of one block."""
        for rows in self._groups(None):
            tokens = len(rows.sequence) - self.before
            whole = [np.array([start]) for start in range(0, tokens - size + 1, size)]
            yield from self._blocks(rows, whole, size)
            if rest := tokens % size:
                yield from self._blocks(rows, [np.array([tokens - rest])], rest)
            del rows

    def _blocks(self, rows: _Rows, parts: Sequence[Array], size: int) -> Iterator[Block]:
        """A block of each part's starts; the next is read while one is worked on."""
        with ThreadPoolExecutor(_READERS) as pool:
            read = [partial(self._read_block, rows, starts, size) for starts in parts]
            for states, routed, sequence in _ahead(pool, read):
                yield Block(
                    {n: mx.array(blocks).astype(self.dtype) for n, blocks in states.items()},
                    {layer: experts[:, self.before :] for layer, experts in routed.items()},
                    mx.array(sequence),
                    self.before,
                )

    def _read_block(
        self, rows: _Rows, starts: Array, size: int
    ) -> tuple[dict[int, Array], dict[int, Array], Array]:
        index = starts[:, None] + np.arange(self.before + size)
        states, routed = (
            {layer: np.zeros((*index.shape, width), dtype) for layer in self.layers}
            for width, dtype in (
                (self.traces.hidden_size, np.float16),
                (self.traces.top_k, np.int16),
            )
        )
        for i, start in enumerate(starts):
            rows.read(int(start), *({n: a[i] for n, a in of.items()} for of in (states, routed)))
        return states, routed, rows.sequence[index]

    @property
    def _shards(self) -> list[int]:
        return [i for i, tokens in enumerate(self._tokens) if tokens]

    @cached_property
    def _whole(self) -> _Rows | None:
        """Everything, where it fits the memory; None where it must be streamed."""
        loaded = sum(
            tokens * 2 * (self.traces.top_k + (0 if stored else self.traces.hidden_size))
            for tokens, stored in zip(self._tokens, self._stored, strict=True)
        )
        if loaded * len(self.layers) > self._memory_bytes:
            return None
        return self._joined([*self._parts(self._shards)])

    def _groups(self, rng: np.random.Generator | None) -> Iterator[_Rows]:
        if self._whole is not None:
            yield self._whole
            return
        shards = self._shards
        if rng is not None:
            shards = [shards[i] for i in rng.permutation(len(shards))]
        parts: list[_Part] = []
        for part in self._parts(shards):
            parts.append(part)
            if sum(part.nbytes for part in parts) + parts[-1].nbytes > self._memory_bytes:
                yield self._joined(parts)
                parts = []
        if parts:
            yield self._joined(parts)

    def _parts(self, shards: Sequence[int]) -> Iterator[_Part]:
        """Those shards, in that order; some are read ahead, since unpacking them takes a core."""
        with ThreadPoolExecutor(_READERS) as pool:
            yield from _ahead(pool, [partial(self._read, shard) for shard in shards])

    def _wanted(self, shard: Any) -> Array:
        document = read_array(shard, "document")
        if self._documents is None:
            return np.ones(len(document), bool)
        return np.isin(document, self._documents)

    def _read(self, index: int) -> _Part:
        shard = self.traces.shards[index]
        wanted = np.flatnonzero(self._wanted(shard))
        starts = np.cumsum(read_array(shard, "position") == 0)
        routed = {n: read_array(shard, f"routed_experts_{n}")[wanted] for n in self.layers}
        stored = self._stored[index]
        if stored is not None:
            return _Part(stored, wanted, routed, starts[wanted])
        loaded = LoadedStates({n: read_states(shard, n)[wanted] for n in self.layers})
        return _Part(loaded, np.arange(len(wanted)), routed, starts[wanted])

    def _joined(self, parts: list[_Part]) -> _Rows:
        """One after the other, each sequence with a number of its own."""
        sequences, first, ends = [np.full(self.before, _NOWHERE)], 0, [self.before]
        for part in parts:
            sequences.append(part.sequence + first)
            first += int(part.sequence[-1]) + 1
            ends.append(ends[-1] + len(part.rows))
        return _Rows(parts, ends, np.concatenate(sequences).astype(np.int32))


def _ahead(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    """Their results, in order; some are under way while one is used."""
    under_way: deque[Future[T]] = deque()
    for call in calls:
        under_way.append(pool.submit(call))
        if len(under_way) > _READERS:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
