"""Several sequences at once: each is predicted for with what its own earlier tokens left."""

from collections import Counter

import mlx.core as mx
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load as load_stock

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe.sequences import MOST_KEPT
from test_offload import assert_no_lease
from test_pass_observer import predicted, undropped
from test_prefetcher import add_context, make_bundle

PROMPTS = [[5, 600, 70, 8], [11, 12, 13, 14], [900, 3, 3, 41]]


@pytest.fixture
def opened():
    """Opens nano with contexts that nobody trained: (model, runtime)."""
    runtimes = []

    def open_():
        path = model_directory("nano-moe")
        bundle = add_context(make_bundle())
        model, _, runtime = mlx_od_moe.load(path, bundle, "50%", guarded=False)
        runtimes.append(runtime)
        return model, runtime

    yield open_
    for runtime in runtimes:
        runtime.close()


def decode(opened, prompts, continuations):
    """The predictions of each token [sequences, tokens] of the continuations, after the prompts."""

    def run():
        model, runtime = opened()
        cache, found = make_prompt_cache(model), []
        mx.eval(model(mx.array(prompts), cache=cache))
        predicted(runtime)
        for tokens in zip(*continuations, strict=True):
            mx.eval(model(mx.array(tokens)[:, None], cache=cache))
            found.append(predicted(runtime))
        return found, runtime

    return undropped(run)


def test_a_batch_is_predicted_for_as_each_of_its_sequences_alone(opened):
    continuations = [[7, 100, 2], [8, 300, 4], [9, 9, 9]]
    together = decode(opened, PROMPTS, continuations)
    alone = [decode(opened, [p], [c]) for p, c in zip(PROMPTS, continuations, strict=True)]
    for step, layers in enumerate(together):
        for layer, experts in enumerate(layers):
            wanted = Counter(e for one in alone for e, _ in one[step][layer])
            assert dict(experts) == wanted


def test_more_sequences_than_contexts_are_predicted_for_without(opened):
    model, runtime = opened()
    tokens = mx.arange(MOST_KEPT + 1)[:, None]
    cache = make_prompt_cache(model)
    for _ in range(2):
        mx.eval(model(tokens, cache=cache))
    runner = runtime._prefetcher._runner
    assert len(runner.get_predictions_for_layer(7, None)) >= 16
    assert runtime._prefetcher._sources


def test_sequences_that_come_and_go_keep_their_contexts(opened, monkeypatch):
    """A batch generator's: prompts one after the other, which end at several times."""
    model, runtime = opened()
    runner = runtime._prefetcher._runner
    begun, copied = [], []
    reset, fork = runner.reset, runner.fork
    monkeypatch.setattr(runner, "reset", lambda s: (begun.append(s), reset(s)))
    monkeypatch.setattr(runner, "fork", lambda s, to: (copied.append(to), fork(s, to)))

    def texts(some):
        generator = BatchGenerator(some, prefill_batch_size=1)
        prompts = [PROMPTS[0], [*PROMPTS[1], 77, 78], PROMPTS[2][:3]]
        ids = generator.insert(prompts, [3, 12, 7])
        out = {i: [] for i in ids}
        while responses := generator.next_generated():
            for r in responses:
                out[r.uid].append(r.token)
        generator.close()
        return list(out.values())

    expected = texts(load_stock(str(model_directory("nano-moe")))[0])
    assert [len(t) for t in expected] == [3, 12, 7]
    assert texts(model) == expected
    # Each begins once, with nothing or as a copy (mlx-lm copies caches to split a batch), and is
    # never lost track of: its length at the end says so.
    assert sorted(begun) == list(range(1, len(begun) + 1))
    assert len(begun) == len(PROMPTS) + len(copied)
    lengths = {length for _, length in runtime._prefetcher._sequences._known.values()}
    assert {3 + 7, 4 + 3, 6 + 12} <= lengths
    assert_no_lease(runtime)
