"""Tables of what tokens choose at the first layers: learned, stored, looked up."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe import PredictorBundle
from mlx_od_moe.route_recorder import RouteRecorder
from mlx_od_moe.server.metrics_page import _labels
from mlx_od_moe.token_experts import TokenExperts
from mlx_od_moe.token_table import TokenTable
from mlx_od_moe.training.dataset import read_array
from mlx_od_moe.training.train_shadow import learn_token_experts
from planted_traces import plant
from test_prefetcher import make_bundle


@pytest.fixture
def learned() -> TokenExperts:
    """Of 2 layers with 20 experts: token 7 chooses 3 and 4, token 9 chooses 19 and 0."""
    table = TokenTable(2, 20)
    tokens = np.array([9, 7, 9, 7])
    chosen = np.array([[[19, 0]] * 2, [[3, 4]] * 2] * 2)
    table.observe(tokens, chosen)
    return TokenExperts.learned(table)


def test_what_a_token_chose_is_likeliest(learned):
    likely = learned.predict(np.array([7, 9, 8]), 20)
    assert likely.shape == (3, 2, 20)
    assert set(np.argsort(-likely[0, 1])[:2]) == {3, 4}
    assert set(np.argsort(-likely[1, 0])[:2]) == {19, 0}
    # Any other token: as often as all of them together did.
    np.testing.assert_allclose(likely[2, 0, [0, 3, 4, 19]], 0.5, atol=1 / 255)
    table = TokenTable(2, 20)
    table.observe(np.array([9, 7]), np.array([[[19, 0]] * 2, [[3, 4]] * 2]))
    table.observe(np.array([9, 7]), np.array([[[19, 0]] * 2, [[3, 4]] * 2]))
    np.testing.assert_allclose(likely[0], table.predict(7), atol=1 / 255)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_bundle_keeps_them(learned, bits, tmp_path):
    bundle = make_bundle()
    bundle.token_experts = learned
    bundle.save(tmp_path / "bundle.safetensors", bits)
    read = PredictorBundle.load(tmp_path / "bundle.safetensors").token_experts
    for name in ("tokens", "experts", "probabilities"):
        expected, found = getattr(learned, name), getattr(read, name)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    assert len(bundle.native()) == 7


def test_ids_above_a_byte_are_kept():
    table = TokenTable(1, 384)
    table.observe(np.array([5]), np.array([[[383, 256]]]))
    learned = TokenExperts.learned(table)
    read = TokenExperts.from_tensors(learned.tensors())
    assert np.array_equal(read.experts, learned.experts)
    assert {383, 256} == set(read.experts[0, 0, :2].tolist())


def test_tables_that_do_not_fit_are_refused(learned):
    with pytest.raises(ValueError, match=r"2 tokens need experts .* \[3, layers, width\], got"):
        TokenExperts(learned.tokens, learned.experts[:2], learned.probabilities)
    with pytest.raises(ValueError, match="tokens must ascend"):
        TokenExperts(learned.tokens[::-1], learned.experts, learned.probabilities)
    with pytest.raises(ValueError, match="at least one token"):
        TokenExperts(learned.tokens[:0], learned.experts[-1:], learned.probabilities[-1:])
    bundle = make_bundle(num_experts=16)
    with pytest.raises(ValueError, match="ids up to 19; the model has 8 with 16"):
        PredictorBundle(bundle.moe_layers, bundle, token_experts=learned)


def test_training_learns_them_from_its_documents_only(tmp_path):
    info = plant(tmp_path / "traces")
    documents = {int(read_array(info.shards[0], "document")[0])}
    learned = learn_token_experts(info, documents)
    seen = [
        read_array(shard, "token_ids")[np.isin(read_array(shard, "document"), list(documents))]
        for shard in info.shards
    ]
    assert learned.tokens.tolist() == np.unique(np.concatenate(seen)).tolist()
    assert learned.layers == min(info.lookahead, len(info.moe_layers))


def test_the_first_layers_are_prefetched_by_the_token():
    """What the model itself has chosen for each token before is what it is given to learn."""
    path, text = model_directory("nano-moe"), [11, 500, 42, 900]
    model, _, runtime = mlx_od_moe.load(path, capacity="100%")
    with runtime:
        recorder = RouteRecorder(runtime.store.layers)
        runtime.on_routing = recorder.record
        for token in text:
            mx.eval(model(mx.array([[token]])))
    table = TokenTable(4, 64)
    table.observe(np.array(text), recorder.experts()[:, :4].astype(np.int64))
    bundle = make_bundle()
    bundle.token_experts = TokenExperts.learned(table)
    model, _, runtime = mlx_od_moe.load(path, bundle, "25%", guarded=False)
    with runtime:
        for token in text * 3:
            mx.eval(model(mx.array([[token]])))
        by_token = runtime.report()["prediction"]["by_token"]
        assert by_token[0] == 1.0
        assert set(by_token) == {0, 1, 2, 3}
        labels = {tuple(_labels(row)) for row in runtime.report()["prediction"]["layers"]}
        assert {("0", "token"), ("3", "token"), ("1", "1"), ("7", "4")} <= labels
        assert not {("0", "1"), ("3", "4")} & labels
        first = runtime.store.counters()["layers"][0]
        assert first["useful"] + first["late"] > 0
        # Two sequences at once are predicted for together, and prompts not at all.
        mx.eval(model(mx.array([[11], [500]])), model(mx.array([[11, 500]])))
