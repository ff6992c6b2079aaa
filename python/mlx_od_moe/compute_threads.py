"""The experts of one call, computed on several CPU threads: MLX runs a stream's operations on one.

Each pair of a token and an expert is computed by itself, so that the parts' outputs are bit for bit
those of the whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import mlx.core as mx

Compute = Callable[[mx.array, mx.array], mx.array]
# From so many token-expert pairs on mlx-lm sorts them, and its matmuls then take another path with
# another rounding.
SORTED_FROM = 64
# More gave no clear gain on a machine with 16 CPUs.
MOST = 2


class ComputeThreads:
    """How many CPU threads compute a call's experts; a GPU computes them as a whole.

    Args:
        threads: 1: as mlx-lm does; None: as many as this process may use CPUs, at most MOST.

    Raises ValueError for less than 1.
    """

    def __init__(self, threads: int | None = None):
        if threads is None:
            threads = min(_cpus(), MOST)
        if threads < 1:
            raise ValueError(f"[load] threads must be 1 or more, got {threads}")
        self._others = [mx.new_thread_local_stream(mx.cpu) for _ in range(threads - 1)]

    def spread(self, compute: Compute) -> Compute:
        """`compute(x, ids)`, ids [..., k] and its output [..., k, hidden_size], in parts of k."""

        def parts(x: mx.array, ids: mx.array) -> mx.array:
            count = self._parts(ids)
            if count == 1:
                return compute(x, ids)
            k = ids.shape[-1]
            ends = [k * (i + 1) // count for i in range(count)]
            outputs = [compute(x, ids[..., : ends[0]])]
            for stream, begin, end in zip(self._others, ends, ends[1:], strict=False):
                with mx.stream(stream):
                    outputs.append(compute(x, ids[..., begin:end]))
            return mx.concatenate(outputs, axis=-2)

        return parts

    def _parts(self, ids: mx.array) -> int:
        k, count = ids.shape[-1], min(len(self._others) + 1, ids.shape[-1])
        if mx.default_device() != mx.cpu:
            return 1
        if ids.size >= SORTED_FROM:  # all parts must take the path that the whole would
            while count > 1 and k // count * (ids.size // k) < SORTED_FROM:
                count -= 1
        return count


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
