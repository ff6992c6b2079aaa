"""Trains the shadow model of every MoE layer; validation chooses what each layer uses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..metrics import Recall, mean_over_layers
from ..model_routers import LayerRouter, load_routers, save_routers
from ..predictor_bundle import PredictorBundle
from ..predictor_file import Quantization
from ..router import input_scale
from ..shadow_model import ExpertPredictor, PredictorConfig
from .dataset import LayerDataset, split_documents
from .fit import FitOptions, fit, measure
from .traces import TraceInfo, open_traces
from .workers import Advance, progress_bar, run_layers

# {candidate: (term of every distance, whether the previous token's experts are an input)}
CANDIDATES = {
    "mlp": ("mlp", False),
    "mlp+previous": ("mlp", True),
    "mlp+gate": ("mlp+gate", False),
    "mlp+gate+previous": ("mlp+gate", True),
    "gate": ("gate", False),
}
DEFAULT_CANDIDATES = ("mlp", "mlp+gate", "mlp+gate+previous", "gate")


@dataclass(frozen=True)
class TrainingOptions:
    """What to train, besides how (`fit`). `predictor_size`, `activation`: see PredictorConfig."""

    predictor_size: int = 1024
    activation: str = "relu"
    layer_norm: bool = False
    candidates: tuple[str, ...] = DEFAULT_CANDIDATES
    validation_fraction: float = 0.1
    fit: FitOptions = field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        unknown = set(self.candidates) - set(CANDIDATES)
        if unknown or not self.candidates:
            raise ValueError(
                f"[TrainingOptions] candidates are some of {[*CANDIDATES]}, got {self.candidates}"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"[TrainingOptions] validation_fraction must be between 0 and 1, "
                f"got {self.validation_fraction}"
            )


def fingerprint(traces: TraceInfo) -> str:
    """Identifies a collection: the same settings and text give the same."""
    return hashlib.sha256((traces.path / "collection.json").read_bytes()).hexdigest()[:16]


def train_shadow_model(
    traces: str | Path,
    out: str | Path,
    options: TrainingOptions | None = None,
    *,
    layers: Iterable[int] | None = None,
    routers: Mapping[int, LayerRouter] | None = None,
    bits: int | None = None,
    jobs: int = 1,
    memory_bytes: int = 1 << 30,
    progress: bool = True,
) -> PredictorBundle:
    """Train one predictor per MoE layer on recorded traces and write the bundle to `out`.

    Training and validation samples come from different documents. Each candidate is trained with
    early stopping; gate lookahead alone takes its place at distances where that is better, and per
    layer the candidate is kept whose mean validation recall@k is then the best. An interrupted run
    goes on where it stopped when called again: its state lies in `out` + ".checkpoint", and is
    removed at the end.

    Args:
        traces: a directory that `collect_expert_usage` wrote.
        layers: only these MoE layers; default all that have a layer after them.
        routers: {MoE layer: router}; default those recorded with the traces. Without any, the
            candidates that look through them are left out.
        bits: quantise the written file (4 or 8).
        jobs: layers trained at once, each in a process of its own.
        memory_bytes: how much decoded data is held at once, roughly, by all jobs together.

    Raises ValueError naming the file and rule for unusable traces or a foreign checkpoint.
    """
    options = options or TrainingOptions()
    info, out = open_traces(traces), Path(out)
    if jobs < 1:
        raise ValueError(f"[train] jobs must be positive, got {jobs}")
    if bits is not None:
        Quantization(bits)  # refused now, not when hours have passed
    trainable = _trainable(info, layers)
    checkpoint = _open_checkpoint(out, options, info)
    if routers is not None:
        save_routers(checkpoint / "routers.safetensors", routers)
    settings = info, options, checkpoint, memory_bytes // jobs
    trainer = LayerTrainer(*settings)
    work = sum(trainer.work(layer) for layer in trainable)
    bar = progress_bar(work, "train", "sample", progress)
    reports: dict[int, dict[str, Any]] = {}
    with bar:
        for layer, report in run_layers(_train_layer, settings, trainable, jobs, bar):
            reports[layer] = report
            if progress:
                bar.write(_summary(layer, info.top_k, report), file=sys.stderr)
    reports = dict(sorted(reports.items()))
    predictors = {layer: ExpertPredictor.load(trainer.finished(layer)) for layer in reports}
    metrics = [report["validation"] for report in reports.values()]
    training = {
        "traces": fingerprint(info),
        "model": info.model,
        "options": dataclasses.asdict(options),
        "validation": mean_over_layers(metrics),
        "layers": reports,
    }
    training = json.loads(json.dumps(training))  # as the file will give it back
    bundle = PredictorBundle(list(info.moe_layers), predictors, training)
    bundle.save(out, bits)
    shutil.rmtree(checkpoint)
    return bundle


def _trainable(traces: TraceInfo, layers: Iterable[int] | None) -> list[int]:
    """The layers asked for, in order; all that have states and a MoE layer after them if None."""
    possible = [layer for layer in traces.recorded_layers if layer != traces.moe_layers[-1]]
    wanted = set(possible if layers is None else layers)
    if not wanted or not wanted <= set(possible):
        raise ValueError(
            f"[{traces.path}] layers {possible} have recorded states and a MoE layer after them, "
            f"asked for {sorted(wanted)}"
        )
    return sorted(wanted)


def validation_documents(traces: TraceInfo, bundle: PredictorBundle) -> set[int] | None:
    """The documents of `traces` that `bundle` was validated on; None where it saw none of them."""
    if bundle.training.get("traces") != fingerprint(traces):
        return None
    options = bundle.training["options"]
    return split_documents(traces, options["validation_fraction"], options["fit"]["seed"])[1]


@dataclass(frozen=True)
class LayerTrainer:
    """Trains layers into `checkpoint`."""

    info: TraceInfo
    options: TrainingOptions
    checkpoint: Path
    memory_bytes: int

    @cached_property
    def routers(self) -> dict[int, LayerRouter]:
        """The routers given for this training, or those recorded with the traces."""
        given = self.checkpoint / "routers.safetensors"
        return load_routers(given if given.exists() else self.info.routers)

    @cached_property
    def split(self) -> tuple[set[int], set[int]]:
        """Training and validation documents."""
        fraction, seed = self.options.validation_fraction, self.options.fit.seed
        return split_documents(self.info, fraction, seed)

    def finished(self, layer: int) -> Path:
        """Where a finished layer's predictor lies."""
        return self.checkpoint / f"layer-{layer}.safetensors"

    def work(self, layer: int) -> int:
        """Samples that training the layer goes through at most."""
        training = self._dataset(layer, self.split[0])
        trained = [c for c in self._possible(training.targets) if c != "gate"]
        return len(trained) * self.options.fit.epochs * len(training)

    def train(self, layer: int, advance: Advance) -> dict[str, Any]:
        """Train one layer and report on it; what the checkpoint holds already is not redone."""
        done = self.finished(layer)
        report_path = done.with_suffix(".json")
        if report_path.exists():
            advance(self.work(layer))
            return dict(json.loads(report_path.read_text()))
        training, validation = (self._dataset(layer, documents) for documents in self.split)
        found: dict[str, tuple[ExpertPredictor, Recall]] = {}
        for candidate in self._possible(training.targets):
            predictor = self._build(layer, training.targets, candidate)
            fitted = self._fit(predictor, training, validation, candidate, advance)
            found[candidate] = predictor, fitted
        predictor, report = self._choose(found, validation)
        predictor.save(done)
        partial = report_path.with_suffix(".partial")
        partial.write_text(json.dumps(report))
        partial.replace(report_path)
        return report

    def _dataset(self, layer: int, documents: set[int]) -> LayerDataset:
        routers = self.routers if self.options.fit.loss == "kl" else None
        return LayerDataset(self.info, layer, documents, routers, self.memory_bytes)

    def _possible(self, targets: Sequence[int]) -> list[str]:
        """The candidates whose routers are all known."""
        known = all(target in self.routers for target in targets)
        if not known and self.options.fit.loss == "kl":
            raise ValueError(
                f"[{self.info.path}] the KL loss needs the routers of layers {list(targets)}: "
                "collect from a model, or name it with --model"
            )
        possible = [c for c in self.options.candidates if known or "gate" not in c]
        if not possible:
            raise ValueError(
                f"[{self.info.path}] candidates {self.options.candidates} all need the routers of "
                f"layers {list(targets)}, which are not known"
            )
        return possible

    def _build(self, layer: int, targets: Sequence[int], candidate: str) -> ExpertPredictor:
        term, previous = CANDIDATES[candidate]
        config = PredictorConfig(
            hidden_size=self.info.hidden_size,
            predictor_size=self.options.predictor_size,
            num_experts=self.info.num_experts,
            lookahead=len(targets),
            top_k=self.info.top_k,
            activation=self.options.activation,
            layer_norm=self.options.layer_norm,
            terms=(term,) * len(targets),
            previous_experts=previous,
        )
        mx.random.seed(1_000_003 * self.options.fit.seed + layer)
        if not config.has_gate:
            return ExpertPredictor(config)
        return gate_predictor(config, layer, targets, self.routers)

    def _fit(
        self,
        predictor: ExpertPredictor,
        training: LayerDataset,
        validation: LayerDataset,
        candidate: str,
        advance: Advance,
    ) -> Recall:
        if not predictor.config.has_mlp:
            return measure(predictor, validation, self.info.top_k)
        return fit(
            predictor,
            training,
            validation,
            self.options.fit,
            self.checkpoint / f"layer-{training.layer}-{candidate}.safetensors",
            advance,
        )

    def _choose(
        self, found: dict[str, tuple[ExpertPredictor, Recall]], validation: LayerDataset
    ) -> tuple[ExpertPredictor, dict[str, Any]]:
        top_k = self.info.top_k
        recalls = {name: recall.at(top_k) for name, (_, recall) in found.items()}
        gate = recalls.get("gate", [0.0] * len(validation.targets))

        def merit(name: str) -> tuple[float, bool]:
            return sum(map(max, recalls[name], gate)), name == "gate"

        best = max(found, key=merit)
        predictor, recall = found[best]
        if "gate" in found and best != "gate":
            worse = [d for d, own in enumerate(recalls[best]) if own < gate[d]]
            if worse:
                predictor = _with_gate_alone(predictor, found["gate"][0], worse)
                recall = measure(predictor, validation, top_k)
        return predictor, {
            "candidate": best,
            "terms": predictor.config.terms,
            "validation": recall.report(),
            "candidates": recalls,
        }


def _train_layer(
    info: TraceInfo,
    options: TrainingOptions,
    checkpoint: Path,
    memory_bytes: int,
    layer: int,
    advance: Advance,
) -> dict[str, Any]:
    return LayerTrainer(info, options, checkpoint, memory_bytes).train(layer, advance)


def gate_predictor(
    config: PredictorConfig, layer: int, targets: Sequence[int], routers: Mapping[int, LayerRouter]
) -> ExpertPredictor:
    """A predictor that uses the target layers' routers, each behind its own norm."""
    predictor = ExpertPredictor(config, [routers[target].router for target in targets])
    source = routers[layer].norm if layer in routers else None
    scales = [input_scale(source, routers[target].norm) for target in targets]
    ones = mx.ones((config.hidden_size,))
    predictor.gate_input_scale = mx.stack([ones if s is None else s for s in scales])
    return predictor


def _with_gate_alone(
    predictor: ExpertPredictor, gate: ExpertPredictor, distances: list[int]
) -> ExpertPredictor:
    """The same predictor with gate lookahead alone at those distances (0 is the next layer)."""
    terms = tuple("gate" if d in distances else t for d, t in enumerate(predictor.config.terms))
    result = ExpertPredictor(dataclasses.replace(predictor.config, terms=terms), gate.routers)
    own = dict(tree_flatten(predictor.parameters()))
    kept = [(name, own[name]) for name, _ in tree_flatten(result.parameters()) if name in own]
    result.gate_input_scale = gate.gate_input_scale
    result.update(tree_unflatten(kept))
    result.gate_scale[mx.array(distances)] = 1.0
    return result


def _open_checkpoint(out: Path, options: TrainingOptions, info: TraceInfo) -> Path:
    directory = out.with_name(out.name + ".checkpoint")
    settings = {"traces": fingerprint(info), "options": dataclasses.asdict(options)}
    text = json.dumps(settings, indent=1)
    path = directory / "settings.json"
    if path.exists() and path.read_text() != text:
        raise ValueError(
            f"[{directory}] holds an interrupted training with other settings or traces: "
            "delete it to start anew, or repeat the command that it began with"
        )
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return directory


def _summary(layer: int, top_k: int, report: dict[str, Any]) -> str:
    recall = " ".join(f"{x:.3f}" for x in report["validation"]["recall_at_k"])
    return f"layer {layer:3}: recall@{top_k} {recall}  ({report['candidate']})"
