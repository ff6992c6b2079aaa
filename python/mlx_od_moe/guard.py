"""Whether prediction makes tokens come sooner: measured while they come, in turns."""

from __future__ import annotations

import logging
from statistics import median

log = logging.getLogger("mlx_od_moe")

# Steps of a turn, and how many turns pass between two comparisons: the oftener the same was found,
# the fewer tokens are spent on asking again.
TURN = 12
FIRST_PAUSE, LONGEST_PAUSE = 4, 256
# Prediction has to lose by more than noise before it goes, and to win before it comes back.
MARGIN = 0.02


class Guard:
    """Says for each decoding step whether to predict, and is told how long the step took.

    Every so many turns one turn of the other kind is tried. The medians decide.
    """

    def __init__(self) -> None:
        self.predicting = True
        self._trying = False
        self._turns = 0
        self._pause = FIRST_PAUSE
        self._times: list[float] = []
        self._usual = 0.0

    def predicts(self) -> bool:
        """Whether the next step is to predict."""
        return self.predicting != self._trying

    def took(self, seconds: float) -> None:
        """A step of one token per sequence has taken so long."""
        self._times.append(seconds)
        if len(self._times) < TURN:
            return
        # The first steps of a turn still have what the turn before has prefetched, or not.
        time, self._times = median(self._times[2:]), []
        if self._trying:
            self._compare(time)
            return
        self._usual = time
        self._turns += 1
        self._trying = self._turns == self._pause

    def _compare(self, tried: float) -> None:
        with_, without = (self._usual, tried) if self.predicting else (tried, self._usual)
        # It changes for what is better by the margin.
        pays = with_ < without * ((1 + MARGIN) if self.predicting else (1 - MARGIN))
        self._pause = FIRST_PAUSE if pays != self.predicting else self._pause * 2
        self._pause = min(self._pause, LONGEST_PAUSE)
        if pays != self.predicting:
            log.info(
                "prediction is switched %s: a token takes %.2f ms with it, %.2f ms without",
                "on" if pays else "off",
                with_ * 1e3,
                without * 1e3,
            )
        self.predicting, self._trying, self._turns = pays, False, 0
