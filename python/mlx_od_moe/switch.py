"""The experts of one MoE layer, computed where the store keeps them.

mlx-lm's own SwitchGLU or SwitchMLP computes: with the store's pools in place of its parameters, and
with slot numbers in place of expert ids. Its sorting, activation and gather matmuls stay its own.
"""

from __future__ import annotations

from threading import Lock, get_ident
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from ._ext import ExpertLoan, GraphLeases, LeaseChain, PassObserver, is_computed
from .compute_threads import SORTED_FROM, Compute
from .expert_store import ExpertLease, ExpertStore
from .moe import MoELayer


class Uncomputed(NamedTuple):
    """An output that MLX may not have computed yet: its experts can't be evicted until then."""

    thread: int
    output: mx.array
    experts: frozenset[int]


class Sight(NamedTuple):
    """What an observer is told of a layer: without `hidden` only what was chosen."""

    observer: PassObserver
    step: int
    hidden: mx.array | None = None  # of one token
    sequence: int = 0


class Later(NamedTuple):
    """An output whose experts are not known yet."""

    output: mx.array
    loan: ExpertLoan


class StoredExperts:
    """Puts the store's pools into the experts' module of a layer, and computes with them.

    Raises ValueError where the file's parts are not the module's parameters.
    """

    def __init__(self, layer: MoELayer, store: ExpertStore):
        self.layer = layer.index
        self._store = store
        pools = store.pools(layer.index)
        _check_parts(layer, store)
        self._pools = list(pools.values())
        self._places = [_place(layer.experts, name) for name in pools]
        self._lock = Lock()
        self._uncomputed: list[Uncomputed] = []
        self._all: ExpertLease | None = None  # of a layer that is in memory as a whole
        self._slot_of: mx.array | None = None
        self._any = frozenset(range(layer.num_experts))
        self._leases = GraphLeases(store.native, layer.index)
        self._set(self._pools)

    def _set(self, arrays: list[mx.array]) -> None:
        for (module, name), array in zip(self._places, arrays, strict=True):
            module[name] = array

    def __call__(self, compute: Compute, x: mx.array, ids: NDArray[np.int32]) -> mx.array:
        """The outputs [..., top_k, hidden_size] of the experts `ids` [..., top_k] for x.

        `compute(x, slots)` is the module's own call. What fits the slots is lazy; more experts than
        that are computed in groups, each read once.
        """
        if len(np.unique(ids)) > self._store.slots(self.layer):
            return self._in_groups(compute, x, ids)
        later = self.later(compute, x, ids.shape)
        self.begin(later, ids)
        return later.output

    def later(self, compute: Compute, x: mx.array, shape: tuple[int, ...]) -> Later:
        """The same for ids of this shape that are not known yet: `begin` has to follow."""
        loan = ExpertLoan(self._pools, shape)
        return Later(self._built(loan, compute, x), loan)

    def begin(self, later: Later, ids: NDArray[np.int32]) -> None:
        """Wait for the experts and let the output be computed. Distinct ids must fit the slots."""
        experts = frozenset(ids.ravel().tolist())
        self._make_room(experts)
        lease = self._store.acquire(self.layer, ids)
        later.loan.begin(lease.native, lease.slots)
        self._uncomputed.append(Uncomputed(get_ident(), later.output, experts))

    @property
    def fit(self) -> bool:
        """Whether the layer has room for all of its experts."""
        return self._store.slots(self.layer) == self._store.file.num_experts(self.layer)

    def keep(self) -> None:
        """Read all experts, which must fit, for good."""
        self._all = self._store.acquire(self.layer, np.arange(self._store.slots(self.layer)))
        self._slot_of = mx.array(self._all.slots.view(np.uint32))

    @property
    def kept(self) -> bool:
        """Whether they are in memory for good. Then the store does not count `unwaited`."""
        return self._slot_of is not None

    def can_be_leased(self, pairs: int) -> bool:
        """Whether `leased` can compute so many token-expert pairs."""
        return mx.default_device() == mx.cpu and self.certainly_fit(pairs)

    def unwaited(self, compute: Compute, x: mx.array, indices: mx.array) -> mx.array:
        """The same, lazy, for `indices` that nobody knows yet, where all experts are kept."""
        assert self._slot_of is not None
        return compute(x, self._slot_of[indices])

    def leased(
        self, compute: Compute, x: mx.array, indices: mx.array, chain: LeaseChain, sight: Sight
    ) -> mx.array:
        """The same, lazy, for any `indices` that can be: MLX acquires the experts itself.

        `chain`: of the only thread that computes. `sight`: what is observed then.
        """
        self._make_room(self._any)
        lease = self._leases.begin(indices, chain, *sight)
        with self._lock:
            output = compute(x, lease.slots)
        return lease.end(output, chain)

    def certainly_fit(self, pairs: int) -> bool:
        """Whether so many token-expert pairs do, whatever their experts."""
        return pairs <= self._store.slots(self.layer)

    def settle(self) -> None:
        """Let go of outputs that are computed."""
        self._uncomputed = [u for u in self._uncomputed if not is_computed(u.output)]

    def _make_room(self, experts: frozenset[int]) -> None:
        """Compute what this thread has left uncomputed, where it holds slots that are needed now.

        No one else would: a forward pass that is not evaluated before the next one begins.
        """
        self.settle()
        own = [u for u in self._uncomputed if u.thread == get_ident()]
        if own and len(experts.union(*(u.experts for u in own))) > self._store.slots(self.layer):
            mx.eval([u.output for u in own])
            self.settle()

    def _built(self, loan: ExpertLoan, compute: Compute, x: mx.array) -> mx.array:
        """The lease ends when MLX has computed this, or nobody can ask for it any more."""
        with self._lock:
            self._set(loan.pools)
            try:
                return compute(x, loan.slots)
            finally:
                self._set(self._pools)

    def _in_groups(self, compute: Compute, x: mx.array, ids: NDArray[np.int32]) -> mx.array:
        """Each token-expert pair by itself: summed by the caller, in the order it always sums in.

        A group takes half of the slots, so that one is read while the other is computed.
        """
        rows = x.reshape(-1, x.shape[-1])
        outputs: list[mx.array] = []
        order: list[NDArray[np.int64]] = []
        for pairs in self._groups(ids.ravel()):
            mx.eval(outputs[-2:-1])  # what still held the slots that this group takes
            chosen = _padded(pairs, min(ids.size, SORTED_FROM))
            lease = self._store.acquire(self.layer, ids.ravel()[chosen, None])
            loan = ExpertLoan(self._pools, lease.slots.shape)
            output = self._built(loan, compute, rows[mx.array(chosen // ids.shape[-1])])
            loan.begin(lease.native, lease.slots)
            outputs.append(output[: len(pairs), 0])
            mx.async_eval(outputs[-1])  # type: ignore[no-untyped-call]
            order.append(pairs)
        places = np.empty(ids.size, np.uint32)
        places[np.concatenate(order)] = np.arange(ids.size, dtype=np.uint32)
        return mx.concatenate(outputs)[mx.array(places.reshape(ids.shape))]

    def _groups(self, ids: NDArray[np.int32]) -> list[NDArray[np.int64]]:
        """The pairs of each group.

        What is resident comes first, since reads will evict it; what is used most comes last, since
        it then stays.
        """
        experts, uses = np.unique(ids, return_counts=True)
        resident = np.isin(experts, self._store.resident(self.layer))
        rank = np.empty(len(experts), np.int64)
        rank[np.lexsort((uses, ~resident))] = np.arange(len(experts))
        group = rank[np.searchsorted(experts, ids)] // max(self._store.slots(self.layer) // 2, 1)
        order = np.argsort(group, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(group[order])) + 1)


def _padded(pairs: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """At least so many: a group is computed as the whole would be."""
    missing = max(least - len(pairs), 0)
    return np.concatenate([pairs, np.repeat(pairs[-1:], missing)])


def _place(experts: nn.Module, part: str) -> tuple[nn.Module, str]:
    *path, name = part.split(".")
    module: Any = experts
    for step in path:
        module = module[step]
    return module, name


def _check_parts(layer: MoELayer, store: ExpertStore) -> None:
    expected = {
        name: (array.shape[1:], array.dtype)
        for name, array in tree_flatten(layer.experts.parameters())
        if array.shape[:1] == (layer.num_experts,)
    }
    stored = {n: (p.shape[1:], p.dtype) for n, p in store.pools(layer.index).items()}
    if stored != expected:
        raise ValueError(
            f"[load] {store.file.path}: the experts of layer {layer.index} are stored as "
            f"{_described(stored)}, but {layer.path} computes with {_described(expected)}"
        )


def _described(parts: dict[str, tuple[tuple[int, ...], mx.Dtype]]) -> str:
    return ", ".join(f"{n} {list(shape)} {dtype}" for n, (shape, dtype) in sorted(parts.items()))
