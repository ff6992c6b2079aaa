"""Model directories made of tensors, for the tests of files: right ones, and wrong ones."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_od_moe

NUMPY = {"U32": np.uint32, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8}


def model_directory(name: str) -> Path:
    """A real model: the one that ships, or one in shared/models beside the repository."""
    beside = [folder / "shared" / "models" / name for folder in Path(__file__).parents]
    found = [
        path for path in (mlx_od_moe.INSTALL_DIR / "examples" / name, *beside) if path.exists()
    ]
    if not found:
        pytest.skip(f"shared/models/{name} is not beside this repository")
    return found[0]


def write_file(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """A safetensors file with that header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_tensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file of random bytes as tensors of these dtypes and shapes."""
    header, begin = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = begin + int(np.prod(shape)) * np.dtype(NUMPY[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    write_file(path, header, np.random.default_rng(len(tensors)).bytes(begin))


def stacked(
    module: str = "model.layers.0.mlp.switch_mlp", experts: int = 4
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a quantised SwitchGLU: hidden size 64, width 32, 4 bits in groups of 32."""
    shapes = {"gate_proj": (32, 8, 2), "up_proj": (32, 8, 2), "down_proj": (64, 4, 1)}
    return {
        f"{module}.{name}.{parameter}": (dtype, (experts, rows, columns))
        for name, (rows, words, groups) in shapes.items()
        for parameter, dtype, columns in (
            ("weight", "U32", words),
            ("scales", "BF16", groups),
            ("biases", "BF16", groups),
        )
    }


def load_bits(directory: Path) -> dict[str, np.ndarray]:
    """All tensors as mx.load gives them, as bits of the same width: bfloat16 has no NumPy type."""
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    return {
        name: np.array(array.view(bits[array.dtype.size]))
        for path in sorted(directory.glob("model*.safetensors"))
        for name, array in mx.load(str(path)).items()
    }
