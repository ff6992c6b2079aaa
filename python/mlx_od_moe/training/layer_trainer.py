"""Trains the candidates of one MoE layer and keeps the one that validation prefers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..metrics import Recall
from ..model_routers import LayerRouter, load_routers
from ..router import input_scale
from ..shadow_model import ExpertPredictor, PredictorConfig
from .dataset import LayerDataset, split_documents
from .fit import FitOptions, fit, measure
from .traces import TraceInfo
from .workers import Advance

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


def train_layer(
    info: TraceInfo,
    options: TrainingOptions,
    checkpoint: Path,
    memory_bytes: int,
    layer: int,
    advance: Advance,
) -> dict[str, Any]:
    """`LayerTrainer.train` for a worker: its arguments can be sent to another process."""
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
