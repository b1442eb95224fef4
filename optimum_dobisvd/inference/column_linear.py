"""Linears of a CPU whose weights are stored by columns, where products of few rows read them faster so."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..encodings.base import Encoding
from ..model.substitutions import RESTORE
from .device_time import cold_copies, ratio_by_turns

logger = logging.getLogger(__name__)

_FEW_ROWS = 2
"""More read weights once for all of them, in any order; then the order in which they are stored hardly matters."""
_CLEARLY = 0.95
"""Of the time with weights by rows what those by columns may take at most: two equal ones may differ by that."""
RATIOS: dict[tuple[Any, ...], float] = {}
"""Times by columns over those by rows, by all that decides them. To override a measurement, set it here."""


class ColumnLinear(nn.Module):
    """Stands in for a linear with the same tensors, and has the weight's values in the order of its columns."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("weight", linear.weight)
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        self.resume()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def suspend(self) -> None:
        """Put the values into the order of rows."""
        self.weight.data = self.weight.data.contiguous()

    def resume(self) -> None:
        """Put the values into the order of columns."""
        self.weight.data = _by_columns(self.weight.data)

    def __format__(self, spec: str) -> str:
        # See `SharedInputPart.__format__`.
        return format(f"{self!r} (optimized for inference: {RESTORE})", spec)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@torch.no_grad()
def faster_by_columns(linear: Any, encoding: Encoding, rows: Sequence[int]) -> ColumnLinear | None:
    """Return what is to stand in for a linear; None where columns are not faster over all `rows`, or do not apply.

    Args:
        linear: with its values, on its device.
        encoding: its own.
        rows: of one product.
    """
    if type(linear) is not nn.Linear or not encoding.is_row_scaled(linear) or min(rows) > _FEW_ROWS:
        return None
    weight = linear.weight
    # The library's products in 16 bits pack weights that are stored by rows.
    if weight.device.type != "cpu" or weight.dtype is not torch.float32 or not weight.is_contiguous():
        return None
    ratios = [_ratio(weight, count) for count in rows]
    if math.exp(statistics.fmean(map(math.log, ratios))) > _CLEARLY:
        return None
    return ColumnLinear(linear)


def _by_columns(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


def _ratio(weight: Tensor, rows: int) -> float:
    key = (*weight.shape, rows, torch.get_num_threads())
    if key not in RATIOS:
        copies = [torch.full_like(weight, 1 / 64) for _ in range(cold_copies(weight.nbytes, weight.device))]
        x = torch.randn(rows, weight.shape[1])
        by_columns = [_by_columns(each) for each in copies]
        RATIOS[key] = ratio_by_turns(lambda each: nn.functional.linear(x, each), by_columns, copies)
    return RATIOS[key]
