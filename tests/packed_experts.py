"""A packed directory whose bytes are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mlx_od_moe import _ext

PARTS = {"up_proj.weight": ("U32", (6, 8)), "up_proj.scales": ("BF16", (6, 2))}
EXPERT_BYTES = 6 * 8 * 4 + 6 * 2 * 2


def content(layer: int, expert: int) -> np.ndarray:
    """An expert's parts, one after the other."""
    return np.random.default_rng([layer, expert]).integers(0, 256, EXPERT_BYTES, np.uint8)


def write(folder: Path, layers: tuple[int, ...] = (2, 5), num_experts: int = 8) -> Path:
    entries = []
    for layer in layers:
        blocks = [content(layer, expert) for expert in range(num_experts)]
        file = folder / f"layer{layer}.experts"
        file.write_bytes(b"".join(block.tobytes().ljust(4096, b"\0") for block in blocks))
        parts = [{"name": n, "dtype": d, "shape": list(s)} for n, (d, s) in PARTS.items()]
        entry = {"layer": layer, "file": file.name, "num_experts": num_experts, "parts": parts}
        sums = [_ext.crc32c(block) for block in blocks]
        entries.append(entry | {"block_bytes": 4096, "checksums": sums})
    manifest = {"format": "mlx-od-moe-experts", "version": 1, "alignment": 4096, "layers": entries}
    (folder / "experts.json").write_text(json.dumps(manifest))
    return folder
