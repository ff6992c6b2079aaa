"""Training: what is learned and chosen, repeated, interrupted, spread over processes, refused."""

import dataclasses
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from interruptions import interrupt_after
from mlx_od_moe import PredictorBundle
from mlx_od_moe.training.dataset import LayerDataset, split_documents
from mlx_od_moe.training.fit import FitOptions, measure
from mlx_od_moe.training.layer_trainer import CANDIDATES, TrainingOptions
from mlx_od_moe.training.traces import TraceInfo, write_shard
from mlx_od_moe.training.train_shadow import documents_of, train_shadow_model
from planted_traces import TOP_K, plant, routers_of

FIT = FitOptions(epochs=4, batch_size=64, learning_rate=5e-3, seed=1)
OPTIONS = TrainingOptions(
    predictor_size=24, candidates=("mlp", "mlp+gate+previous", "gate"), fit=FIT
)


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> TraceInfo:
    return plant(tmp_path_factory.mktemp("traces") / "planted")


def train(traces: TraceInfo, out: Path, options: TrainingOptions = OPTIONS, **settings):
    return train_shadow_model(traces.path, out, options, progress=False, **settings)


@pytest.fixture(scope="module")
def trained(traces, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "predictor.safetensors"
    train(traces, out)
    return out


def reports(bundle: PredictorBundle) -> dict[int, dict]:
    return {int(layer): report for layer, report in bundle.training["layers"].items()}


@pytest.mark.parametrize("loss", ["soft", "bce", "kl", "softmax"])
def test_planted_structure_is_learned(tmp_path, loss):
    traces = plant(tmp_path / "traces", layers=(0, 1), lookahead=1, sequences=25)
    fit = FitOptions(loss=loss, epochs=12, batch_size=64, learning_rate=5e-3)
    options = TrainingOptions(predictor_size=64, candidates=("mlp", "mlp+gate", "gate"), fit=fit)
    report = reports(train(traces, tmp_path / "p.safetensors", options))[0]
    found = {name: recall[0] for name, recall in report["candidates"].items()}
    assert found["mlp"] > 0.6  # guessing finds a quarter
    assert found["mlp+gate"] > found["gate"] + 0.05
    assert report["candidate"] == max(found, key=found.get)


@pytest.mark.parametrize("epochs", [1, 4])
@pytest.mark.parametrize("predictor_size", [1, 24])
def test_no_distance_is_worse_than_gate_lookahead(traces, tmp_path, epochs, predictor_size):
    options = dataclasses.replace(
        OPTIONS, predictor_size=predictor_size, fit=dataclasses.replace(FIT, epochs=epochs)
    )
    bundle = train(traces, tmp_path / "p.safetensors", options)
    for layer, report in reports(bundle).items():
        chosen, gate = report["validation"]["recall_at_k"], report["candidates"]["gate"]
        assert all(own >= free for own, free in zip(chosen, gate, strict=True)), layer


@pytest.mark.parametrize("predictor_size", [8, 24])
def test_a_distance_where_the_gate_is_better_gets_the_gate(traces, tmp_path, predictor_size):
    """Half trained, an MLP loses to the near router and beats the far one."""
    fit = dataclasses.replace(FIT, epochs=3)
    options = TrainingOptions(predictor_size, candidates=("mlp", "gate"), fit=fit)
    report = reports(train(traces, tmp_path / "p.safetensors", options, layers=[1]))[1]
    mlp, gate = report["candidates"]["mlp"], report["candidates"]["gate"]
    assert mlp[0] < gate[0]
    assert mlp[1] > gate[1]
    assert report["terms"] == ["gate", "mlp"]
    assert report["validation"]["recall_at_k"] == pytest.approx([gate[0], mlp[1]])


def test_the_report_is_what_the_saved_predictor_scores_on_unseen_documents(traces, trained):
    bundle = PredictorBundle.load(trained)
    _, documents = documents_of(traces, bundle)
    assert documents == split_documents(traces, OPTIONS.validation_fraction, FIT.seed)[1]
    for layer, report in reports(bundle).items():
        dataset = LayerDataset(traces, layer, documents, memory_bytes=0)
        assert measure(bundle[layer], dataset, TOP_K).report() == report["validation"]


def test_traces_of_another_seed_have_no_validation_documents(trained, tmp_path):
    other = plant(tmp_path / "other", seed=5)
    assert documents_of(other, PredictorBundle.load(trained)) is None


def test_layers_past_the_last_are_absent(traces, trained):
    bundle = PredictorBundle.load(trained)
    assert list(bundle) == [1, 3]
    assert {layer: bundle.targets(layer) for layer in bundle} == {1: [3, 4], 3: [4]}
    lengths = {layer: len(r["validation"]["recall_at_k"]) for layer, r in reports(bundle).items()}
    assert lengths == {1: 2, 3: 1}


def test_the_returned_bundle_is_the_one_in_the_file(traces, tmp_path):
    out = tmp_path / "p.safetensors"
    returned, loaded = train(traces, out), PredictorBundle.load(out)
    assert returned.training == loaded.training
    x = mx.random.normal((4, traces.hidden_size))
    assert all(mx.array_equal(returned[layer](x), loaded[layer](x)) for layer in loaded)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_the_same_seed_gives_the_same_file_and_another_does_not(traces, trained, tmp_path):
    train(traces, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == trained.read_bytes()
    options = dataclasses.replace(OPTIONS, fit=dataclasses.replace(FIT, seed=2))
    train(traces, tmp_path / "other.safetensors", options)
    assert (tmp_path / "other.safetensors").read_bytes() != trained.read_bytes()


@pytest.mark.parametrize("calls", [1, 12, 33, 90])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    traces, trained, tmp_path, monkeypatch, calls
):
    out = tmp_path / "p.safetensors"
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls)
        with pytest.raises(KeyboardInterrupt):
            train(traces, out)
    assert not out.exists()
    train(traces, out)
    assert out.read_bytes() == trained.read_bytes()


def test_a_training_interrupted_again_and_again_gets_there(traces, trained, tmp_path, monkeypatch):
    out = tmp_path / "p.safetensors"
    interruptions = 0
    while not out.exists():
        with monkeypatch.context() as patch:
            interrupt_after(patch, 20)  # an epoch is 9 calls
            try:
                train(traces, out)
            except KeyboardInterrupt:
                interruptions += 1
    assert interruptions > 3
    assert out.read_bytes() == trained.read_bytes()


def test_two_jobs_give_what_one_gives(traces, trained, tmp_path):
    train(traces, tmp_path / "p.safetensors", jobs=2)
    assert (tmp_path / "p.safetensors").read_bytes() == trained.read_bytes()


def test_layers_may_come_from_an_iterator(traces, tmp_path):
    assert list(train(traces, tmp_path / "p.safetensors", layers=iter([3, 1]))) == [1, 3]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_written_file_is_quantised(tmp_path, traces, bits):
    options = dataclasses.replace(OPTIONS, predictor_size=64, candidates=("mlp",))
    out = tmp_path / "p.safetensors"
    bundle = train(traces, out, options, layers=[1], bits=bits)
    loaded = PredictorBundle.load(out)
    assert loaded[1].quantization.bits == bits
    x = mx.array(np.random.default_rng(0).standard_normal((100, traces.hidden_size), np.float32))
    agree = np.array(loaded[1].predict(x, 1) == bundle[1].predict(x, 1))
    assert agree.mean() > 0.8


def interrupted(traces: TraceInfo, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Interrupt a training after its first epochs; returns its checkpoint."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 30)
        with pytest.raises(KeyboardInterrupt):
            train(traces, out)
    return out.with_name(out.name + ".checkpoint")


def test_a_checkpoint_of_other_settings_or_traces_is_refused(traces, tmp_path, monkeypatch):
    out = tmp_path / "p.safetensors"
    checkpoint = interrupted(traces, out, monkeypatch)
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    with pytest.raises(ValueError, match=checkpoint.name):
        train(traces, out, dataclasses.replace(OPTIONS, predictor_size=25))
    with pytest.raises(ValueError, match=checkpoint.name):
        train(plant(tmp_path / "other", seed=9), out)
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before


def test_a_truncated_checkpoint_is_an_error_that_names_it(traces, tmp_path, monkeypatch):
    out = tmp_path / "p.safetensors"
    states = sorted(interrupted(traces, out, monkeypatch).glob("layer-*.safetensors"))
    data = states[0].read_bytes()
    for size in (0, 100, len(data) - 10):
        states[0].write_bytes(data[:size])
        with pytest.raises(ValueError, match=states[0].name):
            train(traces, out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [4]}, r"planted.*layers \[1, 3\] .*MoE layer after.*\[4\]"),
        ({"layers": [1, 99]}, r"planted.*\[1, 99\]"),
        ({"layers": []}, "planted"),
        ({"jobs": 0}, "jobs must be positive, got 0"),
        ({"bits": 3}, "bits is 4 or 8, got 3"),
    ],
)
def test_impossible_settings_are_errors_before_any_training(traces, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(traces, tmp_path / "p.safetensors", **settings)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "change",
    [{"candidates": ()}, {"candidates": ("oracle",)}, {"validation_fraction": 1.0}],
)
def test_impossible_options_name_themselves(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(OPTIONS, **change)
    with pytest.raises(ValueError, match="hinge"):
        dataclasses.replace(FIT, loss="hinge")


def test_without_routers_what_needs_them_is_left_out_or_refused(tmp_path):
    traces = plant(tmp_path / "bare", with_routers=False)
    options = dataclasses.replace(OPTIONS, candidates=tuple(CANDIDATES))
    report = reports(train(traces, tmp_path / "p.safetensors", options))[1]
    assert set(report["candidates"]) == {"mlp", "mlp+previous"}
    with pytest.raises(ValueError, match=r"bare.*routers of layers \[3, 4\]"):
        train(traces, tmp_path / "g", dataclasses.replace(OPTIONS, candidates=("gate",)))
    kl = dataclasses.replace(OPTIONS, fit=dataclasses.replace(FIT, loss="kl"))
    with pytest.raises(ValueError, match=r"bare.*KL loss needs the routers"):
        train(traces, tmp_path / "k", kl)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_bad_shard_is_an_error_that_names_it(traces, tmp_path, jobs):
    copy = shutil.copytree(traces.path, tmp_path / "copy")
    with np.load(copy / "shard-00002.npz") as archive:
        arrays = dict(archive)
    arrays["hidden_states_1"][0, 0] = np.nan
    write_shard(copy / "shard-00002.npz", arrays)
    with pytest.raises(ValueError, match=r"copy.shard-00002\.npz"):
        train_shadow_model(copy, tmp_path / "p", OPTIONS, jobs=jobs, progress=False)


def test_other_routers_or_a_directory_as_output_are_refused(traces, tmp_path, monkeypatch):
    out = tmp_path / "predictor.safetensors"
    interrupt_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(traces, out)
    other = routers_of({layer: np.ones((12, 24), np.float32) for layer in traces.moe_layers})
    with pytest.raises(ValueError, match=r"checkpoint\] holds an interrupted training with other"):
        train(traces, out, routers=other)
    with pytest.raises(ValueError, match="is a directory, not a file to write"):
        train(traces, tmp_path)
