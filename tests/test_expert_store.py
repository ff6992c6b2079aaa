"""The expert store: its C++ tests, also under sanitizers, its Python face, and a model of it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import packed_experts
from mlx_od_moe import ExpertStore
from mlx_od_moe.expert_file import ExpertFile
from mlx_od_moe.expert_store import parse_bytes, parse_disk
from packed_experts import bytes_in, holds
from test_cpp import ADDRESS, RELEASE, THREAD, build, run

LAYERS, EXPERTS = (2, 5), 8


@pytest.mark.timeout(900)
@pytest.mark.parametrize("configuration", [RELEASE, ADDRESS, THREAD], ids=lambda c: c[0])
def test_cpp(configuration):
    run(str(build(*configuration, target="store_tests")), TSAN_OPTIONS="halt_on_error=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return packed_experts.write(tmp_path_factory.mktemp("packed"), LAYERS, EXPERTS)


@pytest.fixture
def store(folder):
    with ExpertStore(folder, capacity=8 * packed_experts.EXPERT_BYTES) as s:
        yield s


def test_slots_are_places_in_the_pools(store):
    assert store.layers == list(LAYERS)
    assert store.slots(2) == 4
    assert store.capacity_bytes == 8 * store.expert_bytes(2)
    pools = store.pools(5)
    assert {n: (p.shape, p.dtype) for n, p in pools.items()} == {
        "up_proj.weight": ((4, 6, 8), mx.uint32),
        "up_proj.scales": ((4, 6, 2), mx.bfloat16),
    }
    ids = np.array([[7, 0], [3, 7]])
    with store.acquire(5, ids) as lease:
        assert lease.slots.dtype == np.int32
        assert lease.slots.shape == (2, 2)
        assert lease.slots[0, 0] == lease.slots[1, 1]
        for expert, slot in zip(ids.ravel(), lease.slots.ravel(), strict=True):
            assert holds(store, 5, expert, slot)
    assert store.resident(5) == [0, 3, 7]
    assert store.resident(2) == []


def test_products_with_pools_are_those_with_all_experts(store):
    """A gather of rows by slot gives what one by expert gives, though pools change in between."""
    for ids in ([1, 4], [6, 2], [0, 1], [5, 7, 3]):
        with store.acquire(2, ids) as lease:
            pool = store.pools(2)["up_proj.weight"]
            got = np.array(mx.take(pool, mx.array(lease.slots), axis=0))
        want = [store.file.read(2, expert)["up_proj.weight"] for expert in ids]
        assert np.array_equal(got, np.stack(want))


@pytest.mark.parametrize("ids", [5, [5], (5,), np.uint8([5]), np.int64([[5]]), []])
def test_ids_may_be_anything_of_integers(store, ids):
    with store.acquire(2, ids) as lease:
        assert lease.slots.shape == np.shape(ids)


@pytest.mark.parametrize("parts", [packed_experts.PARTS, packed_experts.ALIGNED])
def test_direct_reads_bring_the_same_bytes(tmp_path, parts):
    packed_experts.write(tmp_path, LAYERS, EXPERTS, parts)
    try:
        store = ExpertStore(tmp_path, "50%", direct_io=True, verify=True)
    except OSError as error:
        pytest.skip(f"no direct I/O here: {error}")
    size = store.expert_bytes(5)
    with store:
        for ids in ([3, 1, 7], [0, 6], [5]):
            with store.acquire(5, ids) as lease:
                for expert, slot in zip(ids, lease.slots, strict=True):
                    want = packed_experts.content(5, expert, size)
                    assert np.array_equal(bytes_in(store, 5, slot), want)


def test_prefetch_and_counters(store):
    assert store.prefetch(2, [3, 4], scores=[0.9, 0.1]) == 2
    assert store.prefetch(2, [3]) == 0
    deadline = time.monotonic() + 20
    while store.resident(2) != [3, 4] and time.monotonic() < deadline:
        time.sleep(0.001)
    with store.acquire(2, [3, 5]):
        pass
    found = store.counters()
    assert found["lookups"] == 2
    assert found["useful"] == found["pending"] == found["misses"] == 1
    assert found["prefetch_bytes"] == 2 * store.expert_bytes(2)
    assert found["non_resident_recall"] == 0.5
    assert found["layers"][5]["lookups"] == 0
    assert found["layers"][2]["lookups"] == 2


def test_steps(store):
    assert store.step == 0
    store.cancel(3)
    assert store.step == 3
    assert store.prefetch(2, [1], step=2) == 0
    assert store.prefetch(2, [1], step=3) == 1
    assert store.prefetch(2, [2]) == 1


def test_prometheus_text(store):
    with store.acquire(5, [1, 2]):
        pass
    families = {f.name: f for f in text_string_to_metric_families(store.prometheus())}
    assert all(name.startswith("mlx_od_moe_store_") for name in families)
    found = {
        (
            sample.name.removeprefix("mlx_od_moe_store_"),
            *sorted(sample.labels.values()),
        ): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert found["lookups_total", "5"] == 2
    assert found["lookups_total", "2"] == 0
    assert found["read_bytes_total", "5", "demand"] == 2 * packed_experts.EXPERT_BYTES
    gauges = {"queued", "pending", "non_resident_recall"}
    apart = {"demand_bytes", "prefetch_bytes", "stall_ns"}  # by cause, and in seconds
    for layer, counts in store.counters()["layers"].items():
        plain = counts.keys() - gauges - apart
        assert all(found[f"{name}_total", str(layer)] == counts[name] for name in plain)
        assert all(found[name, str(layer)] == counts[name] for name in gauges)
        assert found["stall_seconds_total", str(layer)] == counts["stall_ns"] / 1e9
    assert all(families[f"mlx_od_moe_store_{name}"].type == "gauge" for name in gauges)
    assert sum(f.type == "counter" for f in families.values()) == len(plain) + 2


def test_wrong_use(store, folder):
    with pytest.raises(ValueError, match="layer 3 has no experts"):
        store.acquire(3, [0])
    with pytest.raises(ValueError, match=r"expert ids must be 0 \.\.\. 7, got 8"):
        store.acquire(2, [8])
    with pytest.raises(ValueError, match=r"4 slots, but one call asks for 5 experts"):
        store.acquire(2, range(5))
    with pytest.raises(TypeError, match="must be integers, got float64"):
        store.acquire(2, [0.5])
    with pytest.raises(ValueError, match=r"at least 2592 bytes, 6 of the experts"):
        ExpertStore(folder, capacity=2591, top_k=6)
    with pytest.raises(ValueError, match="policy"):
        ExpertStore(folder, policy="random")
    with pytest.raises(ValueError, match=r'a share like "25%"; got \'a lot\''):
        ExpertStore(folder, capacity="a lot")


def test_quantities():
    assert parse_bytes("8GB") == 8 * 10**9
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    assert parse_bytes("25%", whole=1000) == 250
    assert parse_bytes(77) == 77
    assert parse_disk("500MB/s,100us") == (5e8, pytest.approx(1e-4))
    assert parse_disk("2GB/s") == (2e9, 0)
    for text in ("25%", "0", "-3", "8XB", "1.2.3GB", ""):
        with pytest.raises(ValueError, match="bytes are written as"):
            parse_bytes(text)
    for text in ("500MB", "5MB/s,3", "GB/s,1us"):
        with pytest.raises(ValueError, match=r"(are|is) written as"):
            parse_disk(text)


def test_waiting_for_a_slot_releases_the_gil_and_ends_with_the_lease(store):
    lease = store.acquire(2, [0, 1, 2, 3])
    with pytest.raises(TimeoutError):
        store.acquire(2, [4], timeout=0.02)
    threading.Timer(0.05, lease.release).start()  # could not run if the GIL were held
    with store.acquire(2, [4, 5]) as other:
        assert holds(store, 2, 5, other.slots[1])


def test_a_failed_demand_is_an_os_error(tmp_path):
    packed_experts.write(tmp_path, LAYERS, EXPERTS)
    with ExpertStore(tmp_path, "50%") as store:
        with store.acquire(5, [0]):
            pass
        file = tmp_path / "layer5.experts"
        os.truncate(file, 4096)
        with pytest.raises(OSError, match=r"layer 5, expert 6, .* at 24576: ") as caught:
            store.acquire(5, [6])
        assert caught.value.filename == str(file)
        assert caught.value.errno
        with store.acquire(2, [6]) as lease:
            assert holds(store, 2, 6, lease.slots[0])


def test_a_wrong_checksum_is_an_os_error(tmp_path):
    packed_experts.write(tmp_path, LAYERS, EXPERTS)
    with (tmp_path / "layer2.experts").open("r+b") as file:
        file.seek(3 * 4096 + 5)
        byte = file.read(1)
        file.seek(3 * 4096 + 5)
        file.write(bytes([byte[0] ^ 1]))
    with ExpertStore(tmp_path, "50%", verify=True) as store:
        with pytest.raises(OSError, match=r"layer 2, expert 3.*CRC-32C"):
            store.acquire(2, [3])
        with store.acquire(2, [4]) as lease:
            assert holds(store, 2, 4, lease.slots[0])


def test_closed(folder):
    store = ExpertStore(folder, "50%")
    lease = store.acquire(2, [1])
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="is closed"):
        store.acquire(2, [1])
    assert holds(store, 2, 1, lease.slots[0])
    lease.release()


def test_pools_outlive_the_store(folder):
    store = ExpertStore(folder, "50%")
    slot = store.acquire(2, [1]).slots[0]
    pool = store.pools(2)["up_proj.weight"]
    file = store.file
    del store
    assert np.array_equal(np.array(pool[int(slot)]), file.read(2, 1)["up_proj.weight"])


RSS = """
import sys
from pathlib import Path
import numpy as np
from mlx_od_moe import ExpertStore
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
with ExpertStore(sys.argv[1], 2**25, readers=2) as warm:   # threads, code and tables are there
    before = peak()
    for i in range(600):
        for layer in warm.layers:
            warm.prefetch(layer, [(i * 7 + 3) % 32, (i * 5) % 32])
            with warm.acquire(layer, [i % 32, i * 11 % 32]):
                pass
    assert warm.counters()["evicted"] > 500
    print(peak() - before, warm.capacity_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_within_the_capacity(tmp_path):
    """96 MiB of experts through 30; the margin is 4 MiB, for readers and Python."""
    experts = mx.random.normal((32, 256, 512))
    tensors = {
        f"model.layers.{layer}.mlp.switch_mlp.{name}_proj.weight": experts
        for layer in (0, 1)
        for name in ("gate", "up", "down")
    }
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors, {"format": "mlx"})
    done = subprocess.run(
        [sys.executable, "-c", RSS, tmp_path], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    growth, capacity = map(int, done.stdout.split())
    assert capacity == 30 * 2**20
    assert growth <= capacity + 2**22, growth


def test_a_checkpoint_as_mlx_lm_wrote_it():
    root = Path(__file__).parents[1]
    places = (root / "examples/nano-moe", root / "../shared/models/nano-qwen3-moe")
    model = next((place for place in places if any(place.glob("*.safetensors"))), None)
    if model is None:
        pytest.skip("no small MoE model is on this machine")
    file = ExpertFile(model)
    with ExpertStore(file, "25%", readers=3) as store:
        for layer in file.layers:
            ids = np.arange(store.slots(layer))
            with store.acquire(layer, ids) as lease:
                for expert, slot in zip(ids, lease.slots, strict=True):
                    want = file.read_bytes(layer, expert)
                    assert np.array_equal(bytes_in(store, layer, slot), want)
