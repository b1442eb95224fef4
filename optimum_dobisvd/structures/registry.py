"""The structures there are. To add one is a file beside this one, and a line here."""

from __future__ import annotations

from ..registry import Registry
from .base import CompressedLinear
from .dense import DenseLinear
from .low_rank import LowRankLinear

STRUCTURES: Registry[type[CompressedLinear]] = Registry("structure")
for _structure in (DenseLinear, LowRankLinear):
    STRUCTURES.register(_structure.structure, _structure)
