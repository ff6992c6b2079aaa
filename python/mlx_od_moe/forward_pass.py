"""The forward pass that a thread is in, as a runtime has to know it."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import mlx.core as mx

from .cache_rows import Place
from .switch import Later


class Routed(NamedTuple):
    """A MoE layer's input and the router's choice, not computed yet; layers[i] is meant."""

    i: int
    hidden: mx.array
    indices: mx.array


class ForwardPass(threading.local):
    """Each thread's own."""

    in_pass = False
    announced = False  # whether MLX tells of the pass's tokens itself
    tokens: mx.array | None = None  # that are decoded, one of each sequence
    place = Place()
    hidden: mx.array | None = None
    waiting: tuple[Routed, Later] | None = None

    def __init__(self, uncounted: int) -> None:
        # What layers in memory as a whole chose, to count: (i, step, ids). Only a thread's own:
        # others can't tell whether it is computed. Of the last passes: some never will be.
        self.uncounted: deque[tuple[int, int, mx.array]] = deque(maxlen=uncounted)

    def take_hidden(self) -> mx.array:
        """The input of the block that is computed now."""
        assert self.hidden is not None
        hidden, self.hidden = self.hidden, None
        return hidden


def decoded_tokens(args: tuple[Any, ...]) -> mx.array | None:
    """A model's first argument, if that is one token of each sequence."""
    tokens = args[0] if args else None
    if not isinstance(tokens, mx.array) or not mx.issubdtype(tokens.dtype, mx.integer):
        return None
    return tokens if tokens.ndim == 2 and tokens.shape[1] == 1 else None
