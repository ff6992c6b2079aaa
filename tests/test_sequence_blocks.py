"""Blocks of tokens in order: the same from states stored as they are and from compressed ones."""

import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_od_moe.training.sequence_blocks import SequenceBlocks
from mlx_od_moe.training.traces import TraceInfo, write_shard
from planted_traces import plant

LAYERS = [0, 1, 2, 3]
BEFORE = 5


def compressed(traces: TraceInfo) -> TraceInfo:
    """The same traces, as shards were once written."""
    for shard in traces.shards:
        np.savez_compressed(shard, **_arrays(shard))
    return traces


@pytest.fixture(scope="module", params=["stored", "compressed"])
def traces(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / request.param
    found = plant(path, layers=LAYERS, sequences=10)
    return compressed(found) if request.param == "compressed" else found


@pytest.mark.parametrize("memory_bytes", [1, 1 << 30])
@pytest.mark.parametrize("documents", [None, {0, 3, 4, 11, 19}])
def test_blocks_hold_every_token_once_with_what_came_before_it(traces, documents, memory_bytes):
    blocks = SequenceBlocks(traces, LAYERS, BEFORE, documents, memory_bytes)
    router = np.array(mx.load(str(traces.routers))["0.weight"])
    tokens = 0
    for block in blocks.in_order(64):
        states, sequence = np.array(block.states[0]), np.array(block.sequence)
        assert states.shape[:2] == sequence.shape
        own = np.sort(np.argsort(-states[0, BEFORE:] @ router.T, axis=1)[:, : traces.top_k])
        assert (own == np.sort(block.routed[0][0])).mean() > 0.99
        assert (np.diff(sequence[0]) >= 0).all()  # -1 for rows that are not there
        assert (states[sequence < 0] == 0).all()
        tokens += states.shape[1] - BEFORE
    assert tokens == len(blocks)


def test_random_batches_pass_over_less_than_a_block_per_group(traces):
    blocks = SequenceBlocks(traces, LAYERS, BEFORE)
    rng = np.random.default_rng(0)
    seen = sum(len(block) * 64 for block in blocks.batches(64, 3, rng))
    assert len(blocks) - 2 * 64 < seen <= len(blocks)


def test_a_block_is_the_rows_of_its_shards(traces):
    """Over the borders of shards, and of documents that are left out."""
    documents = {0, 3, 4, 11, 19}
    blocks = SequenceBlocks(traces, LAYERS, BEFORE, documents, memory_bytes=1 << 30)
    expected = []
    for shard in traces.shards:
        arrays = _arrays(shard)
        expected.append(arrays["hidden_states_2"][np.isin(arrays["document"], list(documents))])
    rows = np.concatenate([np.zeros_like(expected[0][:BEFORE]), *expected])
    first = 0
    for block in blocks.in_order(37):
        states = np.array(block.states[2])[0]
        np.testing.assert_array_equal(states, rows[first : first + len(states)])
        first += 37


def test_compressed_states_are_held_a_group_at_a_time(tmp_path):
    """Not the group before, and no group twice."""
    traces = compressed(plant(tmp_path / "many", layers=LAYERS, shards=24, sequences=30))
    limit = _state_bytes(traces) // 3
    blocks = SequenceBlocks(traces, LAYERS, BEFORE, memory_bytes=limit)
    assert _peak_of_a_pass(blocks) < 2 * limit
    assert len(list(blocks._groups(None))) >= 3


def test_stored_states_are_not_held(tmp_path):
    traces = plant(tmp_path / "many", layers=LAYERS, shards=24, sequences=30)
    blocks = SequenceBlocks(traces, LAYERS, BEFORE, memory_bytes=_state_bytes(traces) // 3)
    assert _peak_of_a_pass(blocks) < _state_bytes(traces) // 2
    assert len(list(blocks._groups(None))) == 1


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nan_in_recorded_states_is_an_error_that_names_the_file(tmp_path, bad):
    traces = plant(tmp_path / "t", layers=LAYERS, shards=2)
    arrays = _arrays(traces.shards[1])
    arrays["hidden_states_3"][11, 2] = bad
    write_shard(traces.shards[1], arrays)
    with pytest.raises(ValueError, match=r"shard-00001\.npz.*hidden_states_3 hold NaN"):
        list(SequenceBlocks(traces, LAYERS, BEFORE).in_order(64))


def test_a_shard_that_is_replaced_while_it_is_read_is_an_error_that_names_it(tmp_path):
    traces = plant(tmp_path / "t", layers=LAYERS, shards=2)
    blocks = SequenceBlocks(traces, LAYERS, BEFORE).in_order(8)  # a few are read ahead
    next(blocks)
    write_shard(traces.shards[0], _arrays(traces.shards[1]))
    with pytest.raises(ValueError, match=r"shard-00000\.npz\] was written to while it was read"):
        list(blocks)


def _arrays(shard: Path) -> dict[str, np.ndarray]:
    with np.load(shard) as archive:
        return dict(archive)


def _state_bytes(traces: TraceInfo) -> int:
    return traces.samples * len(LAYERS) * traces.hidden_size * 2


def _peak_of_a_pass(blocks: SequenceBlocks) -> int:
    tracemalloc.start()
    for _ in blocks.in_order(64):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak
