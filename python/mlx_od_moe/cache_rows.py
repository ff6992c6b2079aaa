"""Which sequence each row of a prompt cache holds, through what mlx-lm does to batches of them."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

_ROWS = "_mlx_od_moe_rows"
_numbers = itertools.count(1)


class Row:
    """A sequence, as long as its prompt cache lasts. A copy of the cache holds copies of it.

    Attributes:
        number: of this sequence and no other.
        parent: that of the sequence that it was copied from; 0: of none.
    """

    def __init__(self, parent: int = 0):
        self.number = next(_numbers)
        self.parent = parent

    def __deepcopy__(self, memo: dict[int, Any]) -> Row:
        return Row(self.number)


class Place(NamedTuple):
    """Where a pass begins: its sequences, and how many tokens of each its cache holds.

    Both are empty where that is not known.
    """

    rows: tuple[Row, ...] = ()
    offsets: tuple[int, ...] = ()

    @classmethod
    def of(cls, batch: int, cache: Any) -> Place:
        """Of a pass over so many sequences, with a model's prompt cache. To be asked before it."""
        first = cache[0] if isinstance(cache, list) and cache else None
        offsets = _offsets(first, batch)
        if first is None or len(offsets) != batch:
            return cls()
        _follow_batches()
        rows = getattr(first, _ROWS, ())
        if len(rows) != batch:
            rows = [Row() for _ in range(batch)]
            setattr(first, _ROWS, rows)
        return cls(tuple(rows), offsets)


def _offsets(cache: Any, batch: int) -> tuple[int, ...]:
    """Empty where it has none, and for prompts of several lengths, padded at their ends."""
    offset = getattr(cache, "offset", None)
    if isinstance(offset, int):
        return (offset,) * batch
    padded = any(getattr(cache, n, None) is not None for n in ("_right_padding", "_lengths"))
    if padded or not isinstance(offset, mx.array):
        return ()
    padding = getattr(cache, "left_padding", None)
    if hasattr(cache, "_idx") and not hasattr(cache, "_offset") and padding is not None:
        # The same, without a wait for the pass before.
        return tuple(cache._idx - p for p in padding.tolist())
    return tuple(offset.tolist())  # type: ignore[arg-type]


def _of(cache: Any) -> list[Row]:
    return list(getattr(cache, _ROWS, ()))


@functools.cache
def _follow_batches() -> None:
    """Have mlx-lm's caches take their rows along, from now on."""
    from mlx_lm.models import cache as caches

    kinds = (kind for _, kind in inspect.getmembers(caches, inspect.isclass))
    for kind in kinds:
        for name, follow in _FOLLOWED.items():
            if kind.__module__ == caches.__name__ and name in vars(kind):
                setattr(kind, name, _followed(vars(kind)[name], follow))


def _followed(method: Any, follow: Callable[..., None]) -> Any:
    """The method, and after it `follow`, with the rows as they were before."""
    if isinstance(method, classmethod | staticmethod):
        return type(method)(_followed(method.__func__, follow))

    @functools.wraps(method)
    def call(*args: Any) -> Any:
        before = [_of(arg) for arg in args]
        result = method(*args)
        follow(args, before, result)
        return result

    return call


def _filter(args: tuple[Any, ...], before: list[list[Row]], _: Any) -> None:
    cache, kept = args
    if before[0]:
        setattr(cache, _ROWS, [before[0][int(i)] for i in kept])


def _extend(args: tuple[Any, ...], before: list[list[Row]], _: Any) -> None:
    if all(before):
        setattr(args[0], _ROWS, before[0] + before[1])
    else:
        vars(args[0]).pop(_ROWS, None)


def _extract(args: tuple[Any, ...], before: list[list[Row]], result: Any) -> None:
    if before[0]:
        setattr(result, _ROWS, [before[0][args[1]]])


def _merge(args: tuple[Any, ...], _: list[list[Row]], result: Any) -> None:
    merged = [_of(cache) or [Row()] for cache in args[-1]]
    if all(len(rows) == 1 for rows in merged):
        setattr(result, _ROWS, [rows[0] for rows in merged])


_FOLLOWED = {"filter": _filter, "extend": _extend, "extract": _extract, "merge": _merge}
