"""Prefetches beside a running model: never a different result, judged, switched off and on."""

import dataclasses
import logging

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.utils import load as load_stock
from mlx_od_moe._ext import Prediction, PredictionQueue, Prefetcher

import mlx_od_moe
import packed_experts
from checkpoints import model_directory
from mlx_od_moe import ExpertPredictor, ExpertStore, PredictorBundle, PredictorConfig
from mlx_od_moe.context import ContextConfig, TokenMemory
from mlx_od_moe.guard import FIRST_PAUSE, TURN, Guard
from mlx_od_moe.model_routers import read_routers
from test_offload import assert_no_lease, assert_same_logits, tokens


def make_bundle(
    layers=range(8), hidden_size=192, num_experts=64, lookahead=4, terms="mlp", previous=False
):
    """Predictors that nobody trained."""
    layers = list(layers)
    predictors = {}
    mx.random.seed(0)
    for i, layer in enumerate(layers[:-1]):
        ahead = min(lookahead, len(layers) - 1 - i)
        config = PredictorConfig(
            hidden_size,
            64,
            num_experts,
            ahead,
            top_k=8,
            terms=(terms,) * ahead,
            previous_experts=previous,
        )
        predictors[layer] = ExpertPredictor(config)
    return PredictorBundle(layers, predictors)


@pytest.mark.parametrize("guarded", [False, True])
def test_predictions_change_no_bit(guarded):
    path = model_directory("nano-moe")
    stock = load_stock(str(path))[0]
    model, _, runtime = mlx_od_moe.load(path, make_bundle(), "25%", guarded=guarded)
    with runtime:
        assert_same_logits(stock, model, tokens(20), steps=20)
        report = runtime.report()
        assert report["prediction"]["runner"]["submitted"] > 0
        assert set(report["prediction"]["recall_at_k"]) == {1, 2, 3, 4}
        store = report["store"]
        assert store["lookups"] == store["hits"] + store["late"] + store["misses"]
        assert_no_lease(runtime)


def add_context(bundle):
    """The same predictors, with contexts that nobody trained either."""
    context = ContextConfig(window=5, key_size=8, state_size=8)
    predictors = {
        layer: ExpertPredictor(dataclasses.replace(p.config, context=context))
        for layer, p in bundle.items()
    }
    memories = {n: TokenMemory(context, 192) for layer in bundle for n in bundle.targets(layer)}
    return PredictorBundle(bundle.moe_layers, predictors, memories=memories)


@pytest.mark.parametrize("sequences", [1, 3])
def test_contexts_are_kept_up_and_change_no_bit(sequences):
    path = model_directory("nano-moe")
    stock = load_stock(str(path))[0]
    model, _, runtime = mlx_od_moe.load(path, add_context(make_bundle()), "25%", guarded=False)
    with runtime:
        for _ in range(2):  # a second prompt on the same model
            prompt = mx.concatenate([tokens(20, seed=i) for i in range(sequences)])
            assert_same_logits(stock, model, prompt, steps=10)
        runner = runtime.report()["prediction"]["runner"]
        # Prompt and ten tokens, twice, at all eight layers: the last one leaves something too.
        assert runner["submitted"] >= 2 * 11 * 7
        assert runtime.report()["prediction"]["recall_at_k"].keys() == {1, 2, 3, 4}
        assert_no_lease(runtime)


def test_a_context_follows_its_sequence(monkeypatch):
    """It begins anew where the prompt cache says so, however short the prompt is."""
    path = model_directory("nano-moe")
    model, _, runtime = mlx_od_moe.load(path, add_context(make_bundle()), "25%", guarded=False)
    with runtime:
        calls = []
        runner = runtime._prefetcher._runner
        monkeypatch.setattr(runner, "reset", lambda sequence: calls.append(("reset", sequence)))
        monkeypatch.setattr(runner, "trim", lambda *trimmed: calls.append(("trim", *trimmed)))

        def run(ids, cache) -> list[tuple]:
            calls.clear()
            mx.eval(model(mx.array([ids]), cache=cache))
            return list(calls)

        one, other = make_prompt_cache(model), make_prompt_cache(model)
        assert run([5], one) == [("reset", 1)]
        assert run([6], one) == []
        assert run([7, 8, 9], one) == []  # the next turn of a chat
        assert run([5], other) == [("reset", 2)]
        assert run([6], one) == []
        trim_prompt_cache(one, 2)
        assert run([7], one) == [("trim", 1, 2)]
        # Without a cache nobody knows what follows what: a prompt begins anew.
        assert run([1, 2], None) == [("reset", 0)]
        assert run([3], None) == []


def test_nothing_is_predicted_where_all_experts_are_resident():
    model, _, runtime = mlx_od_moe.load(model_directory("nano-moe"), make_bundle(), "100%")
    with runtime:
        mx.eval(model(tokens(1)), model(tokens(1)))
        assert runtime.report()["prediction"]["runner"] == {}


@pytest.mark.parametrize(
    ("bundle", "what"),
    [
        (make_bundle(hidden_size=256), "hidden size 256, the model hidden size 192"),
        (make_bundle(num_experts=32), "experts 32, the model experts 64"),
        (make_bundle(layers=range(6)), r"MoE layers \[0, 1, 2, 3, 4, 5\]"),
    ],
)
def test_a_predictor_of_another_model_is_refused(bundle, what, tmp_path):
    bundle.save(tmp_path / "other.safetensors")
    path = model_directory("nano-moe")
    with pytest.raises(ValueError, match=rf"other.safetensors.*nano-moe.*{what}"):
        mlx_od_moe.load(path, tmp_path / "other.safetensors")


def test_a_predictor_with_other_routers_is_refused():
    path = model_directory("nano-moe")
    routers = {n: r.router for n, r in read_routers(load_stock(str(path))[0]).items()}

    def bundle(change) -> PredictorBundle:
        config = PredictorConfig(192, 64, 64, 1, top_k=8, terms=("mlp+gate",))
        router = routers[7]
        router.linear.weight = change(router.linear.weight)
        return PredictorBundle(list(range(8)), {6: ExpertPredictor(config, [router])})

    mlx_od_moe.load(path, bundle(lambda w: w))[2].close()
    with pytest.raises(ValueError, match="another router in layer 7"):
        mlx_od_moe.load(path, bundle(lambda w: mx.random.normal(w.shape)))


@pytest.fixture
def store(tmp_path):
    folder = packed_experts.write(tmp_path, (2, 5), 64)
    with ExpertStore(folder, capacity=32 * packed_experts.EXPERT_BYTES) as s:
        yield s


def predict(queue: PredictionQueue, native: Prefetcher, step: int, experts: list[int]) -> None:
    queue.try_push(Prediction(step, 2, 5, 1, experts, [3.0] * len(experts)))
    native.drain()


def test_what_does_not_pay_is_switched_off_and_on_again(store):
    queue = PredictionQueue()
    native = Prefetcher(store.native, queue)
    rng = np.random.default_rng(0)

    def run(steps: range, right: bool) -> list[tuple[int, int, bool]]:
        changes = []
        for step in steps:
            store.cancel(step)
            chosen = rng.choice(32, 8, replace=False).astype(np.int32)
            predict(queue, native, step, (chosen + (0 if right else 32)).tolist())
            native.reached(5, chosen, step)
            store.acquire(5, chosen).release()
            changes += [c[:3] for c in native.take_changes()]
        return changes

    assert run(range(1, 40), right=False) == [(5, 1, False)]
    before = store.counters()["accepted"]
    assert before > 0
    assert run(range(40, 60), right=False) == []
    assert store.counters()["accepted"] == before
    assert run(range(60, 300), right=True) == [(5, 1, True)]
    assert store.counters()["accepted"] > before
    (row,) = [r for r in native.recalls() if r["layer"] == 5 and r["distance"] == 1]
    assert row["on"]
    assert row["predictions"] == 299
    assert row["named"] == 240 * 8
    assert row["chosen"] == 299 * 8


def test_uses_are_counted_once_per_pass(store):
    native = Prefetcher(store.native, PredictionQueue())
    native.reached(2, np.array([[1, 3], [3, 1]], np.int32), 1)
    native.reached(2, np.array([3], np.int32), 2)
    assert {e: n for e, n in enumerate(native.uses(2)) if n} == {1: 1, 3: 2}


def guard_after(guard: Guard, turns: int, with_: float, without: float) -> Guard:
    for _ in range(turns * TURN):
        guard.took(with_ if guard.predicts() else without)
    return guard


def test_the_guard_stops_what_makes_tokens_slower_and_lets_it_come_back(caplog):
    caplog.set_level(logging.INFO, "mlx_od_moe")
    guard = guard_after(Guard(), FIRST_PAUSE + 1, with_=0.012, without=0.010)
    assert not guard.predicting
    assert not guard.predicts()
    assert "switched off" in caplog.text
    guard = guard_after(guard, FIRST_PAUSE + 1, with_=0.008, without=0.010)
    assert guard.predicting
    assert "switched on" in caplog.text


def test_the_guard_keeps_what_pays_and_asks_ever_less():
    guard, trials = Guard(), 0
    for _ in range(5000):
        trials += not guard.predicts()
        guard.took(0.010 if guard.predicts() else 0.020)
    assert guard.predicting
    assert trials < 5000 * 0.03


def test_a_layer_that_nobody_predicts_gets_more_slots(tmp_path):
    path = model_directory("nano-moe")
    for capacity in ("12.5%", "25%", "90%"):
        runtimes = [mlx_od_moe.load(path, p, capacity)[2] for p in (None, make_bundle())]
        equal, favoured = (
            {layer: r.store.slots(layer) for layer in r.store.layers} for r in runtimes
        )
        assert runtimes[1].store.capacity_bytes <= runtimes[0].store.capacity_bytes
        assert min(favoured.values()) >= 8
        assert max(favoured.values()) <= 64
        if capacity == "25%":
            assert favoured == {0: 30} | dict.fromkeys(range(1, 8), 14)
            assert set(equal.values()) == {16}
        for runtime in runtimes:
            runtime.close()
