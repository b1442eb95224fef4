"""A pivoted matrix computed as two factors, which give its outputs in order."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..model.substitutions import Substitute
from ..structures.base import bare_linear
from ..structures.low_rank import LowRankLinear
from ..structures.pivoted import PivotedLinear


class UnfoldedLinear(Substitute, LowRankLinear):
    """Stands in for a pivoted matrix: the same first linear, and a second one that has all rows in order.

    Those of the pivot rows are unit vectors: `k^2` more multiply-adds, and values in memory, in which every value is
    the stored one. Until `suspend` the second linear of the matrix has no values of its own.
    """

    def __init__(self, matrix: PivotedLinear) -> None:
        super().__init__(matrix.in_features, matrix.out_features, matrix.rank, bias=False, device="meta")
        self.weight, self.encoding = matrix.weight, matrix.encoding
        self._matrix = (matrix,)  # in a tuple: not registered
        self.first = matrix.first
        self.second = bare_linear(self._taken(), matrix.bias)
        self.training = matrix.training

    @torch.no_grad()
    def suspend(self) -> None:
        """Give the values back to the matrix."""
        weight, rest = self._weight_of(self), self._matrix[0].permutation[self.rank :].long()
        self._weight_of(self._matrix[0]).data = weight.data[rest.to(weight.device)]
        weight.data = weight.data.new_empty(0, self.rank)

    def resume(self) -> None:
        """Undo `suspend`."""
        self._weight_of(self).data = self._taken()

    @torch.no_grad()
    def _taken(self) -> Tensor:
        """Return the values of the second linear, which are then no longer the matrix's."""
        weight = self._weight_of(self._matrix[0])
        unfolded = self._matrix[0].factors()[0].to(weight.dtype)
        weight.data = weight.data.new_empty(0, self.rank)
        return unfolded

    @staticmethod
    def _weight_of(matrix: PivotedLinear | LowRankLinear) -> nn.Parameter:
        return cast(nn.Parameter, matrix.second.weight)
