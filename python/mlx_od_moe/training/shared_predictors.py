"""The predictors of all layers and what they share, as one model; its recall."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..calibration import CalibrationFit
from ..confidence import Confidence
from ..context import ContextConfig, TokenMemory
from ..metrics import Recall
from ..projection import Projection
from ..shadow_model import ExpertPredictor
from .fast_layers import fast_logits, fast_memories, is_fast
from .fit import Shares, rows_of
from .sequence_blocks import Block, SequenceBlocks

_NAME = "layer"  # a name of digits alone would read as a place in a list


def name_of(layer: int) -> str:
    """Of a layer's modules among the parameters."""
    return f"{_NAME}{layer}"


class SharedPredictors(nn.Module):
    """The predictors of all layers and what they share, as one set of parameters.

    Without a `context` there are no memories. `queries`: {layer: ContextConfig.query_layer}; None:
    its own. `projection`: the one that the predictors were given.
    """

    def __init__(
        self,
        predictors: Mapping[int, ExpertPredictor],
        targets: Mapping[int, Sequence[int]],
        context: ContextConfig | None,
        hidden_size: int,
        queries: Mapping[int, int] | None = None,
        projection: Projection | None = None,
    ):
        super().__init__()
        self._queries = dict(queries or {layer: layer for layer in predictors})
        self._targets = {layer: list(ahead) for layer, ahead in targets.items()}
        self.predictors = {name_of(layer): p for layer, p in predictors.items()}
        self.memories = {}
        if context is not None:
            remembered = sorted({target for ahead in targets.values() for target in ahead})
            self.memories = {name_of(n): TokenMemory(context, hidden_size) for n in remembered}
        self.projections = {} if projection is None else {"shared": projection}
        self._streams: dict[str, Any] = {}

    def spread(self, streams: Sequence[Any]) -> None:
        """Compute on these streams: each layer wholly on one, so that all have about as much to do.

        A predictor's work goes with the layers that it speaks of; a memory's is small.
        """
        work = {name_of(layer): float(len(ahead)) for layer, ahead in self._targets.items()}
        loads = [0.0] * len(streams)
        for kind, share in (("predictors", 1.0), ("memories", 0.25), ("projections", 0.25)):
            names = sorted(self[kind], key=lambda name: (-work.get(name, 1.0), name))
            for name in names:
                least = loads.index(min(loads))
                loads[least] += work.get(name, 1.0) * share
                self._streams[f"{kind}.{name}"] = streams[least]

    def on_stream_of(self, module: str) -> AbstractContextManager[Any]:
        """Within it, operations run where the module ("predictors.layer3") does."""
        stream = self._streams.get(module)
        return nullcontext() if stream is None else mx.stream(stream)

    @property
    def targets(self) -> dict[int, list[int]]:
        """{layer: the layers that its predictor speaks of}."""
        targets: dict[int, list[int]] = self._targets
        return targets

    def __call__(self, block: Block) -> dict[int, mx.array]:
        """{layer: logits [tokens, lookahead, num_experts]} of a block's tokens.

        In products of bfloat16 where fast_layers.py serves.
        """
        memories, logits = {}, {}
        for layer, memory in self.of_layers("memories").items():
            with self.on_stream_of(f"memories.{name_of(layer)}"):
                h = block.states[layer]
                memories[layer] = fast_memories(memory, h) if is_fast(memory) else memory(h)
        for layer, predictor in self.of_layers("predictors").items():
            with self.on_stream_of(f"predictors.{name_of(layer)}"):
                run = fast_block_logits if is_fast(predictor) else block_logits
                asks, ahead = self._queries[layer], self.targets[layer]
                logits[layer] = run(predictor, layer, asks, ahead, memories, block)
        return logits

    def of_layers(self, kind: str) -> dict[int, Any]:
        """{layer: its predictor} or {layer: its memory}."""
        return {int(name.removeprefix(_NAME)): module for name, module in self[kind].items()}


def block_logits(
    predictor: ExpertPredictor,
    layer: int,
    asks: int,
    targets: Sequence[int],
    memories: Mapping[int, mx.array],
    block: Block,
) -> mx.array:
    """Logits [tokens, lookahead, num_experts] of a block's tokens, from {target: its memories}.

    `asks`: the layer whose state attention's query is made of.
    """
    h, context = block.own_states(layer), None
    if predictor.config.has_context:
        asking = h if asks == layer else block.own_states(asks)
        context = predictor.context(asking, [memories[t] for t in targets], block.sequence)
    return mx.flatten(predictor(h, context=context), 0, 1)


def fast_block_logits(
    predictor: ExpertPredictor,
    layer: int,
    asks: int,
    targets: Sequence[int],
    memories: Mapping[int, mx.array],
    block: Block,
) -> mx.array:
    """`block_logits` of a predictor that `is_fast`, in products of bfloat16."""
    read = [memories[t] for t in targets] if predictor.config.has_context else []
    h, asking = block.own_states(layer), block.own_states(asks)
    return mx.flatten(fast_logits(predictor, h, asking, read, block.sequence), 0, 1)


def measure_blocks(
    logits: Callable[[Block], Mapping[int, mx.array]],
    targets: Mapping[int, Sequence[int]],
    blocks: SequenceBlocks,
    shares: Shares | None = None,
    confidences: Mapping[int, Confidence] | None = None,
) -> dict[int, Recall]:
    """{layer: recall} of what gives {layer: logits [tokens, lookahead, num_experts]} of a block.

    `shares`: see Recall.add, of all tokens in order.
    """
    top_k, done = blocks.traces.top_k, 0
    recalls = {
        layer: Recall(len(ahead), top_k, confidence=(confidences or {}).get(layer))
        for layer, ahead in targets.items()
    }
    for block in blocks.in_order():
        for layer, scores in logits(block).items():
            chosen = block.chosen(targets[layer])
            part = rows_of(shares, done, len(chosen))
            recalls[layer].add_scores(np.array(scores.astype(mx.float32)), chosen, part)
        done += block.sequence.shape[1] - block.before
    return recalls


def fit_block_calibrations(
    logits: Callable[[Block], Mapping[int, mx.array]],
    targets: Mapping[int, Sequence[int]],
    blocks: SequenceBlocks,
) -> dict[int, mx.array]:
    """{layer: calibration [lookahead, 2]} for what gives {layer: logits} of a block.

    Logits [tokens, lookahead, num_experts] must have none yet.
    """
    top_k = blocks.traces.top_k
    found = {layer: CalibrationFit(len(ahead), top_k) for layer, ahead in targets.items()}
    for block in blocks.in_order():
        for layer, scores in logits(block).items():
            found[layer].add(np.array(scores.astype(mx.float32)), block.chosen(targets[layer]))
    return {layer: fit.result() for layer, fit in found.items()}
