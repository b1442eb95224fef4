"""Rounds of several models by turns, the first of them twice: what differs less than that one from itself is noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .generation import Timing

AGAIN = "again"
"""The name of the first row's second turn."""
LARGEST_NOISE = 0.05
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Patience:
    """How often is measured.

    Attributes:
        rounds: in which every row has its turn.
        attempts: of so many rounds each, while the first row differs from itself.
        seconds: after which no further round of an attempt is begun, three being the least.
    """

    rounds: int = 7
    attempts: int = 3
    seconds: float = 120.0


@dataclass(frozen=True)
class Rounds:
    """The timings of every row, and of the first one's second turns under `AGAIN`."""

    timings: dict[str, list[Timing]]

    @property
    def noise(self) -> float:
        """How far the first row is from itself: of the medians of both phases, the larger difference, relative."""
        one, other = next(iter(self.timings.values())), self.timings[AGAIN]
        pairs = ((first_token(one), first_token(other)), (per_token(one), per_token(other)))
        return max(max(pair) / min(pair) - 1 for pair in pairs)

    @property
    def can_tell(self) -> bool:
        """Whether differences between rows mean something."""
        return self.noise <= LARGEST_NOISE


def first_token(timings: Sequence[Timing]) -> float:
    """Return the median of the seconds until the first token."""
    return statistics.median(timing.first for timing in timings)


def per_token(timings: Sequence[Timing]) -> float:
    """Return the median of the seconds of a further token, over all tokens of all rounds."""
    return statistics.median(gap for timing in timings for gap in timing.gaps)


def slow_token(timings: Sequence[Timing]) -> float:
    """Return the seconds that 95 % of these tokens stay below."""
    gaps = sorted(gap for timing in timings for gap in timing.gaps)
    return gaps[min(len(gaps) - 1, round(0.95 * len(gaps)))]


def measure_rounds(
    rows: Sequence[str],
    run: Callable[[str], Timing],
    patience: Patience,
    clock: Callable[[], float] = time.monotonic,
) -> Rounds:
    """Have every row generate in every round, and the first one twice, each round beginning with another row.

    Rounds are repeated while the medians of the first row and of its second turn differ by more than 5 %.

    Args:
        rows: names, at least one.
        run: one generation of the row of that name, which was run before: nothing is warmed up here.
        patience: how often.
        clock: seconds, for its limit.
    """
    found: dict[str, list[Timing]] = {name: [] for name in (*rows, AGAIN)}
    turns = [*rows, AGAIN]
    if len(rows) > 1:  # its two turns as far apart as can be, so that what comes and goes does not hit both
        turns.insert(len(rows) // 2 + 1, turns.pop())
    for _ in range(patience.attempts):
        begun = clock()
        for number in range(patience.rounds):
            if number >= _LEAST_ROUNDS and clock() - begun > patience.seconds:
                break
            place = number % len(turns)
            for name in turns[place:] + turns[:place]:
                found[name].append(run(rows[0] if name == AGAIN else name))
        if Rounds(found).can_tell:
            break
    return Rounds(found)
