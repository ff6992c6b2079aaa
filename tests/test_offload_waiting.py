"""When a forward pass waits for its experts: at the next layer's, at its end, or not at all."""

import mlx.core as mx
import pytest
from mlx_lm.utils import load as load_stock

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe.moe import hooked
from mlx_od_moe.route_recorder import RouteRecorder

TOKEN = mx.array([[7]])
LAYERS, TOP_K = 8, 8


@pytest.fixture
def quarter():
    """Nano, a quarter of its experts in memory: (model, runtime)."""
    model, _, runtime = mlx_od_moe.load(model_directory("nano-moe"), capacity="25%")
    with runtime:
        yield model, runtime


@pytest.fixture
def whole():
    """Nano with room for all experts."""
    model, _, runtime = mlx_od_moe.load(model_directory("nano-moe"), capacity="100%")
    with runtime:
        yield model, runtime


@pytest.fixture(scope="module")
def logits():
    return load_stock(str(model_directory("nano-moe")))[0](TOKEN)


def test_an_output_evaluated_before_its_experts_are_known_is_refused(quarter, logits):
    model, runtime = quarter
    runtime.on_routing = lambda *_: None  # who listens makes the pass wait

    def impatient(call, x, *rest):
        mx.eval(x)
        return call(x, *rest)

    refused = pytest.raises(RuntimeError, match="evaluated before its experts were known")
    with hooked(model.model.layers[3], impatient), refused:
        model(TOKEN)
    assert mx.array_equal(model(TOKEN), logits)


@pytest.mark.parametrize("listener", [None, lambda *_: None])
def test_a_pass_that_fails_midway_leaves_nothing_waiting(quarter, logits, listener):
    model, runtime = quarter
    runtime.on_routing = listener

    def broken(call, x, *rest):
        raise KeyError("broken")

    with hooked(model.model.layers[3], broken), pytest.raises(KeyError, match="broken"):
        model(TOKEN)
    assert mx.array_equal(model(TOKEN), logits)
    runtime.store.acquire(2, range(16), timeout=5).release()


def test_part_of_a_model_can_be_called_by_itself(quarter):
    """Outside of the model's own call nothing is put off."""
    model, _ = quarter
    stock = load_stock(str(model_directory("nano-moe")))[0]
    x = stock.model.embed_tokens(TOKEN)
    assert mx.array_equal(model.model.layers[0](x), stock.model.layers[0](x))


def test_layers_in_memory_as_a_whole_are_counted_once_they_are_computed(whole, logits):
    model, runtime = whole
    assert all(len(runtime.store.resident(layer)) == 64 for layer in runtime.store.layers)
    before = runtime.snapshot()["store"]
    output = model(TOKEN)
    assert mx.array_equal(output, logits)
    now = runtime.snapshot()["store"]
    assert now["lookups"] - before["lookups"] == LAYERS * TOP_K
    assert now["hits"] - before["hits"] == LAYERS * TOP_K
    assert now["demand_bytes"] == before["demand_bytes"]


def test_who_listens_to_a_whole_layer_hears_it_at_once(whole):
    model, runtime = whole
    recorder = RouteRecorder(runtime.store.layers)
    runtime.on_routing = recorder.record
    model(TOKEN)
    routes = recorder.experts()
    runtime.on_routing = None
    mx.eval(model(TOKEN))
    runtime.snapshot()
    assert routes.shape == (1, LAYERS, TOP_K)
    uses = [runtime._prefetcher.uses(layer) for layer in runtime.store.layers]
    for layer, chosen in enumerate(routes[0]):
        assert {e for e, n in enumerate(uses[layer]) if n == 2} == set(chosen.tolist())
