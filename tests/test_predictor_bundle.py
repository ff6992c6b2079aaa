"""Bundles: every parameter comes back, routers are shared, sizes stay in their bounds."""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_od_moe import ExpertPredictor, PredictorBundle, PredictorConfig
from mlx_od_moe.native_predictor import load_bundle
from mlx_od_moe.predictor_file import read_tensors, write_tensors
from mlx_od_moe.projection import Projection
from mlx_od_moe.router import Router, RouterConfig

MOE_LAYERS = [1, 2, 5, 6, 9]
CONFIG = PredictorConfig(hidden_size=64, predictor_size=32, num_experts=16, lookahead=3, top_k=2)


def randomised(module):
    module.update(tree_map(lambda p: mx.random.normal(p.shape), module.parameters()))
    return module


def make_bundle(
    config: PredictorConfig = CONFIG, seed: int = 0, share: bool = False, **router
) -> PredictorBundle:
    """A predictor of every layer but the last, sharing the routers of their targets."""
    mx.random.seed(seed)
    one = randomised(Projection(config.hidden_size, config.trunk_rank)) if share else None
    options = RouterConfig(config.hidden_size, config.num_experts, **router)
    routers = {layer: randomised(Router(options)) for layer in MOE_LAYERS}
    predictors = {}
    for i, layer in enumerate(MOE_LAYERS[:-1]):
        targets = MOE_LAYERS[i + 1 :][: config.lookahead]
        own = dataclasses.replace(
            config, lookahead=len(targets), terms=config.terms[: len(targets)]
        )
        shared = [routers[t] for t in targets] if own.has_gate else []
        predictors[layer] = randomised(ExpertPredictor(own, shared, one))
    training = {"options": {"seed": seed, "terms": ["é", None, 0.1]}}
    return PredictorBundle(MOE_LAYERS, predictors, training)


def contents(bundle: PredictorBundle) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    tensors = {}
    for layer, predictor in bundle.items():
        tensors |= {f"{layer}.{n}": p for n, p in predictor.named_parameters().items()}
    return {n: (str(p.dtype), p.shape, np.array(p).tobytes()) for n, p in tensors.items()}


CONFIGS = {
    "mlp": CONFIG,
    "all parts": dataclasses.replace(
        CONFIG, layer_norm=True, previous_experts=True, terms=("mlp", "mlp+gate", "gate")
    ),
    "gate alone": dataclasses.replace(CONFIG, terms=("gate",) * 3),
    "odd sizes": dataclasses.replace(
        CONFIG, hidden_size=63, predictor_size=31, num_experts=13, terms=("mlp+gate",) * 3
    ),
    "low rank": dataclasses.replace(CONFIG, trunk_rank=64),
    "low rank, odd sizes": dataclasses.replace(CONFIG, hidden_size=63, trunk_rank=7),
}


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_comes_back_bit_for_bit(tmp_path, config, share, bits):
    if share and not config.trunk_rank:
        return
    bundle = make_bundle(
        config, share=share, bias=True, correction=True, scoring="sigmoid", n_group=1
    )
    path = tmp_path / "bundle.safetensors"
    bundle.save(path, bits)
    loaded, expected = (
        PredictorBundle.load(path),
        bundle if bits is None else bundle.quantized(bits),
    )
    assert contents(loaded) == contents(expected)
    assert {n: p.config for n, p in loaded.items()} == {n: p.config for n, p in bundle.items()}
    assert loaded.moe_layers == MOE_LAYERS
    assert loaded.training == bundle.training
    h = mx.random.normal((4, config.hidden_size))
    for layer, predictor in loaded.items():
        assert mx.array_equal(predictor(h), expected[layer](h))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("bits", [None, 4])
def test_routers_are_written_once_and_shared_again_after_loading(tmp_path, bits):
    path = tmp_path / "bundle.safetensors"
    make_bundle(CONFIGS["all parts"]).save(path, bits)
    tensors, _ = read_tensors(path, "bundle")
    names = {name.split(".linear")[0] for name in tensors if "linear.weight" in name}
    assert names == {f"routers.{layer}" for layer in MOE_LAYERS[1:]}
    bundle = PredictorBundle.load(path)
    assert bundle[1].routers[1] is bundle[2].routers[0]
    assert bundle[1].routers[2] is bundle[5].routers[0]
    assert set(bundle.routers()) == {2, 5, 6, 9}


@pytest.mark.parametrize("bits", [None, 4])
def test_a_shared_projection_is_written_once_and_shared_again_after_loading(tmp_path, bits):
    path = tmp_path / "bundle.safetensors"
    config = dataclasses.replace(
        CONFIG, trunk_rank=64, layer_norm=True, terms=("mlp", "gate", "mlp+gate")
    )
    bundle = make_bundle(config, share=True)
    bundle.save(path, bits)
    tensors, _ = read_tensors(path, "bundle")
    assert [n for n in tensors if n.endswith("projection.linear.weight")] == [
        "projection.linear.weight"
    ]
    loaded = PredictorBundle.load(path)
    assert {id(p.shared_projection) for p in loaded.values()} == {id(loaded.projection)}
    x = mx.random.normal((5, 64))
    natives, from_file = loaded.native("f32", threads=2), load_bundle(str(path), "f32")
    for layer, predictor in loaded.items():
        expected = np.array(predictor(x))
        np.testing.assert_allclose(natives[layer].logits(x), expected, rtol=1e-4, atol=1e-3)
        assert (from_file[layer].logits(x) == natives[layer].logits(x)).all()
        predictor.save(tmp_path / "alone.safetensors")
        alone = ExpertPredictor.load(tmp_path / "alone.safetensors")
        assert mx.array_equal(alone(x), predictor(x))
        np.testing.assert_array_equal(alone.native("f32").logits(x), natives[layer].logits(x))


def test_a_shared_projection_is_the_same_for_all():
    bundle = make_bundle(dataclasses.replace(CONFIG, trunk_rank=8), share=True)
    other = make_bundle(dataclasses.replace(CONFIG, trunk_rank=8), share=True)
    own = make_bundle(dataclasses.replace(CONFIG, trunk_rank=8))
    for mixed in (other, own):
        with pytest.raises(ValueError, match="all layers share one projection, or none"):
            PredictorBundle(MOE_LAYERS, {1: bundle[1], 2: mixed[2]})
    wide = ExpertPredictor(dataclasses.replace(CONFIG, trunk_rank=9), (), bundle.projection)
    with pytest.raises(
        ValueError, match=r"one hidden_size and trunk_rank, got \[\(64, 8\), \(64, 9\)\]"
    ):
        PredictorBundle(MOE_LAYERS, {1: bundle[1], 2: wide})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"projection.linear.weight": None}, r"projection\.linear\.weight"),
        ({"projection.linear.weight": mx.zeros((9, 64))}, "9, 64"),
        ({"projection.linear.weight": mx.zeros((8, 32))}, "8, 32"),
        ({"layers.2.trunk.weight": mx.zeros((32, 64))}, "32, 64"),
    ],
    ids=["missing", "other rank", "other width", "trunk without rank"],
)
def test_projections_that_do_not_fit_are_an_error_that_names_the_file(tmp_path, change, reason):
    path, other = tmp_path / "bundle.safetensors", tmp_path / "other.safetensors"
    make_bundle(dataclasses.replace(CONFIG, trunk_rank=8), share=True).save(path)
    tensors, metadata = read_tensors(path, "bundle")
    tensors = {n: t for n, t in (tensors | change).items() if t is not None}
    write_tensors(other, tensors, "bundle", metadata)
    for load in (PredictorBundle.load, load_bundle):
        with pytest.raises(ValueError, match=rf"(?s)other\.safetensors.*{reason}"):
            load(str(other))


def test_a_quantised_bundle_is_its_predictors_quantised():
    bundle = make_bundle(CONFIGS["all parts"])
    h = mx.random.normal((10, 64))
    quantized = bundle.quantized(4)
    assert quantized[1].routers[1] is quantized[2].routers[0]
    for layer, predictor in bundle.items():
        assert mx.array_equal(quantized[layer](h), predictor.quantized(4)(h))
        assert not mx.array_equal(quantized[layer](h), predictor(h))


def nbytes(bundle: PredictorBundle) -> int:
    modules = [*bundle.values(), *bundle.routers().values()]
    return sum(p.nbytes for module in modules for _, p in tree_flatten(module.parameters()))


def test_a_file_is_as_large_as_its_tensors(tmp_path):
    bundle = make_bundle(CONFIGS["all parts"]).quantized(4)
    path = tmp_path / "bundle.safetensors"
    bundle.save(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header - 8 == nbytes(bundle)


def test_a_bundle_for_kimi_k2_with_all_parts_stays_below_500_mb_at_4_bits():
    """Nothing is computed: arrays know their sizes before."""
    layers = list(range(1, 61))
    config = PredictorConfig(
        hidden_size=7168, layer_norm=True, previous_experts=True, terms=("mlp+gate",) * 4
    )
    options = RouterConfig(7168, 384, correction=True, scoring="sigmoid")
    routers = {layer: Router(options) for layer in layers}
    predictors = {}
    for i, layer in enumerate(layers[:-1]):
        targets = layers[i + 1 : i + 5]
        own = dataclasses.replace(
            config, lookahead=len(targets), terms=config.terms[: len(targets)]
        )
        predictors[layer] = ExpertPredictor(own, [routers[t] for t in targets])
    size = nbytes(PredictorBundle(layers, predictors).quantized(4))
    assert 300_000_000 < size < 500_000_000


def test_a_bundle_is_a_mapping_in_layer_order():
    bundle = make_bundle()
    shuffled = PredictorBundle(MOE_LAYERS, {n: bundle[n] for n in (6, 1, 5, 2)})
    assert list(shuffled) == [1, 2, 5, 6]
    assert len(shuffled) == 4
    assert 9 not in shuffled
    with pytest.raises(KeyError):
        shuffled[9]
    assert {n: shuffled.targets(n) for n in MOE_LAYERS} == {
        1: [2, 5, 6],
        2: [5, 6, 9],
        5: [6, 9],
        6: [9],
        9: [],
    }


def test_what_cannot_be_a_bundle_says_why():
    predictor = ExpertPredictor(CONFIG)
    with pytest.raises(ValueError, match="at least one layer"):
        PredictorBundle(MOE_LAYERS, {})
    with pytest.raises(ValueError, match=r"layer 5 predicts 3 layers ahead, but only \[6, 9\]"):
        PredictorBundle(MOE_LAYERS, {5: predictor})
    with pytest.raises(ValueError, match=r"3 is not one of"):
        PredictorBundle(MOE_LAYERS, {3: predictor})
    with pytest.raises(ValueError, match="quantised alike"):
        PredictorBundle(MOE_LAYERS, {1: predictor, 2: predictor.quantized(4)})


def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path):
    whole = tmp_path / "whole.safetensors"
    make_bundle().save(whole)
    data = whole.read_bytes()
    for size in (0, 7, 1000, len(data) - 1):
        cut = tmp_path / f"cut-{size}.safetensors"
        cut.write_bytes(data[:size])
        with pytest.raises(ValueError, match=cut.name):
            PredictorBundle.load(cut)


def test_each_kind_of_file_is_loaded_by_its_own_class(tmp_path):
    make_bundle().save(tmp_path / "bundle.safetensors")
    ExpertPredictor(CONFIG).save(tmp_path / "predictor.safetensors")
    with pytest.raises(ValueError, match=r"bundle\.safetensors.*not a predictor"):
        ExpertPredictor.load(tmp_path / "bundle.safetensors")
    with pytest.raises(ValueError, match=r"predictor\.safetensors.*not a bundle"):
        PredictorBundle.load(tmp_path / "predictor.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"moe_layers": [1, 2]},
        {"moe_layers": None},
        {"layers": {}},
        {"layers": {"1": {**dataclasses.asdict(CONFIG), "hidden_size": 128}}},
        {"routers": {}},
        {"quantization": {"bits": 5}},
        {"training": ...},
    ],
    ids=lambda change: json.dumps(change, default=str)[:30],
)
def test_metadata_that_the_tensors_contradict_is_an_error_that_names_the_file(
    tmp_path: Path, change
):
    path = tmp_path / "bundle.safetensors"
    make_bundle(CONFIGS["all parts"]).save(path)
    tensors, metadata = read_tensors(path, "bundle")
    metadata = {k: v for k, v in (metadata | change).items() if v is not ...}
    other = tmp_path / "other.safetensors"
    write_tensors(other, tensors, "bundle", metadata)
    with pytest.raises(ValueError, match=other.name):
        PredictorBundle.load(other)
