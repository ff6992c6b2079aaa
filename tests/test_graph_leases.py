"""Experts that MLX acquires itself: where nobody predicts and nobody listens."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load as load_stock

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe import sole_user
from mlx_od_moe.pack import pack

TOKEN = mx.array([[7]])
LAYERS, TOP_K = 8, 8


@pytest.fixture
def nano():
    return model_directory("nano-moe")


@pytest.fixture
def logits(nano):
    return load_stock(str(nano))[0](TOKEN)


@pytest.fixture
def quarter(nano):
    """Nano, a quarter of its experts in memory: (model, runtime)."""
    model, _, runtime = mlx_od_moe.load(nano, capacity="25%")
    with runtime:
        yield model, runtime


def assert_no_lease(runtime):
    for layer in runtime.store.layers:
        runtime.store.acquire(layer, range(runtime.store.slots(layer)), timeout=5).release()


def decode(model, first, count):
    """The likeliest tokens, one after the other."""
    cache, ids = make_prompt_cache(model), []
    token = mx.array([[first]])
    for _ in range(count):
        token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
        ids.append(token.item())
    return ids


def test_a_pass_reads_nothing_until_it_is_evaluated(quarter, logits):
    model, runtime = quarter
    output = model(TOKEN)
    assert runtime.store.counters()["lookups"] == 0
    assert mx.array_equal(output, logits)
    assert runtime.store.counters()["lookups"] == LAYERS * TOP_K
    assert_no_lease(runtime)


def test_uses_are_counted_once_they_are_known(quarter):
    model, runtime = quarter
    mx.eval(model(TOKEN))
    runtime.snapshot()
    uses = [sum(runtime._prefetcher.uses(layer)) for layer in runtime.store.layers]
    assert uses == [TOP_K] * LAYERS


def test_a_pass_that_is_dropped_takes_no_slots(quarter, logits):
    model, runtime = quarter
    model(mx.array([[9]]))
    assert_no_lease(runtime)
    assert mx.array_equal(model(TOKEN), logits)
    assert_no_lease(runtime)


def test_passes_can_be_evaluated_in_any_order(nano):
    """With room for one token's experts: no pass may wait for one that comes after it."""
    stock = load_stock(str(nano))[0]
    model, _, runtime = mlx_od_moe.load(nano, capacity="12.5%")
    with runtime:
        tokens = [mx.array([[t]]) for t in (5, 6, 7)]
        outputs = [model(token) for token in tokens]
        mx.eval(*reversed(outputs))
        for token, output in zip(tokens, outputs, strict=True):
            assert mx.array_equal(stock(token), output)


@pytest.mark.parametrize("mixed", [False, True])
def test_threads_with_room_for_one_tokens_experts_get_on(nano, mixed):
    """Also where some read prompts, and MLX waits for all of them with Python's lock held."""
    stock = load_stock(str(nano))[0]
    model, _, runtime = mlx_od_moe.load(nano, capacity="12.5%")
    prompt, first = mx.array([list(range(100, 140))]), [3, 50, 700, 2000]
    expected = [decode(stock, token, 12) for token in first]
    read = stock(prompt)

    def work(token):
        if mixed:
            assert mx.array_equal(model(prompt), read)
        ids = decode(model, token, 12)
        mx.clear_cache()
        return ids

    mx.eval(read)
    with runtime, ThreadPoolExecutor(len(first)) as pool:
        for _ in range(3):
            assert list(pool.map(work, first)) == expected


def in_a_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_a_second_thread_waits_for_what_the_first_has_begun(quarter, nano):
    model, _ = quarter
    token = mx.array([[9]])
    expected = load_stock(str(nano))[0](token)
    mx.eval(expected)
    output = model(token)
    mx.async_eval(output)
    assert in_a_thread(lambda: mx.array_equal(model(mx.array([[9]])), expected).item())
    assert mx.array_equal(output, expected)
    assert mx.array_equal(model(token), expected)  # it waits for its experts now, as all do


def test_a_pass_that_a_second_thread_has_waited_for_in_vain_is_refused(
    quarter, logits, monkeypatch
):
    monkeypatch.setattr(sole_user, "PATIENCE", 0.1)
    model, _ = quarter
    mx.eval(logits)
    output = model(TOKEN)  # and nobody evaluates it
    assert in_a_thread(lambda: mx.array_equal(model(mx.array([[7]])), logits).item())
    with pytest.raises(RuntimeError, match="not evaluated before another thread's began"):
        mx.eval(output)
    assert mx.array_equal(model(TOKEN), logits)


def test_who_listens_and_who_does_not_may_take_turns(quarter, nano):
    model, runtime = quarter
    stock, heard = load_stock(str(nano))[0], []
    caches = make_prompt_cache(stock), make_prompt_cache(model)
    for step in range(8):
        listens = step % 3 == 1
        runtime.on_routing = (lambda layer, *_: heard.append(layer)) if listens else None
        expected, output = (
            m(mx.array([[step]]), cache=c) for m, c in zip((stock, model), caches, strict=True)
        )
        assert mx.array_equal(expected, output)
    assert len(heard) == 3 * LAYERS


def test_a_read_that_fails_is_told_once_and_its_pass_computes_nothing(nano, tmp_path):
    path = pack(nano, tmp_path / "packed", progress=False).path
    model, _, runtime = mlx_od_moe.load(path, capacity="25%")
    with runtime:
        mx.eval(model(TOKEN))
        for file in sorted(path.glob("experts-*.bin")):
            content = file.read_bytes()
            file.unlink()
            file.write_bytes(content[: len(content) // 2])
        for token in (90, 91):  # each pass tries again
            output = model(mx.array([[token]]))
            with pytest.raises(RuntimeError, match=r"layer 0, expert \d+"):
                mx.eval(output)
            assert mx.isnan(output).all()
        assert mx.array_equal(mx.ones(3) + 1, mx.full(3, 2))
        assert_that_all_leases_have_ended(runtime)


def assert_that_all_leases_have_ended(runtime):
    for layer in runtime.store.layers:
        resident = runtime.store.resident(layer)
        runtime.store.acquire(layer, resident, timeout=5).release()


def test_what_has_begun_when_the_runtime_is_closed_is_computed(nano, logits):
    model, _, runtime = mlx_od_moe.load(nano, capacity="25%")
    output = model(TOKEN)
    mx.async_eval(output)
    runtime.close()
    assert mx.array_equal(output, logits)
    with pytest.raises(RuntimeError, match="closed"):
        model(TOKEN)
    assert mx.array_equal(mx.ones(3) + 1, mx.full(3, 2))


def test_a_pass_evaluated_after_the_end_is_refused(nano):
    model, _, runtime = mlx_od_moe.load(nano, capacity="25%")
    output = model(TOKEN)
    runtime.close()
    with pytest.raises(RuntimeError, match="closed"):
        mx.eval(output)


def test_a_guard_that_has_switched_prediction_off_spares_the_wait(nano, logits, tmp_path):
    bundle = nano / "predictor.safetensors"
    shutil.copy(bundle, tmp_path)
    model, _, runtime = mlx_od_moe.load(nano, predictor=tmp_path / bundle.name, capacity="25%")
    with runtime:
        mx.eval(model(mx.array([[3]])))
        assert runtime.report()["prediction"]["runner"]["submitted"] > 0
        assert not runtime._prefetcher._gap
        runtime._guard.predicting = False
        before = runtime.store.counters()["lookups"]
        output = model(TOKEN)
        assert runtime.store.counters()["lookups"] == before
        assert mx.array_equal(output, logits)
        # What it has not seen must not be taken for what came just before.
        assert runtime._prefetcher._gap
        runtime._guard.predicting = True
        assert mx.array_equal(model(TOKEN), logits)
