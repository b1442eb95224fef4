"""The structures there are. To add one is a file beside this one, and a line here."""

from __future__ import annotations

import difflib

from ..registry import Registry
from .base import CompressedLinear
from .dense import DenseLinear
from .low_rank import LowRankLinear
from .pivoted import PivotedLinear

STRUCTURES: Registry[type[CompressedLinear]] = Registry("structure")
for _structure in (DenseLinear, LowRankLinear, PivotedLinear):
    STRUCTURES.register(_structure.structure, _structure)

AUTO = "auto"
"""What lets every matrix take whichever structure loses least at its bytes."""


def structures_for(name: str) -> tuple[type[CompressedLinear], ...]:
    """Return the structures that a setting allows; of `auto`, all that have a rank. ValueError lists the names."""
    if name == AUTO:
        return tuple(each for known in STRUCTURES if (each := STRUCTURES.get(known)).has_rank)
    if name not in STRUCTURES:
        near = difflib.get_close_matches(str(name), [AUTO, *STRUCTURES], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown structure {name!r}; {hint}known: {', '.join([AUTO, *STRUCTURES])}")
    return (STRUCTURES.get(name),)
