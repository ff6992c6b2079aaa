"""The expert store against plain models: least recently used, and random operations."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import packed_experts
from mlx_od_moe import ExpertStore
from packed_experts import holds

LAYERS, EXPERTS = (2, 5), 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return packed_experts.write(tmp_path_factory.mktemp("packed"), LAYERS, EXPERTS)


def test_without_prefetch_it_is_least_recently_used_to_the_letter(folder):
    """Hits and what is resident, against an ordered dict."""
    random = np.random.default_rng(3)
    with ExpertStore(folder, 8 * packed_experts.EXPERT_BYTES) as store:
        resident: dict[int, None] = {}  # the least recently used first
        hits = 0
        for _ in range(3000):
            ids = random.choice(EXPERTS, random.integers(1, 4), replace=False)
            with store.acquire(2, ids):
                pass
            missing = [e for e in ids if e not in resident]
            hits += len(ids) - len(missing)
            for e in ids:
                if resident.pop(e, "absent") is None:
                    resident[e] = None
            for e in missing:
                if len(resident) == 4:
                    del resident[next(iter(resident))]
                resident[e] = None
            assert store.resident(2) == sorted(resident)
        assert store.counters()["hits"] == hits


class StoreModel(RuleBasedStateMachine):
    """The store against a plain model: who is leased, who must be resident, what was looked up."""

    folder: Path

    def __init__(self):
        super().__init__()
        self.store = ExpertStore(self.folder, 6 * packed_experts.EXPERT_BYTES, policy=self.policy)
        self.leases: list[tuple[int, list[int], object]] = []
        self.lookups: Counter[int] = Counter()
        self.step = 0

    operations = 0
    policy = "lru"
    layers = st.sampled_from(LAYERS)
    ids = st.lists(st.integers(0, EXPERTS - 1), max_size=5)

    def held(self, layer: int) -> set[int]:
        return {e for at, experts, _ in self.leases if at == layer for e in experts}

    @rule(layer=layers, ids=ids)
    def acquire(self, layer, ids):
        if len(set(ids)) > 3:
            with pytest.raises(ValueError, match="3 slots"):
                self.store.acquire(layer, ids)
        elif len(self.held(layer) | set(ids)) > 3:
            with pytest.raises(TimeoutError):
                self.store.acquire(layer, ids, timeout=0)
        else:
            lease = self.store.acquire(layer, ids)
            self.lookups[layer] += len(set(ids))
            self.leases.append((layer, ids, lease))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        _, _, lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        lease.release()

    @rule(layer=layers, ids=ids, ahead=st.integers(-1, 2), score=st.floats(0, 1, width=32))
    def prefetch(self, layer, ids, ahead, score):
        step = max(self.step + ahead, 0)
        taken = self.store.prefetch(layer, ids, [score] * len(ids), step)
        assert 0 <= taken <= (0 if step < self.step else len(set(ids) - self.held(layer)))

    @rule(ahead=st.integers(-1, 2))
    def cancel(self, ahead):
        self.store.cancel(max(self.step + ahead, 0))
        self.step = max(self.step, self.step + ahead)
        assert self.store.step == self.step

    @invariant()
    def leased_experts_are_where_they_were_and_counters_agree(self):
        type(self).operations += 1
        for layer, ids, lease in self.leases:
            slots = dict(zip(ids, lease.slots, strict=True))
            assert len(set(slots.values())) == len(slots)
            assert all(holds(self.store, layer, e, slot) for e, slot in slots.items())
        for layer, c in self.store.counters()["layers"].items():
            resident = set(self.store.resident(layer))
            assert self.held(layer) <= resident
            assert len(resident) <= 3
            assert c["lookups"] == self.lookups[layer] == c["hits"] + c["late"] + c["misses"]
            assert c["prefetched"] == c["useful"] + c["late"] + c["wasted"] + c["pending"]
            assert c["accepted"] == c["prefetched"] + c["overtaken"] + c["cancelled"] + c["queued"]
            assert c["failed_demands"] == c["failed_prefetches"] == 0

    def teardown(self):
        self.store.close()


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_random_operations(folder, policy):
    model = type("Model", (StoreModel,), {"folder": folder, "policy": policy})
    machine = model.TestCase
    machine.settings = settings(
        max_examples=150,
        stateful_step_count=100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    machine().runTest()
    assert model.operations >= 5000
