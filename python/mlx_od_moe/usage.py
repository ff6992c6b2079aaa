"""Which experts a model uses most, kept between runs: so that a start is a warm one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .durable_file import whole_or_absent
from .expert_store import ExpertStore
from .progress import progress_bar

FORMAT = "mlx-od-moe-usage"


def save_usage(path: str | Path, uses: dict[int, list[int]]) -> None:
    """Write how often each expert of each layer was chosen, whole or not at all."""
    text = json.dumps({"format": FORMAT, "version": 1, "uses": uses})
    with whole_or_absent(Path(path)) as file:
        file.write(text.encode())


def load_usage(path: str | Path, store: ExpertStore) -> dict[int, list[int]]:
    """Read what `save_usage` wrote. Raises ValueError, naming the file, for another model's."""
    try:
        read = json.loads(Path(path).read_text())
        if read["format"] != FORMAT or read["version"] != 1:
            raise ValueError(f"format {read['format']!r}, version {read['version']!r}")
        uses = {int(layer): [int(n) for n in counts] for layer, counts in read["uses"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"[{path}] not a readable file of usage: {error}") from error
    experts = {layer: store.file.num_experts(layer) for layer in store.layers}
    if {layer: len(counts) for layer, counts in uses.items()} != experts:
        raise ValueError(f"[{path}] holds the usage of another model than {store.file.path}")
    return uses


def warm(store: ExpertStore, uses: dict[int, list[int]], progress: bool) -> None:
    """Read the experts that were used most, as many as each layer has slots for."""
    with progress_bar(len(uses), "reading what was used most", "layer", progress) as bar:
        for layer, counts in uses.items():
            hot = np.argsort(np.array(counts), kind="stable")[-store.slots(layer) :]
            # The one used most comes last: it is the last to be evicted.
            store.acquire(layer, [e for e in hot.tolist() if counts[e]]).release()
            bar.update()
