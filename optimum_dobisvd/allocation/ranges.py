"""Ascending numbers as text a person can read and edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_RANGES = re.compile(r"[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*")
_MOST_DIRECTIONS = 10**6


def write_ranges(directions: Sequence[int]) -> str:
    """`(0, 1, 2, 5)` as `"1-3,6"`."""
    ranges: list[list[int]] = []
    for number in directions:
        if ranges and number == ranges[-1][1]:
            ranges[-1][1] = number + 1
        else:
            ranges.append([number + 1, number + 1])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def read_ranges(text: Any) -> tuple[int, ...]:
    """What `write_ranges` wrote, or a person did."""
    if not isinstance(text, str) or not _RANGES.fullmatch(text):
        raise ValueError(f"directions are numbers and ranges of them, such as '1-40,43,45-50', got {text!r:.60}")
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise ValueError(f"directions: the range {part} runs backwards; write the smaller number first")
        if int(last or first) > _MOST_DIRECTIONS:  # said before so many numbers are made
            raise ValueError(f"directions: {part} goes beyond {_MOST_DIRECTIONS}, more than any matrix has")
        found.extend(range(int(first) - 1, int(last or first)))
    return tuple(found)
