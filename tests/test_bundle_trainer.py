"""Training all layers together: contexts learn what they should, and runs repeat and resume."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from interruptions import train_interrupted
from mlx_od_moe import PredictorBundle
from mlx_od_moe.context import ContextConfig
from mlx_od_moe.evaluate import evaluate
from mlx_od_moe.metrics import hits
from mlx_od_moe.routing_trace import Predictions, open_routing, predict_layers
from mlx_od_moe.training.bundle_trainer import planned_steps
from mlx_od_moe.training.dataset import read_array
from mlx_od_moe.training.fast_layers import fast
from mlx_od_moe.training.fit import FitOptions
from mlx_od_moe.training.layer_trainer import TrainingOptions
from mlx_od_moe.training.train_shadow import documents_of, train_shadow_model
from planted_traces import plant

CONTEXT = ContextConfig(window=8, key_size=8, state_size=24)
FIT = FitOptions(epochs=4, batch_size=512, learning_rate=2e-3, seed=1)
OPTIONS = TrainingOptions(predictor_size=24, context=CONTEXT, fit=FIT)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("traces") / "planted", sequences=10)


def train(traces, out: Path, options: TrainingOptions = OPTIONS, **settings) -> PredictorBundle:
    return train_shadow_model(traces.path, out, options, progress=False, **settings)


@pytest.fixture(scope="module")
def trained(traces, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "p.safetensors"
    train(traces, out)
    return out


@pytest.mark.parametrize("loss", ["soft", "bce", "kl"])
@pytest.mark.parametrize(
    ("context", "gain"),
    [
        (ContextConfig(4, 24, 0, early_query=False), 0.035),
        (ContextConfig(4, 24, 0), 0.02),  # these layers' states have less in common than a model's
        (ContextConfig(0, 0, 24), 0.04),
    ],
)
def test_context_finds_what_the_state_alone_does_not_hold(tmp_path, loss, context, gain):
    planted = {"layers": (0, 1, 2), "sequences": 40, "carry": 0.8}
    traces = plant(tmp_path / "traces", **planted)
    fit = FitOptions(loss=loss, epochs=15, batch_size=512, learning_rate=2e-3, patience=15)
    recall = {}
    for name, options in {
        "with": TrainingOptions(predictor_size=64, context=context, fit=fit),
        "without": TrainingOptions(predictor_size=64, fit=fit),
    }.items():
        bundle = train(traces, tmp_path / f"{name}.safetensors", options)
        recall[name] = bundle.training["validation"]["recall_at_k"][0]
    assert recall["with"] > recall["without"] + gain


def test_the_report_is_what_evaluate_finds_on_the_validation_documents(traces, trained):
    reported = PredictorBundle.load(trained).training["layers"]
    found = evaluate(trained, traces.path, progress=False)["layers"]
    for layer, report in reported.items():
        own = found[int(layer)]["predictor"]["recall_at_k"]
        np.testing.assert_allclose(own, report["validation"]["recall_at_k"], atol=0.01)


def test_no_distance_is_worse_than_gate_lookahead(traces, tmp_path):
    fit = FitOptions(epochs=1, batch_size=512, learning_rate=1e-6)
    options = TrainingOptions(predictor_size=4, context=CONTEXT, fit=fit)
    for report in train(traces, tmp_path / "p.safetensors", options).training["layers"].values():
        own, gate = report["validation"]["recall_at_k"], report["candidates"]["gate"]
        assert all(a >= b - 0.01 for a, b in zip(own, gate, strict=True))


def test_the_same_seed_gives_the_same_file(traces, trained, tmp_path):
    train(traces, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("calls", [1, 5, 9])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    traces, trained, tmp_path, monkeypatch, calls
):
    out = tmp_path / "p.safetensors"
    train_interrupted(monkeypatch, calls, lambda: train(traces, out))
    assert out.read_bytes() == trained.read_bytes()


def test_streams_change_no_more_than_rounding(traces, trained, tmp_path):
    both = PredictorBundle.load(trained), train(traces, tmp_path / "p.safetensors", jobs=2)
    one, two = (bundle.training["validation"]["recall_at_k"] for bundle in both)
    np.testing.assert_allclose(one, two, atol=0.03)


@pytest.mark.skipif(not fast(), reason="this CPU has no products in bfloat16")
@pytest.mark.parametrize("loss", ["soft", "bce", "kl"])
def test_products_in_bfloat16_cost_no_recall(traces, tmp_path, monkeypatch, loss):
    options = dataclasses.replace(OPTIONS, fit=dataclasses.replace(FIT, loss=loss, epochs=8))
    recall = []
    for name in ("", "scalar"):  # the CPU's best, and one in float32
        monkeypatch.setenv("MLX_OD_MOE_KERNEL", name)
        assert fast() == (name == "")
        bundle = train(traces, tmp_path / f"{loss}{name}.safetensors", options)
        recall.append(bundle.training["validation"]["recall_at_k"])
    np.testing.assert_allclose(*recall, atol=0.02)


def test_without_routers_there_is_no_gate(tmp_path):
    traces = plant(tmp_path / "traces", with_routers=False, sequences=10)
    bundle = train(traces, tmp_path / "p.safetensors")
    assert {t for p in bundle.values() for t in p.config.terms} == {"mlp"}


def test_candidates_without_an_mlp_are_refused(traces, tmp_path):
    options = TrainingOptions(context=CONTEXT, candidates=("gate",), fit=FIT)
    with pytest.raises(ValueError, match="a context goes with the candidates mlp"):
        train(traces, tmp_path / "p.safetensors", options)


def test_the_schedule_ends_with_the_last_epoch_however_few_the_tokens():
    assert planned_steps(500, 1024, 2048) == 500
    assert planned_steps(3, 1_000_000, 2048) == 3 * 488
    assert planned_steps(1, 1024, 2048) == 2  # warm-up and decay


def test_a_replay_predicts_as_evaluate_does(traces, trained):
    """The simulator runs the native forward on recorded states, contexts included."""
    trace = open_routing(traces.path)
    predictions = Predictions.empty(trace, 2, 6)
    predict_layers(predictions, trace, trained, "f32", lambda n: None)
    documents = np.concatenate([read_array(s, "document") for s in traces.shards])
    _, validation = documents_of(traces, PredictorBundle.load(trained))
    rows = np.isin(documents, sorted(validation))
    found = evaluate(trained, traces.path, progress=False)["layers"]
    for i, layer in enumerate(traces.moe_layers[:-1]):
        expected = found[layer]["predictor"]["recall_at_k"]
        for d, recall in enumerate(expected):
            ids = predictions.ids[rows, i + 1, d, : traces.top_k]
            own = hits(ids, trace.experts[rows, i + 1 + d]).sum() / ids.size
            assert own == pytest.approx(recall, abs=0.02)
