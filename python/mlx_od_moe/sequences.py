"""Which of a runner's sequences a forward pass belongs to: its prompt cache says so."""

from __future__ import annotations

from .cache_rows import Place, Row
from .shadow_runner import ShadowRunner

# Sequences whose contexts are kept at once; beyond, the one that was not used longest goes.
MOST_KEPT = 16


class Sequences:
    """Keeps the contexts of a runner in step with the prompt caches of a model.

    Sequence 0 is that of passes whose place is not known.
    """

    def __init__(self, runner: ShadowRunner):
        self._runner = runner
        # By a row's number, in order of use: sequence, length.
        self._known: dict[int, tuple[int, int]] = {}

    def follows(self, place: Place, tokens: int) -> bool:
        """Whether `enter` would change no context."""
        if not place.rows:
            return tokens == 1
        lengths = [self._known.get(row.number, (0, -1))[1] for row in place.rows]
        return lengths == [max(offset, 0) for offset in place.offsets]

    def enter(self, place: Place, tokens: int) -> list[int]:
        """A pass of so many tokens of each sequence begins: they fit it from now on.

        A cache that was trimmed takes a context's last tokens with it, one that was copied begins
        with a copy; one that holds what was not seen begins it anew. Where the place is unknown, a
        prompt does. Raises ValueError for more than MOST_KEPT sequences.
        """
        if not place.rows:
            if tokens > 1:
                self._runner.reset(0)
            return [0]
        if len(place.rows) > MOST_KEPT:
            raise ValueError(
                f"[Sequences] {MOST_KEPT} contexts are kept, a pass has {len(place.rows)}"
            )
        for row in place.rows:  # what this pass needs is not what goes
            if row.number in self._known:
                self._known[row.number] = self._known.pop(row.number)
        return [
            self._enter(row, offset, tokens)
            for row, offset in zip(place.rows, place.offsets, strict=True)
        ]

    def _enter(self, row: Row, offset: int, tokens: int) -> int:
        sequence, length = self._known.pop(row.number, (0, 0))
        held = max(offset, 0)  # below 0: the row begins with padding
        if sequence == 0:
            sequence = self._free()
            origin, length = self._known.get(row.parent, (0, 0))
            if 0 < held <= length:
                self._runner.fork(origin, sequence)
            else:
                length = 0
        if held < length:
            self._runner.trim(sequence, length - held)
        elif held > length:
            self._runner.reset(sequence)
        self._known[row.number] = sequence, offset + tokens
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
