"""SequenceContext: the native context, token by token, against the oracle over whole sequences."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_od_moe._ext import available_kernels

from context_models import HIDDEN, INNER, LAYERS, make_bundle, make_states, oracle, vectors
from mlx_od_moe import ExpertPredictor, NativePredictor, PredictorBundle, PredictorConfig
from mlx_od_moe.context import ContextConfig, TokenMemory
from mlx_od_moe.native_predictor import SequenceContext, load_bundle

# What a forward loses, relative to the logits' norm.
TOLERANCE = {"f32": 1e-5, "f16": 4e-3, "bf16": 2e-2, "int8": 5e-2, "int4": 0.3}

contexts = st.builds(
    lambda window, key_size, state_size, early: ContextConfig(
        window, key_size if window else 0, state_size if window else max(state_size, 1), early
    ),
    window=st.integers(0, 40),
    key_size=st.integers(1, 19),
    state_size=st.integers(0, 5),
    early=st.booleans(),
)


class Player:
    """Passes tokens through all layers, natively, and keeps the logits."""

    def __init__(self, natives: dict[int, NativePredictor], context: SequenceContext | None = None):
        self.natives = natives
        self.context = context or SequenceContext(natives)

    def play(self, states: dict[int, np.ndarray], first: int, last: int) -> dict[int, np.ndarray]:
        """One forward pass of the tokens first … last - 1: {layer: logits}."""
        logits = {}
        for layer in LAYERS:
            h = states[layer][first:last]
            if layer in self.natives:
                logits[layer] = self.natives[layer].logits(h, sequence=self.context)
            self.context.observe(layer, h)
        return logits

    def decode(self, states: dict[int, np.ndarray], first: int, last: int) -> dict[int, np.ndarray]:
        """Token by token."""
        passes = [self.play(states, i, i + 1) for i in range(first, last)]
        return {layer: np.concatenate([p[layer] for p in passes]) for layer in self.natives}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check(found, expected, tolerance=TOLERANCE["f32"]):
    for layer in found:
        assert error(found[layer], expected[layer]) < tolerance, layer


@settings(max_examples=60, deadline=None)
@given(
    context=contexts,
    tokens=st.integers(1, 75),
    seed=st.integers(0, 9),
    trunk_rank=st.sampled_from([0, 3, 19]),
)
def test_decoding_is_what_the_oracle_computes(context, tokens, seed, trunk_rank):
    bundle = make_bundle(context, seed, trunk_rank=trunk_rank)
    states = make_states(tokens, seed)
    found = Player(bundle.native("f32")).decode(states, 0, tokens)
    check(found, oracle(bundle, states))


@pytest.mark.parametrize("trunk_rank", [0, 70])
@pytest.mark.parametrize("kernel", available_kernels())
@pytest.mark.parametrize("format", TOLERANCE)
@pytest.mark.parametrize(
    "context",
    [
        ContextConfig(21, 19, 0),
        ContextConfig(0, 0, 7),
        ContextConfig(64, 64, 64),
        ContextConfig(64, 64, 64, early_query=False),
    ],
    ids=["attention", "state", "both", "both, late"],
)
def test_every_format_and_kernel(monkeypatch, kernel, format, context, trunk_rank):
    monkeypatch.setenv("MLX_OD_MOE_KERNEL", kernel)
    bundle = make_bundle(context, layer_norm=True, trunk_rank=trunk_rank)
    states = make_states(90)
    player = Player(bundle.native(format))
    assert player.natives[0].kernel == kernel
    check(player.decode(states, 0, 90), oracle(bundle, states), TOLERANCE[format])


@settings(max_examples=40, deadline=None)
@given(
    context=contexts, prompt=st.integers(1, 140), tail=st.integers(1, 5), chunk=st.integers(1, 80)
)
def test_decoding_goes_on_from_a_prefill(context, prompt, tail, chunk):
    """However the prompt was cut, the tokens after it see all of it."""
    bundle = make_bundle(context)
    states = make_states(prompt + tail)
    player = Player(bundle.native("f32"))
    for first in range(0, prompt, chunk):
        player.play(states, first, min(first + chunk, prompt))
    assert len(player.context) == prompt
    found = player.decode(states, prompt, prompt + tail)
    check(found, {layer: x[prompt:] for layer, x in oracle(bundle, states).items()})


@settings(max_examples=30, deadline=None)
@given(context=contexts, before=st.integers(0, 50), batch=st.integers(1, 64))
def test_tokens_of_one_call_see_what_was_there_before_it(context, before, batch):
    """At their true distance; what they leave at later layers is not there yet."""
    bundle = make_bundle(context)
    states = make_states(before + batch)
    player = Player(bundle.native("f32"))
    if before:
        player.play(states, 0, before)
    found = player.play(states, before, before + batch)
    for i in range(batch):
        # In the oracle the batch's own tokens before this one are another sequence's.
        sequence = np.zeros(before + batch, int)
        sequence[before : before + i] = 1
        for layer in bundle:
            arrays = {at: mx.array(h[: before + i + 1]) for at, h in states.items()}
            own = mx.array(sequence[: before + i + 1])
            vector = vectors(bundle, layer, arrays, own)[-1]
            expected = np.array(bundle[layer](arrays[layer][-1], context=vector))
            assert error(found[layer][i], expected) < 2e-5


@settings(max_examples=30, deadline=None)
@given(
    context=contexts,
    tokens=st.integers(1, 60),
    trimmed=st.integers(0, 16),
    again=st.integers(1, 20),
)
def test_a_trim_of_up_to_16_tokens_loses_no_others(context, tokens, trimmed, again):
    bundle = make_bundle(context)
    states = make_states(tokens)
    kept = max(0, tokens - trimmed)
    other = make_states(again, seed=5)
    joined = {layer: np.concatenate([h[:kept], other[layer]]) for layer, h in states.items()}
    player = Player(bundle.native("f32"))
    player.play(states, 0, tokens)
    player.context.trim(trimmed)
    assert len(player.context) == kept
    found = player.decode(joined, kept, kept + again)
    check(found, {layer: x[kept:] for layer, x in oracle(bundle, joined).items()})


def test_a_longer_trim_leaves_what_the_ring_still_holds():
    window = 32  # the ring holds 48
    bundle = make_bundle(ContextConfig(window, 4, 3))
    states = make_states(100)
    player = Player(bundle.native("f32"))
    player.play(states, 0, 100)
    player.context.trim(30)
    assert len(player.context) == 70
    found = player.play(states, 70, 71)
    # Tokens 52 … 69 are there, and the state of none.
    for layer in bundle:
        arrays = {at: mx.array(h[:71]) for at, h in states.items()}
        sequence = mx.array([1] * 52 + [0] * 19)
        predictor = bundle[layer]
        whole = vectors(bundle, layer, arrays, sequence)[-1]
        left = mx.concatenate(
            [bundle.memories[t](arrays[t][69])[8:] for t in bundle.targets(layer)]
        )
        vector = whole - predictor.context.previous_state(left)
        assert error(found[layer][0], np.array(predictor(arrays[layer][-1], context=vector))) < 1e-5
    player.context.trim(100)
    assert len(player.context) == 0
    check(player.decode(states, 0, 3), oracle(bundle, {a: h[:3] for a, h in states.items()}))


def test_sequences_and_forks_are_independent():
    bundle = make_bundle(ContextConfig(8, 5, 3))
    natives = bundle.native("f32")
    a, b, c = make_states(30, 1), make_states(30, 2), make_states(30, 3)
    first, second = Player(natives), Player(natives)
    found = {"a": [], "b": []}
    for i in range(12):
        found["a"].append(first.play(a, i, i + 1))
        found["b"].append(second.play(b, i, i + 1))
    forked = Player(natives, first.context.fork())
    joined = {layer: np.concatenate([a[layer][:12], c[layer][12:]]) for layer in LAYERS}
    second.context.reset()
    for i in range(12, 30):
        found["a"].append(first.play(a, i, i + 1))
        expected = {layer: x[i : i + 1] for layer, x in oracle(bundle, joined).items()}
        check(forked.play(joined, i, i + 1), expected)
    check(second.decode(c, 0, 30), oracle(bundle, c))
    for name, states in (("a", a), ("b", b)):
        expected = oracle(bundle, states)
        for i, logits in enumerate(found[name]):
            check(logits, {layer: x[i : i + 1] for layer, x in expected.items()})


def test_a_token_that_was_left_out_is_seen_by_none():
    bundle = make_bundle(ContextConfig(6, 4, 3))
    states = make_states(4)
    player = Player(bundle.native("f32"))
    player.play(states, 0, 1)
    for layer in LAYERS:  # token 1 is missing
        player.context.observe(layer, states[layer][2:3], position=2)
    found = player.play(states, 3, 4)
    for layer in bundle:
        arrays = {at: mx.array(h) for at, h in states.items()}
        sequence = mx.array([0, 1, 0, 0])
        vector = vectors(bundle, layer, arrays, sequence)[-1]
        expected = np.array(bundle[layer](arrays[layer][-1], context=vector))
        assert error(found[layer][0], expected) < 1e-5


def test_what_was_trimmed_is_not_seen_across_a_gap():
    natives = make_bundle(ContextConfig(6, 4, 3)).native("f32")
    states, old = make_states(3, 1), make_states(3, 2)
    bad = np.full((1, HIDDEN), np.nan, np.float32)
    found = []
    for trims in (False, True):
        player = Player(natives)
        player.play(states, 0, 1)
        if trims:
            player.play(old, 1, 3)
            player.context.trim(2)
        for layer in LAYERS:
            if layer == 2:
                with pytest.raises(ValueError, match="not finite"):
                    player.context.observe(layer, bad)
            else:
                player.context.observe(layer, states[layer][1:2])
        found.append(player.play(states, 2, 3))
    for layer, logits in found[0].items():
        np.testing.assert_allclose(found[1][layer], logits, atol=1e-6)


def test_memory_is_bounded():
    bundle = make_bundle(ContextConfig(256, 64, 64))
    context = SequenceContext(bundle.native("int4"))
    assert context.nbytes == 3 * INNER * 4
    sizes = set()
    for _ in range(3):
        for layer in LAYERS:
            context.observe(layer, np.ones((1000, HIDDEN), np.float32))
        sizes.add(context.nbytes)
    keys, values, states = 272 * 64 * 2, 64 * 320 * 2, 17 * 64 * 4
    per_layer = keys + values + states + (272 + 17) * 8
    assert sizes == {3 * per_layer + 3 * INNER * 4}


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("format", ["f32", "int4"])
def test_files_are_loaded_with_their_context(tmp_path, bits, format):
    context = ContextConfig(10, 32, 32)
    bundle = make_bundle(context)
    bundle.save(tmp_path / "p.safetensors", bits)
    read = PredictorBundle.load(tmp_path / "p.safetensors")
    states = make_states(25)
    found = Player(load_bundle(str(tmp_path / "p.safetensors"), format)).decode(states, 0, 25)
    again = Player(read.native(format)).decode(states, 0, 25)
    check(found, oracle(read, states), TOLERANCE[format])
    for layer in found:
        np.testing.assert_array_equal(found[layer], again[layer])


def test_threads_change_nothing():
    """The second stage is shared out too."""
    mx.random.seed(0)
    context = ContextConfig(64, 64, 32)
    config = PredictorConfig(512, 512, 128, 2, 3, context=context)
    memories = {layer: TokenMemory(context, 512) for layer in (1, 2)}
    bundle = PredictorBundle([0, 1, 2], {0: ExpertPredictor(config)}, memories=memories)
    x = np.random.default_rng(0).standard_normal((100, 512), dtype=np.float32)
    found = []
    for threads in (1, 3):
        natives = bundle.native("int8", threads)
        sequence = SequenceContext(natives)
        for layer in (1, 2):
            sequence.observe(layer, x)
        found.append([natives[0].logits(x[:n], sequence=sequence) for n in (1, 70)])
    for alone, together in zip(*found, strict=True):
        np.testing.assert_array_equal(alone, together)


def test_wrong_uses_are_refused():
    bundle = make_bundle(ContextConfig(4, 4, 4))
    natives = bundle.native("f32")
    context = SequenceContext(natives)
    context.observe(2, np.zeros((3, HIDDEN), np.float32))
    context.observe(99, np.zeros((3, HIDDEN), np.float32))  # no predictor looks at it
    assert len(context) == 3
    for states, position, rule in (
        (np.zeros((1, HIDDEN), np.float32), 2, "layer 2 has seen 3 tokens, got .* position 2"),
        (np.zeros((1, HIDDEN), np.float32), -1, "can't be negative, got -1"),
        (np.zeros((1, HIDDEN + 1), np.float32), None, r"must be \[..., 20\], but is \[1, 21\]"),
        (np.full((1, HIDDEN), np.nan, np.float32), None, "token 0 is not finite"),
    ):
        with pytest.raises(ValueError, match=rule):
            context.observe(2, states, position)
    assert len(context) == 4  # the last one left a gap
    with pytest.raises(ValueError, match="number of tokens, got -1"):
        context.trim(-1)
    other = make_bundle(ContextConfig(4, 4, 4)).native("f32")
    with pytest.raises(ValueError, match="not one that this context was made for"):
        other[0].logits(np.zeros(HIDDEN, np.float32), sequence=context)
    with pytest.raises(ValueError, match=r"share one context, got window 4.* and window 5"):
        SequenceContext({0: natives[0], 2: make_bundle(ContextConfig(5, 4, 4)).native()[2]})


def test_a_bundle_without_context_remembers_nothing():
    natives = make_bundle(None).native("f32")
    context = SequenceContext(natives)
    assert context.empty
    context.observe(2, np.zeros((1, HIDDEN), np.float32))
    assert len(context) == context.nbytes == 0


def test_a_context_keeps_the_weights_that_it_needs():
    bundle = make_bundle(ContextConfig(4, 4, 4))
    natives = bundle.native("f32")
    context = SequenceContext(natives)
    one = natives[0]
    del natives
    gc.collect()
    states = make_states(2)
    for layer in LAYERS:
        context.observe(layer, states[layer][:1])
    found = one.logits(states[0][1:], sequence=context)
    check({0: found}, {0: oracle(bundle, states)[0][1:]})
