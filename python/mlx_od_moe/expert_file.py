"""A model's experts on disk, one by one: where each lies, and its bytes. See docs/formats.md."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _ext

# What NumPy has no type for is served as its bits: bfloat16 as uint16, 8-bit floats as uint8.
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class ExpertPart:
    """One tensor of an expert: `name` inside the experts' module ("gate_proj.weight").

    `dtype` as safetensors names it ("U32", "BF16", …), `shape` of one expert, its `bytes`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is no expert: its place in the file of that index in `ExpertFile.files`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    bytes: int


class ExpertFile:
    """The experts of a model directory: an mlx-lm or Hugging Face checkpoint, or a packed one.

    Opening reads headers only. Files stay open until the object goes. Any thread may use it.
    `native` is the same in C++.

    Raises FileNotFoundError where `path` holds no model, ValueError naming the file and the tensor
    where files contradict themselves, lack something, or hold experts in a form that mlx-lm must
    convert first, and OSError for what the system reports.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.native = _ext.ExpertFile(os.fspath(path))

    @property
    def path(self) -> Path:
        """The model's directory."""
        return Path(self.native.path)

    @property
    def is_packed(self) -> bool:
        """Whether each expert lies in one block, as `mlx-od-moe pack` writes it."""
        return bool(self.native.is_packed)

    @property
    def files(self) -> list[Path]:
        """The files that are open: those with experts, and for a checkpoint those with the rest."""
        return [Path(name) for name in self.native.files]

    @property
    def metadata(self) -> dict[str, str]:
        """What a checkpoint's safetensors files say of themselves."""
        return dict(self.native.metadata)

    @property
    def layers(self) -> list[int]:
        """The layers that have routed experts, as the model numbers them, ascending."""
        return list(self.native.layers)

    @property
    def rest(self) -> list[StoredTensor]:
        """A checkpoint's tensors that are no routed experts, by name; of a packed one none."""
        return [StoredTensor(*tensor) for tensor in self.native.rest]

    def num_experts(self, layer: int) -> int:
        """How many routed experts the layer has. Raises ValueError where it has none."""
        return int(self.native.num_experts(layer))

    def parts(self, layer: int) -> list[ExpertPart]:
        """The tensors of each of the layer's experts, in the order of their bytes."""
        return [ExpertPart(*part) for part in self.native.parts(layer)]

    def expert_bytes(self, layer: int) -> int:
        """The bytes of one expert: the sum of its parts."""
        return int(self.native.expert_bytes(layer))

    def block_bytes(self, layer: int) -> int:
        """From one expert to the next in a packed file; 0 in a checkpoint."""
        return int(self.native.block_bytes(layer))

    def checksums(self, layer: int) -> list[int]:
        """The CRC-32C of each expert's bytes, in a packed directory; else empty."""
        return list(self.native.checksums(layer))

    def read_bytes(self, layer: int, expert: int) -> npt.NDArray[np.uint8]:
        """An expert's parts, one after the other: uint8 [expert_bytes].

        Raises ValueError for an expert that does not exist, OSError where reading fails. The bytes
        are not compared with the checksum.
        """
        return np.asarray(self.native.read(layer, expert))

    def read(self, layer: int, expert: int) -> dict[str, npt.NDArray[Any]]:
        """An expert's parts by name, each of its own shape.

        bfloat16 comes as its bits in uint16 (`mx.array(a).view(mx.bfloat16)`), 8-bit floats as
        theirs in uint8, as mx.load gives them. Raises as `read_bytes` does.
        """
        data, begin = self.read_bytes(layer, expert), 0
        parts: dict[str, npt.NDArray[Any]] = {}
        for part in self.parts(layer):
            dtype: Any = _DTYPES.get(part.dtype, np.uint8)
            parts[part.name] = data[begin : begin + part.bytes].view(dtype).reshape(part.shape)
            begin += part.bytes
        return parts

    def read_rest(self, tensor: StoredTensor, begin: int, bytes: int) -> npt.NDArray[np.uint8]:
        """The `bytes` from `begin` on of a tensor of `rest`. Raises OSError where reading fails."""
        return np.asarray(self.native.read_bytes(tensor.file, tensor.offset + begin, bytes))

    def check(self) -> None:
        """Raise OSError where a file was truncated, written to, replaced or removed meanwhile."""
        self.native.check()
