"""Predictions of passes that MLX tells of itself: the same as of those that wait in Python."""

import logging
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe.pack import pack
from mlx_od_moe.predictor_bundle import PredictorBundle
from mlx_od_moe.token_experts import TokenExperts
from mlx_od_moe.token_table import TokenTable
from test_graph_leases import LAYERS, TOKEN, TOP_K, assert_that_all_leases_have_ended
from test_prefetcher import add_context, make_bundle

BUNDLES = {
    "plain": make_bundle,
    "previous": lambda: make_bundle(previous=True),
    "context": lambda: add_context(make_bundle()),
}


def token_experts() -> TokenExperts:
    table = TokenTable(4, 64)
    table.observe(np.array([7, 9]), np.arange(2 * 4 * 8).reshape(2, 4, 8) % 64)
    return TokenExperts.learned(table)


@pytest.fixture
def opened():
    """Opens nano with a bundle, a quarter of its experts in memory: (model, runtime)."""
    runtimes = []

    def open_(bundle, listened=False, path=None):
        path = path or model_directory("nano-moe")
        model, _, runtime = mlx_od_moe.load(path, bundle, "25%", guarded=False)
        runtimes.append(runtime)
        if listened:  # then every pass waits in Python
            runtime.on_routing = lambda *_: None
        return model, runtime

    yield open_
    for runtime in runtimes:
        runtime.close()


def predicted(runtime):
    """What the pass's states predict for each layer: [(expert, logit)]."""
    runner = runtime._prefetcher._runner
    return [runner.get_scored_predictions_for_layer(n, None) for n in range(1, LAYERS)]


def predictions(model, runtime, passes):
    """The predictions of each pass, (token ids, of which cache), in order."""
    caches, out = {}, []
    for ids, name in passes:
        cache = caches.setdefault(name, make_prompt_cache(model))
        if ids is None:
            trim_prompt_cache(cache, 2)
            continue
        mx.eval(model(mx.array([ids]), cache=cache))
        found = predicted(
            runtime
        )  # of prompts, too: waiting leaves room for the next pass's states
        if len(ids) == 1:
            out.append(found)
    return out


def undropped(run):
    """What `run()` returns, with its runtime, once no state was dropped, as a busy machine may."""
    for _ in range(5):
        result, runtime = run()
        if runtime.report()["prediction"]["runner"]["dropped"] == 0:
            return result
    raise AssertionError("states were dropped each time")


@pytest.mark.parametrize("kind", BUNDLES)
def test_they_are_those_of_a_pass_that_waits(kind, opened):
    decoded = [([t], "a") for t in (11, 500, 42, 900)]
    passes = [([3, 4, 5, 6], "a"), *decoded, ([8], "b"), ([9], "b"), ([1], "a"), (None, "a")]
    passes += [([77], "a"), ([78], "a")]
    runs = []
    for listened in (False, True):

        def run(listened=listened):
            model, runtime = opened(BUNDLES[kind](), listened)
            return predictions(model, runtime, passes), runtime

        runs.append(undropped(run))
    assert len(runs[0]) == 9
    for told, waited in zip(*runs, strict=True):
        for mine, theirs in zip(told, waited, strict=True):
            assert len(mine) == 16
            assert [e for e, _ in mine] == [e for e, _ in theirs]
            np.testing.assert_allclose([s for _, s in mine], [s for _, s in theirs], rtol=1e-5)


def test_a_pass_with_predictions_reads_and_predicts_nothing_until_it_is_evaluated(opened):
    bundle = BUNDLES["context"]()
    bundle.token_experts = token_experts()
    model, runtime = opened(bundle)
    output = model(TOKEN)
    assert runtime.store.counters()["lookups"] == 0
    assert runtime.report()["prediction"]["runner"]["submitted"] == 0
    mx.eval(output)
    assert runtime.store.counters()["lookups"] == LAYERS * TOP_K
    assert runtime.report()["prediction"]["runner"]["submitted"] == LAYERS
    runtime._prefetcher._runner.get_predictions_for_layer(7, None)
    assert 0 in runtime.report()["prediction"]["by_token"]


def test_a_token_is_predicted_from_before_its_pass_reaches_a_layer(opened):
    """The only predictions of the first layer are the token's, and none comes too late to judge."""
    bundle = make_bundle()
    bundle.token_experts = token_experts()
    model, runtime = opened(bundle)
    for _ in range(4):
        mx.eval(model(TOKEN))
    row = next(r for r in runtime._prefetcher._native.recalls() if r["layer"] == 0)
    assert row["predictions"] == 4
    assert row["chosen"] == 4 * TOP_K


@pytest.mark.parametrize("listened", [False, True])
def test_the_next_tokens_first_layers_are_predicted(opened, listened):
    bundle = PredictorBundle.load(model_directory("nano-moe") / "predictor.safetensors")
    model, runtime = opened(bundle, listened)
    cache = make_prompt_cache(model)
    for token in (5, 6, 7, 8, 9):
        mx.eval(model(mx.array([[token]]), cache=cache))
        runtime._prefetcher._next.get_predictions_for_layer(1, None)
    rows = runtime.report()["prediction"]["next_token"]
    assert [*rows] == [0, 1, 2, 3]
    # A busy machine may predict after the next token has begun.
    assert all(0 < row["predictions"] <= 4 for row in rows.values())
    assert all(0 < row["recall_at_k"] < 1 for row in rows.values())


def test_passes_ahead_of_their_evaluation_are_predicted_in_order(opened):
    tokens = (5, 6, 7, 8)
    bundle = BUNDLES["context"]()

    def one_by_one():
        model, runtime = opened(bundle)
        return predictions(model, runtime, [([t], "a") for t in tokens])[-1], runtime

    def ahead():
        model, runtime = opened(bundle)
        cache = make_prompt_cache(model)
        outputs = [model(mx.array([[t]]), cache=cache) for t in tokens]
        mx.eval(outputs)
        return predicted(runtime), runtime

    for mine, theirs in zip(undropped(ahead), undropped(one_by_one), strict=True):
        assert [e for e, _ in mine] == [e for e, _ in theirs]


def test_a_failed_read_begins_contexts_anew(opened, tmp_path, monkeypatch):
    path = pack(model_directory("nano-moe"), tmp_path / "packed", progress=False).path
    model, runtime = opened(BUNDLES["context"](), path=path)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[3]]), cache=cache))
    for file in path.glob("experts-*.bin"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 8])
    resets = []
    monkeypatch.setattr(runtime._prefetcher._runner, "reset", resets.append)

    def go_on() -> None:
        for token in range(90, 120):
            mx.eval(model(mx.array([[token]]), cache=cache))

    with pytest.raises(RuntimeError, match=r"layer \d+, expert \d+"):
        go_on()
    assert resets == []
    output = model(mx.array([[4]]), cache=cache)
    assert 1 in resets
    with pytest.raises(RuntimeError, match=r"layer \d+, expert \d+"):
        mx.eval(output)
    assert_that_all_leases_have_ended(runtime)


def test_an_error_of_a_predictor_ends_predictions_and_not_the_text(opened, caplog):
    caplog.set_level(logging.INFO, "mlx_od_moe")
    model, runtime = opened(make_bundle())
    plain, _ = opened(None)
    mx.eval(model(TOKEN))
    runtime._prefetcher._runner._close()
    for token in (5, 6, 7):
        x = mx.array([[token]])
        assert mx.array_equal(model(x), plain(x))
    messages = [r.message for r in caplog.records if "switched off: layer" in r.message]
    assert len(messages) == 1
    assert "is closed" in messages[0]


def test_threads_that_come_and_go_are_predicted_for_in_turns(opened):
    """The first one's states are told by MLX until the second comes, then all wait in Python."""
    model, runtime = opened(BUNDLES["context"]())
    plain, _ = opened(None)

    def decode(some, first):
        cache, ids, token = make_prompt_cache(some), [], mx.array([[first]])
        for _ in range(8):
            token = mx.argmax(some(token, cache=cache)[:, -1:], axis=-1)
            ids.append(token.item())
        return ids

    firsts = [5, 600, 70]
    expected = [decode(plain, first) for first in firsts]
    assert decode(model, firsts[0]) == expected[0]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda f: decode(model, f), firsts)) == expected
    statistics = runtime.report()["prediction"]["runner"]
    assert statistics["failed"] == 0
    assert statistics["submitted"] > 8 * LAYERS
