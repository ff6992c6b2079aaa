import os
import threading

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_od_moe._ext import available_kernels

from mlx_od_moe import ExpertPredictor, NativePredictor, PredictorBundle, PredictorConfig
from mlx_od_moe.native_predictor import FORMATS, load_bundle
from mlx_od_moe.router import Router, RouterConfig

# Relative error of the logits that gaussian weights, the worst case, show at most.
TOLERANCE = {"f32": 2e-5, "f16": 2e-3, "bf16": 1.5e-2, "int8": 5e-2, "int4": 0.35}


def make_predictor(seed=0, scoring="softmax", **options):
    mx.random.seed(seed)
    config = PredictorConfig(**options)
    routers = []
    if config.has_gate:
        sigmoid = scoring == "sigmoid"
        groups = 2 if sigmoid and config.num_experts % 2 == 0 and config.num_experts > 2 else 1
        for _ in range(config.lookahead):
            router_config = RouterConfig(
                config.hidden_size, config.num_experts, True, sigmoid, scoring, groups
            )
            router = Router(router_config)
            if sigmoid:
                router.correction = mx.random.normal((config.num_experts,)) * 0.2
            routers.append(router)
    predictor = ExpertPredictor(config, routers)
    if config.has_mlp:  # with routers training starts at zero
        heads = mx.random.normal(predictor.heads.weight.shape) / config.predictor_size**0.5
        predictor.heads.weight = heads
    if config.has_projection:  # its outputs as large as its inputs
        shape = (config.trunk_rank, config.hidden_size)
        predictor.projection.linear.weight = mx.random.normal(shape) / config.hidden_size**0.5
    if config.has_gate:
        predictor.gate_scale = mx.random.uniform(0.5, 1.5, (config.lookahead,))
        predictor.gate_input_scale = mx.random.uniform(
            0.5, 1.5, (config.lookahead, config.hidden_size)
        )
    mx.eval(predictor.parameters())
    return predictor


def relative_error(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)


@pytest.fixture(scope="module")
def predictor():
    return make_predictor(hidden_size=128, predictor_size=64, num_experts=40, lookahead=3)


@pytest.fixture(scope="module")
def native(predictor):
    return predictor.native("f32")


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    hidden_size=st.integers(1, 300),
    predictor_size=st.integers(1, 150),
    num_experts=st.integers(1, 70),
    lookahead=st.integers(1, 5),
    tokens=st.integers(1, 70),
    format=st.sampled_from(FORMATS),
    kernel=st.sampled_from(available_kernels()),
    threads=st.integers(1, 3),
)
def test_agrees_with_the_python_predictor(
    data, hidden_size, predictor_size, num_experts, lookahead, tokens, format, kernel, threads
):
    terms = data.draw(
        st.lists(
            st.sampled_from(("mlp", "mlp+gate", "gate")), min_size=lookahead, max_size=lookahead
        )
    )
    predictor = make_predictor(
        seed=tokens,
        hidden_size=hidden_size,
        predictor_size=predictor_size,
        num_experts=num_experts,
        lookahead=lookahead,
        top_k=1,
        terms=tuple(terms),
        activation=data.draw(st.sampled_from(("silu", "relu"))),
        # Of few values LayerNorm may divide by a difference that is mostly rounding.
        layer_norm=predictor_size > 8 and data.draw(st.booleans()),
        previous_experts=data.draw(st.booleans()),
        trunk_rank=data.draw(st.integers(0, 200)),
    )
    x = mx.random.normal((tokens, hidden_size))
    count = data.draw(st.integers(1, 3))
    previous = mx.random.randint(-1, num_experts, (tokens, lookahead, count))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_OD_MOE_KERNEL", kernel)
        native = predictor.native(format, threads)
    assert native.kernel == kernel
    expected = np.array(predictor(x, previous))
    logits = native.logits(x, previous=previous)
    assert logits.shape == (tokens, lookahead, num_experts)
    # Few and small logits may cancel: what is lost is relative to the terms, not to their sum.
    error = np.linalg.norm(logits - expected) / np.sqrt(expected.size)
    matrices = 2 if predictor.config.has_projection else 1  # of the trunk, each with its losses
    assert error < matrices * TOLERANCE[format] * max(1.0, np.sqrt(np.mean(expected**2)))

    k = data.draw(st.integers(1, min(32, num_experts)))
    ids = native.predict(x, k, previous=previous)
    assert (ids == np.argsort(-logits, axis=-1, kind="stable")[..., :k]).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_routers_of_every_scoring(kernel, format, scoring):
    predictor = make_predictor(
        scoring=scoring, hidden_size=192, predictor_size=96, num_experts=24, lookahead=3, top_k=4,
        terms=("mlp", "mlp+gate", "gate"),
    )  # fmt: skip
    x = mx.random.normal((5, 192))
    logits = predictor.native(format).logits(x)
    # In int4 a weak group may win by a rounding: compare what most experts get.
    error = np.median(np.abs(logits - np.array(predictor(x))))
    assert error < TOLERANCE[format]


def test_exact_formats_choose_the_same_experts(kernel):
    predictor = make_predictor(hidden_size=256, predictor_size=128, num_experts=96)
    x = mx.random.normal((32, 256))
    expected = np.array(predictor.predict(x))
    assert (predictor.native("f32").predict(x) == expected).mean() > 0.999


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_predictors_lose_nothing_more_in_f32(kernel, bits):
    predictor = make_predictor(hidden_size=256, predictor_size=128, num_experts=24).quantized(bits)
    x = mx.random.normal((4, 256))
    expected = np.array(predictor(x))
    assert relative_error(predictor.native("f32").logits(x), expected) < 1e-5
    # What is int4 already keeps its values: only activations are rounded.
    if bits == 4:
        assert relative_error(predictor.native("int4").logits(x), expected) < 2e-2


@pytest.mark.parametrize("trunk_rank", [0, 96])
def test_thread_counts_agree_bit_for_bit(trunk_rank):
    predictor = make_predictor(
        hidden_size=1024, predictor_size=512, num_experts=128, trunk_rank=trunk_rank
    )
    x = np.random.default_rng(0).standard_normal((3, 1024), dtype=np.float32)
    for format in FORMATS:
        alone = predictor.native(format, threads=1).logits(x)
        for threads in (2, 3):
            assert (predictor.native(format, threads=threads).logits(x) == alone).all()


def test_concurrent_callers():
    predictor = make_predictor(hidden_size=512, predictor_size=256, num_experts=64)
    native = predictor.native("int4", threads=2)
    x = np.random.default_rng(0).standard_normal((8, 512), dtype=np.float32)
    expected = native.logits(x)
    wrong = []

    def call():
        wrong.extend(i for i in range(50) if not (native.logits(x) == expected).all())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_takes_mlx_arrays_of_any_float_type_lazy_or_not(predictor, native, dtype):
    x = mx.random.normal((6, 128)).astype(dtype)
    expected = np.array(predictor(x))
    assert relative_error(native.logits(x), expected) < 1e-5
    assert (
        relative_error(native.logits(mx.contiguous(x.T).T + 0), expected) < 1e-5
    )  # not contiguous


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_takes_numpy_arrays_with_any_strides(predictor, native, dtype):
    x = np.random.default_rng(1).standard_normal((6, 128)).astype(dtype)
    expected = np.array(predictor(mx.array(x)))
    for form in (x, np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], x[::-1][::-1]):
        assert relative_error(native.logits(form), expected) < 1e-5
    read_only = x.copy()
    read_only.flags.writeable = False
    assert relative_error(native.logits(read_only), expected) < 1e-5


def test_leading_axes_are_kept(native):
    x = np.zeros((2, 3, 128), np.float32)
    assert native.logits(x).shape == (2, 3, 3, 40)
    assert native.predict(x, 5).shape == (2, 3, 3, 5)
    assert native.predict(x[0, 0]).shape == (3, 8)
    assert native.predict(x[:0]).shape == (0, 3, 3, 8)


def test_writes_into_out(native):
    x = np.random.default_rng(2).standard_normal((4, 128), dtype=np.float32)
    out = np.full((4, 3, 8), -1, np.int32)
    assert native.predict(x, out=out) is out
    assert (out == native.predict(x)).all()
    with pytest.raises(ValueError, match=r"out must be \[4, 3, 8\], but is \[4, 3, 7\]"):
        native.predict(x, out=np.empty((4, 3, 7), np.int32))
    with pytest.raises(TypeError, match="contiguous int32"):
        native.predict(x, out=np.empty((4, 3, 8), np.int64))


def test_context_joins_the_trunk(predictor, native):
    x = np.random.default_rng(3).standard_normal((4, 128), dtype=np.float32)
    context = np.random.default_rng(4).standard_normal((4, 64), dtype=np.float32)
    z = predictor.trunk(mx.array(x)) + mx.array(context)
    expected = np.array(predictor.heads(mx.maximum(z, 0))).reshape(4, 3, 40)
    assert relative_error(native.logits(x, context=context), expected) < 1e-5
    assert relative_error(native.logits(x, context=mx.array(context)), expected) < 1e-5
    with pytest.raises(ValueError, match=r"context must be \[4, 64\], but is \[4, 63\]"):
        native.logits(x, context=context[:, :63])


def test_previous_of_any_integer_type():
    predictor = make_predictor(
        hidden_size=64, predictor_size=32, num_experts=20, lookahead=2, previous_experts=True
    )
    native = predictor.native("f32")
    x = np.random.default_rng(5).standard_normal((2, 64), dtype=np.float32)
    previous = np.array([[[0, 19], [3, -1]], [[-1, -1], [7, 7]]])
    expected = np.array(predictor(mx.array(x), mx.array(previous)))
    for ids in (previous, previous.astype(np.int16), mx.array(previous)):
        assert relative_error(native.logits(x, previous=ids), expected) < 1e-5
    with pytest.raises(ValueError, match="previous experts must be below 20, got 20"):
        native.logits(x, previous=previous + 1)
    with pytest.raises(ValueError, match="previous must be"):
        native.logits(x, previous=previous[:1])


def test_refuses_what_it_cannot_take(predictor, native):
    x = np.zeros((2, 128), np.float32)
    with pytest.raises(
        ValueError, match="has 7168 features, but this predictor is for hidden_size 128"
    ):
        native.predict(np.zeros((2, 7168), np.float32))
    with pytest.raises(TypeError, match="float32, float16 or bfloat16"):
        native.predict(np.zeros((2, 128)))
    with pytest.raises(TypeError, match=r"numpy array or an mx\.array"):
        native.predict("hidden")
    for k in (0, -1, 33, 41):
        with pytest.raises(ValueError, match=f"k must be 1 ... 32, got {k}"):
            native.predict(x, k)
    with pytest.raises(ValueError, match="format is one of"):
        predictor.native("int3")
    for threads in (0, 65):
        with pytest.raises(ValueError, match=r"threads must be 1 \.\.\. 64"):
            predictor.native("f32", threads=threads)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_a_state_that_is_not_finite(native, bad):
    x = np.zeros((70, 128), np.float32)
    x[67, 5] = bad
    with pytest.raises(ValueError, match="the hidden state of token 67 is not finite"):
        native.predict(x)
    assert native.predict(x[:5]).max() < 40  # and works on


def test_unknown_kernel_is_refused(predictor, monkeypatch):
    monkeypatch.setenv("MLX_OD_MOE_KERNEL", "sse9")
    with pytest.raises(ValueError, match="not 'sse9'"):
        predictor.native()


def test_describes_itself(predictor):
    native = predictor.native("int8", threads=2)
    assert isinstance(native, NativePredictor)
    assert (native.hidden_size, native.predictor_size, native.num_experts) == (128, 64, 40)
    assert (native.lookahead, native.top_k, native.format, native.threads) == (3, 8, "int8", 2)
    assert native.weight_bytes >= 64 * 128 + 120 * 64
    assert native.kernel == os.environ.get("MLX_OD_MOE_KERNEL", available_kernels()[0])


@pytest.mark.parametrize("trunk_rank", [0, 64])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_loads_what_python_saved(tmp_path, bits, trunk_rank):
    predictor = make_predictor(
        scoring="sigmoid", hidden_size=128, predictor_size=64, num_experts=20, lookahead=2,
        terms=("mlp+gate", "gate"), layer_norm=True, previous_experts=True, trunk_rank=trunk_rank,
    )  # fmt: skip
    path = tmp_path / "predictor.safetensors"
    predictor.save(path, bits)
    x = np.random.default_rng(0).standard_normal((3, 128), dtype=np.float32)
    loaded = NativePredictor.load(str(path), format="f32")
    expected = np.array(ExpertPredictor.load(path)(mx.array(x)))
    assert relative_error(loaded.logits(x), expected) < 1e-5


@pytest.mark.parametrize("bits", [None, 4])
def test_bundles_in_memory_and_from_a_file(tmp_path, bits):
    def config(lookahead):
        terms = ("mlp+gate",) * lookahead
        return PredictorConfig(64, 32, 10, lookahead, top_k=4, terms=terms)

    routers = {layer: Router(RouterConfig(64, 10)) for layer in (3, 5, 7)}
    predictors = {
        1: ExpertPredictor(config(2), [routers[3], routers[5]]),
        3: ExpertPredictor(config(2), [routers[5], routers[7]]),
        5: ExpertPredictor(config(1), [routers[7]]),
    }
    bundle = PredictorBundle([1, 3, 5, 7], predictors)
    bundle = bundle if bits is None else bundle.quantized(bits, group_size=32)
    path = tmp_path / "bundle.safetensors"
    bundle.save(path)
    x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    packed = bundle.native("f32", threads=2)
    loaded = load_bundle(str(path), "f32")
    assert list(packed) == list(loaded) == [1, 3, 5]
    for layer, predictor in bundle.items():
        expected = np.array(predictor(mx.array(x)))
        assert relative_error(packed[layer].logits(x), expected) < 1e-5
        assert (loaded[layer].logits(x) == packed[layer].logits(x)).all()


def test_refuses_files_that_are_none(tmp_path, predictor):
    path = tmp_path / "predictor.safetensors"
    predictor.save(path)
    with pytest.raises(ValueError, match="kind='bundle'"):
        load_bundle(str(path))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"predictor\.safetensors\] .*its data lie at"):
        NativePredictor.load(str(path))
    with pytest.raises(ValueError, match="no such predictor file"):
        NativePredictor.load(str(tmp_path / "none"))


def test_states_have_as_many_axes_as_fit():
    native = ExpertPredictor(
        PredictorConfig(hidden_size=8, predictor_size=8, num_experts=4, top_k=2)
    ).native()
    deep = np.ones((1,) * 14 + (8,), np.float32)
    assert native.predict(deep).shape == (1,) * 14 + (4, 2)
    with pytest.raises(ValueError, match="at most 16 axes"):
        native.predict(deep[None])
