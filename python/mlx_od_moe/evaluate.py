"""Measures a predictor file against the baselines on recorded traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import dequantize_model

from . import baselines
from .confidence import Confidence
from .evaluate_first_layers import by_token, next_token
from .metrics import Recall, absent, mean_over_layers, rank
from .model_routers import LayerRouter, load_routers
from .predictor_bundle import PredictorBundle
from .progress import progress_bar
from .shadow_model import ExpertPredictor
from .training.dataset import LayerDataset
from .training.fit import Scorer, Shares, inputs, measure
from .training.sequence_blocks import Block, SequenceBlocks
from .training.shared_predictors import block_logits, measure_blocks
from .training.traces import TraceInfo, open_traces
from .training.train_shadow import documents_of
from .training.workers import Advance, run_layers

METHODS = (
    "random",
    "frequency",
    "previous_token",
    "gate_lookahead_raw",
    "gate_lookahead",
    "linear_probe",
    "predictor",
    "true_state",
)

# Of a layer's experts: what a cache holds that recall on non-resident experts is measured beside.
RESIDENT_SHARE = 0.25


@dataclass(frozen=True)
class Split:
    """What is measured, and what the fitted baselines learn from.

    `documents` None: all of `traces`. `fit_traces` None: nothing to learn from.
    """

    traces: TraceInfo
    routers: Path
    documents: set[int] | None
    fit_traces: TraceInfo | None
    fit_documents: set[int] | None

    def dataset(self, layer: int, routers: Mapping[int, LayerRouter] | None = None) -> LayerDataset:
        """The samples to measure on; with routers, their probabilities too."""
        return LayerDataset(self.traces, layer, self.documents, routers)

    def fit_dataset(self, layer: int) -> LayerDataset | None:
        """The samples to learn from."""
        if self.fit_traces is None:
            return None
        return LayerDataset(self.fit_traces, layer, self.fit_documents)


def evaluate(
    predictor: str | Path,
    traces: str | Path,
    fit_traces: str | Path | None = None,
    *,
    routers: str | Path | None = None,
    jobs: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Recall of a bundle file and of every baseline, per layer and distance.

    On the traces that it was trained on, only its validation documents count, and the frequency and
    linear baselines learn from its training documents. On other traces all documents count, and
    those two learn from `fit_traces`; without it they are left out. `routers`: a file that
    `save_routers` wrote, in place of the traces' own.

    Returns {"top_k", "num_experts", "samples", "methods": {name: {"recall_at_k": [d1, d2, …],
    "recall_at_2k": …, …}}, "layers": {layer: {name: …}}, "control": {layer: recall@k of the layer's
    own router on its own input}, "margin": the smallest lead over gate lookahead in recall@k,
    "by_token": {"recall_at_k": [first layer, second, …], …} by the token alone, "next_token": the
    same for the next token's, with "samples" and, beside it, "previous_token"}; {}: not known.
    Raises ValueError where file and traces do not belong together.
    """
    bundle, info = PredictorBundle.load(predictor), open_traces(traces)
    check_traces(Path(predictor), bundle, info)
    split = _split(bundle, info, fit_traces, Path(routers or info.routers))
    bar = progress_bar(len(bundle), "evaluate", "layer", progress)
    reports: dict[int, dict[str, Any]] = {}
    with bar:
        settings = Path(predictor), split
        for layer, report in run_layers(_evaluate_layer, settings, list(bundle), jobs, bar):
            reports[layer] = report
    reports = dict(sorted(reports.items()))
    methods = [name for name in METHODS if name in next(iter(reports.values()))["methods"]]
    return {
        "top_k": info.top_k,
        "num_experts": info.num_experts,
        "samples": len(split.dataset(next(iter(bundle)))),
        "methods": {
            name: mean_over_layers([report["methods"][name] for report in reports.values()])
            for name in methods
        },
        "layers": {layer: report["methods"] for layer, report in reports.items()},
        "control": {layer: r["control"] for layer, r in reports.items() if "control" in r},
        "margin": _margin(reports),
        "by_token": by_token(bundle, info, split.documents),
        "next_token": next_token(bundle, info, split.documents),
    }


def check_traces(path: Path, bundle: PredictorBundle, info: TraceInfo) -> None:
    """Raise ValueError naming both where the bundle in `path` is not of the traces' model."""
    config = next(iter(bundle.values())).config
    for name in ("hidden_size", "num_experts", "top_k"):
        if getattr(config, name) != getattr(info, name):
            raise ValueError(
                f"[{path}] is for {name} {getattr(config, name)}, but the traces in {info.path} "
                f"have {name} {getattr(info, name)}"
            )
    if list(info.moe_layers) != bundle.moe_layers:
        raise ValueError(
            f"[{path}] is for MoE layers {bundle.moe_layers}, but the traces in {info.path} have "
            f"{list(info.moe_layers)}"
        )


def _split(
    bundle: PredictorBundle, info: TraceInfo, fit_traces: str | Path | None, routers: Path
) -> Split:
    if seen := documents_of(info, bundle):
        training, validation = seen
        return Split(info, routers, validation, info, training)
    if fit_traces is None:
        return Split(info, routers, None, None, None)
    fit_info = open_traces(fit_traces)
    seen = documents_of(fit_info, bundle)
    return Split(info, routers, None, fit_info, seen[0] if seen else None)


def _evaluate_layer(predictor: Path, split: Split, layer: int, advance: Advance) -> dict[str, Any]:
    bundle = PredictorBundle.load(predictor)
    dataset = split.dataset(layer)
    scorers = _baselines(bundle[layer], split, layer)
    top_k = split.traces.top_k
    routers = load_routers(split.routers)
    shares = _shares(split, layer, routers)
    report = {n: measure(s, dataset, top_k, shares).report() for n, s in scorers.items()}
    if all(target in routers for target in dataset.targets):
        report["true_state"] = _true_state(split, layer, routers, shares).report()
    report["predictor"] = _measure(bundle, split, layer, shares).report()
    advance(1)
    result: dict[str, Any] = {"methods": report}
    if layer in routers:
        result["control"] = _own_router(routers[layer].router.scores, dataset, top_k)
    return result


def _shares(split: Split, layer: int, routers: Mapping[int, LayerRouter]) -> Shares:
    """What recall is also weighed by: what a small cache lacks, and the gate's mass."""
    known = all(target in routers for target in split.dataset(layer).targets)
    dataset = split.dataset(layer, routers if known else None)
    parts: dict[str, list[Any]] = {}
    capacity = max(split.traces.top_k, round(RESIDENT_SHARE * split.traces.num_experts))
    for samples in dataset.groups():
        missing = [
            absent(samples.chosen[:, d], split.traces.num_experts, capacity)
            for d in range(len(dataset.targets))
        ]
        parts.setdefault("non_resident", []).append(np.stack(missing, axis=1))
        if known:
            chosen = np.maximum(samples.chosen, 0).astype(np.int64)
            mass = np.exp(np.take_along_axis(samples.taught, chosen, axis=-1))
            parts.setdefault("gate_mass", []).append(mass)
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _true_state(
    split: Split, layer: int, routers: Mapping[int, LayerRouter], shares: Shares
) -> Recall:
    """The ceiling in practice: each target's own state, through its router at 4 bits."""
    targets = split.dataset(layer).targets
    tokens = {t: split.dataset(t).batches(4096) for t in targets}
    quantised = {t: routers[t].router.quantized(4, 32) for t in targets}
    for router in quantised.values():
        dequantize_model(router)

    def scores(h: mx.array, previous: mx.array) -> mx.array:
        states = {t: inputs(next(tokens[t]))[0] for t in targets}
        return mx.stack([quantised[t].scores(states[t]) for t in targets], axis=1)

    return measure(scores, split.dataset(layer), split.traces.top_k, shares)


def _baselines(predictor: ExpertPredictor, split: Split, layer: int) -> dict[str, Scorer]:
    config, targets = predictor.config, split.dataset(layer).targets
    routers = load_routers(split.routers)
    training, counts = split.fit_dataset(layer), None
    scorers = {"random": baselines.random(config, layer)}
    if training is not None:
        counts = baselines.count_experts(config, training)
        scorers["frequency"] = baselines.frequency(counts)
        scorers["linear_probe"] = baselines.linear_probe(config, training)
    scorers["previous_token"] = baselines.previous_token(config, counts)
    if all(target in routers for target in targets):
        gate = dataclasses.replace(config, terms=("gate",) * config.lookahead)
        for name, raw in (("gate_lookahead_raw", True), ("gate_lookahead", False)):
            scorers[name] = baselines.gate_lookahead(gate, layer, targets, routers, raw)
    return scorers


def _measure(bundle: PredictorBundle, split: Split, layer: int, shares: Shares) -> Recall:
    """The predictor's recall, with its context where it has one."""
    predictor, targets = bundle[layer], bundle.targets(layer)
    dequantize(bundle, layer)
    confidence = Confidence(len(targets))
    if bundle.context is None:
        top_k = split.traces.top_k
        return measure(predictor, split.dataset(layer), top_k, shares, confidence)
    layers = [*{layer, bundle.query_layer(layer), *targets}]
    blocks = SequenceBlocks(split.traces, layers, bundle.context.rows, split.documents)
    found = measure_blocks(
        bundle_logits(bundle, [layer]), {layer: targets}, blocks, shares, {layer: confidence}
    )
    return found[layer]


def dequantize(bundle: PredictorBundle, layer: int) -> None:
    """The same numbers as plain matrices: quantised ones are slow to multiply by on a CPU."""
    shared = [bundle.projection] if bundle.projection is not None else []
    for module in (bundle[layer], *bundle[layer].routers, *bundle.memories.values(), *shared):
        dequantize_model(module)


def bundle_logits(
    bundle: PredictorBundle, layers: Sequence[int]
) -> Callable[[Block], dict[int, mx.array]]:
    """What gives {layer: logits} of a block, for a bundle with a context."""
    targets = {layer: bundle.targets(layer) for layer in layers}

    def logits(block: Block) -> dict[int, mx.array]:
        needed = {target for ahead in targets.values() for target in ahead}
        memories = {target: bundle.memories[target](block.states[target]) for target in needed}
        return {
            n: block_logits(bundle[n], n, bundle.query_layer(n), ahead, memories, block)
            for n, ahead in targets.items()
        }

    return logits


def _own_router(scores: Any, dataset: LayerDataset, top_k: int) -> float:
    recall = Recall(1, top_k)
    for samples in dataset.batches(4096):
        ids = rank(np.array(scores(inputs(samples)[0])), top_k)
        recall.add(ids[:, None], samples.routed[:, None])
    return recall.at(top_k)[0]


def _margin(reports: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """Where the predictor leads gate lookahead by least."""
    leads = [
        {"lead": own - free, "layer": layer, "distance": d + 1}
        for layer, report in reports.items()
        if "gate_lookahead" in (methods := report["methods"])
        for d, (own, free) in enumerate(
            zip(
                methods["predictor"]["recall_at_k"],
                methods["gate_lookahead"]["recall_at_k"],
                strict=True,
            )
        )
    ]
    return min(leads, key=lambda lead: lead["lead"], default=None)
