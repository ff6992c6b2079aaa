"""Evaluation: what is measured, on which documents, against what."""

import json
from pathlib import Path

import pytest

from mlx_od_moe import PredictorBundle
from mlx_od_moe.evaluate import evaluate
from mlx_od_moe.report import plot, table
from mlx_od_moe.training import FitOptions, TrainingOptions, train_shadow_model
from mlx_od_moe.training.dataset import LayerDataset
from mlx_od_moe.training.train_shadow import documents_of
from planted_traces import EXPERTS, TOP_K, plant

OPTIONS = TrainingOptions(
    predictor_size=24, candidates=("mlp+gate", "gate"), fit=FitOptions(epochs=5, learning_rate=5e-3)
)


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> Path:
    return plant(tmp_path_factory.mktemp("traces") / "planted").path


@pytest.fixture(scope="module")
def predictor(traces, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("predictor") / "predictor.safetensors"
    train_shadow_model(traces, out, OPTIONS, progress=False)
    return out


@pytest.fixture(scope="module")
def result(predictor, traces):
    return evaluate(predictor, traces, progress=False)


def test_each_method_is_where_theory_puts_it(result):
    at_k = {name: metrics["recall_at_k"] for name, metrics in result["methods"].items()}
    assert at_k["random"] == pytest.approx([TOP_K / EXPERTS] * 2, abs=0.06)
    assert list(result["control"].values()) == [1.0, 1.0], "own router, own input, exact states"
    assert at_k["gate_lookahead"] == at_k["gate_lookahead_raw"], "these routers have no norm"
    assert at_k["previous_token"][0] < at_k["gate_lookahead"][0], "tokens are independent here"
    for own, free in zip(at_k["predictor"], at_k["gate_lookahead"], strict=True):
        assert own >= free, "validation chose, and these are its documents"


def test_only_validation_documents_of_the_training_traces_count(result, predictor, traces):
    from mlx_od_moe.training import open_traces

    info = open_traces(traces)
    _, documents = documents_of(info, PredictorBundle.load(predictor))
    assert result["samples"] == len(LayerDataset(info, 1, documents)) < info.samples


def test_other_traces_count_whole_and_learn_only_from_traces_given(predictor, traces, tmp_path):
    other = plant(tmp_path / "other", shards=1, seed=0)
    alone = evaluate(predictor, other.path, progress=False)
    assert alone["samples"] == other.samples
    assert not {"frequency", "linear_probe"} & alone["methods"].keys()
    fitted = evaluate(predictor, other.path, traces, progress=False)
    assert {"frequency", "linear_probe"} < fitted["methods"].keys()
    assert fitted["methods"]["predictor"] == alone["methods"]["predictor"]


def test_margin_names_the_weakest_place(result):
    leads = {
        (layer, d + 1): own - free
        for layer, methods in result["layers"].items()
        for d, (own, free) in enumerate(
            zip(
                methods["predictor"]["recall_at_k"],
                methods["gate_lookahead"]["recall_at_k"],
                strict=True,
            )
        )
    }
    margin = result["margin"]
    assert margin["lead"] == min(leads.values())
    assert leads[margin["layer"], margin["distance"]] == margin["lead"]


def test_layers_in_several_processes_give_the_same(result, predictor, traces):
    assert evaluate(predictor, traces, jobs=2, progress=False) == result


def test_a_quantised_file_is_measured_as_it_is(result, predictor, traces, tmp_path):
    path = tmp_path / "quantised.safetensors"
    bundle = PredictorBundle.load(predictor)
    bundle.quantized(4, group_size=32).save(path)
    coarse = evaluate(path, traces, progress=False)["methods"]
    assert coarse["gate_lookahead"] == result["methods"]["gate_lookahead"]
    assert coarse["predictor"]["recall_at_2k"][0] > 0.8


def test_table_and_plot_show_every_method(result, tmp_path):
    text = table(result)
    for label in ("random", "previous token", "gate lookahead, raw", "shadow model"):
        assert label in text
    assert f"{result['methods']['predictor']['recall_at_k'][1]:.3f}" in text
    first = result["by_token"]["recall_at_k"]
    assert f"{'layers 1, 2, … by token':26}{''.join(f'{x:7.3f}' for x in first)}" in text
    assert len(first) == 2
    assert all(0 <= x <= 1 for x in first)
    plot(result, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(result)


def test_predictor_of_another_model_is_refused(predictor, tmp_path):
    other = plant(tmp_path / "other", layers=(0, 1), lookahead=1, seed=3)
    with pytest.raises(ValueError, match=r"predictor\.safetensors\] is for MoE layers \[1, 3, 4\]"):
        evaluate(predictor, other.path, progress=False)
