"""Which of a runner's sequences a forward pass belongs to: its prompt cache says so."""

from __future__ import annotations

from typing import NamedTuple

from .shadow_runner import ShadowRunner

# Sequences whose contexts are kept at once; beyond, the one that was not used longest goes.
MOST_KEPT = 8


class Place(NamedTuple):
    """Where a pass begins: its prompt cache (0: unknown), and how many tokens that holds."""

    cache: int = 0
    offset: int = 0


class Sequences:
    """Keeps the contexts of a runner in step with the prompt caches of a model."""

    def __init__(self, runner: ShadowRunner):
        self._runner = runner
        self._known: dict[int, tuple[int, int]] = {}  # by cache, in order of use: sequence, length

    def follows(self, place: Place, tokens: int) -> bool:
        """Whether `enter` would change no context."""
        if not place.cache:
            return tokens == 1
        return self._known.get(place.cache, (0, -1))[1] == place.offset

    def enter(self, place: Place, tokens: int) -> int:
        """A pass of so many tokens begins: its sequence, whose context fits it from now on.

        A cache that was trimmed takes the context's last tokens with it; one that holds what was
        not seen begins it anew. Where the cache is unknown, a prompt does.
        """
        if not place.cache:
            if tokens > 1:
                self._runner.reset(0)
            return 0
        sequence, length = self._known.pop(place.cache, (0, 0))
        if sequence == 0:
            sequence = self._free()
        if place.offset < length:
            self._runner.trim(sequence, length - place.offset)
        elif place.offset > length:
            self._runner.reset(sequence)
        self._known[place.cache] = sequence, place.offset + tokens
        return sequence

    def _free(self) -> int:
        if len(self._known) < MOST_KEPT:
            taken = {sequence for sequence, _ in self._known.values()}
            sequence = min({*range(1, MOST_KEPT + 1)} - taken)
        else:
            sequence, _ = self._known.pop(next(iter(self._known)))
        self._runner.reset(sequence)
        return sequence

    def forget(self) -> None:
        """All begin anew: tokens were missed."""
        for sequence in [0, *(sequence for sequence, _ in self._known.values())]:
            self._runner.reset(sequence)
        self._known.clear()
