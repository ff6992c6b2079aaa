"""Ctrl-C in the middle of a training."""

import itertools
from collections.abc import Callable

import pytest
from tqdm import tqdm

from mlx_od_moe.training import train_shadow


def interrupt_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """At the n-th batch, counted over all training that follows."""
    count = itertools.count(1)

    class Bar(tqdm):
        def update(self, n=1):
            if next(count) == calls:
                raise KeyboardInterrupt
            return super().update(n)

    monkeypatch.setattr(train_shadow, "progress_bar", lambda *_: Bar(disable=True))


def train_interrupted(
    monkeypatch: pytest.MonkeyPatch, calls: int, train: Callable[[], object]
) -> None:
    """Train until interrupted at the n-th batch, then again to the end."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls)
        with pytest.raises(KeyboardInterrupt):
            train()
    train()
