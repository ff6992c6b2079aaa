"""What the expert store's calls cost in Python.

    pytest benchmarks/bench_expert_store.py --benchmark-enable

bench_expert_store.cpp measures the same calls without Python, and reads beside plain pread.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_od_moe import ExpertStore

EXPERTS = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    (folder / "layer0").write_bytes(bytes(EXPERTS * 4096))
    part = {"name": "up_proj.weight", "dtype": "U32", "shape": [32, 32]}
    layer = {"layer": 0, "file": "layer0", "num_experts": EXPERTS, "block_bytes": 4096}
    layer |= {"parts": [part], "checksums": [0] * EXPERTS}
    manifest = {"format": "mlx-od-moe-experts", "version": 1, "alignment": 4096, "layers": [layer]}
    (folder / "experts.json").write_text(json.dumps(manifest))
    with ExpertStore(folder, "50%") as s:
        yield s


@pytest.mark.parametrize("count", [1, 8, 32])
def test_acquire_residents(benchmark, store, count):
    ids = np.arange(count, dtype=np.int32)
    store.acquire(0, ids).release()
    benchmark(lambda: store.acquire(0, ids).release())


def test_prefetch_residents(benchmark, store):
    ids = np.arange(8, dtype=np.int32)
    scores = np.full(8, 0.5, np.float32)
    store.acquire(0, ids).release()
    benchmark(store.prefetch, 0, ids, scores)


def test_acquire_absent(benchmark, store):
    """One expert of 4 KiB, from the page cache."""
    ids = iter(np.tile(np.arange(EXPERTS, dtype=np.int32), 1000))
    benchmark.pedantic(lambda: store.acquire(0, [next(ids)]).release(), rounds=2000)
