"""Context: what a predictor reads from earlier tokens, against a loop over tokens."""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_od_moe import ExpertPredictor, PredictorBundle, PredictorConfig
from mlx_od_moe.context import ContextConfig, TokenMemory
from mlx_od_moe.native_predictor import SequenceContext, load_bundle

HIDDEN, INNER, AHEAD = 12, 16, 2


def make_bundle(context: ContextConfig, seed: int = 0) -> PredictorBundle:
    """Layers 0, 2, 4 with two predictors, every weight random."""
    mx.random.seed(seed)
    moe_layers = [0, 2, 4]
    predictors = {
        layer: ExpertPredictor(
            PredictorConfig(HIDDEN, INNER, 8, lookahead, top_k=2, context=context)
        )
        for layer, lookahead in ((0, AHEAD), (2, 1))
    }
    for predictor in predictors.values():
        if context.window:
            shape = predictor.context.position_bias.shape
            predictor.context.position_bias = mx.random.normal(shape)
    memories = {layer: TokenMemory(context, HIDDEN) for layer in (2, 4)}
    return PredictorBundle(moe_layers, predictors, memories=memories)


def by_hand(bundle, layer, h, states, sequence):
    """The same in float64, one token, head and key after the other."""
    predictor, config = bundle[layer], bundle.context
    size, targets = config.key_size, bundle.targets(layer)
    f64 = lambda a: np.array(a).astype(np.float64)  # noqa: E731
    memories = [f64(states[t]) @ f64(bundle.memories[t].encode.weight).T for t in targets]
    result = np.zeros((len(h), predictor.config.predictor_size))
    for i in range(len(h)):
        if config.state_size and i > 0 and sequence[i - 1] == sequence[i]:
            left = np.concatenate([m[i - 1, 2 * size :] for m in memories])
            result[i] += f64(predictor.context.previous_state.weight) @ left
        if not config.window:
            continue
        query = (f64(predictor.context.query.weight) @ f64(h[i])).reshape(len(targets), size)
        read = []
        for d, memory in enumerate(memories):
            bias = f64(predictor.context.position_bias[d])
            scores, values = [bias[0]], [np.zeros(size)]
            for age in range(1, config.window + 1):
                if i - age >= 0 and sequence[i - age] == sequence[i]:
                    key = memory[i - age, :size]
                    scores.append(query[d] @ key / np.sqrt(size) + bias[age])
                    values.append(memory[i - age, size : 2 * size])
            weights = np.exp(scores - np.max(scores))
            read.append(weights / weights.sum() @ np.array(values))
        result[i] += f64(predictor.context.attended.weight) @ np.concatenate(read)
    return result


def tokens(lengths, seed=0):
    """States per layer, and which sequence each token belongs to."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    states = {
        layer: mx.array(rng.normal(size=(n, HIDDEN)).astype(np.float32)) for layer in (0, 2, 4)
    }
    return states, np.repeat(np.arange(len(lengths)), lengths)


@settings(max_examples=40, deadline=None)
@given(
    window=st.integers(0, 5),
    state_size=st.integers(0, 3),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    layer=st.sampled_from([0, 2]),
)
def test_vectors_are_what_the_definition_says(window, state_size, lengths, layer):
    if not window and not state_size:
        return
    bundle = make_bundle(ContextConfig(window, 4 if window else 0, state_size))
    states, sequence = tokens(lengths)
    vectors = bundle.context_vectors(layer, states[layer], states, mx.array(sequence))
    expected = by_hand(bundle, layer, states[layer], states, sequence)
    np.testing.assert_allclose(np.array(vectors), expected, atol=2e-5)


def test_a_token_never_sees_itself_nor_what_comes_later():
    """At inference these states do not exist yet."""
    bundle = make_bundle(ContextConfig(4, 4, 3))
    states, sequence = tokens([9])
    before = bundle.context_vectors(0, states[0], states, mx.array(sequence))
    changed = {t: s.at[5:].add(1.0) if t else s for t, s in states.items()}
    after = bundle.context_vectors(0, states[0], changed, mx.array(sequence))
    same = np.abs(np.array(before - after)).max(axis=-1) == 0
    assert same[:6].all()
    assert not same[6:].any()


def test_a_new_sequence_starts_without_context():
    bundle = make_bundle(ContextConfig(4, 4, 3))
    states, _ = tokens([6])
    together = bundle.context_vectors(0, states[0], states, mx.array([0, 0, 0, 1, 1, 1]))
    second = {t: s[3:] for t, s in states.items()}
    alone = bundle.context_vectors(0, second[0], second, mx.array([0, 0, 0]))
    np.testing.assert_allclose(np.array(together[3:]), np.array(alone), atol=1e-6)
    assert np.abs(np.array(alone[0])).max() == 0


@pytest.mark.parametrize("bits", [None, 4])
def test_a_bundle_with_context_comes_back_from_its_file(tmp_path, bits):
    context = ContextConfig(3, 4, 8)
    bundle = make_bundle(context)
    bundle.save(tmp_path / "p.safetensors", bits)
    again = PredictorBundle.load(tmp_path / "p.safetensors")
    assert again.context == context
    assert again[0].config == bundle[0].config
    if bits is None:
        states, sequence = tokens([7])
        vectors = [
            np.array(b.context_vectors(0, states[0], states, mx.array(sequence)))
            for b in (bundle, again)
        ]
        np.testing.assert_array_equal(*vectors)


def test_the_layer_before_asks_but_for_the_first():
    assert [make_bundle(ContextConfig(2, 2, 0)).query_layer(n) for n in (0, 2)] == [0, 0]
    late = ContextConfig(2, 2, 0, early_query=False)
    assert [make_bundle(late).query_layer(n) for n in (0, 2)] == [0, 2]
    assert late.query_layer(4, [0, 2, 4]) == 4
    assert ContextConfig(2, 2, 0).query_layer(4, [0, 2, 4]) == 2


def test_a_file_from_before_there_were_early_queries_has_none(tmp_path):
    path = tmp_path / "p.safetensors"
    make_bundle(ContextConfig(3, 4, 8, early_query=False)).save(path)
    tensors, metadata = mx.load(str(path), return_metadata=True)
    layers = json.loads(metadata["layers"])
    for config in layers.values():
        del config["context"]["early_query"]
    mx.save_safetensors(str(path), tensors, metadata | {"layers": json.dumps(layers)})
    assert PredictorBundle.load(path).query_layer(2) == 2
    natives = load_bundle(str(path), "f32")
    context = SequenceContext(natives)
    h = np.ones((2, 1, HIDDEN), np.float32)
    context.observe(0, h[0])  # nobody asks there
    assert len(context) == 0
    context.observe(4, h[0])
    assert np.abs(natives[2].logits(h[1], sequence=context) - natives[2].logits(h[1])).max() > 0


def test_context_changes_the_logits_as_a_summand_of_the_first_matrix():
    bundle = make_bundle(ContextConfig(3, 4, 2))
    predictor = bundle[0]
    h, vector = mx.random.normal((3, HIDDEN)), mx.random.normal((3, INNER))
    moved = ExpertPredictor(predictor.config)
    moved.update(predictor.parameters())
    for i in range(3):
        moved.trunk.bias = predictor.trunk.bias + vector[i]
        expected, got = moved(h[i]), predictor(h, context=vector)[i]
        np.testing.assert_allclose(np.array(got), np.array(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [((0, 4, 4), "both 0 or neither"), ((0, 0, 0), "no context"), ((-1, 4, 4), "negative")],
)
def test_sizes_are_checked(sizes, rule):
    with pytest.raises(ValueError, match=rule):
        ContextConfig(*sizes)


def test_a_bundle_needs_the_memories_that_it_reads():
    bundle = make_bundle(ContextConfig(2, 2, 2))
    with pytest.raises(ValueError, match=r"memories of layers \[2, 4\], got those of \[2\]"):
        PredictorBundle(bundle.moe_layers, dict(bundle), memories={2: bundle.memories[2]})
