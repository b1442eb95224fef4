"""The interface between the training loop and an optimizer of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ..allocation.budget import Budget
from ..allocation.plan import PlannedModule
from ..calibration.loss import NotFiniteError


class RankOptimizer(Protocol):
    """Ranks that follow the gradient of a loss within a byte budget."""

    def ranks(self) -> dict[str, float | None]:
        """Return the present rank of every matrix in `Budget.options`; None is dense."""

    def step(self, step: int, ids: Tensor, mask: Tensor) -> float:
        """Measure the gradient on a batch (`batch x seqlen`) and update the ranks.

        `step` is counted from 0. Returns the loss before, in nats per token.

        Raises:
            NotFiniteError: the loss or a gradient is NaN or infinite; nothing was updated.
            NoGradientError: no rank has a gradient.
        """

    def planned(self) -> dict[str, PlannedModule]:
        """Return integer ranks within the budget, a planned module for every target."""

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on, for the journal."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned. KeyError where a tensor is missing."""


class NoGradientError(ValueError):
    """An error for ranks none of which has a gradient."""


def check_gradient(found: Mapping[str, float]) -> None:
    """Raise NotFiniteError, naming the matrix, for a gradient that is not finite; NoGradientError if all are zero."""
    broken = [name for name, value in found.items() if not math.isfinite(value)]
    if broken:
        raise NotFiniteError(f"the gradient of the rank of {broken[0]} is not finite")
    if not any(found.values()):
        raise NoGradientError("no rank has a gradient; the loss does not feel these matrices")


def require_ranks(budget: Budget, start: Mapping[str, PlannedModule]) -> None:
    """Raise ValueError if every matrix in `budget.options` starts dense."""
    if all(start[name].rank is None for name in budget.options):
        raise ValueError(
            "no matrix has a rank to learn: all are dense or overridden; lower ratio, or leave quantization out"
        )
