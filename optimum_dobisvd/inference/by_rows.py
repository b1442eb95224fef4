"""A matrix held in two forms: factors where these are faster, dense for other numbers of rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from torch import Tensor, nn

from ..model.substitutions import Substitute, tell


class ByRows(Substitute):
    """Stands in for a matrix: `factors` or `dense` computes a product, by its number of rows."""

    def __init__(self, factors: nn.Module, dense: nn.Module, runs_dense: Mapping[int, bool]) -> None:
        """`runs_dense` says it for some numbers of rows; others go with the nearest, by their ratio."""
        super().__init__()
        self.factors, self.dense = factors, dense
        known = sorted(runs_dense)
        self._steps = [
            (math.isqrt(rows * more), self._name(runs_dense[rows]))
            for rows, more in itertools.pairwise(known)
            if runs_dense[rows] != runs_dense[more]
        ]
        self._last = self._name(runs_dense[known[-1]])
        self.training = factors.training

    @staticmethod
    def _name(runs_dense: bool) -> str:
        return "dense" if runs_dense else "factors"

    @property
    def weight(self) -> Tensor:
        """That of one of the two, which modeling code asks for dtype and device."""
        weight: Tensor = self.dense.weight  # type: ignore[assignment]
        return weight

    def form(self, rows: int) -> str:
        """Return the name of the one that computes products of so many rows."""
        for most, name in self._steps:
            if rows <= most:
                return name
        return self._last

    def forward(self, x: Tensor) -> Tensor:
        # Not by attribute, which in a module takes as long as another call.
        y: Tensor = self._modules[self.form(x.numel() // x.shape[-1])](x)  # type: ignore[misc]
        return y

    def suspend(self) -> None:
        """See `Substitutions`."""
        tell(self.factors, "suspend")

    def resume(self) -> None:
        """See `Substitutions`."""
        tell(self.factors, "resume")
