"""A MoE layer's router as plain arrays: its experts can be ranked again from recorded states."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
_PARTS = ("weight", "bias", "correction", "norm")

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Router:
    """How one MoE layer ranks its experts.

    `weight` [num_experts, hidden_size]; `bias` [num_experts] is added to the logits; `correction`
    [num_experts] to the scores, for the ranking only (DeepSeek-V3). `norm` [hidden_size] is the
    weight of the RMSNorm whose output is the block's input; None where there is no such norm.
    All are float32. With `n_group` > 1 only the best `topk_group` groups of experts compete.
    """

    weight: FloatArray
    bias: FloatArray | None = None
    correction: FloatArray | None = None
    norm: FloatArray | None = None
    scoring: str = "softmax"
    n_group: int = 1
    topk_group: int = 1

    def logits(self, hidden: NDArray[np.floating]) -> FloatArray:
        """Router logits [tokens, num_experts] of block inputs [tokens, hidden_size]."""
        logits: FloatArray = hidden.astype(np.float32) @ self.weight.T
        return logits if self.bias is None else logits + self.bias

    def scores(self, hidden: NDArray[np.floating]) -> FloatArray:
        """The scores [tokens, num_experts] float32 by which the model picks its top-k experts."""
        scores = _activate(self.logits(hidden), self.scoring)
        if self.correction is not None:
            scores = scores + self.correction
        return scores if self.n_group <= 1 else self._drop_groups(scores)

    def _drop_groups(self, scores: FloatArray) -> FloatArray:
        """Zero the groups whose two best experts sum lowest, as DeepSeek-V3 does."""
        grouped = scores.reshape(len(scores), self.n_group, -1)
        strength = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        dropped = np.argsort(strength, axis=-1, kind="stable")[:, : self.n_group - self.topk_group]
        kept = grouped.copy()
        np.put_along_axis(kept, dropped[..., None], 0.0, axis=1)
        return kept.reshape(scores.shape)


def _activate(logits: FloatArray, scoring: str) -> FloatArray:
    if scoring == "softmax":
        weights: FloatArray = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)
    if scoring == "sigmoid":
        return (0.5 * (1.0 + np.tanh(0.5 * logits))).astype(np.float32)
    if scoring == "sqrtsoftplus":
        return np.sqrt(np.logaddexp(0.0, logits)).astype(np.float32)
    raise ValueError(f"[Router] scoring must be one of {', '.join(SCORINGS)}, but is {scoring!r}")


def top_experts(scores: NDArray[np.floating], k: int) -> NDArray[np.intp]:
    """Ids [tokens, k] of the k best experts, best first, from scores [tokens, num_experts]."""
    return np.argsort(-scores, axis=-1, kind="stable")[:, :k]


def save_routers(path: Path, routers: Mapping[int, Router]) -> None:
    """Write routers to a safetensors file, whole or not at all.

    The file has one scoring rule; a layer whose rule differs is left out with a warning.
    """
    import mlx.core as mx

    if not routers:
        return
    rule = _rule(next(iter(routers.values())))
    arrays = {}
    for layer, router in routers.items():
        if _rule(router) != rule:
            warnings.warn(f"layer {layer}: its routing rule differs, left out", stacklevel=2)
            continue
        parts = ((part, getattr(router, part)) for part in _PARTS)
        arrays |= {f"{layer}.{part}": mx.array(v) for part, v in parts if v is not None}
    temporary = path.with_name(f"{path.stem}.tmp.safetensors")
    mx.save_safetensors(str(temporary), arrays, rule)
    os.replace(temporary, path)


def load_routers(path: Path) -> dict[int, Router]:
    """Read what `save_routers` wrote: {layer: Router}; empty where there is no such file."""
    import mlx.core as mx

    if not path.exists():
        return {}
    arrays, rule = mx.load(str(path), return_metadata=True)
    routers: dict[int, Router] = {}
    for name in sorted(arrays, key=lambda name: not name.endswith(".weight")):
        layer, part = name.split(".")
        value = np.array(arrays[name])
        if part == "weight":
            groups = int(rule.get("n_group", 1)), int(rule.get("topk_group", 1))
            routers[int(layer)] = Router(value, None, None, None, rule["scoring"], *groups)
        else:
            routers[int(layer)] = replace(routers[int(layer)], **{part: value})
    return dict(sorted(routers.items()))


def _rule(router: Router) -> dict[str, str]:
    rule = {"scoring": router.scoring}
    if router.n_group > 1:
        rule |= {"n_group": str(router.n_group), "topk_group": str(router.topk_group)}
    return rule
