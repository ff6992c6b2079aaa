"""Training with one first factor for all layers: it learns from all, repeats and resumes."""

import dataclasses
import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from interruptions import train_interrupted
from mlx_od_moe import PredictorBundle
from mlx_od_moe.cli import main
from mlx_od_moe.context import ContextConfig
from mlx_od_moe.projection import Projection
from mlx_od_moe.training.fit import FitOptions
from mlx_od_moe.training.layer_trainer import TrainingOptions
from mlx_od_moe.training.train_shadow import train_shadow_model
from planted_traces import HIDDEN, plant

RANK = 12
FIT = FitOptions(epochs=3, batch_size=512, learning_rate=2e-3, seed=1)
OPTIONS = TrainingOptions(predictor_size=24, trunk_rank=RANK, share_trunk=True, fit=FIT)


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


def fresh_projection() -> np.ndarray:
    mx.random.seed(FIT.seed)
    return np.array(Projection(HIDDEN, RANK).linear.weight)


@pytest.mark.parametrize("context", [None, ContextConfig(4, 4, 8)], ids=["alone", "context"])
def test_layers_share_one_projection_that_has_learned(traces, tmp_path, context):
    options = dataclasses.replace(OPTIONS, context=context)
    bundle = train(traces, tmp_path / "p.safetensors", options)
    assert len(bundle) == 2
    assert {id(p.shared_projection) for p in bundle.values()} == {id(bundle.projection)}
    moved = np.array(bundle.projection.linear.weight) - fresh_projection()
    assert np.abs(moved).max() > 1e-3
    assert bundle.context == context


def test_the_projection_learns_from_every_layer(traces, tmp_path):
    """What it becomes depends on each layer that it is trained with."""
    found = [
        np.array(
            train(traces, tmp_path / f"{i}.safetensors", layers=layers).projection.linear.weight
        )
        for i, layers in enumerate(([1], [3], [1, 3]))
    ]
    for a, b in itertools.combinations(found, 2):
        assert np.abs(a - b).max() > 1e-3


def test_shared_and_own_projections_find_more_than_the_gate(tmp_path):
    traces = plant(tmp_path / "traces", layers=(0, 1, 2), sequences=40)
    fit = FitOptions(loss="kl", epochs=15, batch_size=512, learning_rate=2e-3, patience=15)
    for share in (False, True):
        options = TrainingOptions(
            64, candidates=("mlp+gate", "gate"), trunk_rank=20, share_trunk=share, fit=fit
        )
        bundle = train(traces, tmp_path / f"{share}.safetensors", options)
        assert (bundle.projection is not None) == share
        for report in bundle.training["layers"].values():
            found = report["candidates"]
            assert found["mlp+gate"][0] > found["gate"][0] + 0.02


def test_the_same_seed_gives_the_same_file(traces, trained, tmp_path):
    train(traces, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("calls", [1, 4])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    traces, trained, tmp_path, monkeypatch, calls
):
    out = tmp_path / "p.safetensors"
    train_interrupted(monkeypatch, calls, lambda: train(traces, out))
    assert out.read_bytes() == trained.read_bytes()


def test_the_command_line_trains_and_evaluates_it(traces, tmp_path, capsys):
    out = str(tmp_path / "p.safetensors")
    flags = ["--trunk-rank", "8", "--share-trunk", "--predictor-size", "16", "--epochs", "1"]
    assert main(["train", "--traces", str(traces.path), "--out", out, "--bits", "8", *flags]) == 0
    bundle = PredictorBundle.load(out)
    assert bundle.projection is not None
    assert {p.config.trunk_rank for p in bundle.values()} == {8}
    assert main(["evaluate", "--predictor", out, "--traces", str(traces.path), "--jobs", "1"]) == 0
    assert "shadow model" in capsys.readouterr().out


def test_sharing_needs_a_rank():
    with pytest.raises(ValueError, match="share_trunk needs a trunk_rank"):
        TrainingOptions(share_trunk=True)
