"""ShadowRunner with a bundle that has a context: what it predicts is what the oracle predicts."""

import time

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from context_models import AHEAD, HIDDEN, LAYERS, make_bundle, make_states, oracle
from mlx_od_moe import ExpertPredictor, PredictorConfig, ShadowRunner
from mlx_od_moe.context import ContextConfig

TOP_K = 3
WAIT = 30  # seconds that no test takes
CONTEXT = ContextConfig(24, 5, 4)


class Recorded:
    """A runner whose predictions are kept as {(step, source layer, target layer): ids}."""

    def __init__(self, bundle, **options):
        self.bundle = bundle
        self.found = {}
        self.runner = ShadowRunner(bundle, "f32", on_prediction=self._keep, capacity=512, **options)

    def _keep(self, p):
        self.found[p.step, p.source_layer, p.target_layer] = list(p.expert_ids)

    def play(self, states, first, last, sequence=0):
        """One forward pass; returns its step."""
        step = self.runner.step + 1
        for layer in LAYERS:
            self.runner.predict_async(states[layer][first:last], layer, step, sequence=sequence)
        # Else the next step would make this one's predictions old.
        wait_until(lambda: self.runner.statistics()["waiting"] == 0)
        return step

    def check(self, steps, expected):
        """After the pass `steps[i]` of one token: its predictions are those of the i-th logits."""
        self.runner.close()
        for i, step in enumerate(steps):
            for layer in AHEAD:
                targets = self.bundle.targets(layer)
                for target, logits in zip(targets, expected[layer][i], strict=True):
                    best = np.argsort(-logits)[:TOP_K].tolist()
                    assert self.found[step, layer, target] == best, (i, layer, target)


def wait_until(done):
    end = time.monotonic() + WAIT
    while not done():
        assert time.monotonic() < end
        time.sleep(0.0001)


def tail(logits, first):
    return {layer: x[first:] for layer, x in logits.items()}


@settings(max_examples=10, deadline=None)
@given(prompt=st.integers(1, 60), decoded=st.integers(1, 30))
def test_prefill_then_decode(prompt, decoded):
    bundle = make_bundle(CONTEXT)
    states = make_states(prompt + decoded)
    recorded = Recorded(bundle)
    recorded.play(states, 0, prompt)
    steps = [recorded.play(states, i, i + 1) for i in range(prompt, prompt + decoded)]
    recorded.check(steps, tail(oracle(bundle, states), prompt))
    found = recorded.runner.statistics()
    assert found["predicted"] == 3 * (decoded + 1)
    assert found["observed"] == decoded + 1  # the last layer, which has no predictor
    assert found["failed"] == 0


def test_steps_need_not_be_given():
    bundle = make_bundle(CONTEXT)
    states = make_states(9)
    recorded = Recorded(bundle)
    for i in range(9):
        for layer in LAYERS:
            recorded.runner.predict_async(states[layer][i], layer)
        recorded.runner.get_predictions_for_layer(LAYERS[-1], WAIT)
    recorded.check(range(9), oracle(bundle, states))


def test_lazy_states_are_observed_even_when_their_step_is_over():
    bundle = make_bundle(CONTEXT)
    states = make_states(20)
    recorded = Recorded(bundle)
    for i in range(19):  # nobody waits: many are too old to be predicted
        for layer in LAYERS:
            recorded.runner.predict_async(mx.array(states[layer][i])[None] * 1, layer, i)
    step = recorded.play(states, 19, 20)
    recorded.check([step], tail(oracle(bundle, states), 19))


def test_sequences_in_turns_layer_by_layer():
    bundle = make_bundle(CONTEXT)
    all_states = {7: make_states(15, 1), 8: make_states(15, 2)}
    expected = {name: oracle(bundle, states) for name, states in all_states.items()}
    for checked in all_states:
        recorded = Recorded(bundle)
        for i in range(15):
            for layer in LAYERS:
                for name in all_states if checked == 8 else reversed(all_states):
                    h = all_states[name][layer][i]
                    recorded.runner.predict_async(h, layer, i, sequence=name)
            wait_until(lambda r=recorded.runner: r.statistics()["waiting"] == 0)
        # Of two predictions in one step the later one is kept.
        recorded.check(range(15), expected[checked])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_resets_trims_and_forks_hold_for_what_comes_after(data):
    """A random life of three sequences, against the texts that they hold."""
    bundle = make_bundle(CONTEXT)
    fresh = make_states(200)
    recorded = Recorded(bundle)
    texts = {0: [], 1: [], 2: []}  # rows of `fresh`
    longest = {0: 0, 1: 0, 2: 0}
    used, steps, expected = 0, [], {layer: [] for layer in AHEAD}
    names = st.sampled_from([0, 1, 2])
    for _ in range(data.draw(st.integers(5, 25))):
        name = data.draw(names)
        action = data.draw(
            st.sampled_from(["decode", "decode", "prefill", "trim", "reset", "fork"])
        )
        if action == "reset":
            recorded.runner.reset(name)
            texts[name], longest[name] = [], 0
        elif action == "trim":
            # So many that no other is lost.
            spare = 16 - (longest[name] - len(texts[name]))
            n = data.draw(st.integers(0, spare))
            recorded.runner.trim(name, n)
            texts[name] = texts[name][: max(0, len(texts[name]) - n)]
        elif action == "fork":
            to = data.draw(names)
            recorded.runner.fork(name, to)
            texts[to], longest[to] = list(texts[name]), longest[name]
        else:
            n = 1 if action == "decode" else data.draw(st.integers(2, 6))
            rows = list(range(used, used + n))
            used += n
            step = recorded.play(fresh, rows[0], rows[-1] + 1, name)
            texts[name] += rows
            longest[name] = max(longest[name], len(texts[name]))
            if n == 1:
                steps.append(step)
                logits = oracle(bundle, {at: h[texts[name]] for at, h in fresh.items()})
                for layer in AHEAD:
                    expected[layer].append(logits[layer][-1])
    recorded.check(steps, expected)


def test_changes_come_in_order_though_the_thread_is_behind():
    bundle = make_bundle(CONTEXT)
    a, b = make_states(6, 1), make_states(6, 2)
    recorded = Recorded(bundle)
    runner = recorded.runner
    for i in range(5):
        for layer in LAYERS:
            runner.predict_async(a[layer][i], layer, i)
    runner.trim(0, 2)
    runner.fork(0, 1)
    runner.reset(0)
    for i in range(3, 5):
        for layer in LAYERS:
            runner.predict_async(b[layer][i], layer, 5 + i, sequence=1)
    step = recorded.play(b, 5, 6, 1)
    joined = {at: np.concatenate([a[at][:3], b[at][3:]]) for at in LAYERS}
    first = recorded.play(b, 0, 1, 0)
    both = {}
    for layer in AHEAD:
        both[layer] = [oracle(bundle, joined)[layer][-1], oracle(bundle, b)[layer][0]]
    recorded.check([step, first], both)


def test_a_state_that_fails_leaves_a_gap():
    bundle = make_bundle(ContextConfig(6, 4, 0))
    states = make_states(3)
    recorded = Recorded(bundle)
    recorded.play(states, 0, 1)
    bad = {at: h.copy() for at, h in states.items()}
    for layer in (2, 5):
        bad[layer][1] = np.nan
    for layer in LAYERS:
        recorded.runner.predict_async(bad[layer][1], layer, 2)
    wait_until(lambda: recorded.runner.statistics()["waiting"] == 0)
    assert recorded.runner.statistics()["failed"] == 2
    assert recorded.runner.statistics()["observed"] == 1
    for rule in ("token 0 is not finite", "token 0 is not finite"):
        with pytest.raises(ValueError, match=rule):
            recorded.runner.predict_async(states[0][2], 0, 3)
    step = recorded.play(states, 2, 3)
    # At layers 2 and 5 the token after next sees token 0 only; at layer 3 both.
    arrays = {at: mx.array(h) for at, h in states.items()}
    bundle_vector = {}
    for layer, gaps in ((0, (True, False)), (2, (False, True)), (3, (True,))):
        reads = []
        for d, gap in enumerate(gaps):
            sequence = mx.array([0, 1, 0] if gap else [0, 0, 0])
            memories = [
                mx.pad(bundle.memories[t](arrays[t]), [(6, 0), (0, 0)])[None]
                for t in bundle.targets(layer)
            ]
            own = mx.pad(sequence, [(6, 0)], constant_values=-1)[None]
            reader = bundle[layer].context
            asking = arrays[bundle.query_layer(layer)]
            read = reader._attend(reader.query(asking[None]), memories, own)[0, -1]
            reads.append(read[4 * d : 4 * d + 4])
        vector = bundle[layer].context.attended(mx.concatenate(reads))
        bundle_vector[layer] = [np.array(bundle[layer](arrays[layer][-1], context=vector))]
    recorded.check([step], bundle_vector)


def test_a_forward_pass_has_one_number_of_tokens():
    with ShadowRunner(make_bundle(CONTEXT), "f32") as runner:
        states = make_states(4)
        runner.predict_async(states[0], 0)
        with pytest.raises(
            ValueError, match="as many tokens at each layer, got 1 at layer 2 after 4"
        ):
            runner.predict_async(states[2][:1], 2)
        with pytest.raises(ValueError, match=r"must be \[..., 20\], but is \[4, 19\]"):
            runner.predict_async(states[5][:, 1:], 5)
        with pytest.raises(ValueError, match="a number of tokens, got -1"):
            runner.trim(0, -1)


def test_a_predictor_without_its_bundle_is_refused():
    predictor = ExpertPredictor(PredictorConfig(HIDDEN, 16, 10, 1, 2, context=CONTEXT))
    with pytest.raises(
        ValueError, match=r"reads the memories of layers \[1\], but has those of \[\]"
    ):
        ShadowRunner(predictor, moe_layers=[0, 1])


def test_a_bundle_without_context_takes_no_states_of_its_last_layer():
    with ShadowRunner(make_bundle(None), "f32") as runner:
        for sequence in (0, 1):
            runner.predict_async(object(), LAYERS[-1], sequence=sequence)
        runner.reset()
        runner.trim(0, 3)
        runner.fork(0, 1)
        assert runner.statistics()["submitted"] == 0
