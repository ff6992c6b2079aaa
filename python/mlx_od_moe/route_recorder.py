"""The routes of a running model, for `simulate` and for replays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .durable_file import whole_or_absent


class RouteRecorder:
    """Keeps what each MoE layer chose, token by token. Give `record` as Runtime.on_routing."""

    def __init__(self, layers: list[int]):
        self._chosen: dict[int, list[NDArray[np.int16]]] = {layer: [] for layer in layers}

    def record(self, layer: int, hidden: Any, ids: NDArray[np.int32]) -> None:
        """A layer's choice [..., top_k], one row per token."""
        self._chosen[layer].append(ids.reshape(-1, ids.shape[-1]).astype(np.int16))

    def experts(self) -> NDArray[np.int16]:
        """[tokens, layers, top_k] of the tokens that all layers have seen; -1: none."""
        chosen = [np.concatenate(rows) for rows in self._chosen.values() if rows]
        if len(chosen) < len(self._chosen):
            return np.empty((0, len(self._chosen), 0), np.int16)
        tokens, top_k = min(map(len, chosen)), max(rows.shape[1] for rows in chosen)
        experts = np.full((tokens, len(chosen), top_k), -1, np.int16)
        for i, rows in enumerate(chosen):
            experts[:, i, : rows.shape[1]] = rows[:tokens]
        return experts

    def save(self, path: str | Path, token_ids: list[int]) -> None:
        """Write what `simulate --trace` reads: `experts`, and `tokens`, the ids of these tokens."""
        experts = self.experts()
        count = min(len(experts), len(token_ids))
        with whole_or_absent(Path(path)) as file:
            np.savez_compressed(
                file, experts=experts[:count], tokens=np.array(token_ids[:count], np.int32)
            )
