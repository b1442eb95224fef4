"""The structures there are. To add one is a file beside this one, and a line here."""

from __future__ import annotations

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

STRUCTURE_SETTINGS: Registry[tuple[type[CompressedLinear], ...]] = Registry("structure")
"""The structures that a setting allows."""
for _name in STRUCTURES:
    STRUCTURE_SETTINGS.register(_name, (STRUCTURES.get(_name),))
_with_rank = tuple(each for each in map(STRUCTURES.get, STRUCTURES) if each.has_rank)
STRUCTURE_SETTINGS.register(AUTO, _with_rank)
