"""Rounds by turns, and when their noise lets us tell."""

from collections import Counter

import pytest

from optimum_dobisvd.benchmark.generation import Timing
from optimum_dobisvd.benchmark.rounds import (
    AGAIN,
    Patience,
    first_token,
    measure_rounds,
    per_token,
    slow_token,
)


def steady(first: float = 1.0, gap: float = 0.1) -> Timing:
    return Timing(first, (gap, gap))


def test_in_every_round_each_row_has_its_turn_and_the_first_one_two() -> None:
    called: list[str] = []

    def run(name: str) -> Timing:
        called.append(name)
        return steady()

    rounds = measure_rounds(["dense", "checkpoint", "fused"], run, Patience(rounds=4))
    assert Counter(called) == {"dense": 8, "checkpoint": 4, "fused": 4}
    assert {name: len(found) for name, found in rounds.timings.items()} == {
        "dense": 4,
        "checkpoint": 4,
        "fused": 4,
        AGAIN: 4,
    }
    turns = [tuple(called[start : start + 4]) for start in range(0, 16, 4)]
    assert len(set(turns)) == 4, "no row is always the first"
    assert rounds.noise == 0
    assert rounds.can_tell


def test_what_differs_from_itself_is_repeated_and_then_cannot_tell() -> None:
    count = 0

    def run(name: str) -> Timing:
        nonlocal count
        again = count % 6 in (1, 2, 5)  # of three rounds, which begin by turns with the one or the other
        count += 1
        return steady(gap=0.12 if again else 0.1)

    rounds = measure_rounds(["dense"], run, Patience(rounds=3, attempts=4))
    assert count == 4 * 3 * 2
    assert rounds.noise == pytest.approx(0.2)
    assert not rounds.can_tell


def test_attempts_end_as_soon_as_the_medians_agree() -> None:
    # The first three rounds are disturbed, the second three are not: medians of all six agree within five percent.
    disturbed = iter([1.0, 1.5, 1.0, 1.5, 1.5, 1.0, *[1.2] * 100])
    count = 0

    def run(name: str) -> Timing:
        nonlocal count
        count += 1
        return steady(first=next(disturbed))

    rounds = measure_rounds(["dense"], run, Patience(rounds=3, attempts=5))
    assert count == 12
    assert rounds.can_tell


def test_a_slow_cell_has_three_rounds_and_no_more() -> None:
    now = 0.0

    def run(name: str) -> Timing:
        nonlocal now
        now += 100
        return steady()

    rounds = measure_rounds(["dense", "other"], run, Patience(rounds=9, seconds=60), clock=lambda: now)
    assert len(rounds.timings["other"]) == 3


def test_medians_and_the_slow_end_are_over_all_tokens_of_all_rounds() -> None:
    timings = [Timing(1.0, tuple(0.1 for _ in range(50))), Timing(3.0, (*(0.1 for _ in range(44)), *[0.9] * 6))]
    assert first_token(timings) == 2.0
    assert per_token(timings) == pytest.approx(0.1)
    assert slow_token(timings) == pytest.approx(0.9)
    assert timings[0].total == pytest.approx(6.0)
