"""Cuts a collection into shards, by its settings alone: the same settings, the same shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .traces import DECODE, PREFILL, recorded_layers

_SHARD_BYTES = 1 << 30  # of hidden states: what bounds memory where states are wide
_DECODE_SEQUENCES = 32
_MIN_DECODE_LENGTH = 128
_PREFILL_TOKENS = 2048
_PROMPT_SHARE = 4


@dataclass(frozen=True)
class Shard:
    """What one shard is to hold: `rows` tokens, most of them of one phase.

    `first_row` counts the rows planned before it.
    """

    index: int
    phase: int
    rows: int
    first_row: int


def plan_shards(collection: Mapping[str, Any]) -> list[Shard]:
    """The shards of a collection, prefill and decode in turn where it has both."""
    most = max(1, min(collection["shard_tokens"], _SHARD_BYTES // row_bytes(collection)))
    tokens, mode = collection["tokens"], collection["mode"]
    decode = {"both": tokens // 2, "decode": tokens}.get(mode, 0)
    pieces = [(i, PREFILL, rows) for i, rows in enumerate(_split(tokens - decode, most))]
    pieces += [(i, DECODE, rows) for i, rows in enumerate(_split(decode, most))]
    shards: list[Shard] = []
    first_row = 0
    for index, (_, phase, rows) in enumerate(sorted(pieces)):
        shards.append(Shard(index, phase, rows, first_row))
        first_row += rows
    return shards


def row_bytes(collection: Mapping[str, Any]) -> int:
    """The bytes of one token's hidden states."""
    return 2 * int(collection["hidden_size"]) * len(recorded_layers(collection))


def _split(tokens: int, most: int) -> list[int]:
    """Nearly equal parts of at most `most` tokens."""
    parts = -(-tokens // most)
    return [tokens * (i + 1) // parts - tokens * i // parts for i in range(parts)]


def prefill_batch(window: int, batch_size: int | None) -> int:
    """Sequences of one prefill pass."""
    return batch_size or max(1, _PREFILL_TOKENS // window)


def decode_shape(rows: int, window: int, batch_size: int | None) -> tuple[int, int, int]:
    """(sequences, prompt tokens, tokens) of the decode batches that make up `rows` tokens."""
    sequences = min(batch_size or _DECODE_SEQUENCES, max(1, rows // _MIN_DECODE_LENGTH))
    length = min(window, -(-rows // sequences))
    return sequences, max(1, length // _PROMPT_SHARE), length
