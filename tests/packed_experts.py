"""A packed directory whose bytes are known, and what a store holds of it."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_od_moe import ExpertStore, _ext

# By name: (dtype, shape of one expert, bytes).
Parts = dict[str, tuple[str, tuple[int, ...], int]]
PARTS: Parts = {
    "up_proj.weight": ("U32", (6, 8), 192),
    "up_proj.scales": ("BF16", (6, 2), 24),
}
# Such as direct reads take without a detour.
ALIGNED: Parts = {
    "up_proj.weight": ("U32", (32, 64), 8192),
    "up_proj.scales": ("BF16", (32, 64), 4096),
}
EXPERT_BYTES = 216  # of PARTS


def content(layer: int, expert: int, bytes: int = EXPERT_BYTES) -> np.ndarray:
    """An expert's parts, one after the other."""
    return np.random.default_rng([layer, expert]).integers(0, 256, bytes, np.uint8)


def write(
    folder: Path,
    layers: tuple[int, ...] = (2, 5),
    num_experts: int = 8,
    parts: Parts = PARTS,
) -> Path:
    size = sum(bytes for _, _, bytes in parts.values())
    block_bytes = -(-size // 4096) * 4096
    entries = []
    for layer in layers:
        blocks = [content(layer, expert, size) for expert in range(num_experts)]
        file = folder / f"layer{layer}.experts"
        file.write_bytes(b"".join(block.tobytes().ljust(block_bytes, b"\0") for block in blocks))
        names = [{"name": n, "dtype": d, "shape": list(s)} for n, (d, s, _) in parts.items()]
        entry = {"layer": layer, "file": file.name, "num_experts": num_experts, "parts": names}
        sums = [_ext.crc32c(block) for block in blocks]
        entries.append(entry | {"block_bytes": block_bytes, "checksums": sums})
    manifest = {"format": "mlx-od-moe-experts", "version": 1, "alignment": 4096, "layers": entries}
    (folder / "experts.json").write_text(json.dumps(manifest))
    return folder


def bytes_in(store: ExpertStore, layer: int, slot: int) -> np.ndarray:
    """What MLX sees of a slot, the parts one after the other."""
    parts = [np.array(pool[slot].view(mx.uint8)) for pool in store.pools(layer).values()]
    return np.concatenate([part.ravel() for part in parts])


def holds(store: ExpertStore, layer: int, expert: int, slot: int) -> bool:
    return np.array_equal(bytes_in(store, layer, slot), content(layer, expert))
