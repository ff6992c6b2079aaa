"""Traces as training samples: token order, the split by document, streaming, KL targets."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_od_moe.model_routers import load_routers
from mlx_od_moe.training.dataset import LayerDataset, Samples, read_array, split_documents
from mlx_od_moe.training.losses import soft_labels
from mlx_od_moe.training.traces import TraceInfo, write_shard
from planted_traces import EXPERTS, TOP_K, plant


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> TraceInfo:
    return plant(tmp_path_factory.mktemp("traces") / "planted")


def everything(dataset: LayerDataset, rng: np.random.Generator | None = None) -> list[bytes]:
    """The rows in the order in which they come, each as bytes of all it holds."""
    return [
        b"".join(part.tobytes() for part in (s.hidden_states, s.chosen, s.previous, s.routed))
        for batch in dataset.batches(7, rng)
        for s in (batch.take(slice(i, i + 1)) for i in range(len(batch)))
    ]


def rows(traces: TraceInfo, name: str) -> np.ndarray:
    return np.concatenate([read_array(shard, name) for shard in traces.shards])


def test_previous_is_the_token_before_and_never_of_another_sequence(traces):
    dataset = LayerDataset(traces, 1)
    chosen, previous = (
        np.concatenate([getattr(s, name) for s in dataset.batches(64)])
        for name in ("chosen", "previous")
    )
    document = rows(traces, "document")
    first = np.flatnonzero(np.diff(document, prepend=-1))
    assert len(first) == len(np.unique(document)) == 20
    assert (previous[first] == -1).all()
    others = np.setdiff1d(np.arange(len(document)), first)
    assert (previous[others] == chosen[others - 1]).all()
    assert (previous[others] >= 0).all()


def test_two_sequences_of_one_document_stay_apart(tmp_path):
    traces = plant(tmp_path / "t", shards=1, sequences=2)
    with np.load(traces.shards[0]) as archive:
        arrays = dict(archive)
    arrays["document"][:] = 0
    write_shard(traces.shards[0], arrays)
    starts = np.flatnonzero(arrays["position"] == 0)
    previous = np.concatenate([s.previous for s in LayerDataset(traces, 1).batches(64)])
    assert len(starts) == 2
    assert (np.flatnonzero((previous == -1).all(axis=(1, 2))) == starts).all()


def test_a_split_keeps_what_belongs_together(traces):
    training, validation = split_documents(traces, 0.2, seed=3)
    samples = {
        name: LayerDataset(traces, 3, documents)
        for name, documents in (("training", training), ("validation", validation))
    }
    whole = everything(LayerDataset(traces, 3))
    parts = {name: everything(dataset) for name, dataset in samples.items()}
    assert sorted(parts["training"] + parts["validation"]) == sorted(whole)
    assert {name: len(d) for name, d in samples.items()} == {n: len(p) for n, p in parts.items()}
    # Previous tokens are found before the split: a row is the same in either.
    assert set(parts["validation"]) <= set(whole)


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**31))
def test_documents_are_split_apart_and_always_alike(traces, fraction, seed):
    training, validation = split_documents(traces, fraction, seed)
    assert not training & validation
    assert training | validation == set(range(20))
    assert len(validation) == min(max(1, round(20 * fraction)), 19)
    assert (training, validation) == split_documents(traces, fraction, seed)


def test_the_seed_changes_the_split(traces):
    assert len({frozenset(split_documents(traces, 0.5, seed)[1]) for seed in range(10)}) > 5


def test_one_document_cannot_be_split(tmp_path):
    traces = plant(tmp_path / "single", shards=1, sequences=1)
    with pytest.raises(ValueError, match=r"single.*at least 2 documents, got 1"):
        split_documents(traces, 0.1, 0)


@pytest.mark.parametrize("documents", [None, {0, 3, 7, 19}, {4}])
@pytest.mark.parametrize("memory_bytes", [0, 20_000, 60_000])
def test_streaming_gives_the_rows_that_memory_gives(traces, documents, memory_bytes):
    whole = LayerDataset(traces, 1, documents)
    streamed = LayerDataset(traces, 1, documents, memory_bytes=memory_bytes)
    assert everything(streamed) == everything(whole)
    shuffled = everything(streamed, np.random.default_rng(1))
    assert sorted(shuffled) == sorted(everything(whole))
    assert everything(streamed, np.random.default_rng(1)) == shuffled
    assert len(streamed) == len(whole) == len(shuffled)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_every_epoch_comes_in_another_order(traces, memory_bytes):
    dataset = LayerDataset(traces, 1, memory_bytes=memory_bytes)
    in_order = everything(dataset)
    first, second = (everything(dataset, np.random.default_rng(seed)) for seed in (1, 2))
    assert in_order != first != second != in_order


def test_streaming_holds_little_more_than_it_may(traces):
    shards = [s.nbytes for s in LayerDataset(traces, 1, memory_bytes=0).groups()]
    assert len(shards) == 4
    for memory_bytes in range(0, sum(shards), 2000):
        groups = [s.nbytes for s in LayerDataset(traces, 1, memory_bytes=memory_bytes).groups()]
        assert sum(groups) == sum(shards)
        assert len(groups) > 1
        assert max(groups) <= memory_bytes + max(shards)


def test_only_layers_that_exist_are_predicted(traces):
    datasets = {layer: LayerDataset(traces, layer) for layer in (1, 3, 4)}
    assert {layer: d.targets for layer, d in datasets.items()} == {1: (3, 4), 3: (4,), 4: ()}
    for layer, dataset in datasets.items():
        for samples in dataset.batches(1000):
            assert samples.chosen.shape[1:] == (len(dataset.targets), TOP_K)
            assert (samples.chosen >= 0).all()
            for d, target in enumerate(dataset.targets):
                routed = rows(traces, f"routed_experts_{target}")
                assert (samples.chosen[:, d] == routed).all(), layer


def test_log_probs_are_the_target_routers_own(traces):
    routers = load_routers(traces.routers)
    dataset = LayerDataset(traces, 1, {0, 5, 11}, routers, memory_bytes=0)
    count = 0
    for samples in dataset.batches(50):
        assert samples.taught.shape == (len(samples), 2, EXPERTS)
        probabilities = np.exp(samples.taught.astype(np.float64))
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=0.01)
        best = np.argsort(-samples.taught, axis=-1, kind="stable")[..., :TOP_K]
        same = np.sort(best, -1) == np.sort(samples.chosen, -1)
        assert same.mean() > 0.99  # float16 leaves a tie here and there
        count += len(samples)
    assert count == len(dataset)
    assert next(LayerDataset(traces, 1).batches(5)).taught.shape == (5, 0, 0)


def test_soft_labels_are_above_half_for_what_was_chosen(traces):
    routers = load_routers(traces.routers)
    samples = next(LayerDataset(traces, 1, routers=routers, teacher=soft_labels).batches(200))
    of_chosen = np.take_along_axis(samples.taught, samples.chosen.astype(np.int64), axis=-1)
    assert (of_chosen >= 0.5).mean() > 0.99  # float16 leaves a tie here and there
    assert ((samples.taught > 0.5).sum(-1) <= TOP_K).all()
    assert next(LayerDataset(traces, 1, routers=routers, teacher=None).batches(5)).taught.size == 0


def test_a_layer_that_is_no_moe_layer_is_an_error(traces):
    with pytest.raises(ValueError, match=r"planted.*layer 2\b.*\(1, 3, 4\)"):
        LayerDataset(traces, 2)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nan_in_recorded_states_is_an_error_that_names_the_file(tmp_path, bad):
    traces = plant(tmp_path / "t", shards=2)
    with np.load(traces.shards[1]) as archive:
        arrays = dict(archive)
    arrays["hidden_states_3"][11, 2] = bad
    write_shard(traces.shards[1], arrays)
    assert everything(LayerDataset(traces, 1))
    with pytest.raises(ValueError, match=r"shard-00001\.npz.*hidden_states_3.*NaN"):
        everything(LayerDataset(traces, 3))


def test_a_shard_cut_after_it_was_opened_is_an_error_that_names_it(tmp_path):
    traces = plant(tmp_path / "t", shards=2)
    shard: Path = traces.shards[1]
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"shard-00001\.npz"):
        everything(LayerDataset(traces, 1))


def test_taking_rows_takes_them_from_every_array():
    n = 6
    arrays = {name: np.arange(n) for name in ("hidden_states", "chosen", "previous", "routed")}
    samples = Samples(**arrays, taught=np.arange(n))
    taken = samples.take(np.array([4, 1]))
    assert all(getattr(taken, name).tolist() == [4, 1] for name in (*arrays, "taught"))
    assert [len(batch) for batch in samples.batches(4)] == [4, 2]
