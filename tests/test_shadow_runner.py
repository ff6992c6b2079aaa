"""ShadowRunner from Python: states in, predictions out; lazy arrays, steps, errors."""

import gc
import sys
import threading
import weakref

import mlx.core as mx
import numpy as np
import pytest

from mlx_od_moe import (
    ExpertPredictor,
    NativePredictor,
    PredictionQueue,
    PredictorBundle,
    PredictorConfig,
    ShadowRunner,
)

HIDDEN, EXPERTS, LOOKAHEAD, TOP_K = 64, 24, 2, 4
LAYERS = [1, 3, 5, 6]
WAIT = 30  # seconds that no test takes


def new_predictor(lookahead: int = LOOKAHEAD, **options: bool) -> ExpertPredictor:
    config = PredictorConfig(HIDDEN, 32, EXPERTS, lookahead, TOP_K, **options)
    return ExpertPredictor(config)


@pytest.fixture(scope="module")
def native() -> NativePredictor:
    mx.random.seed(3)
    return new_predictor().native("f32")


@pytest.fixture(scope="module")
def bundle() -> PredictorBundle:
    mx.random.seed(4)
    return PredictorBundle(
        LAYERS, {1: new_predictor(), 3: new_predictor(), 5: new_predictor(lookahead=1)}
    )


@pytest.fixture
def runner(native):
    with ShadowRunner(native, moe_layers=LAYERS) as runner:
        yield runner


def state(seed: int = 0, *leading: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*leading, HIDDEN), dtype=np.float32)


def test_predicts_what_the_predictor_predicts(runner, native):
    x = state()
    assert runner.predict_async(x, 3) == 0
    assert runner.get_predictions_for_layer(5, WAIT) == native.predict(x)[0].tolist()
    scored = runner.get_scored_predictions_for_layer(6, WAIT)
    ids = native.predict(x)[1]
    assert [expert for expert, _ in scored] == ids.tolist()
    np.testing.assert_allclose([s for _, s in scored], native.logits(x)[1][ids], rtol=1e-6)
    assert runner.get_predictions_for_layer(3, WAIT) == []
    assert runner.get_predictions_for_layer(1) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x[None, None],
        lambda x: np.repeat(x, 2)[::2],
        lambda x: mx.array(x),
        lambda x: mx.array(x)[None] * 1,
        lambda x: mx.contiguous(mx.stack([mx.array(x)] * 3, axis=-1))[:, 1],
    ],
    ids=["numpy", "leading axes", "strided numpy", "mx", "lazy mx", "strided mx"],
)
@pytest.mark.parametrize("evaluated", [True, False])
def test_every_kind_of_array(runner, native, make, evaluated):
    x = make(state(5))
    if evaluated and isinstance(x, mx.array):
        mx.eval(x)
    runner.predict_async(x, 1)
    assert runner.get_predictions_for_layer(3, WAIT) == native.predict(state(5))[0].tolist()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(runner, native, dtype):
    x = mx.array(state(6)).astype(dtype)
    runner.predict_async(x, 1)
    expected = native.predict(x.astype(mx.float32))
    assert runner.get_predictions_for_layer(3, WAIT) == expected[0].tolist()


def test_a_numpy_buffer_may_be_overwritten_at_once(runner, native):
    x = state(7)
    expected = native.predict(x)[0].tolist()
    runner.predict_async(x, 1)
    x[:] = 0
    assert runner.get_predictions_for_layer(3, WAIT) == expected


def test_a_lazy_array_is_not_waited_for_and_stays_usable(runner, native):
    """The runner predicts from what another thread computes; nothing is evaluated twice."""
    a = mx.random.normal((600, 600))
    mx.eval(a)
    slow = a
    for _ in range(20):
        slow = (slow @ a) * 0.01
    h = slow[0, :HIDDEN] * 0 + mx.array(state(8))
    runner.predict_async(h, 1)
    assert runner.get_predictions_for_layer(3) == []  # far from computed
    after = (h + 1).sum().item()
    assert after == pytest.approx(float((state(8) + 1).sum()), rel=1e-4)
    assert runner.get_predictions_for_layer(3, WAIT) == native.predict(state(8))[0].tolist()


def test_threads_of_python_predict_from_their_own_graphs(native):
    """MLX's streams belong to threads: a runner that evaluated would fail here."""
    failures: list[str] = []

    def work(seed: int) -> None:
        with ShadowRunner(native, moe_layers=LAYERS) as own:
            for i in range(20):
                x = state(100 * seed + i)
                own.predict_async(mx.array(x) * 1, 1)
                if own.get_predictions_for_layer(3, WAIT) != native.predict(x)[0].tolist():
                    failures.append(f"{seed} {i}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_steps_follow_the_layers_and_forget(runner, native):
    x, y = state(1), state(2)
    assert [runner.predict_async(x, layer) for layer in LAYERS] == [0, 0, 0, 0]
    assert runner.get_predictions_for_layer(6, WAIT) != []
    assert runner.predict_async(y, 1) == 1
    assert runner.step == 1
    assert runner.get_predictions_for_layer(6, WAIT) == []
    assert runner.get_predictions_for_layer(5, WAIT) == native.predict(y)[1].tolist()
    assert runner.predict_async(x, 1, step=1) == 1
    assert runner.get_predictions_for_layer(5, WAIT) == native.predict(x)[1].tolist()
    assert runner.predict_async(x, 1, step=9) == 9
    with pytest.raises(ValueError, match="never go back, got 8 after 9"):
        runner.predict_async(x, 1, step=8)


def test_queue_and_callback_get_every_prediction(native):
    called = []
    queue = PredictionQueue(64)
    with ShadowRunner(
        native, moe_layers=LAYERS, queue=queue, on_prediction=called.append
    ) as runner:
        assert runner.queue is queue
        runner.predict_async(state(), 1)
        runner.predict_async(state(), 5)
        runner.get_predictions_for_layer(6, WAIT)
    popped = [queue.try_pop() for _ in range(3)]
    assert queue.try_pop() is None
    assert [(p.source_layer, p.target_layer, p.distance) for p in popped] == [
        (1, 3, 1),
        (1, 5, 2),
        (5, 6, 1),
    ]
    assert [p.expert_ids for p in called] == [p.expert_ids for p in popped]
    assert popped[0].ready_ns > 0
    assert not queue.closed


def test_prefill_is_the_union_most_wanted_first(native):
    x = state(3, 2, 50)
    ids, counts = np.unique(native.predict(x, k=6)[..., 1, :], return_counts=True)
    with ShadowRunner(native, moe_layers=LAYERS, k=6) as runner:
        runner.predict_async(x, 1)
        scored = runner.get_scored_predictions_for_layer(5, WAIT)
        assert dict(scored) == dict(zip(ids.tolist(), counts.tolist(), strict=True))
        assert [n for _, n in scored] == sorted(counts.tolist(), reverse=True)
        queued: list[int] = []
        while (p := runner.queue.try_pop()) is not None:
            if p.target_layer == 5:
                assert p.batch
                assert p.first_rank == len(queued)
                queued += p.expert_ids
        assert queued == [expert for expert, _ in scored]


def test_a_large_mx_array_is_predicted_without_a_copy(runner, native):
    x = state(4, 500)
    a = mx.array(x)
    mx.eval(a)
    runner.predict_async(a, 1)
    del a
    scored = runner.get_scored_predictions_for_layer(3, WAIT)
    assert sum(n for _, n in scored) == 500 * TOP_K


def test_previous_experts_take_part():
    mx.random.seed(9)
    native = new_predictor(previous_experts=True).native("f32")
    x = state()
    previous = np.array([[1, 5, 9, -1], [2, 2, 20, 23]], dtype=np.int32)
    expected = native.predict(x, previous=previous)
    assert (expected != native.predict(x)).any()
    with ShadowRunner(native, moe_layers=LAYERS) as runner:
        for given in (previous, mx.array(previous)):
            runner.predict_async(x, 1, previous=given)
            assert runner.get_predictions_for_layer(3, WAIT) == expected[0].tolist()
        with pytest.raises(ValueError, match=r"previous must be \[2, 3\], but is \[3, 3\]"):
            runner.predict_async(x, 1, previous=np.zeros((3, 3), np.int32))


def test_context_takes_part(runner, native):
    x, context = state(), np.linspace(-3, 3, 32, dtype=np.float32)
    runner.predict_async(x, 1, context=context)
    expected = native.predict(x, context=context)
    assert runner.get_predictions_for_layer(3, WAIT) == expected[0].tolist()


@pytest.mark.parametrize("as_path", [True, False])
def test_bundle(bundle, tmp_path, as_path):
    bundle.save(tmp_path / "bundle.safetensors")
    source = tmp_path / "bundle.safetensors" if as_path else bundle
    natives = bundle.native("f32")
    x = state()
    with ShadowRunner(source, format="f32") as runner:
        assert runner.moe_layers == LAYERS
        for layer in LAYERS:
            runner.predict_async(x, layer)
            runner.get_predictions_for_layer(6, WAIT)
        expected = {3: natives[1].predict(x)[0], 5: natives[3].predict(x)[0]}
        expected[6] = natives[5].predict(x)[0]
        for layer, ids in expected.items():
            assert runner.get_predictions_for_layer(layer) == ids.tolist()
        for layer in (0, 2, 7, -1):
            with pytest.raises(ValueError, match=rf"\[1, 3, 5, 6\], got {layer}"):
                runner.predict_async(x, layer)
            with pytest.raises(ValueError, match=rf"\[1, 3, 5, 6\], got {layer}"):
                runner.get_predictions_for_layer(layer)
    with pytest.raises(ValueError, match=r"moe_layers must be the bundle's \[1, 3, 5, 6\]"):
        ShadowRunner(bundle, moe_layers=[1, 2])


def test_single_predictor_from_its_file_serves_any_layer(tmp_path):
    predictor = new_predictor()
    predictor.save(tmp_path / "predictor.safetensors")
    x = state()
    expected = predictor.native("f32").predict(x)
    with ShadowRunner(str(tmp_path / "predictor.safetensors"), "f32") as runner:
        for layer in (0, 60, 254):
            runner.predict_async(x, layer)
            assert runner.get_predictions_for_layer(layer + 1, WAIT) == expected[0].tolist()
        assert runner.predict_async(x, 255) == runner.step  # the last layer: nothing to predict


def test_wrong_sources_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        ShadowRunner(tmp_path / "none.safetensors")
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(3)})
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        ShadowRunner(tmp_path / "other.safetensors")
    with pytest.raises(TypeError, match="got int"):
        ShadowRunner(3)


def test_wrong_states_are_refused_at_once(runner):
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 64\], but is \[65\]"):
        runner.predict_async(np.zeros(65, np.float32), 1)
    with pytest.raises(ValueError, match=r"but is \[\]"):
        runner.predict_async(mx.array(1.0), 1)
    for wrong in (np.zeros(64), mx.zeros(64, mx.int32), "state", None, [0.0] * 64):
        with pytest.raises(TypeError, match=r"hidden_states must be a numpy array or mx\.array"):
            runner.predict_async(wrong, 1)
    with pytest.raises(ValueError, match=r"k must be 1 \.\.\. 24, got 25"):
        ShadowRunner(new_predictor(), k=25)
    with pytest.raises(ValueError, match=r"can't be part of mx\.compile"):
        mx.compile(lambda h: (runner.predict_async(h, 1), h)[1])(mx.zeros(64))
    assert runner.statistics()["submitted"] == 0


def wait_for_errors(runner: ShadowRunner, n: int) -> None:
    while runner.statistics()["errors"] < n:
        threading.Event().wait(0.001)


def test_errors_are_raised_by_later_calls_with_their_traceback(native):
    def fail(prediction) -> None:
        raise LookupError(f"no expert {prediction.target_layer}")

    runner = ShadowRunner(native, moe_layers=LAYERS, on_prediction=fail)
    runner.predict_async(state(), 1)
    wait_for_errors(runner, 2)
    with pytest.raises(LookupError, match="no expert 3") as raised:
        runner.predict_async(state(), 1)
    assert raised.traceback[-1].name == "fail"
    with pytest.raises(LookupError, match="no expert 5"):
        runner.get_predictions_for_layer(3)
    assert runner.get_predictions_for_layer(3) == native.predict(state())[0].tolist()
    x = state()
    x[7] = np.nan
    runner.predict_async(x, 1)
    wait_for_errors(runner, 3)
    with pytest.raises(ValueError, match="token 0 is not finite"):
        runner.close()
    assert runner.statistics()["failed"] == 1


def test_an_error_that_no_call_could_raise_is_reported_when_the_runner_goes(native, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: unraisable.append(u.exc_type))
    runner = ShadowRunner(native, moe_layers=LAYERS, on_prediction=lambda p: 1 / 0)
    runner.predict_async(state(), 5)
    wait_for_errors(runner, 1)
    del runner
    gc.collect()
    assert unraisable == [ZeroDivisionError]


def test_closed_runners_refuse(native):
    runner = ShadowRunner(native, moe_layers=LAYERS)
    queue = runner.queue
    runner.close()
    runner.close()
    assert runner.closed
    assert queue.closed
    with pytest.raises(RuntimeError, match=r"\[ShadowRunner\] is closed"):
        runner.predict_async(state(), 1)


def test_a_callback_may_use_and_close_its_runner(native):
    done = threading.Event()

    def callback(prediction) -> None:
        assert runner.get_predictions_for_layer(prediction.target_layer, None)
        runner.close()
        done.set()

    runner = ShadowRunner(native, moe_layers=LAYERS, on_prediction=callback)
    runner.predict_async(state(), 5)
    assert done.wait(WAIT)
    runner.close()


def test_a_cycle_through_the_callback_is_collected(native):
    class Owner:
        def __init__(self) -> None:
            self.runner = ShadowRunner(native, moe_layers=LAYERS, on_prediction=self.note)

        def note(self, prediction) -> None:
            pass

    owner = Owner()
    owner.runner.predict_async(state(), 1)
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_statistics_count(runner):
    for i in range(5):
        runner.predict_async(state(i), 1)
        runner.get_predictions_for_layer(3, WAIT)
    found = runner.statistics()
    assert found["submitted"] == found["predicted"] == 5
    assert found["dropped"] == found["expired"] == found["failed"] == found["waiting"] == 0
    assert 0 < found["latency_p50_us"] <= found["latency_p99_us"]
