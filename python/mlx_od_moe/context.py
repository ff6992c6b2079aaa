"""Context: what earlier tokens left at the layers that a predictor looks ahead to.

A token's state at layer l lacks what the attentions between l and l + d will bring in. That comes
from earlier tokens, whose states at the target layers are known by then. So each MoE layer keeps
a memory of the last tokens that passed it (TokenMemory: for each a key, a value and an encoded
state), which the predictors of up to `lookahead` layers before it share; and each predictor reads
the memories of its targets (ContextReader) into one vector, which joins the output of its first
matrix:

    context = previous_state([s_1 … s_D]) + attended([a_1 … a_D])

s_d is the previous token's encoded state at target d, and a_d one head of attention over the keys
and values of the last `window` tokens there. The first term is known as soon as the previous token
has passed the last target. The attention's query is made of this token's state, but of that at the
MoE layer before (`early_query`): when the predictor's own layer is reached, both terms are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ._ext import read_memories
from .predictor_file import quantize
from .row_ops import on_cpu

_NEVER = -1e9  # an attention score that gets no weight


@dataclass(frozen=True)
class ContextConfig:
    """Sizes of a bundle's context; all layers share them.

    Args:
        window: earlier tokens that attention sees; 0: no attention.
        key_size: width of the keys and values of each layer's memory.
        state_size: width of the previous token's encoded state; 0: none.
        early_query: attention's query is of the state at the MoE layer before the predictor's own,
            but for the first layer, which has none before it. False: of the own layer's state.
    """

    window: int = 64
    key_size: int = 64
    state_size: int = 64
    early_query: bool = True

    def __post_init__(self) -> None:
        for name in ("window", "key_size", "state_size"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"[ContextConfig] {name} can't be negative, got {getattr(self, name)}"
                )
        if bool(self.window) != bool(self.key_size):
            raise ValueError(
                f"[ContextConfig] window and key_size are both 0 or neither, got {self.window} and "
                f"{self.key_size}"
            )
        if not self.window and not self.state_size:
            raise ValueError("[ContextConfig] without window and state_size there is no context")

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> ContextConfig:
        """As a file has it; in those from before there were early queries there are none."""
        return cls(**{"early_query": False, **fields})

    @property
    def memory_size(self) -> int:
        """Numbers that one token leaves at one layer."""
        return 2 * self.key_size + self.state_size

    @property
    def rows(self) -> int:
        """Earlier tokens that a vector depends on at most."""
        return max(1, self.window)

    def query_layer(self, layer: int, moe_layers: Sequence[int]) -> int:
        """The MoE layer with whose state `layer`'s predictor asks its targets' memories."""
        return moe_layers[max(moe_layers.index(layer) - self.early_query, 0)]


class TokenMemory(nn.Module):
    """What a token leaves at one MoE layer: `encode` its block input to key, value and state."""

    def __init__(self, config: ContextConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.encode = nn.Linear(hidden_size, config.memory_size, bias=False)

    def quantized(self, bits: int, group_size: int = 64) -> TokenMemory:
        """A copy with its matrix in MLX's affine format."""
        copy = TokenMemory(self.config, self.encode.weight.shape[-1])
        copy.update(self.parameters())
        quantize(copy, bits, group_size)
        return copy

    def __call__(self, h: mx.array) -> mx.array:
        """Memories [..., 2 * key_size + state_size] of states h [..., hidden_size]."""
        return self.encode(h)


class ContextReader(nn.Module):
    """Reads the memories of a layer's targets into a vector for its predictor's inner layer.

    `position_bias` [lookahead, window + 1]: added to the attention score of the token that many
    positions earlier; entry 0 is the score of attending to nothing.
    """

    def __init__(
        self, config: ContextConfig, hidden_size: int, predictor_size: int, lookahead: int
    ):
        super().__init__()
        self.config, self.lookahead = config, lookahead
        if config.window:
            width = lookahead * config.key_size
            self.query = nn.Linear(hidden_size, width, bias=False)
            self.attended = nn.Linear(width, predictor_size, bias=False)
            # Slopes as in ALiBi (Press et al., 2022), so that training starts with near tokens.
            slopes = mx.power(4.0, -mx.arange(lookahead, dtype=mx.float32))
            self.position_bias = -slopes[:, None] * mx.arange(config.window + 1, dtype=mx.float32)
        if config.state_size:
            width = lookahead * config.state_size
            self.previous_state = nn.Linear(width, predictor_size, bias=False)

    def __call__(
        self, asking: mx.array, memories: Sequence[mx.array], sequence: mx.array
    ) -> mx.array:
        """Context vectors [batch, n, predictor_size] of n tokens in order.

        Args:
            asking: their states at the query's layer, [batch, n, hidden_size].
            memories: per distance, the target's [batch, rows + n, memory_size]: `config.rows` rows
                that precede the first token, then those of the n tokens, read by later ones only.
            sequence: which sequence each of these rows belongs to, int [batch, rows + n]. Tokens
                see only their own; rows that are not there have a number of their own.
        """
        query = self.query(asking) if self.config.window else None
        vectors = [matrix(read) for matrix, read in self.read(query, memories, sequence)]
        return vectors[0] if len(vectors) == 1 else vectors[0] + vectors[1]

    def read(
        self,
        query: mx.array | None,
        memories: Sequence[mx.array],
        sequence: mx.array,
        bf16: bool = False,
    ) -> list[tuple[nn.Linear, mx.array]]:
        """What the vectors are sums of: matrices, each with what it is to multiply.

        `query` [batch, n, lookahead * key_size]: of the states; None where there is no attention.
        `bf16`: on a CPU with products in bfloat16, attention multiplies so.
        """
        if query is None:
            return [(self.previous_state, self._previous(memories, sequence))]
        if on_cpu():
            states, read = read_memories(
                query, self.position_bias, sequence, list(memories), bf16=bf16
            )
        else:
            states, read = (
                self._previous(memories, sequence),
                self._attend(query, memories, sequence),
            )
        attended = (self.attended, read)
        return [attended, (self.previous_state, states)] if self.config.state_size else [attended]

    def _previous(self, memories: Sequence[mx.array], sequence: mx.array) -> mx.array:
        """The previous token's states, [batch, n, lookahead * state_size]."""
        size, before = self.config.key_size, self.config.rows
        states = mx.concatenate([m[:, before - 1 : -1, 2 * size :] for m in memories], axis=-1)
        follows = sequence[:, before - 1 : -1] == sequence[:, before:]
        return states * follows[..., None]

    def _attend(
        self, query: mx.array, memories: Sequence[mx.array], sequence: mx.array
    ) -> mx.array:
        """[batch, n, lookahead * key_size]; `window` queries at once, over two blocks of keys."""
        window, size = self.config.window, self.config.key_size
        tokens = query.shape[1]
        pad = -tokens % window
        ages = window + mx.arange(window)[:, None] - mx.arange(2 * window)[None]
        earlier = (ages != 0).astype(mx.float32)  # in the token's own place stands "nothing"

        by_head = mx.unflatten(query, -1, (self.lookahead, size)).swapaxes(1, 2)
        queries = mx.unflatten(_padded(by_head, pad), 2, (-1, window))
        keys = _block_pairs(mx.stack([m[..., :size] for m in memories], axis=1), pad, window)
        values = mx.stack([m[..., size : 2 * size] for m in memories], axis=1)
        own = _padded(sequence[:, None, :, None], pad)
        same = mx.unflatten(own[:, :, window:], 2, (-1, window)) == _block_pairs(
            own, 0, window
        ).swapaxes(-1, -2)

        scores = queries @ keys.swapaxes(-1, -2) * (earlier * size**-0.5) + self._bias(ages)
        weights = mx.softmax(mx.where(same, scores, _NEVER), axis=-1) * earlier
        read = weights @ _block_pairs(values, pad, window)  # [batch, heads, blocks, window, size]
        read = mx.flatten(read, 2, 3)[:, :, :tokens]
        return mx.flatten(read.swapaxes(1, 2), -2, -1)

    def _bias(self, ages: mx.array) -> mx.array:
        """[heads, 1, window, 2 * window]."""
        window = self.config.window
        table = mx.take(self.position_bias, mx.clip(ages, 0, window), axis=1)
        return mx.where((ages >= 0) & (ages <= window), table, _NEVER)[:, None]


def _padded(rows: mx.array, pad: int) -> mx.array:
    """[batch, heads, n, c] with `pad` rows of zeros after the last."""
    return mx.pad(rows, [(0, 0), (0, 0), (0, pad), (0, 0)]) if pad else rows


def _block_pairs(rows: mx.array, pad: int, window: int) -> mx.array:
    """[batch, heads, window + n, c] → [batch, heads, blocks, 2 * window, c]: block and next."""
    blocks = mx.unflatten(_padded(rows, pad), 2, (-1, window))
    return mx.concatenate([blocks[:, :, :-1], blocks[:, :, 1:]], axis=3)
