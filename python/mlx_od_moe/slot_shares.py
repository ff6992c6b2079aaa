"""How many slots each layer gets, where some layers' experts are predicted and others' are not."""

from __future__ import annotations

from collections.abc import Collection

from .expert_file import ExpertFile

# What a predicted layer gives: it needs its slots less than one that nobody reads ahead for. With a
# quarter resident it is what was best of what docs/planning.md tried (--first-capacity 38).
GIVEN = 1 / 8


def favour(
    slots: dict[int, int], unpredicted: Collection[int], file: ExpertFile, top_k: int
) -> dict[int, int]:
    """The slots of each layer, in no more bytes: up to an eighth goes to the `unpredicted`."""
    shares = dict(slots)
    givers = [layer for layer in slots if layer not in unpredicted]
    wanting = sorted(unpredicted)
    least = {n: max(slots[n] - int(slots[n] * GIVEN), min(top_k, slots[n])) for n in givers}
    given = 0
    # One slot at a time, so that all give and get alike.
    while wanting := [n for n in wanting if shares[n] < file.num_experts(n)]:
        layer = min(wanting, key=lambda n: shares[n])
        while given < file.expert_bytes(layer):
            giver = max(givers, key=lambda n: shares[n] - least[n], default=None)
            if giver is None or shares[giver] <= least[giver]:
                return shares
            shares[giver] -= 1
            given += file.expert_bytes(giver)
        shares[layer] += 1
        given -= file.expert_bytes(layer)
    return shares
