"""Runs batches of sequences through a model and returns what its MoE layers saw and chose."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from ..moe import MoELayer, RoutingRecorder


@dataclass(frozen=True)
class Batch:
    """Recorded rows of B sequences of L tokens.

    `token_ids` [B, L]; by layer `states` [B, L, hidden_size] float32 and `experts` [B, L, top_k].
    """

    token_ids: NDArray[np.int32]
    states: dict[int, NDArray[np.float32]]
    experts: dict[int, NDArray[np.int32]]


class ModelRunner:
    """Runs a model whose routing `recorder` records. One thread only."""

    def __init__(self, model: nn.Module, layers: Sequence[MoELayer], recorder: RoutingRecorder):
        """`layers` are the model's MoE layers, all of them."""
        self._model, self._recorder = model, recorder
        self._num_experts = {layer.index: layer.num_experts for layer in layers}

    def prefill(self, sequences: Sequence[Sequence[int]]) -> Batch:
        """One forward pass over sequences of any lengths; rows past a sequence's end are noise."""
        # Padding comes after the text, so causal models never see it.
        tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = sequence
        recorded = _Recorded(self._recorder, tokens.shape[0])
        self._model(mx.array(tokens), cache=new_cache(self._model))
        recorded.take()
        return self._batch(tokens, recorded)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        length: int,
        seed: int,
        advance: Callable[[int], None],
    ) -> Batch:
        """Continue prompts of equal length to `length` tokens, sampling at temperature 1.

        `advance` is told the number of tokens after each step.
        """
        key, cache = mx.random.key(seed), new_cache(self._model)
        recorded = _Recorded(self._recorder, len(prompts))
        tokens = [mx.array([list(prompt) for prompt in prompts])]
        advance(tokens[0].size)
        for step in range(tokens[0].shape[1], length + 1):
            logits = self._model(tokens[-1], cache=cache)
            recorded.take()
            if step < length:
                key, now = mx.random.split(key)
                sampled = mx.random.categorical(logits[:, -1].astype(mx.float32), key=now)
                tokens.append(sampled[:, None])
                mx.eval(sampled, recorded.last)
                advance(len(prompts))
        return self._batch(np.array(mx.concatenate(tokens, axis=1)), recorded)

    def _batch(self, tokens: NDArray[np.int32], recorded: _Recorded) -> Batch:
        if recorded.states.keys() != self._num_experts.keys():
            missing = sorted(self._num_experts.keys() - recorded.states.keys())
            raise ValueError(f"[collect] MoE layers {missing} did not run in the forward pass")
        states = {layer: np.array(mx.concatenate(s, 1)) for layer, s in recorded.states.items()}
        experts = {
            layer: np.array(mx.concatenate(ids, 1)).astype(np.int32)
            for layer, ids in recorded.experts.items()
        }
        for layer, ids in experts.items():
            ids[ids >= self._num_experts[layer]] = -1
        return Batch(tokens.astype(np.int32), states, experts)


class _Recorded:
    """What one batch's forward passes recorded, by layer, as arrays [B, tokens, ...]."""

    def __init__(self, recorder: RoutingRecorder, sequences: int):
        self._recorder, self._sequences = recorder, sequences
        self.states: dict[int, list[mx.array]] = {}
        self.experts: dict[int, list[mx.array]] = {}
        self.last: list[mx.array] = []
        recorder.take()

    def take(self) -> None:
        """Take what one forward pass recorded; `last` is what remains to be evaluated of it."""
        self.last = []
        for routing in self._recorder.take():
            for arrays, array in (
                (self.states, routing.hidden.astype(mx.float32)),
                (self.experts, routing.expert_ids),
            ):
                array = array.reshape(self._sequences, -1, array.shape[-1])
                arrays.setdefault(routing.layer, []).append(array)
                self.last.append(array)


def new_cache(model: nn.Module) -> Any:
    """The model's own empty prompt cache."""
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


def use_float32_if_faster(model: nn.Module) -> bool:
    """Turn a model into float32 where that is faster: on a Linux CPU with memory to spare.

    There, MLX runs quantised and half-precision matrices some 40 times slower than float32. The
    model is changed in place. Returns whether it was.
    """
    from mlx_lm.utils import dequantize_model, get_total_parameters

    if sys.platform != "linux" or mx.default_device() != mx.Device(mx.cpu):
        return False
    if 4 * get_total_parameters(model) > _available_bytes() / 2:
        return False
    # Scales first: dequantised in bfloat16, weights would be rounded once more.
    model.set_dtype(mx.float32)
    dequantize_model(model)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return True


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
