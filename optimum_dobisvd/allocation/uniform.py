"""Uniform allocation: the same fraction of every matrix is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .budget import Budget, spend
from .global_allocation import QuantizationLosses
from .plan import PlannedModule

if TYPE_CHECKING:
    from torch import Tensor


def uniform(
    budget: Budget, spectra: Mapping[str, Tensor] | None = None, losses: QuantizationLosses | None = None
) -> dict[str, PlannedModule]:
    """Keep the same fraction of the bytes of every matrix that has no override, up to the rounding of ranks."""
    return spend(budget, {name: each.target.dense_bytes for name, each in budget.options.items()})
