"""Linears that were given too few of the tokens, as an expert is that a router seldom chooses, and what they borrow.

A Gram of fewer tokens than features says nothing of most directions, and one of none at all says nothing. Such a
linear takes the sum over its pool: the linears of the same block that differ from it only by a number in their names,
the other experts. Which tokens a router sends where is never changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MIN_TOKENS_PER_FEATURE = 1
"""A linear that sees only some of the text keeps its own statistics from this many tokens per feature on."""


def pool_name(block: str, name: str) -> str:
    """Return the name of a linear's pool: its own, with `*` for every number inside the block."""
    inside = name.removeprefix(block)
    return block + re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inside)


def pools(block: str, sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the members of every pool of more than one; all have one size. `sizes` are those of all linears."""
    found: dict[str, list[str]] = {}
    for name in sizes:
        found.setdefault(pool_name(block, name), []).append(name)
    return {
        pool: members
        for pool, members in found.items()
        if len(members) > 1 and len({sizes[name] for name in members}) == 1
    }


def borrowers(members: Iterable[str], tokens: Mapping[str, int], size: int, text: int) -> set[str]:
    """Return the members of a pool that borrow: they saw too few tokens for `size` features, and not all of the text.

    `tokens` are those each one saw, of the `text` that the block was given. None borrows from a pool that saw nothing.
    """
    few = MIN_TOKENS_PER_FEATURE * size
    known = {name: tokens.get(name, 0) for name in members}
    if not any(known.values()):
        return set()
    return {name for name, count in known.items() if count < few and count < text}
