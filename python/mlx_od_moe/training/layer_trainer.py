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

from ..calibration import UNCALIBRATED
from ..context import ContextConfig
from ..metrics import Recall
from ..model_routers import LayerRouter, load_routers
from ..predictor_config import PredictorConfig
from ..projection import Projection
from ..router import input_scale
from ..shadow_model import ExpertPredictor
from .dataset import LayerDataset, split_documents
from .fit import FitOptions, fit, fit_calibration, measure
from .losses import TEACHERS
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
    """What to train, besides how (`fit`). `predictor_size` … `trunk_rank`: see PredictorConfig.

    `share_trunk`: all layers have one projection. With that or a context all layers are trained
    together (bundle_trainer.py), as the candidate "mlp+gate", or "mlp" where the routers are not
    known. `next_token`: train what predicts the next token's first layers too (next_token.py).
    """

    predictor_size: int = 1024
    activation: str = "relu"
    layer_norm: bool = False
    candidates: tuple[str, ...] = DEFAULT_CANDIDATES
    validation_fraction: float = 0.1
    context: ContextConfig | None = None
    trunk_rank: int = 0
    share_trunk: bool = False
    next_token: bool = True
    fit: FitOptions = field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        if isinstance(self.context, dict):  # as read from a file
            object.__setattr__(self, "context", ContextConfig.read(self.context))
        if self.share_trunk and not self.trunk_rank:
            raise ValueError("[TrainingOptions] share_trunk needs a trunk_rank")
        unknown = set(self.candidates) - set(CANDIDATES)
        if unknown or not self.candidates:
            raise ValueError(
                f"[TrainingOptions] candidates are some of {[*CANDIDATES]}, got {self.candidates}"
            )
        if not 0 < self.validation_fraction < 1:
            rule = "validation_fraction must be between 0 and 1"
            raise ValueError(f"[TrainingOptions] {rule}, got {self.validation_fraction}")

    @property
    def together(self) -> bool:
        """Whether layers share parameters."""
        return self.share_trunk or self.context is not None


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
        return split_documents(self.info, self.options.validation_fraction, self.options.fit.seed)

    @cached_property
    def fit_options(self) -> FitOptions:
        """Those given; labels are hard where not all routers are known that could soften them."""
        fit = self.options.fit
        known = all(layer in self.routers for layer in self.info.moe_layers[1:])
        return dataclasses.replace(fit, loss="bce") if fit.loss == "soft" and not known else fit

    def finished(self, layer: int) -> Path:
        """Where a finished layer's predictor lies."""
        return self.checkpoint / f"layer-{layer}.safetensors"

    def work(self, layer: int) -> int:
        """Samples that training the layer goes through at most."""
        training = self._dataset(layer, self.split[0])
        trained = [c for c in self.possible(training.targets) if c != "gate"]
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
        for candidate in self.possible(training.targets):
            predictor = self.build(layer, training.targets, candidate)
            fitted = self._fit(predictor, training, validation, candidate, advance)
            found[candidate] = predictor, fitted
        predictor, report = self._choose(found, validation)
        if self.fit_options.loss in UNCALIBRATED:
            predictor.calibrate(fit_calibration(predictor, validation, self.info.top_k))
        predictor.save(done)
        partial = report_path.with_suffix(".partial")
        partial.write_text(json.dumps(report))
        partial.replace(report_path)
        return report

    @cached_property
    def training_tokens(self) -> int:
        """Tokens that a layer has to learn from."""
        return len(self._dataset(self.info.recorded_layers[0], self.split[0]))

    def targets(self, layer: int) -> list[int]:
        """The layers that the layer's predictor is to speak of."""
        return list(self._dataset(layer, set()).targets)

    def candidate_together(self, layer: int) -> str:
        """What layers trained together start from: "mlp+gate", or "mlp" without known routers."""
        possible = [c for c in self.possible(self.targets(layer)) if c in ("mlp+gate", "mlp")]
        if not possible:
            what = "a shared trunk" if self.options.context is None else "a context"
            raise ValueError(
                f"[TrainingOptions] {what} goes with the candidates mlp+gate and mlp, got "
                f"{self.options.candidates}"
            )
        return "mlp+gate" if "mlp+gate" in possible else "mlp"

    def gate(self, layer: int) -> ExpertPredictor | None:
        """Gate lookahead alone; None where it is no candidate."""
        targets = self.targets(layer)
        return self.build(layer, targets, "gate") if "gate" in self.possible(targets) else None

    def _dataset(self, layer: int, documents: set[int]) -> LayerDataset:
        teacher, memory = TEACHERS.get(self.fit_options.loss), self.memory_bytes
        return LayerDataset(self.info, layer, documents, self.routers, memory, teacher)

    def possible(self, targets: Sequence[int]) -> list[str]:
        """The candidates whose routers are all known."""
        known = all(target in self.routers for target in targets)
        if not known and self.fit_options.loss == "kl":
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

    def build(
        self,
        layer: int,
        targets: Sequence[int],
        candidate: str,
        projection: Projection | None = None,
    ) -> ExpertPredictor:
        """A predictor with fresh weights, the same for the same seed."""
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
            context=self.options.context,
            trunk_rank=self.options.trunk_rank,
        )
        mx.random.seed(1_000_003 * self.options.fit.seed + layer)
        if not config.has_gate:
            return ExpertPredictor(config, projection=projection)
        return gate_predictor(config, layer, targets, self.routers, projection)

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
            self.fit_options,
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
        worse = [d for d, own in enumerate(recalls[best]) if own < gate[d]]
        if worse:
            predictor = with_gate_alone(predictor, found["gate"][0], worse)
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
    config: PredictorConfig,
    layer: int,
    targets: Sequence[int],
    routers: Mapping[int, LayerRouter],
    projection: Projection | None = None,
) -> ExpertPredictor:
    """A predictor that uses the target layers' routers, each behind its own norm."""
    predictor = ExpertPredictor(config, [routers[target].router for target in targets], projection)
    source = routers[layer].norm if layer in routers else None
    scales = [input_scale(source, routers[target].norm) for target in targets]
    ones = mx.ones((config.hidden_size,))
    predictor.gate_input_scale = mx.stack([ones if s is None else s for s in scales])
    return predictor


def with_gate_alone(
    predictor: ExpertPredictor, gate: ExpertPredictor, distances: list[int]
) -> ExpertPredictor:
    """The same predictor with gate lookahead alone at those distances (0 is the next layer).

    Without a calibration: that of a distance is not its gate's.
    """
    terms = tuple("gate" if d in distances else t for d, t in enumerate(predictor.config.terms))
    config = dataclasses.replace(predictor.config, terms=terms)
    result = ExpertPredictor(config, gate.routers, predictor.shared_projection)
    own = dict(tree_flatten(predictor.parameters()))
    kept = [(name, own[name]) for name, _ in tree_flatten(result.parameters()) if name in own]
    result.gate_input_scale = gate.gate_input_scale
    result.update(tree_unflatten(kept))
    result.gate_scale[mx.array(distances)] = 1.0
    return result
