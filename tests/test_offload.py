"""A model that runs from the store computes what mlx-lm computes with all of it in memory."""

import gc
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from threading import Thread

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import batch_generate, generate, stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load as load_stock

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe.moe import find_moe_layers
from mlx_od_moe.pack import pack
from tiny_models import BASE, MODELS, build

TEXT = "Once upon a time there was a small fox who"


def tokens(n: int, vocabulary: int = 4096, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(1, vocabulary, (1, n)))


def assert_same_logits(stock: nn.Module, model: nn.Module, prompt: mx.array, steps: int) -> None:
    """Bit for bit: of a prefill, and of decoding what `stock` likes best after it."""
    caches = make_prompt_cache(stock), make_prompt_cache(model)
    ids = prompt
    for _ in range(1 + steps):
        expected, logits = (m(ids, cache=c) for m, c in zip((stock, model), caches, strict=True))
        assert mx.array_equal(expected, logits)
        ids = mx.argmax(expected[:, -1:], axis=-1)


def assert_no_lease(runtime: mlx_od_moe.Runtime) -> None:
    """Every slot can be had at once: nothing is leased any more."""
    gc.collect()
    for layer in runtime.store.layers:
        slots = runtime.store.slots(layer)
        for first in (0, runtime.store.file.num_experts(layer) - slots):
            runtime.store.acquire(layer, range(first, first + slots), timeout=5).release()


@pytest.fixture(scope="module")
def nano() -> Path:
    return model_directory("nano-moe")


@pytest.fixture(scope="module")
def stock(nano):
    return load_stock(str(nano))[0]


@pytest.fixture(scope="module")
def packed_nano(nano, tmp_path_factory) -> Path:
    return pack(nano, tmp_path_factory.mktemp("nano") / "packed", progress=False).path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("capacity", ["12.5%", "19%", "25%", "100%"])
def test_logits_are_bit_identical_at_any_capacity(
    nano, packed_nano, stock, capacity, packed, request
):
    model, _, runtime = mlx_od_moe.load(packed_nano if packed else nano, capacity=capacity)
    with runtime:
        assert_same_logits(stock, model, tokens(40), steps=8)
        assert_no_lease(runtime)


def test_logits_of_the_small_model_are_bit_identical():
    path = model_directory("small-qwen3-moe")
    model, _, runtime = mlx_od_moe.load(path, capacity="25%")
    with runtime:
        assert_same_logits(load_stock(str(path))[0], model, tokens(30), steps=6)
        assert_no_lease(runtime)


def save_tiny(name: str, mode: str, folder: Path) -> nn.Module:
    """A tiny model as mlx-lm would save it, and the model itself."""
    model = build(name)
    model_type, settings, _, _ = MODELS[name]
    config = {**BASE, "model_type": model_type, **settings}
    if mode != "float":
        group, bits = (16, 4) if mode == "nvfp4" else (32, 4)
        owners = {layer.path for layer in find_moe_layers(model)}

        def is_expert(path: str, module: nn.Module) -> bool:
            linear = "weight" in module and path.rpartition(".")[0] in owners
            return linear and module.weight.shape[-1] % group == 0

        nn.quantize(model, group, bits, mode=mode, class_predicate=is_expert)
        config["quantization"] = {"group_size": group, "bits": bits, "mode": mode}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_directory("nano-moe") / file, folder)
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["float", "affine", "mxfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_bit_identical(name, mode, packed, tmp_path):
    """Loaded as mlx-lm loads it, from what mlx-lm saves, and from what `pack` made of that."""
    save_tiny(name, mode, tmp_path)
    expected = load_stock(str(tmp_path))[0]
    path = pack(tmp_path, tmp_path / "packed", progress=False).path if packed else tmp_path
    model, _, runtime = mlx_od_moe.load(path, capacity="50%")
    with runtime:
        assert_same_logits(expected, model, tokens(24, 128), steps=3)
        assert_no_lease(runtime)


def test_a_prefill_reads_each_expert_once(nano):
    model, _, runtime = mlx_od_moe.load(nano, capacity="25%")
    with runtime:
        mx.eval(model(tokens(300)))
        mx.eval(model(tokens(300)))
        for counts in runtime.store.counters()["layers"].values():
            assert counts["demand_bytes"] <= (64 + 48) * runtime.store.expert_bytes(0)


def test_mlx_lm_generates_the_same_text(nano):
    model, tokenizer, runtime = mlx_od_moe.load(nano, capacity="25%")
    stock, _ = load_stock(str(nano))
    with runtime:
        for run in (generate, lambda *a, **k: "".join(r.text for r in stream_generate(*a, **k))):
            expected = run(stock, tokenizer, TEXT, max_tokens=20)
            assert run(model, tokenizer, TEXT, max_tokens=20) == expected
        prompts = [tokenizer.encode(text) for text in (TEXT, "The sea", "A cat and a dog met")]
        expected = batch_generate(stock, tokenizer, prompts, max_tokens=12).texts
        assert batch_generate(model, tokenizer, prompts, max_tokens=12).texts == expected
        assert_no_lease(runtime)


def test_a_prompt_cache_is_reused(nano, stock):
    model, tokenizer, runtime = mlx_od_moe.load(nano, capacity="25%")
    with runtime:
        texts = []
        for m in (stock, model):
            cache = make_prompt_cache(m)
            texts.append(
                [generate(m, tokenizer, t, max_tokens=8, prompt_cache=cache) for t in (TEXT, "And")]
            )
        assert texts[0] == texts[1]


def test_a_generator_dropped_midway_leaves_no_lease(nano):
    model, tokenizer, runtime = mlx_od_moe.load(nano, capacity="12.5%")
    with runtime:
        stream = stream_generate(model, tokenizer, TEXT, max_tokens=100)
        assert len(list(islice(stream, 3))) == 3
        stream.close()
        assert_no_lease(runtime)


def test_passes_that_nobody_evaluates_wait_for_nothing(nano, stock):
    """Of each pass the last layer's output is computed late: it must not hold slots for ever."""
    model, _, runtime = mlx_od_moe.load(nano, capacity="12.5%")
    with runtime:
        inputs = [tokens(1, seed=seed) for seed in range(4)]
        lazy = [model(ids) for ids in inputs]
        for ids, logits in zip(inputs, lazy, strict=True):
            assert mx.array_equal(stock(ids), logits)
        del lazy, logits
        assert_no_lease(runtime)


def test_a_prompt_of_a_thread_that_is_gone_holds_no_slots(nano):
    """As mlx-lm reads prompts: only the cache is evaluated, the last layer's output never."""
    model, _, runtime = mlx_od_moe.load(nano, capacity="25%")

    def read_prompt() -> None:
        cache = make_prompt_cache(model)
        model(mx.array([[1, 2, 3]]), cache=cache)
        mx.eval([c.state for c in cache])

    with runtime:
        thread = Thread(target=read_prompt)
        thread.start()
        thread.join()
        assert_no_lease(runtime)
        mx.eval(model(mx.array([[50, 60, 70, 80, 90, 100]])))


def test_two_models_run_beside_each_other(nano, stock):
    (one, _, first), (two, _, second) = (
        mlx_od_moe.load(nano, capacity=capacity) for capacity in ("25%", "50%")
    )
    with first, second:
        assert_same_logits(one, two, tokens(12), steps=4)
        assert_same_logits(stock, one, tokens(5), steps=2)


def test_threads_generate_at_once(nano, stock):
    """Slots are fewer than both need together: they wait for each other, and both get on."""
    model, tokenizer, runtime = mlx_od_moe.load(nano, capacity="12.5%")
    texts = [TEXT, "The sea was", "In the beginning"]
    with runtime:
        expected = [generate(stock, tokenizer, text, max_tokens=10) for text in texts]
        with ThreadPoolExecutor(len(texts)) as pool:
            run = pool.map(lambda text: generate(model, tokenizer, text, max_tokens=10), texts)
            assert list(run) == expected
        assert_no_lease(runtime)
