"""Trains all layers' predictors together, where they share parameters.

With a context they share their targets' memories, and the projection if asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .._blas import one_blas_thread
from ..calibration import UNCALIBRATED
from ..context import TokenMemory
from ..metrics import Recall
from ..model_routers import LayerRouter
from ..predictor_file import write_safetensors
from ..projection import Projection
from ..shadow_model import ExpertPredictor
from .adam import AdamW
from .fast_layers import fast
from .fit import FitOptions, FitState, read_checkpoint, vectors
from .layer_trainer import LayerTrainer, with_gate_alone
from .losses import LOSSES, TEACHERS
from .muon import Muon
from .sequence_blocks import Block, SequenceBlocks
from .shared_predictors import (
    SharedPredictors,
    block_logits,
    fit_block_calibrations,
    measure_blocks,
    name_of,
)
from .workers import Advance

_BLOCK = 256  # tokens that follow each other in a batch
# Muon's step is a share of each matrix's own scale, AdamW's of 1: tuned together.
_MUON_RATE = 20.0


class BundleFit:
    """Fits SharedPredictors to batches of blocks, layers on `streams` at once.

    Matrices are stepped by Muon (Jordan et al., 2024), which needs half the samples that Adam needs
    here; what is not a matrix by AdamW. One optimiser per module: each on its module's stream.
    """

    def __init__(
        self,
        model: SharedPredictors,
        training: SequenceBlocks,
        validation: SequenceBlocks,
        routers: Mapping[int, LayerRouter],
        options: FitOptions,
        checkpoint: Path,
        streams: int = 1,
    ):
        self.model, self.training, self.validation = model, training, validation
        self.options, self.checkpoint = options, checkpoint
        self._routers, self._top_k = routers, training.traces.top_k
        self._batch = max(1, options.batch_size // _BLOCK)
        self._streams = _streams(streams)
        model.spread(self._streams)
        self._modules: dict[str, nn.Module] = {
            f"{kind}.{name}": module
            for kind in ("predictors", "memories", "projections")
            for name, module in model[kind].items()
        }
        self._optimizers = {name: self._optimizer() for name in self._modules}
        for name, module in self._modules.items():
            self._optimizers[name].init(module.trainable_parameters())
        self._gradient = nn.value_and_grad(model, self._loss)
        self._under_way: list[mx.array] = []
        self._recalls: dict[int, Recall] = {}  # at the end of the last epoch of this run
        self.state, self._best = FitState(), dict(tree_flatten(model.trainable_parameters()))

    def run(self, advance: Advance) -> None:
        """Train to the best validation epoch; resumes where a checkpoint lies."""
        options, state = self.options, self._resume()
        advance(state.epoch * len(self.training))
        with one_blas_thread():
            while not state.finished(options):
                order = np.random.default_rng([options.seed, state.epoch])
                for block in self.training.batches(_BLOCK, self._batch, order):
                    self._step(block)
                    advance(block.sequence.shape[0] * _BLOCK)
                self._recalls = self._measured()
                found = self._recalls.values()
                self._end_epoch(float(np.mean([np.mean(r.at(self._top_k)) for r in found])))
        self.model.update(tree_unflatten(list(self._best.items())))

    def recalls(self) -> dict[int, Recall]:
        """{layer: its validation recall} after `run`."""
        known = self._recalls and self.state.best_epoch == self.state.epoch
        return self._recalls if known else self._measured()

    def _measured(self) -> dict[int, Recall]:
        return measure_blocks(self.model, self.model.targets, self.validation)

    def _optimizer(self) -> Any:
        options = self.options
        steps = planned_steps(options.epochs, len(self.training), self._batch * _BLOCK)
        warmup = max(1, min(50, steps // 10))

        def schedule(peak: float) -> Any:
            rise = optim.linear_schedule(0.0, peak, warmup)
            return optim.join_schedules([rise, optim.cosine_decay(peak, steps - warmup)], [warmup])

        rate = options.learning_rate
        matrices = Muon(schedule(_MUON_RATE * rate))
        others = AdamW(schedule(rate), options.weight_decay)
        return optim.MultiOptimizer([matrices, others], [_is_matrix])

    def _loss(self, block: Block) -> mx.array:
        loss_of, targets = LOSSES[self.options.loss], self.model.targets
        taught = self._taught(block)
        losses = []
        for layer, logits in self.model(block).items():
            ahead = targets[layer]
            with self.model.on_stream_of(f"predictors.{name_of(layer)}"):
                known = [taught[t] for t in ahead] if taught else [mx.zeros((len(logits), 0))]
                chosen = mx.array(block.chosen(ahead))
                losses.append(loss_of(logits, chosen, mx.stack(known, axis=1)))
        return mx.stack(losses).sum()

    def _taught(self, block: Block) -> dict[int, mx.array]:
        """{target layer: what its router teaches [tokens, num_experts]}, where the loss asks."""
        found: dict[int, mx.array] = {}
        if (teacher := TEACHERS.get(self.options.loss)) is None:
            return found
        for layer in {t for targets in self.model.targets.values() for t in targets}:
            with self.model.on_stream_of(f"memories.{name_of(layer)}"):
                states = mx.flatten(block.own_states(layer), 0, 1)
                found[layer] = teacher(self._routers[layer].router, states, self._top_k)
        return found

    def _step(self, block: Block) -> None:
        with mx.stream(self._streams[0]):
            _, gradient = self._gradient(block)
        for name, module in self._modules.items():
            with self.model.on_stream_of(name):
                self._optimizers[name].update(module, _at(gradient, name))
        states = [optimizer.state for optimizer in self._optimizers.values()]
        mx.async_eval(  # type: ignore[no-untyped-call]
            self.model.trainable_parameters(), states
        )
        before, self._under_way = self._under_way, vectors(self.model)
        mx.eval(before)

    def _end_epoch(self, recall: float) -> None:
        weights = dict(tree_flatten(self.model.trainable_parameters()))
        if not all(mx.isfinite(weight).all().item() for weight in weights.values()):
            raise ValueError(
                f"[train] training diverged at learning rate {self.options.learning_rate}: the "
                "weights hold NaN or infinity"
            )
        state = self.state
        state.epoch += 1
        state.history.append(recall)
        if recall > state.best_recall:
            state.best_recall, state.best_epoch, self._best = recall, state.epoch, weights
        tensors = {f"best.{n}": t for n, t in self._best.items()}
        tensors |= {f"now.{n}": t for n, t in weights.items()}
        for name, optimizer in self._optimizers.items():
            tensors |= {f"optimizer.{name}.{n}": t for n, t in tree_flatten(optimizer.state)}
        write_safetensors(self.checkpoint, tensors, {"state": json.dumps(vars(state))})

    def _resume(self) -> FitState:
        if not self.checkpoint.exists():
            return self.state
        tensors, self.state = read_checkpoint(self.checkpoint)
        self.model.update(tree_unflatten(list(tensors("now.").items())))
        for name, optimizer in self._optimizers.items():
            optimizer.state = tree_unflatten(list(tensors(f"optimizer.{name}.").items()))
        self._best = tensors("best.")
        return self.state


def planned_steps(epochs: int, tokens: int, batch_tokens: int) -> int:
    """How many steps the learning rate's schedule is for; each epoch has one at least."""
    return max(2, epochs * max(1, tokens // batch_tokens))


def _is_matrix(path: str, weight: mx.array) -> bool:
    return weight.ndim == 2 and path.endswith("weight")


def _at(tree: dict[str, Any], path: str) -> Any:
    for name in path.split("."):
        tree = tree[name]
    return tree


def _streams(count: int) -> list[Any]:
    """Of a CPU, where each has a thread of its own; a GPU needs no more than one."""
    if mx.default_device() == mx.gpu:
        return [mx.default_stream(mx.gpu)]
    return [mx.new_stream(mx.cpu) for _ in range(count)]


def train_together(
    trainer: LayerTrainer, layers: Sequence[int], streams: int, advance: Advance
) -> tuple[dict[int, ExpertPredictor], dict[int, TokenMemory], dict[int, dict[str, Any]]]:
    """Train the layers' predictors and memories; returns both and a report on each layer.

    `streams`: layers that run at once, on a CPU. At distances where validation likes gate
    lookahead alone better, it takes the predictor's place.
    """
    context, info = trainer.options.context, trainer.info
    suffix = "" if context is None else "+context"
    targets = {layer: trainer.targets(layer) for layer in layers}
    candidates = {layer: trainer.candidate_together(layer) for layer in layers}
    projection = None
    if trainer.options.share_trunk:
        mx.random.seed(trainer.options.fit.seed)
        projection = Projection(info.hidden_size, trainer.options.trunk_rank)
    predictors = {n: trainer.build(n, targets[n], candidates[n], projection) for n in layers}
    asking = {n: context.query_layer(n, info.moe_layers) if context else n for n in layers}
    model = SharedPredictors(predictors, targets, context, info.hidden_size, asking, projection)
    ahead = {target for of_layer in targets.values() for target in of_layer}
    needed = sorted({*layers, *asking.values(), *ahead})
    training, validation = (
        SequenceBlocks(
            info,
            needed,
            context.rows if context else 0,
            documents,
            trainer.memory_bytes,
            mx.float16 if fast() else mx.float32,
        )
        for documents in trainer.split
    )
    checkpoint = trainer.checkpoint / "together.safetensors"
    options = trainer.fit_options
    fit = BundleFit(model, training, validation, trainer.routers, options, checkpoint, streams)
    fit.run(advance)
    found = fit.recalls()
    gates = {layer: gate for layer in layers if (gate := trainer.gate(layer)) is not None}
    free = measure_blocks(
        lambda block: {n: block_logits(gates[n], n, n, (), {}, block) for n in gates},
        {layer: targets[layer] for layer in gates},
        validation,
    )
    final = found
    for layer, gate in gates.items():
        own, alone = found[layer].at(info.top_k), free[layer].at(info.top_k)
        worse = [d for d, recall in enumerate(alone) if own[d] < recall]
        if worse:
            model.predictors[name_of(layer)] = with_gate_alone(predictors[layer], gate, worse)
            final = {}
    final = final or measure_blocks(model, targets, validation)
    chosen = {layer: model.predictors[name_of(layer)] for layer in layers}
    if options.loss in UNCALIBRATED:
        for layer, calibration in fit_block_calibrations(model, targets, validation).items():
            chosen[layer].calibrate(calibration)
    reports = {
        layer: {
            "candidate": candidates[layer] + suffix,
            "terms": chosen[layer].config.terms,
            "validation": final[layer].report(),
            "candidates": {candidates[layer] + suffix: found[layer].at(info.top_k)}
            | ({"gate": free[layer].at(info.top_k)} if layer in free else {}),
        }
        for layer in layers
    }
    return chosen, model.of_layers("memories"), reports
