"""ExpertFile serves the bytes that mx.load gives, and refuses what contradicts itself."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_od_moe._ext import crc32c

from checkpoints import load_bits, model_directory, stacked, write_tensors
from mlx_od_moe.expert_file import ExpertFile
from mlx_od_moe.moe import find_moe_layers, load_model
from mlx_od_moe.pack import pack
from tiny_models import MODELS, build


def assert_same_experts(file: ExpertFile, tensors: dict[str, np.ndarray], path: str) -> None:
    """`path` is the experts' module, with {} for the layer."""
    for layer in file.layers:
        for expert in range(file.num_experts(layer)):
            parts = file.read(layer, expert)
            assert list(parts) == [part.name for part in file.parts(layer)]
            for part, values in parts.items():
                expected = tensors[f"{path.format(layer)}.{part}"][expert]
                assert values.shape == expected.shape
                assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["nano-moe", "nano-qwen3-moe", "small-qwen3-moe"])
def test_every_expert_is_what_mlx_loads(name, packed, tmp_path):
    model = model_directory(name)
    file = pack(model, tmp_path / "out", progress=False) if packed else ExpertFile(model)
    assert file.is_packed == packed
    tensors = load_bits(model)
    assert len(file.layers) == json.loads((model / "config.json").read_text())["num_hidden_layers"]
    assert_same_experts(file, tensors, "model.layers.{}.mlp.switch_mlp")
    if not packed:
        experts = {name for name in tensors if ".switch_mlp." in name}
        assert [tensor.name for tensor in file.rest] == sorted(tensors.keys() - experts)


def test_the_parts_are_what_mlx_lms_own_module_takes(tmp_path):
    """A model whose experts come from the packed file computes what it did before."""
    model, _ = load_model(model_directory("nano-moe"))
    tokens = mx.array([[5, 17, 300, 2, 99, 1024, 7, 8]])
    before = model(tokens)
    file = pack(model_directory("nano-moe"), tmp_path / "out", progress=False)
    for layer in find_moe_layers(model):
        layer.experts.apply(mx.zeros_like)
    assert not mx.array_equal(model(tokens), before)
    for layer in find_moe_layers(model):
        experts = [file.read(layer.index, e) for e in range(layer.num_experts)]
        stacks = []
        for part in file.parts(layer.index):
            stack = mx.array(np.stack([expert[part.name] for expert in experts]))
            stacks.append((part.name, stack.view(mx.bfloat16) if part.dtype == "BF16" else stack))
        layer.experts.load_weights(stacks, strict=True)
    assert mx.array_equal(model(tokens), before)


@pytest.mark.parametrize("mode", ["float", "affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_the_experts_of_every_architecture_are_found(name, mode, tmp_path):
    """As mlx-lm saves them, in each format: whatever the modules are called, wherever they hang."""
    model = build(name)
    layers = {layer.index: layer for layer in find_moe_layers(model)}
    if mode != "float":
        group, bits = 16 if mode == "nvfp4" else 32, 8 if mode == "mxfp8" else 4
        owners = {layer.path for layer in layers.values()}

        def is_expert(path: str, module: nn.Module) -> bool:
            linear = "weight" in module and path.rpartition(".")[0] in owners
            return linear and module.weight.shape[-1] % group == 0

        nn.quantize(model, group, bits, mode=mode, class_predicate=is_expert)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    file = ExpertFile(tmp_path)
    assert file.layers == sorted(layers)
    tensors, rest = load_bits(tmp_path), {tensor.name for tensor in file.rest}
    for index, layer in layers.items():
        own = {n for n, _ in tree_flatten(layer.experts.parameters())}
        assert {part.name for part in file.parts(index)} == own
        assert not rest & {f"{layer.path}.{name}" for name in own}
        for expert in range(layer.num_experts):
            for part, values in file.read(index, expert).items():
                assert values.tobytes() == tensors[f"{layer.path}.{part}"][expert].tobytes()


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("gate_proj", "up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")),
        (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")),
        (("up_proj", "down_proj"), ("fc1", "fc2")),
    ],
)
def test_single_experts_come_under_the_stacked_names(names, parts, tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(64, 32) if name in ("down_proj", "w2") else (32, 64) for name in names]
    tensors = {
        f"model.layers.{layer}.mlp.experts.{e}.{name}.weight": mx.array(
            rng.standard_normal(shape, np.float32)
        ).astype(mx.bfloat16)
        for layer in (1, 2)
        for e in range(12)
        for name, shape in zip(names, shapes, strict=True)
    }
    tensors["model.layers.0.mlp.gate_proj.weight"] = mx.zeros((32, 64))
    tensors["mtp.layers.0.mlp.experts.0.gate_proj.weight"] = mx.zeros((32, 64))
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves):
        mx.save_safetensors(str(tmp_path / f"model-{i}.safetensors"), half)
    index = {name: f"model-{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    bits = load_bits(tmp_path)
    for file in (ExpertFile(tmp_path), pack(tmp_path, tmp_path / "out", progress=False)):
        assert file.layers == [1, 2]
        for layer in file.layers:
            for e in range(12):
                read = file.read(layer, e)
                assert list(read) == [f"{part}.weight" for part in parts]
                for name, values in zip(names, read.values(), strict=True):
                    whole = bits[f"model.layers.{layer}.mlp.experts.{e}.{name}.weight"]
                    assert np.array_equal(values, whole)


def test_threads_read_at_once_and_descriptors_are_closed(tmp_path):
    write_tensors(tmp_path / "model.safetensors", stacked(experts=64))
    descriptors = Path("/proc/self/fd") if os.path.exists("/proc/self/fd") else Path("/dev/fd")
    before = len(list(descriptors.iterdir()))
    file = ExpertFile(tmp_path)
    expected = [file.read_bytes(0, e).tobytes() for e in range(64)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            read = pool.map(file.read_bytes, [0] * 64, range(64))
            assert [data.tobytes() for data in read] == expected
    del file, pool, read
    assert len(list(descriptors.iterdir())) == before


@pytest.mark.parametrize(
    ("data", "checksum"),
    # RFC 3720, appendix B.4, and the check value of the catalogue of CRC algorithms.
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_of_known_vectors(data, checksum):
    assert crc32c(data) == checksum
    for i in range(len(data)):
        assert crc32c(data[i:], crc32c(data[:i])) == checksum
