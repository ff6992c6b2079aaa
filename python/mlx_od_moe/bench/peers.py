"""The predictor's forward as other runtimes do it: the same matrices, ReLU between them, no top-k.

Each maker takes the matrices and the number of threads, and returns a function of a float32 array
[tokens, hidden_size] that has copied the weights; ImportError where the runtime is not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Matrices:
    """The weights: trunk [predictor_size, hidden_size], heads [outputs, predictor_size]."""

    trunk: np.ndarray
    heads: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.trunk, self.heads))


Forward = Callable[[np.ndarray], Any]
Maker = Callable[[Matrices, int], Forward]


def _numpy_f32(matrices: Matrices, threads: int) -> Forward:
    import threadpoolctl  # noqa: F401  without it blas_threads can't hold numpy to its threads

    first, second = (weights.copy() for weights in matrices)
    return lambda x: np.maximum(x @ first.T, 0) @ second.T


def _torch_model(matrices: Matrices, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    layers = []
    for weights in matrices:
        layer = torch.nn.Linear(weights.shape[1], weights.shape[0], bias=False)
        layer.weight.data = torch.from_numpy(weights.copy())
        layers.append(layer)
    return torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1]).eval()


def _torch_f32(matrices: Matrices, threads: int) -> Forward:
    import torch

    model = _torch_model(matrices, threads)

    def run(x: np.ndarray) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(x))

    return run


def _torch_bf16(matrices: Matrices, threads: int) -> Forward:
    import torch

    model = _torch_model(matrices, threads).to(torch.bfloat16)

    def run(x: np.ndarray) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(x).to(torch.bfloat16))

    return run


def _torch_int8(matrices: Matrices, threads: int) -> Forward:
    import torch

    quantize = torch.ao.quantization.quantize_dynamic
    model = quantize(_torch_model(matrices, threads), {torch.nn.Linear}, dtype=torch.qint8)

    def run(x: np.ndarray) -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(x))

    return run


def _onnx_session(model: Any, threads: int) -> Forward:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})


def _onnx_model(nodes: list[Any], tensors: list[Any], matrices: Matrices) -> Any:
    from onnx import TensorProto, helper

    hidden_size, outputs = matrices.trunk.shape[1], matrices.heads.shape[0]

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", hidden_size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", outputs])
    graph = helper.make_graph(nodes, "predictor", [x], [y], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _onnx_f32(matrices: Matrices) -> Any:
    from onnx import helper, numpy_helper

    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(weights.T), name)
        for name, weights in (("w1", matrices.trunk), ("w2", matrices.heads))
    ]
    return _onnx_model(nodes, tensors, matrices)


def _onnxruntime_f32(matrices: Matrices, threads: int) -> Forward:
    return _onnx_session(_onnx_f32(matrices), threads)


@functools.lru_cache(maxsize=1)
def _onnx_int8(matrices: Matrices) -> Any:
    import tempfile
    from pathlib import Path

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "f32.onnx"), Path(folder, "int8.onnx")
        onnx.save(_onnx_f32(matrices), source)
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(target)


def _onnxruntime_int8(matrices: Matrices, threads: int) -> Forward:
    return _onnx_session(_onnx_int8(matrices), threads)


def quantize_int4(weights: np.ndarray, group: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Values 0 … 15 around 8 and one scale per group."""
    groups = weights.reshape(weights.shape[0], -1, group)
    scales = np.abs(groups).max(-1, keepdims=True) / 7
    values = np.clip(np.round(groups / scales), -8, 7) + 8
    return values.astype(np.uint8), scales[..., 0].astype(np.float32)


def _onnxruntime_int4(matrices: Matrices, threads: int) -> Forward:
    from onnx import helper, numpy_helper

    nodes, tensors = [], []
    for i, (source, target, weights) in enumerate(
        (
            ("x", "a", matrices.trunk),
            ("b", "y", matrices.heads),
        )
    ):
        values, scales = quantize_int4(weights)
        packed = values[..., 0::2] | values[..., 1::2] << 4
        tensors.append(numpy_helper.from_array(packed, f"w{i}"))
        tensors.append(numpy_helper.from_array(scales.reshape(-1), f"s{i}"))
        rows, columns = weights.shape
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [source, f"w{i}", f"s{i}"],
                [target],
                domain="com.microsoft",
                K=columns,
                N=rows,
                bits=4,
                block_size=64,
                accuracy_level=4,
            )
        )
    nodes.insert(1, helper.make_node("Relu", ["a"], ["b"]))
    return _onnx_session(_onnx_model(nodes, tensors, matrices), threads)


def _openvino(build: Callable[[Any, np.ndarray], Any], matrices: Matrices, threads: int,
              options: dict[str, Any]) -> Forward:  # fmt: skip
    import openvino as ov
    from openvino import opset13 as ops

    x = ops.parameter([-1, matrices.trunk.shape[1]], np.float32, name="x")
    hidden = ops.relu(ops.matmul(x, build(ops, matrices.trunk), False, True))
    model = ov.Model(
        [ops.matmul(hidden, build(ops, matrices.heads), False, True)], [x], "predictor"
    )
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    return lambda x: request.infer([x], share_inputs=True, share_outputs=True)


def _openvino_f32(matrices: Matrices, threads: int) -> Forward:
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return _openvino(lambda ops, w: ops.constant(w), matrices, threads, options)


def _openvino_bf16(matrices: Matrices, threads: int) -> Forward:
    options = {"INFERENCE_PRECISION_HINT": "bf16"}
    return _openvino(lambda ops, w: ops.constant(w), matrices, threads, options)


def _openvino_int8(matrices: Matrices, threads: int) -> Forward:
    def build(ops: Any, weights: np.ndarray) -> Any:
        scales = np.abs(weights).max(1, keepdims=True) / 127
        values = ops.constant(np.round(weights / scales).astype(np.int8))
        return ops.multiply(ops.convert(values, np.float32), ops.constant(scales))

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": matrices.trunk.shape[1],
    }
    return _openvino(build, matrices, threads, options)


def _openvino_int4(matrices: Matrices, threads: int) -> Forward:
    import openvino as ov

    pieces = []  # a tensor of packed values refers to its array, and does not keep it

    def build(ops: Any, weights: np.ndarray) -> Any:
        values, scales = quantize_int4(weights)
        pieces.append((values[..., 0::2] | values[..., 1::2] << 4).reshape(-1))
        packed = ov.Tensor(pieces[-1], list(values.shape), ov.Type.u4)
        zero = ops.constant(np.full((1, 1, 1), 8, np.uint8))
        shifted = ops.subtract(
            ops.convert(ops.constant(packed), np.float32), ops.convert(zero, np.float32)
        )
        scaled = ops.multiply(shifted, ops.constant(scales[..., None]))
        return ops.reshape(scaled, np.array(weights.shape), False)

    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}
    forward = _openvino(build, matrices, threads, options)

    def run(x: np.ndarray, _kept: list[np.ndarray] = pieces) -> Any:
        return forward(x)

    return run


def _mlx(matrices: Matrices, bits: int | None) -> Forward:
    import mlx.core as mx
    import mlx.nn as nn

    layers = []
    for weights in matrices:
        layer = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
        layer.weight = mx.array(weights)
        layers.append(nn.QuantizedLinear.from_linear(layer, 64, bits) if bits else layer)

    def run(x: np.ndarray) -> Any:
        y = layers[1](nn.relu(layers[0](mx.array(x))))
        mx.eval(y)
        return y

    return run


def _mlx_f32(matrices: Matrices, threads: int) -> Forward:
    return _mlx(matrices, None)


def _mlx_int8(matrices: Matrices, threads: int) -> Forward:
    return _mlx(matrices, 8)


def _mlx_int4(matrices: Matrices, threads: int) -> Forward:
    return _mlx(matrices, 4)


PEERS: dict[str, dict[str, Maker]] = {
    "f32": {
        "numpy": _numpy_f32,
        "torch": _torch_f32,
        "onnxruntime": _onnxruntime_f32,
        "openvino": _openvino_f32,
        "mlx": _mlx_f32,
    },
    "f16": {},
    "bf16": {"torch": _torch_bf16, "openvino": _openvino_bf16},
    "int8": {
        "torch": _torch_int8,
        "onnxruntime": _onnxruntime_int8,
        "openvino": _openvino_int8,
        "mlx": _mlx_int8,
    },
    "int4": {"onnxruntime": _onnxruntime_int4, "openvino": _openvino_int4, "mlx": _mlx_int4},
}
