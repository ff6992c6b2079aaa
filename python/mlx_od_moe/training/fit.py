"""Fits one predictor to one layer's samples: the loop, early stopping and its checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten

from ..calibration import CalibrationFit
from ..confidence import Confidence
from ..metrics import Recall
from ..predictor_file import write_safetensors
from .adam import AdamW
from .dataset import LayerDataset, Samples
from .losses import LOSSES
from .workers import Advance

# Maps (hidden states float32 [n, hidden_size], previous experts) to scores.
Scorer = Callable[[mx.array, mx.array], mx.array]
# {name: weights [samples, lookahead, top_k] of the chosen experts}; see Recall.add.
Shares = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class FitOptions:
    """How to train.

    `loss`: see losses.py; "soft" is "bce" where the target layers' routers are not known.
    `patience`: epochs without a better validation recall@k before stopping; `learning_rate`: the
    peak of a cosine schedule over all epochs, after a tenth of an epoch of warm-up.
    """

    loss: str = "bce"
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"[FitOptions] loss is one of {[*LOSSES]}, not {self.loss!r}")
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"[FitOptions] {name} must be positive, got {getattr(self, name)}")


@dataclass
class FitState:
    """Where a fit stands after an epoch; everything that the next epoch depends on."""

    epoch: int = 0
    best_epoch: int = 0
    best_recall: float = -1.0
    history: list[float] = field(default_factory=list)

    def finished(self, options: FitOptions) -> bool:
        """Whether all epochs are done, or enough of them without a better recall."""
        done, since_best = self.epoch >= options.epochs, self.epoch - self.best_epoch
        return done or since_best >= options.patience


def measure(
    scorer: Scorer,
    dataset: LayerDataset,
    top_k: int,
    shares: Shares | None = None,
    confidence: Confidence | None = None,
) -> Recall:
    """Recall of a scorer over a data set; `shares`: see Recall.add, of all its samples in order."""
    recall, done = Recall(len(dataset.targets), top_k, confidence=confidence), 0
    for samples in dataset.batches(4096):
        scores = np.array(scorer(*inputs(samples)).astype(mx.float32))
        part = rows_of(shares, done, len(samples))
        recall.add_scores(scores, samples.chosen, part)
        done += len(samples)
    return recall


def fit_calibration(scorer: Scorer, dataset: LayerDataset, top_k: int) -> mx.array:
    """The calibration [lookahead, 2] that a scorer needs on a data set; it must have none yet."""
    found = CalibrationFit(len(dataset.targets), top_k)
    for samples in dataset.batches(4096):
        found.add(np.array(scorer(*inputs(samples)).astype(mx.float32)), samples.chosen)
    return found.result()


def rows_of(shares: Shares | None, first: int, count: int) -> Shares:
    """Those rows of every weight."""
    return {name: weights[first : first + count] for name, weights in (shares or {}).items()}


def inputs(samples: Samples) -> tuple[mx.array, mx.array]:
    """What a predictor sees of them."""
    return mx.array(samples.hidden_states).astype(mx.float32), mx.array(samples.previous)


def fit(
    predictor: nn.Module,
    training: LayerDataset,
    validation: LayerDataset,
    options: FitOptions,
    checkpoint: Path,
    advance: Advance,
    forward: Scorer | None = None,
) -> Recall:
    """Train `predictor` in place to its best validation epoch; returns the recall there.

    `checkpoint` (.safetensors) is written after every epoch and taken up again where it exists, so
    that an interrupted run ends with the same weights as an uninterrupted one. `advance` hears of
    `epochs` times the training samples in all, however early training stops. `forward`: computes
    the predictor's logits for its steps; None: it does itself, as it always does for validation.
    """
    steps = math.ceil(len(training) / options.batch_size)
    warmup = max(1, steps // 10)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, options.learning_rate, warmup),
            optim.cosine_decay(options.learning_rate, max(1, steps * options.epochs - warmup)),
        ],
        [warmup],
    )
    optimizer = AdamW(schedule, options.weight_decay)
    optimizer.init(predictor.trainable_parameters())
    top_k = predictor.config.top_k
    state, best = _resume(checkpoint, predictor, optimizer)
    step = _step_function(predictor, optimizer, options, forward or predictor)
    advance(state.epoch * len(training))
    while not state.finished(options):
        order = np.random.default_rng([options.seed, training.layer, state.epoch])
        for samples in training.batches(options.batch_size, order):
            step(samples)
            advance(len(samples))
        _check_finite(predictor, training.layer, options)
        recall = float(np.mean(measure(predictor, validation, top_k).at(top_k)))
        state.epoch += 1
        state.history.append(recall)
        if recall > state.best_recall:
            state.best_recall, state.best_epoch = recall, state.epoch
            best = dict(tree_flatten(predictor.trainable_parameters()))
        _write_checkpoint(checkpoint, predictor, optimizer, state, best)
    advance((options.epochs - state.epoch) * len(training))
    predictor.update(tree_unflatten(list(best.items())))
    return measure(predictor, validation, top_k)


def _check_finite(predictor: nn.Module, layer: int, options: FitOptions) -> None:
    weights = tree_flatten(predictor.trainable_parameters())
    if not all(mx.isfinite(weight).all().item() for _, weight in weights):
        raise ValueError(
            f"[train] layer {layer}: training diverged at learning rate {options.learning_rate}: "
            "the weights hold NaN or infinity"
        )


def _step_function(
    predictor: nn.Module, optimizer: Any, options: FitOptions, forward: Scorer
) -> Callable[[Samples], None]:
    loss_of = LOSSES[options.loss]

    def loss(h: mx.array, previous: mx.array, chosen: mx.array, taught: mx.array) -> mx.array:
        return loss_of(forward(h, previous), chosen, taught)

    gradient = nn.value_and_grad(predictor, loss)
    under_way: list[mx.array] = []

    def step(samples: Samples) -> None:
        nonlocal under_way
        taught = mx.array(samples.taught).astype(mx.float32)
        _, gradients = gradient(*inputs(samples), mx.array(samples.chosen), taught)
        optimizer.update(predictor, gradients)
        mx.async_eval(  # type: ignore[no-untyped-call]
            predictor.trainable_parameters(), optimizer.state
        )
        before, under_way = under_way, vectors(predictor)
        mx.eval(before)

    return step


def vectors(module: nn.Module) -> list[mx.array]:
    """Those among the parameters, which stand for a step that is under way.

    Python prepares the next step while this one is computed. Whoever held matrices would keep the
    next step from writing in their place.
    """
    return [w for _, w in tree_flatten(module.trainable_parameters()) if w.ndim == 1]


def _write_checkpoint(
    path: Path, predictor: nn.Module, optimizer: Any, state: FitState, best: dict[str, mx.array]
) -> None:
    tensors = {f"best.{n}": t for n, t in best.items()}
    tensors |= {f"now.{n}": t for n, t in tree_flatten(predictor.trainable_parameters())}
    tensors |= {f"optimizer.{n}": t for n, t in tree_flatten(optimizer.state)}
    write_safetensors(path, tensors, {"state": json.dumps(vars(state))})


def _resume(
    path: Path, predictor: nn.Module, optimizer: Any
) -> tuple[FitState, dict[str, mx.array]]:
    if not path.exists():
        return FitState(), dict(tree_flatten(predictor.trainable_parameters()))
    part, state = read_checkpoint(path)
    predictor.update(tree_unflatten(list(part("now.").items())))
    optimizer.state = tree_unflatten(list(part("optimizer.").items()))
    return state, part("best.")


def read_checkpoint(path: Path) -> tuple[Callable[[str], dict[str, mx.array]], FitState]:
    """What an interrupted fit left: its tensors by the prefix of their names, and its state.

    Raises ValueError naming the file where it can't be read.
    """
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        tensors, metadata = loaded
        mx.eval(tensors)  # loading is lazy: a file cut short shows only here
        state = FitState(**json.loads(metadata["state"]))
    except Exception as error:
        raise ValueError(
            f"[{path}] not a readable checkpoint: {error}; delete it to train this anew"
        ) from error

    def part(prefix: str) -> dict[str, mx.array]:
        return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}

    return part, state
