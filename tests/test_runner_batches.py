"""ShadowRunner with batches: each row has the context of its own sequence."""

import mlx.core as mx
import numpy as np
import pytest

from context_models import AHEAD, LAYERS, make_bundle, make_states, oracle
from mlx_od_moe import ShadowRunner
from test_runner_context import CONTEXT, TOP_K, WAIT, Recorded, wait_until


def test_a_batch_s_rows_want_together_what_each_text_wants_alone():
    """Three texts of different ages, in batches of two or three, now and then one alone."""
    bundle = make_bundle(CONTEXT)
    texts = {name: make_states(12, name) for name in (4, 9, 2)}
    expected = {name: oracle(bundle, states) for name, states in texts.items()}
    recorded = Recorded(bundle)
    at = dict.fromkeys(texts, 0)
    for name in (4, 9):  # the third begins in a batch
        recorded.play(texts[name], 0, name, name)
        recorded.runner.trim(name, name - 3)
        at[name] = 3
    batches = {}
    for names in ([9, 4], [2, 9, 4], [4], [9, 2], (2, 4, 9), [9], [4, 2, 9], [2]):
        step = recorded.runner.step + 1
        for layer in LAYERS:
            h = np.stack([texts[name][layer][at[name]] for name in names])
            if step % 2 == 0:
                h = mx.array(h)[:, None] * 1  # lazy, as a model's states are
            recorded.runner.predict_async(h, layer, step, sequence=names)
        wait_until(lambda: recorded.runner.statistics()["waiting"] == 0)
        batches[step] = [(name, at[name]) for name in names]
        at |= {name: at[name] + 1 for name in names}
    recorded.runner.close()
    assert recorded.runner.statistics()["failed"] == 0
    for step, rows in batches.items():
        for layer in AHEAD:
            for d, target in enumerate(bundle.targets(layer)):
                best = [np.argsort(-expected[name][layer][i][d])[:TOP_K] for name, i in rows]
                ranks = [{int(e): r for r, e in enumerate(ids)} for ids in best]
                wanted = {
                    e: (-sum(e in r for r in ranks), min(r.get(e, TOP_K) for r in ranks), e)
                    for e in set().union(*ranks)
                }
                assert recorded.found[step, layer, target] == sorted(wanted, key=wanted.get)


def test_what_a_batch_can_t_be():
    with ShadowRunner(make_bundle(CONTEXT), "f32") as runner:
        h = make_states(3)[0]
        with pytest.raises(ValueError, match="sequences must be distinct, got 7 twice"):
            runner.predict_async(h, 0, sequence=[7, 8, 7])
        shapes = r"of 2 sequences must be \[2, 20\] or \[2, 1, 20\], but is "
        with pytest.raises(ValueError, match=shapes + r"\[3, 20\]"):
            runner.predict_async(h, 0, sequence=[7, 8])
        with pytest.raises(ValueError, match=shapes + r"\[1, 2, 20\]"):
            runner.predict_async(h[None, :2], 0, sequence=(7, 8))
        for wrong in ("78", [7, "8"], 7.5):
            with pytest.raises(TypeError, match="an int, or a sequence of them"):
                runner.predict_async(h[:2], 0, sequence=wrong)
        assert runner.statistics()["submitted"] == 0
        runner.predict_async(h[:1], 0, sequence=[7])
        assert len(runner.get_predictions_for_layer(LAYERS[1], WAIT)) == TOP_K
