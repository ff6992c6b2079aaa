"""What a packed directory holds besides the experts' bytes. See docs/formats.md.

Its reader is in C++ (expert_manifest.cpp); here is what `pack` needs to write one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ._ext import crc32c
from .expert_file import ExpertFile, StoredTensor

FORMAT, VERSION = "mlx-od-moe-experts", 1
MANIFEST = "experts.json"
UNFINISHED = "experts.partial.json"  # the manifest while a pack is under way

# A page of Apple silicon, and of most others: what direct reads are aligned to.
_ALIGNMENTS = (16384, 4096)
_MOST_PADDING = 1 / 32
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def new_manifest(source: ExpertFile) -> dict[str, Any]:
    """The manifest of a pack of `source` that holds no layers yet."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "alignment": choose_alignment(source),
        "source": [_describe(path) for path in source.files],
        "rest": None,
        "layers": [],
    }


def choose_alignment(source: ExpertFile) -> int:
    """Bytes that each expert's block starts at a multiple of: 16384 where that pads little."""
    for alignment in _ALIGNMENTS:
        held = padded = 0
        for layer in source.layers:
            held += source.num_experts(layer) * source.expert_bytes(layer)
            padded += source.num_experts(layer) * round_up(source.expert_bytes(layer), alignment)
        if padded - held <= _MOST_PADDING * held:
            return alignment
    return _ALIGNMENTS[-1]


def round_up(bytes: int, alignment: int) -> int:
    """The least multiple of `alignment` that is no less."""
    return -(-bytes // alignment) * alignment


def data_file(layer: int) -> str:
    """The name of the file with the layer's experts."""
    return f"experts-{layer:05}.bin"


def layer_entry(source: ExpertFile, layer: int, block: int, checksums: list[int]) -> dict[str, Any]:
    """The manifest's entry of a layer in blocks of that many bytes."""
    return {
        "layer": layer,
        "file": data_file(layer),
        "num_experts": source.num_experts(layer),
        "block_bytes": block,
        "parts": [
            {"name": part.name, "dtype": part.dtype, "shape": list(part.shape)}
            for part in source.parts(layer)
        ],
        "checksums": checksums,
    }


def rest_header(tensors: list[StoredTensor], metadata: dict[str, str]) -> bytes:
    """What a safetensors file of these tensors begins with; their bytes follow in this order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data start aligned
    return len(text).to_bytes(8, "little") + text


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest, finished or not. Raises ValueError naming the file where it is no JSON object."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"[pack] {path} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"[pack] {path} is no JSON object")
    return manifest


def read_rest_entry(directory: Path) -> dict[str, int]:
    """`bytes` and `checksum` of the model without its experts. Raises ValueError without them."""
    entry = read_manifest(directory / MANIFEST).get("rest")
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), int) for key in ("bytes", "checksum")
    ):
        raise ValueError(f"[pack] {directory / MANIFEST}: 'rest' lacks its bytes or its checksum")
    return {key: entry[key] for key in ("bytes", "checksum")}


def _describe(path: Path) -> dict[str, Any]:
    """Name, size and a checksum by which to know a source file again without reading it whole."""
    size = path.stat().st_size
    checksum = 0
    with open(path, "rb") as file:
        for i in range(_SAMPLES):
            file.seek(i * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            checksum = crc32c(file.read(_SAMPLE_BYTES), checksum)
    return {"name": path.name, "bytes": size, "checksum_of_samples": checksum}
