"""How long work shows how far it is."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, what: str, unit: str, shown: bool, done: int = 0) -> tqdm[Any]:
    """A bar with rate and time left on standard error; a line now and then where that is a file."""
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        unit_scale=True,
        disable=not shown,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
