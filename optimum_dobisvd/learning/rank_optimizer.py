"""What the training loop asks of an optimizer of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ..allocation.budget import Budget
from ..allocation.plan import PlannedModule
from ..calibration.loss import NotFiniteError


class RankOptimizer(Protocol):
    """Ranks that follow the gradient of a loss within a budget."""

    def ranks(self) -> dict[str, float | None]:
        """Where the next step is taken, for the matrices that have something to decide; None is dense."""

    def step(self, step: int, ids: Tensor, mask: Tensor) -> float:
        """Measure on these windows and move; returns the loss there, in nats per token.

        Raises:
            NotFiniteError: the loss or a gradient is NaN or infinite; nothing has moved.
            NoGradientError: no rank has a gradient; nothing has moved.
        """

    def planned(self) -> dict[str, PlannedModule]:
        """Whole ranks within the budget, for every target."""

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on."""

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave. KeyError where it was not that."""


class NoGradientError(ValueError):
    """No rank has a gradient."""


def check_gradient(found: Mapping[str, float]) -> None:
    """Raise if a gradient (by the name of its matrix) is not finite, or all are zero."""
    broken = [name for name, value in found.items() if not math.isfinite(value)]
    if broken:
        raise NotFiniteError(f"the gradient of the rank of {broken[0]} is not finite")
    if not any(found.values()):
        raise NoGradientError("no rank has a gradient; the loss does not feel these matrices")


def require_ranks(budget: Budget, start: Mapping[str, PlannedModule]) -> None:
    """Raise ValueError if every matrix with something to decide is dense."""
    if all(start[name].rank is None for name in budget.options):
        raise ValueError(
            "no matrix has a rank to learn: all are whole or overridden; lower ratio, or leave quantization out"
        )
