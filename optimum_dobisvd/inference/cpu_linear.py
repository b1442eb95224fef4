"""Linears of a CPU that read their weights as fast as memory gives them where few rows are multiplied.

PyTorch's own products of one or two rows of float32 are slow for weights stored by rows with few inputs, as those of a
second linear are. Stored by columns they are not. In a compiled graph, a sum that a compiler makes one loop over the
weights is faster than any of its products, and takes them by rows.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..encodings.base import Encoding
from ..model.substitutions import Substitute
from .device_time import cold_copies, ratio_by_turns
from .measurements import Ratios

logger = logging.getLogger(__name__)

_FEW_ROWS = 2
"""More read weights once for all of them, in any order; then the order in which they are stored hardly matters."""
_LOOP_ROWS = {torch.float32: 4, torch.bfloat16: 1}
"""Up to so many rows a compiler's loop is faster than a product, by 1.2 (bfloat16) to 2 times at one row."""
_CLEARLY = 0.95
"""Of the time with weights by rows what those by columns may take at most: two equal ones may differ by that."""
BY_COLUMNS = Ratios("columns")
"""Times by columns over those by rows."""


class CPULinear(Substitute):
    """Stands in for a linear with the same tensors.

    With `by_columns` the weight's values are in the order of its columns, until `suspend`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: Any, by_columns: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.by_columns = by_columns
        self.register_parameter("weight", linear.weight)
        self.register_parameter("bias", linear.bias)
        self.training = linear.training
        self.resume()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not self.by_columns and x.dtype is self.weight.dtype:
            rows = x.reshape(-1, self.in_features)
            if runs_as_loop(x.dtype, x.device, len(rows)):
                return self._by_loop(rows).view(*x.shape[:-1], self.out_features)
        return nn.functional.linear(x, self.weight, self.bias)

    def _by_loop(self, x: Tensor) -> Tensor:
        # A view by strides is of a tensor in memory. Otherwise a compiler would compute what gives `x`, an activation
        # or a norm, anew for every output.
        x = x.contiguous().as_strided((len(x), 1, self.in_features), (self.in_features, self.in_features, 1))
        y = (x.float() * self.weight.float()).sum(-1)
        return (y if self.bias is None else y + self.bias).to(self.weight.dtype)

    def suspend(self) -> None:
        """Put the values into the order of rows."""
        if self.by_columns:
            self.weight.data = self.weight.data.contiguous()

    def resume(self) -> None:
        """Undo `suspend`."""
        if self.by_columns:
            self.weight.data = _by_columns(self.weight.data)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def runs_as_loop(dtype: torch.dtype, device: torch.device, rows: int) -> bool:
    """Whether a product of so many rows in a compiled graph is a loop over the weights."""
    return device.type == "cpu" and rows <= _LOOP_ROWS.get(dtype, 0)


@torch.no_grad()
def faster_on_cpu(linear: Any, encoding: Encoding, rows: Sequence[int], compiled: bool) -> CPULinear | None:
    """Return what is to stand in for a linear; None where it is not faster over all `rows`, or does not apply.

    Args:
        linear: with its values, on its device.
        encoding: its own.
        rows: of one product.
        compiled: whether it is to run in a compiled graph.
    """
    if type(linear) is not nn.Linear or not encoding.is_row_scaled(linear):
        return None
    weight = linear.weight
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    if compiled:
        some = any(runs_as_loop(weight.dtype, weight.device, count) for count in rows)
        return CPULinear(linear, by_columns=False) if some else None
    # The library's products in 16 bits are for weights by rows.
    if weight.dtype is not torch.float32 or min(rows) > _FEW_ROWS:
        return None
    ratios = [_ratio(weight, count) for count in rows]
    faster = math.exp(statistics.fmean(map(math.log, ratios))) <= _CLEARLY
    return CPULinear(linear, by_columns=True) if faster else None


def _by_columns(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


def _ratio(weight: Tensor, rows: int) -> float:
    def measured() -> float:
        copies = [torch.full_like(weight, 1 / 64) for _ in range(cold_copies(weight.nbytes, weight.device))]
        x = torch.randn(rows, weight.shape[1])
        by_columns = [_by_columns(each) for each in copies]
        return ratio_by_turns(lambda each: nn.functional.linear(x, each), by_columns, copies)

    return BY_COLUMNS.of((*weight.shape, rows, torch.get_num_threads()), measured)
