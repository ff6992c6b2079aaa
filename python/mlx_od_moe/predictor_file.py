"""Predictor files: safetensors with the configuration in the metadata. See docs/formats.md."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

FORMAT = "mlx-od-moe-predictor"
VERSION = 1


@dataclass(frozen=True)
class Quantization:
    """MLX's affine format: `bits` per weight, one scale and bias per `group_size` weights."""

    bits: int
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"[Quantization] bits is 4 or 8, got {self.bits}")


def quantize(module: nn.Module, bits: int, group_size: int) -> Quantization:
    """Quantise each matrix of `module` whose input width is a multiple of `group_size`, in place.

    Scales and biases of the groups are float16: half the overhead of float32 ones.
    """
    quantization = Quantization(bits, group_size)

    def fits(_: str, m: nn.Module) -> bool:
        return isinstance(m, nn.Linear) and m.weight.shape[-1] % group_size == 0

    for path, m in module.named_modules():
        if fits(path, m):
            m.weight = m.weight.astype(mx.float16)
    nn.quantize(module, group_size, bits, class_predicate=fits)
    return quantization


def restore(
    module: nn.Module,
    tensors: dict[str, mx.array],
    prefix: str,
    quantization: Quantization | None,
    path: str | Path,
) -> None:
    """Load the tensors named `prefix`… into `module`, quantising its structure where they are.

    Raises ValueError naming the file where a tensor is missing or has another shape.
    """
    if quantization:
        nn.quantize(
            module,
            quantization.group_size,
            quantization.bits,
            class_predicate=lambda name, _: f"{prefix}{name}.scales" in tensors,
        )
    own = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    try:
        module.load_weights(list(own.items()), strict=True)
    except ValueError as error:
        raise ValueError(f"[{path}] tensors do not match its configuration: {error}") from error
    module.quantization = quantization


def named(module: nn.Module, prefix: str) -> dict[str, mx.array]:
    """All parameters of `module`, their names behind `prefix`."""
    return {prefix + name: tensor for name, tensor in tree_flatten(module.parameters())}


def write_tensors(
    path: str | Path, tensors: dict[str, mx.array], kind: str, metadata: dict[str, Any]
) -> None:
    """Write `tensors` and `metadata` (any JSON values) to `path`, whole or not at all."""
    header = {"format": FORMAT, "version": str(VERSION), "kind": kind}
    header |= {key: json.dumps(value) for key, value in metadata.items()}
    write_safetensors(Path(path), tensors, header)


def write_safetensors(path: Path, tensors: dict[str, mx.array], header: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all; what lies there stays until it is whole.

    Raises OSError naming the file where that is not possible, on a full disk for instance.
    """
    # The suffix is .safetensors: mx.save_safetensors would add it to any other.
    partial = path.with_name(f".{path.name}.partial.safetensors")
    try:
        mx.save_safetensors(str(partial), tensors, header)
        os.replace(partial, path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"[{path}] could not be written: {error}") from error


def read_tensors(path: str | Path, kind: str) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Read a predictor file of that kind: its tensors and its decoded metadata.

    Raises FileNotFoundError where there is none, and ValueError naming the file and the rule where
    it is truncated, of another kind, or was not written by this package.
    """
    with _read(path) as (tensors, header):
        mx.eval(tensors)  # loading is lazy: a file cut short shows only here
    for key, value in (("format", FORMAT), ("version", str(VERSION)), ("kind", kind)):
        if header.pop(key, None) != value:
            raise ValueError(
                f"[{path}] not a {kind} of this release: its metadata must say {key}={value!r}"
            )
    with described_by(path):
        return tensors, {key: json.loads(value) for key, value in header.items()}


def kind_of(path: str | Path) -> str:
    """What a file's metadata says it is: "predictor", "bundle", or "" where it says nothing.

    Raises FileNotFoundError where there is none, and ValueError where it is no safetensors file.
    """
    with _read(path) as (_, header):
        return header.get("kind", "")


@contextmanager
def _read(path: str | Path) -> Iterator[tuple[dict[str, mx.array], dict[str, str]]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"[{path}] no such predictor file")
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        yield loaded
    except Exception as error:
        raise ValueError(f"[{path}] not a readable safetensors file: {error}") from error


@contextmanager
def described_by(path: str | Path) -> Iterator[None]:
    """What goes wrong inside, in building what the metadata says, becomes an error that names it.

    Raises ValueError naming the file.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if str(error).startswith(f"[{path}]"):
            raise
        raise ValueError(f"[{path}] its metadata describes no predictor: {error!r}") from error
