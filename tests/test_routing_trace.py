"""Recorded and assumed routing, and what is predicted of it."""

import numpy as np
import pytest

from mlx_od_moe.assumed_routing import assume_predictions, assume_routes
from mlx_od_moe.predictor_bundle import PredictorBundle
from mlx_od_moe.routing_trace import (
    Predictions,
    open_routing,
    predict_known_tokens,
    predict_layers,
)
from mlx_od_moe.token_table import TokenTable
from plain_replay import replay
from planted_traces import EXPERTS, TOP_K, plant_predictor


def test_assumed_predictions_have_the_recall_that_was_asked_for():
    trace = assume_routes(600, 6, 64, 8, seed=1)
    into = Predictions.empty(trace, 4, 64)
    asked = [0.99, 0.97, 0.95, 0.9]
    assume_predictions(into, trace, asked, range(6), lambda n: None)
    for d, recall in enumerate(asked):
        ids, p = into.ids[:, : 6 - d, d], into.probabilities[:, : 6 - d, d]
        right = (ids[..., None] == trace.experts[:, d:, None]).any(-1)
        assert right[..., :16].sum() / right.sum() == pytest.approx(recall, abs=0.01)
        assert p.sum() / right.sum() == pytest.approx(1, abs=0.02), "calibrated"
        sure = p > 0.8
        assert right[sure].mean() == pytest.approx(p[sure].mean(), abs=0.02)
    with pytest.raises(ValueError, match="recall: it lies in 0"):
        assume_predictions(into, trace, [1.5], range(6), lambda n: None)


def test_better_predictions_hit_more():
    trace = assume_routes(400, 8, 64, 8)
    rates = []
    for recall in (0.6, 0.9, 0.99):
        into = Predictions.empty(trace, 4, 16)
        assume_predictions(into, trace, [recall] * 4, range(8), lambda n: None)
        run = replay(trace, 16, method="predicted", predictions=into)
        rates.append(run["hit_rate"])
    oracle = replay(trace, 16, method="oracle")["hit_rate"]
    none = replay(trace, 16)["hit_rate"]
    assert none < rates[0] < rates[1] < rates[2] < oracle


def test_token_table_counts():
    table = TokenTable(2, 4)
    assert table.predict(5).tolist() == [[0] * 4] * 2
    table.observe(np.array([5]), np.array([[[0, 1], [2, 3]]]))
    both = np.array([[[0, 2], [2, -1]], [[3, 1], [0, 1]]])
    table.observe(np.array([5, 6]), both)
    average = np.array([[2, 2, 1, 1], [1, 1, 2, 1]]) / 3
    counts = np.array([[2, 1, 1, 0], [0, 0, 2, 1]])
    assert table.predict(5) == pytest.approx((counts + average) / (2 + 1))
    assert table.predict(7) == pytest.approx(average)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return plant_predictor(tmp_path_factory.mktemp("recorded"))


def test_a_predictor_speaks_of_the_layers_that_follow(recorded):
    trace = open_routing(recorded[0])
    assert trace.experts.shape[1:] == (3, TOP_K)
    assert trace.num_experts == EXPERTS
    into = Predictions.empty(trace, 2, EXPERTS)
    predict_layers(into, trace, recorded[1], "f32", lambda n: None)
    assert (into.ids[:, 0] == -1).all(), "the token itself was not asked"
    assert (into.ids[:, 2, 1] == -1).all(), "there is no layer that far"
    for source, distance in ((1, 1), (1, 2), (2, 1)):
        likely = into.ids[:, source, distance - 1, :TOP_K, None, None]
        overlap = (likely == trace.experts[:, None]).sum((0, 1, 3))
        assert overlap.argmax() == source + distance - 1
    fewer = open_routing(recorded[0], tokens=200)
    less = Predictions.empty(fewer, 2, EXPERTS)
    predict_layers(less, fewer, recorded[1], "f32", lambda n: None)
    assert (less.ids == into.ids[:200]).all()


def test_what_a_file_knows_of_tokens_is_source_0(recorded):
    trace = open_routing(recorded[0])
    known = PredictorBundle.load(recorded[1]).token_experts
    into = Predictions.empty(trace, 2, 4)
    predict_known_tokens(into, trace, known, lambda n: None)
    expected = np.sort(known.predict(trace.token_ids, EXPERTS), axis=-1)[..., :-5:-1]
    assert np.array_equal(into.probabilities[:, 0], expected)
    assert (into.ids[:, 1:] == -1).all()


def test_an_npz_that_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "routes.npz"
    np.savez(path, experts=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"experts must be integers \[tokens, layers, top_k\]"):
        open_routing(path)
    np.savez(path, experts=np.arange(6).reshape(1, 2, 3), tokens=np.array([7]))
    trace = open_routing(path)
    assert trace.num_experts == 6
    assert trace.token_ids.tolist() == [7]
    assert open_routing(path, num_experts=8).num_experts == 8
