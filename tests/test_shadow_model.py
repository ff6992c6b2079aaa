"""The shadow model: shapes, predictions, saved files, errors, sizes and the native latency."""

import dataclasses
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mlx_od_moe import ExpertPredictor, PredictorConfig
from mlx_od_moe.predictor_config import ACTIVATIONS, TERMS
from mlx_od_moe.predictor_file import write_tensors
from mlx_od_moe.router import Router, RouterConfig
from mlx_od_moe.shadow_model import multi_hot

SMALL = PredictorConfig(hidden_size=64, predictor_size=32, num_experts=24, lookahead=3, top_k=4)


def random_predictor(config: PredictorConfig, seed: int = 0, **router) -> ExpertPredictor:
    """Every parameter random, those that start at 0 or 1 too, so that none can hide."""
    mx.random.seed(seed)
    options = RouterConfig(config.hidden_size, config.num_experts, **router)
    routers = [Router(options) for _ in range(config.lookahead * config.has_gate)]
    predictor = ExpertPredictor(config, routers)
    for module in (predictor, *routers):
        module.update(tree_map(lambda p: mx.random.normal(p.shape), module.parameters()))
    return predictor


def parameters(predictor: ExpertPredictor) -> dict[str, mx.array]:
    found = dict(tree_flatten(predictor.parameters()))
    for d, router in enumerate(predictor.routers):
        found |= {f"routers.{d}.{n}": p for n, p in tree_flatten(router.parameters())}
    return found


def bits_of(array: mx.array) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, np.array(array).tobytes()


@st.composite
def configs(draw: st.DrawFn) -> PredictorConfig:
    lookahead, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    return PredictorConfig(
        hidden_size=draw(st.sampled_from([1, 7, 33, 64, 128])),
        predictor_size=draw(st.sampled_from([1, 5, 64, 65])),
        num_experts=num_experts,
        lookahead=lookahead,
        top_k=draw(st.integers(1, min(8, num_experts))),
        activation=draw(st.sampled_from([*ACTIVATIONS])),
        layer_norm=draw(st.booleans()),
        terms=tuple(draw(st.lists(st.sampled_from(TERMS), min_size=lookahead, max_size=lookahead))),
        previous_experts=draw(st.booleans()),
        trunk_rank=draw(st.sampled_from([0, 1, 5, 64])),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), bits=st.sampled_from([None, 4, 8]), bias=st.booleans())
def test_every_parameter_comes_back_bit_for_bit(tmp_path_factory, config, bits, bias):
    path = tmp_path_factory.mktemp("round") / "predictor.safetensors"
    predictor = random_predictor(config, bias=bias, correction=True, scoring="sigmoid")
    predictor.save(path, bits)
    loaded = ExpertPredictor.load(path)
    saved = predictor if bits is None else predictor.quantized(bits)
    expected, found = parameters(saved), parameters(loaded)
    assert {n: bits_of(p) for n, p in found.items()} == {n: bits_of(p) for n, p in expected.items()}
    assert loaded.config == config
    assert [r.config for r in loaded.routers] == [r.config for r in predictor.routers]
    assert loaded.quantization == saved.quantization

    h = mx.random.normal((3, config.hidden_size))
    previous = mx.zeros((3, config.lookahead, config.top_k), mx.int16)
    logits = saved(h, previous)
    assert logits.shape == (3, config.lookahead, config.num_experts)
    assert bits_of(loaded(h, previous)) == bits_of(logits)

    again = path.with_name("again.safetensors")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("terms", [("mlp",) * 3, ("mlp+gate", "gate", "mlp"), ("gate",) * 3])
def test_leading_axes_are_kept(shape, terms):
    predictor = random_predictor(dataclasses.replace(SMALL, terms=terms, previous_experts=True))
    h = mx.random.normal((*shape, 64))
    previous = mx.random.randint(-1, 24, (*shape, 3, 4))
    assert predictor(h).shape == (*shape, 3, 24)
    assert predictor(h, previous).shape == (*shape, 3, 24)
    assert predictor.predict(h).shape == (*shape, 3, 4)
    assert predictor.predict(h, k=7).shape == (*shape, 3, 7)


@pytest.mark.parametrize("activation", [*ACTIVATIONS])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("trunk_rank", [0, 9])
def test_logits_are_those_of_the_formula(activation, layer_norm, trunk_rank):
    config = dataclasses.replace(
        SMALL,
        activation=activation,
        layer_norm=layer_norm,
        terms=("mlp", "mlp+gate", "gate"),
        previous_experts=True,
        trunk_rank=trunk_rank,
    )
    predictor = random_predictor(config)
    h, ids = mx.random.normal((6, 64)), mx.random.randint(-1, 24, (6, 3, 4))
    w = {name: np.array(p, np.float64) for name, p in parameters(predictor).items()}
    hot = np.zeros((6, 3, 24))
    for token, d, j in np.ndindex(6, 3, 4):
        if (e := int(ids[token, d, j].item())) >= 0:
            hot[token, d, e] = 1
    x = np.array(h, np.float64)
    seen = x @ w["projection.linear.weight"].T if trunk_rank else x
    inner = (
        seen @ w["trunk.weight"].T + w["trunk.bias"] + hot.reshape(6, -1) @ w["previous.weight"].T
    )
    if layer_norm:
        inner -= inner.mean(-1, keepdims=True)
        inner /= np.sqrt((inner**2).mean(-1, keepdims=True) + 1e-5)
        inner = inner * w["norm.weight"] + w["norm.bias"]
    inner = np.maximum(inner, 0) if activation == "relu" else inner / (1 + np.exp(-inner))
    mlp = (inner @ w["heads.weight"].T + w["heads.bias"]).reshape(6, 3, 24)
    gate = [
        w["gate_scale"][d] * ((x * w["gate_input_scale"][d]) @ w[f"routers.{d}.linear.weight"].T)
        for d in range(3)
    ]
    expected = np.stack([mlp[:, 0], mlp[:, 1] + gate[1], gate[2]], axis=1)
    np.testing.assert_allclose(np.array(predictor(h, ids)), expected, rtol=1e-4, atol=1e-3)


def test_predicted_ids_come_best_first():
    predictor = random_predictor(SMALL)
    h = mx.random.normal((50, 64))
    logits, ids = np.array(predictor(h)), np.array(predictor.predict(h, k=24))
    ranked = np.take_along_axis(logits, ids, -1)
    assert (np.diff(ranked, axis=-1) <= 0).all()
    assert (np.sort(ids, -1) == np.arange(24)).all()
    assert (np.array(predictor.predict(h)) == ids[..., :4]).all()


def test_an_unknown_previous_token_equals_one_with_no_experts():
    predictor = random_predictor(dataclasses.replace(SMALL, previous_experts=True))
    h = mx.random.normal((5, 64))
    none = mx.full((5, 3, 4), -1, mx.int16)
    assert mx.array_equal(predictor(h), predictor(h, none))
    assert not mx.array_equal(predictor(h), predictor(h, none + 1))


def test_multi_hot_counts_a_repeated_id_once_and_minus_one_nowhere():
    hot = multi_hot(mx.array([[0, 2, 2, -1], [-1, -1, -1, -1], [3, 1, 0, 2]]), 4)
    assert hot.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]


def test_a_hidden_state_of_another_size_names_both_sizes():
    predictor = ExpertPredictor(dataclasses.replace(SMALL, hidden_size=4096))
    with pytest.raises(ValueError, match=r"7168.*4096"):
        predictor(mx.zeros((1, 7168)))
    with pytest.raises(ValueError, match=r"7168.*4096"):
        predictor.predict(mx.zeros((1, 7168)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predicting_from_nan_or_infinity_is_an_error(bad):
    predictor = random_predictor(SMALL)
    h = np.zeros((4, 64), np.float32)
    h[2, 7] = bad
    with pytest.raises(ValueError, match="NaN"):
        predictor.predict(mx.array(h))


@pytest.mark.parametrize("k", [0, -1, 25])
def test_predicting_more_experts_than_there_are_is_an_error(k):
    with pytest.raises(ValueError, match=rf"24.*{k}"):
        random_predictor(SMALL).predict(mx.zeros((1, 64)), k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"lookahead": -1}, "lookahead"),
        ({"top_k": 25}, "top_k 25 exceeds num_experts 24"),
        ({"activation": "gelu"}, "gelu"),
        ({"trunk_rank": -1}, "trunk_rank can't be negative"),
        ({"terms": ("mlp",)}, "terms"),
        ({"terms": ("mlp", "mlp", "router")}, "router"),
    ],
)
def test_impossible_configurations_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_routers_must_be_as_many_as_the_terms_take():
    with pytest.raises(ValueError, match="3 routers, got 0"):
        ExpertPredictor(dataclasses.replace(SMALL, terms=("gate",) * 3))


def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path):
    whole = tmp_path / "whole.safetensors"
    random_predictor(SMALL).save(whole)
    data = whole.read_bytes()
    for size in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        cut = tmp_path / f"cut-{size}.safetensors"
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=cut.name):
            ExpertPredictor.load(cut)


def test_foreign_and_missing_files_are_errors_that_name_them(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    mx.save_safetensors(str(foreign), {"a": mx.zeros(2)}, {"format": "pt"})
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    for name in ("foreign.safetensors", "arrays.npz"):
        with pytest.raises(ValueError, match=name):
            ExpertPredictor.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="absent"):
        ExpertPredictor.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        {**dataclasses.asdict(SMALL), "hidden_size": 128},
        {**dataclasses.asdict(SMALL), "layer_norm": True},
        {**dataclasses.asdict(SMALL), "top_k": 99},
        {**dataclasses.asdict(SMALL), "unheard_of": 1},
        None,
    ],
)
def test_a_configuration_that_the_tensors_contradict_is_an_error_that_names_the_file(
    tmp_path: Path, config
):
    path = tmp_path / "other.safetensors"
    tensors = {f"predictor.{n}": p for n, p in parameters(random_predictor(SMALL)).items()}
    metadata = {"config": config, "routers": [], "quantization": None}
    write_tensors(path, tensors, "predictor", metadata)
    with pytest.raises(ValueError, match=path.name):
        ExpertPredictor.load(path)


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "predictor.safetensors"
    random_predictor(SMALL).save(path)
    before = path.read_bytes()

    def full(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OSError, match=path.name):
        random_predictor(SMALL, seed=1).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_default_predictor_is_at_most_4_mb_at_4_bits(tmp_path):
    path = tmp_path / "default.safetensors"
    predictor = ExpertPredictor(PredictorConfig())
    predictor.save(path, bits=4)
    size, weights = path.stat().st_size, sum(p.size for p in parameters(predictor).values())
    assert size <= 4_000_000
    assert 8 * size / weights < 4.6  # 4, and 0.5 for the groups' scales and biases
    assert ExpertPredictor.load(path).config == PredictorConfig()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_predictions_stay_close(bits):
    config = dataclasses.replace(SMALL, predictor_size=64, terms=("mlp", "mlp+gate", "gate"))
    mx.random.seed(3)
    router = RouterConfig(64, 24)
    predictor = ExpertPredictor(config, [Router(router) for _ in range(3)])
    h = mx.random.normal((200, 64))
    exact, close = np.array(predictor(h)), np.array(predictor.quantized(bits)(h))
    assert np.abs(close - exact).mean() < {4: 0.1, 8: 0.01}[bits] * exact.std()
    with pytest.raises(ValueError, match="already"):
        predictor.quantized(bits).quantized(bits)


def test_predictor_latency():
    """The native forward with top-8 of the default predictor, 4 bits: under a millisecond."""
    predictor = ExpertPredictor(PredictorConfig())  # 4096 → 1024 → 4 × 384
    native = predictor.native(format="int4", threads=1)
    x = np.random.default_rng(0).standard_normal((1, 4096), np.float32)
    took = []
    for _ in range(2200):
        start = time.perf_counter_ns()
        native.predict(x)
        took.append((time.perf_counter_ns() - start) / 1000)
    low, median, high = np.quantile(took[200:], [0, 0.5, 0.99])
    print(f"\npredictor 4096→1024→4×384 int4, 1 thread: min {low:.0f} µs  ", end="")
    print(f"median {median:.0f} µs  p99 {high:.0f} µs")
    assert median < 1000
