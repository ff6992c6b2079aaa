"""The training loop by itself: early stopping, the best epoch, the order of samples, progress."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_od_moe import ExpertPredictor, PredictorConfig
from mlx_od_moe.training.dataset import LayerDataset
from mlx_od_moe.training.fit import FitOptions, fit, measure
from planted_traces import EXPERTS, HIDDEN, TOP_K, plant

# So fast on so little that validation soon falls: the best epoch is not the last.
OVERFIT = FitOptions(epochs=40, batch_size=16, learning_rate=0.03, patience=4, seed=2)


class Recording(LayerDataset):
    """Keeps the order in which samples are taken, epoch by epoch."""

    def batches(self, batch_size, rng=None):
        if not hasattr(self, "epochs"):
            self.epochs = []
        self.epochs.append([])
        for samples in super().batches(batch_size, rng):
            self.epochs[-1].append(samples.hidden_states.tobytes())
            yield samples


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("traces") / "planted")


def run(traces, checkpoint, options=OVERFIT, advance=lambda n: None, **settings):
    mx.random.seed(0)
    config = PredictorConfig(
        hidden_size=HIDDEN, predictor_size=64, num_experts=EXPERTS, lookahead=2, top_k=TOP_K
    )
    predictor = ExpertPredictor(config)
    training = Recording(traces, 1, {0, 1, 2, 3}, **settings)
    validation = LayerDataset(traces, 1, {10, 11, 12, 13})
    recall = fit(predictor, training, validation, options, checkpoint, advance)
    return predictor, training, validation, recall


def state_of(checkpoint) -> dict:
    return json.loads(mx.load(str(checkpoint), return_metadata=True)[1]["state"])


def test_training_stops_without_progress_and_returns_its_best_epoch(traces, tmp_path):
    path, counted = tmp_path / "c.safetensors", []
    predictor, training, validation, recall = run(traces, path, advance=counted.append)
    history = state_of(path)["history"]
    best = int(np.argmax(history))
    assert len(history) == best + 1 + OVERFIT.patience < OVERFIT.epochs
    assert history[-1] < history[best]
    assert np.mean(recall.at(TOP_K)) == pytest.approx(history[best])
    assert measure(predictor, validation, TOP_K).report() == recall.report()
    assert sum(counted) == OVERFIT.epochs * len(training)
    assert min(counted) >= 0


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_every_epoch_sees_every_sample_in_an_order_of_its_own(traces, tmp_path, memory_bytes):
    options = FitOptions(epochs=3, batch_size=16)
    orders = [
        run(traces, tmp_path / f"{i}.safetensors", options, memory_bytes=memory_bytes)[1].epochs
        for i in range(2)
    ]
    assert orders[0] == orders[1]
    rows = [b"".join(epoch) for epoch in orders[0]]
    assert len(rows) == len(set(rows)) == 3
    width = 2 * HIDDEN
    in_order = [sorted(r[i : i + width] for i in range(0, len(r), width)) for r in rows]
    assert in_order[0] == in_order[1] == in_order[2]


def test_a_finished_checkpoint_is_not_trained_further(traces, tmp_path):
    path = tmp_path / "c.safetensors"
    predictor, *_ = run(traces, path)
    before, counted = path.read_bytes(), []
    again, training, _, _ = run(traces, path, advance=counted.append)
    assert not hasattr(training, "epochs")
    assert path.read_bytes() == before
    assert sum(counted) == OVERFIT.epochs * len(training)
    pairs = zip(tree_flatten(predictor.parameters()), tree_flatten(again.parameters()), strict=True)
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize("learning_rate", [1e30, float("nan")])
def test_divergence_is_an_error_and_leaves_no_checkpoint(traces, tmp_path, learning_rate):
    path = tmp_path / "c.safetensors"
    with pytest.raises(ValueError, match=r"layer 1.*diverged at learning rate"):
        run(traces, path, FitOptions(batch_size=16, learning_rate=learning_rate))
    assert not path.exists()


def test_frozen_routers_and_scales_do_not_move(traces, tmp_path):
    from mlx_od_moe.model_routers import load_routers
    from mlx_od_moe.training.layer_trainer import gate_predictor

    config = PredictorConfig(
        hidden_size=HIDDEN,
        predictor_size=8,
        num_experts=EXPERTS,
        lookahead=2,
        top_k=TOP_K,
        terms=("mlp+gate",) * 2,
    )
    routers = load_routers(traces.routers)
    predictor = gate_predictor(config, 1, (3, 4), routers)
    weights = [np.array(router.linear.weight) for router in predictor.routers]
    training = LayerDataset(traces, 1)
    options = FitOptions(epochs=2, learning_rate=0.01)
    fit(predictor, training, training, options, tmp_path / "c.safetensors", lambda n: None)
    for router, weight in zip(predictor.routers, weights, strict=True):
        assert (np.array(router.linear.weight) == weight).all()
    assert (np.array(predictor.gate_input_scale) == 1).all()
    assert not (np.array(predictor.gate_scale) == 1).all()


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": 0}, {"patience": -1}, {"loss": "hinge"}]
)
def test_impossible_options_name_themselves(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        FitOptions(**change)


def test_a_full_disk_names_the_checkpoint_and_keeps_the_last_one(traces, tmp_path, monkeypatch):
    checkpoint = tmp_path / "c.safetensors"
    save, written = mx.save_safetensors, []

    def full(path: str, *rest) -> None:
        written.append(path)
        save(path, *rest)
        if len(written) == 3:
            raise RuntimeError("[write] Unable to write 8 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match=r"c\.safetensors\] could not be written: \[write\] Unable"):
        run(traces, checkpoint, FitOptions(epochs=5))
    assert state_of(checkpoint)["epoch"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
