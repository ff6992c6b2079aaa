"""The recall at a model's first MoE layers, which no layer's state comes early enough for."""

from __future__ import annotations

from typing import Any

import numpy as np
from mlx_lm.utils import dequantize_model

from . import baselines
from .metrics import Recall
from .predictor_bundle import PredictorBundle
from .training.dataset import read_array
from .training.fit import Scorer, measure
from .training.next_token import NextTokenDataset
from .training.traces import TraceInfo


def by_token(
    bundle: PredictorBundle, traces: TraceInfo, documents: set[int] | None
) -> dict[str, list[float]]:
    """What tokens alone say about the first MoE layers, one by one; {}: not known.

    Of the tokens of `documents` (None: of any).
    """
    found = bundle.token_experts
    if found is None:
        return {}
    recall = Recall(found.layers, traces.top_k)
    for shard in traces.shards:
        document = read_array(shard, "document")
        rows = slice(None) if documents is None else np.isin(document, list(documents))
        layers = bundle.moe_layers[: found.layers]
        chosen = [read_array(shard, f"routed_experts_{layer}")[rows] for layer in layers]
        likeliest = found.likeliest(read_array(shard, "token_ids")[rows])[..., : recall.ranks]
        recall.add(likeliest, np.stack(chosen, axis=1))
    return _at_k_and_2k(recall)


def next_token(
    bundle: PredictorBundle, traces: TraceInfo, documents: set[int] | None
) -> dict[str, Any]:
    """What a token's last state says about the next token's first MoE layers, one by one.

    {"samples": tokens with a next one, "recall_at_k": [first layer, second, …], "recall_at_2k": …,
    "previous_token": the same two of the token's own experts at those layers}. {}: the bundle says
    nothing, or the traces do not record what it takes. Of the tokens of `documents` (None: any).
    Its matrices are plain afterwards: quantised ones are slow to multiply by on a CPU.
    """
    predictor = bundle.next_token
    recorded = set(traces.recorded_layers)
    if predictor is None:
        return {}
    if not {traces.moe_layers[-1], *traces.moe_layers[: predictor.config.lookahead]} <= recorded:
        return {}
    dataset = NextTokenDataset(traces, documents, predictor.config.lookahead)
    dequantize_model(predictor)

    def recall(scorer: Scorer) -> dict[str, list[float]]:
        return _at_k_and_2k(measure(scorer, dataset, traces.top_k))

    previous = baselines.previous_token(predictor.config, None)
    return {"samples": len(dataset), **recall(predictor), "previous_token": recall(previous)}


def _at_k_and_2k(recall: Recall) -> dict[str, list[float]]:
    return {"recall_at_k": recall.at(recall.top_k), "recall_at_2k": recall.at(2 * recall.top_k)}
