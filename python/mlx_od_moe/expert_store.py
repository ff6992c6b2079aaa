"""A model's experts in limited memory: what the router chose on demand, what is predicted ahead."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from . import _ext
from .expert_file import ExpertFile

# What MLX has no type for is held as its bits: 8-bit floats as uint8.
_DTYPES = {
    "F64": mx.float64,
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U64": mx.uint64,
    "U32": mx.uint32,
    "U16": mx.uint16,
    "I64": mx.int64,
    "I32": mx.int32,
    "I16": mx.int16,
    "I8": mx.int8,
    "BOOL": mx.bool_,
}


def pool_dtype(dtype: str) -> mx.Dtype:
    """What a part of that dtype, as safetensors names it, is held as."""
    return _DTYPES.get(dtype, mx.uint8)


_SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_SCALES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NUMBER = r"(?P<number>\d+(\.\d*)?)"
_BYTES = re.compile(_NUMBER + r"\s*((?P<percent>%)|(?P<prefix>[KMGT])(?P<i>i?)B|B?)", re.IGNORECASE)
_LATENCY = re.compile(_NUMBER + r"\s*(?P<unit>ns|us|µs|ms|s)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_bytes(text: str | int, whole: int | None = None) -> int:
    """The bytes that 1000, "8GB" (10⁹), "8GiB" (2³⁰) or, of `whole`, "25%" stands for.

    Raises ValueError where it is none of these, or is not positive.
    """
    match = _BYTES.fullmatch(str(text).strip())
    value = 0.0
    if match and (match["percent"] is None or whole is not None):
        prefix, scales = match["prefix"] or "", _BINARY_SCALES if match["i"] else _SCALES
        scale = (whole or 0) / 100 if match["percent"] else scales[prefix.upper()]
        value = float(match["number"]) * scale
    if value < 1:
        share = ', or a share like "25%"' if whole is not None else ""
        raise ValueError(
            f'[ExpertStore] bytes are written as 1000, "8GB" or "8GiB"{share}; got {text!r}'
        )
    return int(value)


def parse_disk(text: str) -> tuple[float, float]:
    """(bytes per second, seconds of latency) of a disk model like "500MB/s,100us"."""
    bandwidth, _, latency = text.partition(",")
    match = _LATENCY.fullmatch(latency.strip() or "0s")
    if not match or not bandwidth.strip().endswith("/s"):
        raise ValueError(
            f'[ExpertStore] a disk is written as "500MB/s,100us" or "500MB/s"; got {text!r}'
        )
    return float(parse_bytes(bandwidth.strip()[:-2])), float(match["number"]) * _SECONDS[
        match["unit"]
    ]


def all_expert_bytes(file: ExpertFile) -> int:
    """Of all experts of all layers."""
    return sum(file.expert_bytes(n) * file.num_experts(n) for n in file.layers)


def equal_slots(file: ExpertFile, capacity: str | int, top_k: int) -> dict[int, int]:
    """{layer: slots}, as many for each as fit in the capacity. ValueError for less than top_k."""
    given = parse_bytes(capacity, all_expert_bytes(file))
    return dict(zip(file.layers, _ext.partition_slots(file.native, given, top_k), strict=True))


class ExpertLease:
    """Experts that stay where they are until `release`, or the end of a `with`.

    `slots`: where each id that was acquired lies in the layer's pools, int32, of the ids' shape.
    """

    __slots__ = ("native", "slots")

    def __init__(self, native: Any, slots: npt.NDArray[np.int32]):
        self.native = native
        self.slots = slots

    def release(self) -> None:
        """Allow the experts to be evicted again. Twice is once."""
        self.native.release()

    def __enter__(self) -> ExpertLease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release it."""
        self.release()


class ExpertStore:
    """Holds as many of a model's routed experts as fit, and reads the others from disk.

    Each layer has slots, and each part of its experts ("gate_proj.weight" …) a pool: an mx.array
    [slots, *shape of the part], which expert ids are mapped into. `acquire` what the router chose;
    `prefetch` what a predictor expects. MLX reads pools when it evaluates: keep a lease until what
    was computed from its slots has been evaluated.

    Any thread may call any method. After os.fork() the child must open another store: its calls
    raise RuntimeError. Waiting releases the GIL, and Ctrl-C ends it.

    Args:
        file: an ExpertFile, or the path of its directory.
        capacity: of all slots together: "25%" of the experts' bytes, "8GB", "8GiB", or bytes. Slots
            are as many for each layer. ValueError naming the least where it is too little.
        policy: who makes room: one of `_ext.eviction_policies()`.
        readers: threads that read; all but one of them prefetch.
        direct_io: pass the system's page cache by.
        verify: compare each expert's checksum (packed directories have them).
        disk: delay reads as a disk like "500MB/s,100us" would, for measurements.
        top_k: the experts that one token needs, for which each layer must have slots.
        slots: {layer: how many experts it may hold}, for all layers, in place of `capacity`.
        prefetch_bytes: that may be in flight or not used yet; default: half of the capacity.

    Raises OSError where the system refuses something.
    """

    def __init__(
        self,
        file: ExpertFile | str | os.PathLike[str],
        capacity: str | int = "25%",
        policy: str = "lru",
        readers: int = 2,
        direct_io: bool = False,
        verify: bool = False,
        disk: str | None = None,
        *,
        top_k: int = 1,
        slots: Mapping[int, int] | None = None,
        prefetch_bytes: str | int | None = None,
    ):
        self.file = file if isinstance(file, ExpertFile) else ExpertFile(file)
        self.layers = self.file.layers
        whole = all_expert_bytes(self.file)
        self._slots = dict(slots or equal_slots(self.file, capacity, top_k))
        if list(self._slots) != self.layers:
            raise ValueError(
                f"[ExpertStore] slots must be those of layers {self.layers}, got {[*self._slots]}"
            )
        self._pools = {layer: self._new_pools(layer, n) for layer, n in self._slots.items()}
        self.native = _ext.ExpertStore(
            self.file.native,
            list(self._slots.values()),
            [list(pools.values()) for pools in self._pools.values()],
            policy,
            readers,
            direct_io,
            verify,
            parse_disk(disk) if disk is not None else None,
            parse_bytes(prefetch_bytes, whole) if prefetch_bytes is not None else 0,
        )

    def _new_pools(self, layer: int, slots: int) -> dict[str, mx.array]:
        return {
            part.name: _ext.new_pool([slots, *part.shape], pool_dtype(part.dtype))
            for part in self.file.parts(layer)
        }

    def slots(self, layer: int) -> int:
        """How many experts of the layer fit. KeyError where it has none."""
        return self._slots[layer]

    def pools(self, layer: int) -> dict[str, mx.array]:
        """The layer's memory by part: evaluated arrays [slots, *shape of the part], read in place.

        What lies in a slot that is not leased has no meaning. Do not write to them.
        """
        return self._pools[layer]

    def expert_bytes(self, layer: int) -> int:
        """The bytes of one expert of the layer."""
        return self.file.expert_bytes(layer)

    @property
    def capacity_bytes(self) -> int:
        """The bytes of all slots."""
        return sum(self.expert_bytes(layer) * slots for layer, slots in self._slots.items())

    def acquire(self, layer: int, ids: npt.ArrayLike, timeout: float | None = None) -> ExpertLease:
        """Lease the experts of these ids [...], once all of them are resident.

        What is missing is read at once. Equal ids share a slot; distinct ones may be no more than
        the layer has slots (ValueError). Raises OSError naming layer, expert, file and offset where
        one can't be read (a later call tries again), and TimeoutError after `timeout` seconds. A
        thread that holds leases of a layer may wait for its own slots.
        """
        wanted = _int32(ids)
        slots = np.empty(wanted.shape, np.int32)
        return ExpertLease(self.native.acquire(layer, wanted, slots, timeout), slots)

    def prefetch(
        self,
        layer: int,
        ids: npt.ArrayLike,
        scores: npt.ArrayLike | None = None,
        step: int | None = None,
    ) -> int:
        """Queue experts that the layer will probably use in that step; returns at once.

        Args:
            layer: the layer.
            ids: its experts.
            scores: their probabilities: likelier ones are read first; default: 1.
            step: the forward pass they are for; default: the current. Older ones take none. Step
                and layer are the deadline: soon layers first, counted in layers, not by a clock.

        Returns how many are now queued that were not. An acquire of the layer drops what is still
        queued for its step.
        """
        given = None if scores is None else np.ascontiguousarray(scores, np.float32)
        return int(self.native.prefetch(layer, _int32(ids), given, step))

    def cancel(self, step: int) -> None:
        """Begin a step: what is queued for earlier ones is dropped. Steps never go back."""
        self.native.cancel(step)

    @property
    def step(self) -> int:
        """The current step."""
        return int(self.native.step)

    def resident(self, layer: int) -> list[int]:
        """The experts of the layer that are in memory, ascending."""
        return list(self.native.resident(layer))

    def counters(self) -> dict[str, Any]:
        """Counts since opening, in all and under "layers" for each; see store_counters.h.

        lookups == hits + late + misses; prefetched == useful + late + wasted + pending.
        """
        return dict(self.native.counters())

    def prometheus(self) -> str:
        """The counters of each layer in Prometheus' text format: what a server's /metrics has."""
        from .store_metrics import store_text

        return store_text(self.counters()["layers"])

    def close(self) -> None:
        """End the readers. Who waits gets RuntimeError. Twice is once."""
        self.native.close()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def _int32(ids: npt.ArrayLike) -> npt.NDArray[np.int32]:
    array = np.asarray(ids)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"[ExpertStore] expert ids must be integers, got {array.dtype}")
    return np.asarray(array, np.int32, order="C")
