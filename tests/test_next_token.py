"""The next token's first layers: samples, training, the file, evaluation."""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from interruptions import train_interrupted
from mlx_od_moe import PredictorBundle
from mlx_od_moe.cli import main
from mlx_od_moe.evaluate import evaluate
from mlx_od_moe.predictor_config import PredictorConfig
from mlx_od_moe.predictor_file import read_tensors
from mlx_od_moe.report import table
from mlx_od_moe.shadow_model import ExpertPredictor
from mlx_od_moe.training import FitOptions, TrainingOptions, train_shadow_model
from mlx_od_moe.training.dataset import read_array
from mlx_od_moe.training.next_token import NextTokenDataset
from mlx_od_moe.training.traces import (
    TraceInfo,
    open_traces,
    read_collection,
    write_collection,
    write_shard,
)
from planted_traces import EXPERTS, HIDDEN, TOP_K, plant

LAYERS = [1, 3, 4]
FIT = FitOptions(loss="softmax", epochs=12, batch_size=64, learning_rate=5e-3)
OPTIONS = TrainingOptions(predictor_size=64, candidates=("mlp",), fit=FIT)


def plant_rule(directory: Path, **options) -> TraceInfo:
    """Traces whose states of the last layer say exactly what the first layers choose next."""
    info = plant(directory, **options)
    weights = np.random.default_rng(3).standard_normal((2, HIDDEN, EXPERTS)).astype(np.float32)
    for path in info.shards:
        with np.load(path) as archive:
            arrays = dict(archive)
        states = arrays[f"hidden_states_{LAYERS[-1]}"].astype(np.float32)
        for layer, weight in zip(LAYERS, weights, strict=False):
            next_experts = np.argsort(-states @ weight, axis=1)[:, :TOP_K]
            arrays[f"routed_experts_{layer}"][1:] = next_experts[:-1]
        write_shard(path, arrays)
    return info


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> TraceInfo:
    return plant_rule(tmp_path_factory.mktemp("traces") / "planted", sequences=15)


def train(traces: TraceInfo, out: Path, options: TrainingOptions = OPTIONS, **settings):
    return train_shadow_model(traces.path, out, options, progress=False, **settings)


@pytest.fixture(scope="module")
def trained(traces, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "predictor.safetensors"
    train(traces, out)
    return out


def plain(**change) -> ExpertPredictor:
    sizes = {"hidden_size": HIDDEN, "predictor_size": 64, "num_experts": EXPERTS, "top_k": TOP_K}
    return ExpertPredictor(PredictorConfig(**{**sizes, "lookahead": 2, **change}))


def make_bundle(next_token: ExpertPredictor | None) -> PredictorBundle:
    return PredictorBundle(LAYERS, {1: plain(), 3: plain(lookahead=1)}, next_token=next_token)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30], ids=["streamed", "whole"])
def test_a_token_is_paired_with_the_next_one_of_its_sequence(traces, memory_bytes):
    documents = {0, 1, 17, 40}
    dataset = NextTokenDataset(traces, documents, memory_bytes=memory_bytes)
    expected = []
    for shard in traces.shards:
        names = (
            "document",
            "position",
            "hidden_states_4",
            "routed_experts_1",
            "routed_experts_3",
        )
        document, position, states, *routed = (read_array(shard, name) for name in names)
        for i in range(len(document) - 1):
            if document[i] in documents and document[i + 1] == document[i]:
                assert position[i + 1] == position[i] + 1
                after, own = ([r[n].tolist() for r in routed] for n in (i + 1, i))
                expected.append((states[i].tolist(), after, own))
    found = [
        (h.tolist(), chosen.tolist(), previous.tolist())
        for samples in dataset.batches(7)
        for h, chosen, previous in zip(
            samples.hidden_states, samples.chosen, samples.previous, strict=True
        )
    ]
    assert found == expected
    assert len(dataset) == len(expected)
    assert dataset.targets == (1, 3)
    assert dataset.layer == 4


def test_a_gap_in_a_document_makes_no_pair(tmp_path):
    info = plant(tmp_path / "traces", shards=1, sequences=1)
    with np.load(info.shards[0]) as archive:
        arrays = dict(archive)
    n = len(arrays["position"])
    arrays["position"][10:] += 5  # tokens left out
    arrays["position"][20:] -= 20  # the same document from another place
    write_shard(info.shards[0], arrays)
    dataset = NextTokenDataset(info)
    rows = [i for i in range(n - 1) if i not in (9, 19)]
    states = read_array(info.shards[0], "hidden_states_4")[rows]
    (samples,) = dataset.groups()
    assert np.array_equal(samples.hidden_states, states)


def test_what_the_state_determines_is_learned(trained):
    bundle = PredictorBundle.load(trained)
    assert list(bundle) == [1, 3]
    assert bundle.next_token.config == PredictorConfig(HIDDEN, 64, EXPERTS, 2, TOP_K)
    assert bundle.next_token.calibration is None
    recall = bundle.training["next_token"]["validation"]["recall_at_k"]
    assert min(recall) > 0.7, "guessing finds a quarter"


def test_it_is_trained_beside_layers_that_share_parameters(traces, tmp_path):
    options = dataclasses.replace(OPTIONS, trunk_rank=8, share_trunk=True)
    bundle = train(traces, tmp_path / "p.safetensors", options, bits=4)
    assert bundle.next_token.config.trunk_rank == 0
    assert bundle.next_token.quantization == bundle[1].quantization
    assert min(bundle.training["next_token"]["validation"]["recall_at_k"]) > 0.5


def test_an_interrupted_training_goes_on_with_it(traces, trained, tmp_path, monkeypatch):
    out = tmp_path / "p.safetensors"
    checkpoint = tmp_path / "p.safetensors.checkpoint" / "next-token.safetensors"
    was_there = []

    def train_and_look():
        was_there.append(checkpoint.exists())
        train(traces, out)

    batches = 2 * 12 * -(-1600 // 64) + 100  # of both layers, and some of its own
    train_interrupted(monkeypatch, batches, train_and_look)
    assert was_there == [False, True]
    assert out.read_bytes() == trained.read_bytes()


def test_it_can_be_left_out(traces, tmp_path):
    out = tmp_path / "p.safetensors"
    command = ["train", "--traces", str(traces.path), "--out", str(out), "--epochs", "1"]
    assert main([*command, "--candidates", "gate", "--no-next-token", "--jobs", "1"]) == 0
    bundle = PredictorBundle.load(out)
    assert bundle.next_token is None
    assert "next_token" not in bundle.training
    assert evaluate(out, traces.path, progress=False)["next_token"] == {}


def test_traces_that_lack_what_it_needs_say_so(tmp_path, capsys):
    info = plant(tmp_path / "traces", with_routers=False)
    collection = read_collection(info.path) | {"recorded_layers": [1, 3]}
    write_collection(info.path, collection)
    fit = dataclasses.replace(FIT, epochs=1)
    options = dataclasses.replace(OPTIONS, fit=fit)
    bundle = train_shadow_model(info.path, tmp_path / "p.safetensors", options)
    reason = "the traces do not record the MoE layers [4]"
    assert bundle.next_token is None
    assert bundle.training["next_token"] == {"left_out": reason}
    assert f"next token: left out, {reason}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"has no states of layer 4, only of \(1, 3\)"):
        NextTokenDataset(open_traces(info.path))


def test_documents_of_one_token_have_no_next(tmp_path):
    info = plant(tmp_path / "traces", with_routers=False)
    for path in info.shards:
        with np.load(path) as archive:
            arrays = dict(archive)
        arrays["position"][:] = 0
        write_shard(path, arrays)
    options = dataclasses.replace(OPTIONS, fit=dataclasses.replace(FIT, epochs=1))
    bundle = train(info, tmp_path / "p.safetensors", options)
    assert bundle.next_token is None
    assert "two tokens in a row" in bundle.training["next_token"]["left_out"]


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_it_comes_back_bit_for_bit(tmp_path, bits):
    path, again = tmp_path / "bundle.safetensors", tmp_path / "again.safetensors"
    predictor = plain(hidden_size=64)
    layers = {1: plain(hidden_size=64)}
    bundle = PredictorBundle(LAYERS, layers, next_token=predictor)
    bundle.save(path, bits)
    loaded = PredictorBundle.load(path)
    expected = predictor if bits is None else predictor.quantized(bits)
    own, kept = loaded.next_token.named_parameters(), expected.named_parameters()
    assert own.keys() == kept.keys()
    assert all(mx.array_equal(own[name], kept[name]) for name in kept)
    assert loaded.next_token.config == predictor.config
    assert loaded.next_token.quantization == expected.quantization
    assert list(loaded) == [1]
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("bits", [None, 4])
def test_files_without_it_are_what_they_were(tmp_path, bits):
    with_it, without = tmp_path / "with.safetensors", tmp_path / "without.safetensors"
    bundle = make_bundle(plain())
    bundle.save(with_it, bits)
    bundle.next_token = None
    bundle.save(without, bits)
    (tensors, metadata), (old, old_metadata) = (
        read_tensors(p, "bundle") for p in (with_it, without)
    )
    assert not [key for key in (*old, *old_metadata) if "next_token" in key]
    assert metadata.pop("next_token") == json.loads(json.dumps(vars(plain().config)))
    assert metadata == old_metadata
    kept = {name: t for name, t in tensors.items() if not name.startswith("next_token.")}
    assert len(kept) < len(tensors)
    assert kept.keys() == old.keys()
    assert all(mx.array_equal(kept[name], old[name]) for name in old)
    loaded = PredictorBundle.load(without)
    assert loaded.next_token is None
    assert loaded.native_next_token() is None


def test_native_forwards_agree_and_layers_ignore_it(tmp_path):
    path = tmp_path / "bundle.safetensors"
    bundle = make_bundle(plain())
    bundle.save(path)
    h = mx.random.normal((5, HIDDEN))
    native = PredictorBundle.load(path).native_next_token("f32", threads=2)
    np.testing.assert_allclose(
        native.logits(h), np.array(bundle.next_token(h)), rtol=1e-4, atol=1e-5
    )
    from mlx_od_moe.native_predictor import load_bundle

    assert sorted(load_bundle(str(path), "f32")) == [1, 3]
    assert sorted(bundle.native("f32")) == [1, 3]


@pytest.mark.parametrize(
    ("predictor", "reason"),
    [
        (plain(hidden_size=32), "is for hidden_size 32, the layers' are for 24"),
        (plain(num_experts=13), "is for num_experts 13, the layers' are for 12"),
        (plain(top_k=4), "is for top_k 4, the layers' are for 3"),
        (plain(lookahead=4), "is of 4 layers; the model has 3"),
        (plain(previous_experts=True), "must be an MLP on a state alone"),
    ],
    ids=["hidden size", "experts", "top k", "layers", "previous experts"],
)
def test_what_does_not_fit_is_refused(predictor, reason):
    with pytest.raises(ValueError, match=f"next token's predictor {reason}"):
        make_bundle(predictor)


def test_it_is_quantised_as_the_layers_are():
    predictors = {1: plain(hidden_size=64)}
    with pytest.raises(ValueError, match="must be quantised as the layers' are"):
        PredictorBundle(LAYERS, predictors, next_token=plain(hidden_size=64).quantized(4))


def test_evaluation_measures_it_beside_the_previous_token(traces, trained, tmp_path, capsys):
    found = tmp_path / "found.json"
    files = ["--predictor", str(trained), "--traces", str(traces.path), "--json", str(found)]
    assert main(["evaluate", *files, "--jobs", "1"]) == 0
    result = json.loads(found.read_text())
    own = result["next_token"]
    validation = PredictorBundle.load(trained).training["next_token"]["validation"]
    assert own["recall_at_k"] == pytest.approx(validation["recall_at_k"])
    assert own["recall_at_2k"] == pytest.approx(validation["recall_at_2k"])
    assert 0 < own["samples"] < result["samples"]
    for n in ("recall_at_k", "recall_at_2k"):
        pairs = zip(own[n], own["previous_token"][n], strict=True)
        assert all(learned > previous + 0.1 for learned, previous in pairs)
    assert "of the next token" in table(result)
    assert table(result) in capsys.readouterr().out
