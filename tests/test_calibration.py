"""Calibration: what is planted is found, in MLX, natively, in files; what is none is refused."""

import dataclasses
import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_od_moe import ExpertPredictor, NativePredictor, PredictorBundle, PredictorConfig
from mlx_od_moe.calibrate_command import calibrate
from mlx_od_moe.calibration import CalibrationFit, calibrated
from mlx_od_moe.cli import main
from mlx_od_moe.context import ContextConfig
from mlx_od_moe.evaluate import evaluate
from mlx_od_moe.native_predictor import FORMATS, load_bundle, make_op
from mlx_od_moe.predictor_file import read_tensors, write_tensors
from mlx_od_moe.routing_trace import Predictions, open_routing, predict_layers
from mlx_od_moe.training import FitOptions, TrainingOptions, train_shadow_model
from planted_traces import plant
from test_native_predictor import TOLERANCE, make_predictor, relative_error

CONFIG = {"hidden_size": 192, "predictor_size": 96, "num_experts": 40, "lookahead": 3, "top_k": 6}
NUMBERS = mx.array([[1.25, -0.5], [0.75, 0.25], [1.5, 0.0]])


def with_calibration(numbers=NUMBERS, **options) -> ExpertPredictor:
    predictor = make_predictor(**(CONFIG | options))
    predictor.calibrate(numbers)
    return predictor


def test_scores_are_those_of_the_formula():
    logits = np.random.default_rng(0).normal(0, 5, (4, 2, 10)).astype(np.float32)
    numbers = np.array([[2.0, 1.0], [0.5, -3.0]])
    for top_k, (first, end) in {1: (0, 2), 4: (2, 6), 5: (3, 7), 8: (6, 10), 9: (8, 10)}.items():
        boundary = np.sort(logits, axis=-1)[..., ::-1][..., first:end].mean(-1, keepdims=True)
        expected = numbers[:, :1] * (logits - boundary) + numbers[:, 1:]
        found = np.array(calibrated(mx.array(logits), mx.array(numbers, mx.float32), top_k))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        moved = calibrated(mx.array(logits + 7), mx.array(numbers, mx.float32), top_k)
        np.testing.assert_allclose(found, np.array(moved), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("batches", [1, 5])
def test_a_planted_calibration_is_found(scale, batches):
    rng = np.random.default_rng(1)
    logits = (rng.normal(0, scale, (4000, 2, 16)) + rng.normal(0, 9 * scale, (4000, 2, 1))).astype(
        np.float32
    )
    planted = np.array([[2.0 / scale, -0.5], [0.7 / scale, 0.25]])
    scores = np.array(calibrated(mx.array(logits), mx.array(planted, mx.float32), 4))
    taken = rng.random(scores.shape) < 1 / (1 + np.exp(-scores))
    chosen = np.where(taken, np.arange(16), -1)
    fit = CalibrationFit(2, 4)
    for part in np.array_split(np.arange(4000), batches):
        fit.add(logits[part], chosen[part])
    np.testing.assert_allclose(np.array(fit.result()), planted, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("sign", [0, -1, 1000])
def test_a_fit_keeps_the_order_whatever_the_logits_are_worth(sign):
    """Worth nothing, worse than nothing, and never wrong."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(500, 1, 8)).astype(np.float32)
    truth = np.sign(sign) * logits if sign else rng.normal(size=logits.shape)
    chosen = np.argsort(-truth, axis=-1)[..., :3]
    fit = CalibrationFit(1, 3)
    fit.add(sign * logits if sign == 1000 else logits, chosen)
    ((factor, offset),) = fit.result().tolist()
    assert 0 < factor < np.inf
    assert np.isfinite(offset)
    if sign <= 0:  # the share of experts that are chosen
        assert 1 / (1 + np.exp(-offset)) == pytest.approx(3 / 8, abs=0.01)


def test_tokens_without_choices_do_not_count():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(300, 1, 8)).astype(np.float32)
    chosen = np.argsort(-(logits + rng.normal(size=logits.shape)), axis=-1)[..., :3]
    one, two = CalibrationFit(1, 3), CalibrationFit(1, 3)
    one.add(logits, chosen)
    two.add(np.concatenate([logits, logits]), np.concatenate([chosen, np.full_like(chosen, -1)]))
    assert one.result().tolist() == two.result().tolist()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_native_scores_agree_with_python(kernel, format, tokens):
    predictor = with_calibration(terms=("mlp", "mlp+gate", "gate"))
    native, x = predictor.native(format), mx.random.normal((tokens, 192))
    assert relative_error(native.logits(x), np.array(predictor(x))) < TOLERANCE[format]
    predictor.calibrate(None)
    plain = predictor.native(format)
    assert (native.predict(x, 20) == plain.predict(x, 20)).all()
    # What is likelier stays so; rounding may make equals of two.
    order = np.argsort(-plain.logits(x), axis=-1)
    assert (np.diff(np.take_along_axis(native.logits(x), order, axis=-1)) <= 0).all()


@pytest.mark.parametrize(("num_experts", "top_k"), [(384, 8), (100, 30), (3, 2), (2, 1), (33, 32)])
def test_native_scores_agree_at_any_number_of_experts(num_experts, top_k):
    predictor = with_calibration(num_experts=num_experts, top_k=top_k)
    x = mx.random.normal((3, 192))
    assert relative_error(predictor.native("f32").logits(x), np.array(predictor(x))) < 1e-4


def test_the_operation_agrees(kernel):
    for terms in (("mlp",) * 3, ("mlp", "mlp+gate", "gate")):
        predictor = with_calibration(terms=terms)
        op, x = make_op(predictor, "f32"), mx.random.normal((2, 3, 192))
        expected = np.array(predictor(x))
        assert relative_error(np.array(op(x)), expected) < 1e-5
        assert relative_error(np.array(op.from_ops(x)), expected) < 1e-5


def test_no_calibration_changes_no_bit():
    predictor = make_predictor(**CONFIG)
    x = mx.random.normal((5, 192))
    before, native = np.array(predictor(x)), predictor.native("f32").logits(x)
    names = set(predictor.named_parameters())
    predictor.calibrate(NUMBERS)
    assert not (np.array(predictor(x)) == before).any()
    assert set(predictor.named_parameters()) - names == {"predictor.calibration"}
    assert "calibration" not in predictor.trainable_parameters()
    predictor.calibrate(None)
    assert (np.array(predictor(x)) == before).all()
    assert (predictor.native("f32").logits(x) == native).all()
    assert set(predictor.named_parameters()) == names


def test_states_beyond_float32_keep_their_order():
    predictor = with_calibration()
    x = np.full((1, 192), 3e38, np.float32)
    native = predictor.native("f32")
    ids = native.predict(x)
    predictor.calibrate(None)
    assert (ids == predictor.native("f32").predict(x)).all()


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_files_hold_it(tmp_path, bits):
    path = tmp_path / "p.safetensors"
    predictor = with_calibration(terms=("mlp", "mlp+gate", "gate"))
    predictor.save(path, bits)
    loaded, x = ExpertPredictor.load(path), mx.random.normal((3, 192))
    assert mx.array_equal(loaded.calibration, NUMBERS)
    expected = np.array(loaded(x))
    assert (
        expected == np.array((predictor if bits is None else predictor.quantized(bits))(x))
    ).all()
    native = NativePredictor.load(str(path), format="f32")
    assert relative_error(native.logits(x), expected) < 1e-4
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("bits", [None, 4])
def test_bundles_hold_each_layers_own(tmp_path, bits):
    config = PredictorConfig(64, 32, 12, 2, 3)
    first, second = ExpertPredictor(config), ExpertPredictor(config)
    second.calibrate(NUMBERS[:2])
    path = tmp_path / "bundle.safetensors"
    PredictorBundle([1, 3, 5, 7], {1: first, 3: second}).save(path, bits)
    loaded, x = PredictorBundle.load(path), mx.random.normal((3, 64))
    assert loaded[1].calibration is None
    assert mx.array_equal(loaded[3].calibration, NUMBERS[:2])
    packed, read = loaded.native("f32"), load_bundle(str(path), "f32")
    for layer, predictor in loaded.items():
        assert relative_error(packed[layer].logits(x), np.array(predictor(x))) < 1e-4
        assert (read[layer].logits(x) == packed[layer].logits(x)).all()


BAD = {
    r"must be floats \[3, 2\], but is .*\[2, 2\]": NUMBERS[:2],
    r"must be floats \[3, 2\], but is .*\[3, 1\]": NUMBERS[:, :1],
    r"must be floats \[3, 2\], but is ": NUMBERS.astype(mx.uint32),
    r".*got 0\.0+ and -0\.50* at distance 1": NUMBERS * mx.array([[0, 1], [1, 1], [1, 1]]),
    r".*got -0\.750* and .* at distance 2": NUMBERS * mx.array([[1, 1], [-1, 1], [1, 1]]),
    r".*got inf and .* at distance 3": NUMBERS + mx.array([[0, 0], [0, 0], [mx.inf, 0]]),
    r".*got .* and -?nan at distance 3": NUMBERS + mx.array([[0, 0], [0, 0], [0, mx.nan]]),
}


@pytest.mark.parametrize(("reason", "numbers"), BAD.items(), ids=BAD)
def test_what_is_none_is_refused_with_file_rule_and_value(tmp_path, reason, numbers):
    predictor = make_predictor(**CONFIG)
    with pytest.raises(ValueError, match=rf"\[ExpertPredictor\] calibration {reason}"):
        predictor.calibrate(numbers)
    assert predictor.calibration is None
    for kind, prefix in (("predictor", "predictor"), ("bundle", "layers.0")):
        path, bad = tmp_path / f"{kind}.safetensors", tmp_path / f"bad-{kind}.safetensors"
        if kind == "bundle":
            PredictorBundle([0, 1, 2, 3], {0: predictor}).save(path)
        else:
            predictor.save(path)
        tensors, metadata = read_tensors(path, kind)
        write_tensors(bad, tensors | {f"{prefix}.calibration": numbers}, kind, metadata)
        load = ExpertPredictor.load if kind == "predictor" else PredictorBundle.load
        with pytest.raises(ValueError, match=rf"bad-{kind}\S*\] {prefix}\.calibration {reason}"):
            load(bad)
        native = NativePredictor.load if kind == "predictor" else load_bundle
        with pytest.raises(ValueError, match=rf"bad-{kind}\S*\].*calibration {reason}"):
            native(str(bad))


def test_where_all_experts_are_chosen_there_is_no_boundary():
    predictor = make_predictor(**(CONFIG | {"num_experts": 6}))
    with pytest.raises(ValueError, match=r"top_k must be below num_experts \(6\), got 6"):
        predictor.calibrate(NUMBERS)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("traces") / "planted", sequences=30)


def options_for(loss, context):
    fit = FitOptions(loss=loss, epochs=6, batch_size=256, learning_rate=3e-3, patience=6)
    return TrainingOptions(
        predictor_size=32, candidates=("mlp+gate", "gate"), context=context, fit=fit
    )


def mean_error(path, traces) -> float:
    found = evaluate(path, traces.path, progress=False)
    return float(np.mean(found["methods"]["predictor"]["calibration_error"]))


@pytest.mark.parametrize("loss", ["soft", "kl", "softmax"])
@pytest.mark.parametrize("context", [None, ContextConfig(8, 8, 8)], ids=["alone", "together"])
def test_training_calibrates_what_its_loss_leaves_free(tmp_path, traces, loss, context):
    out, plain = tmp_path / "p.safetensors", tmp_path / "plain.safetensors"
    bundle = train_shadow_model(traces.path, out, options_for(loss, context), progress=False)
    for predictor in bundle.values():
        predictor.calibrate(None)
    bundle.save(plain)
    predictions = Predictions.empty(open_routing(traces.path), 2, 6)
    with pytest.warns(UserWarning, match=rf"trained with the loss {loss} and has no calibration"):
        predict_layers(predictions, open_routing(traces.path), plain, "f32", lambda n: None)
    with warnings.catch_warnings(action="error"):
        predict_layers(predictions, open_routing(traces.path), out, "f32", lambda n: None)
    error, without = mean_error(out, traces), mean_error(plain, traces)
    assert error < without / (2 if loss == "soft" else 3)  # soft labels are nearly probabilities
    assert error < 0.03
    calibrate(plain, traces.path, tmp_path / "again.safetensors")
    again = PredictorBundle.load(tmp_path / "again.safetensors")
    for layer, predictor in PredictorBundle.load(out).items():
        np.testing.assert_allclose(
            np.array(again[layer].calibration),
            np.array(predictor.calibration),
            rtol=3e-3,
            atol=3e-3,  # training may have multiplied in bfloat16
        )


@pytest.mark.parametrize("context", [None, ContextConfig(8, 8, 8)], ids=["alone", "together"])
def test_bce_needs_none_but_can_have_one(tmp_path, traces, context, capsys):
    out, calibrated_file = tmp_path / "p.safetensors", tmp_path / "c.safetensors"
    options = dataclasses.replace(options_for("bce", context), predictor_size=64)
    bundle = train_shadow_model(traces.path, out, options, bits=4, progress=False)
    assert all(predictor.calibration is None for predictor in bundle.values())
    command = ["calibrate", "--predictor", out, "--traces", traces.path, "--out", calibrated_file]
    assert main([str(word) for word in command]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(bundle)
    found = PredictorBundle.load(calibrated_file)
    for layer, predictor in found.items():
        predictor.calibrate(None)
        assert predictor.quantization == bundle[layer].quantization
        x = mx.random.normal((4, traces.hidden_size))
        assert mx.array_equal(predictor(x), bundle[layer](x))
