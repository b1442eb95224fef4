"""Rounding a matrix to a given code so that its outputs, not its values, are close: GPTQ's error feedback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_COLUMNS_AT_ONCE = 128
"""Columns whose errors are passed on to all later ones in one product."""
_FRACTIONS = tuple(0.6 + 0.025 * step for step in range(21))
"""Scales that are tried, over those given. Some are larger, since what is passed on makes later values larger."""
_CELLS = 4096
_SPAN = 1.75
"""The largest number that a scale may leave: 1 over the smallest fraction, and what scales in 8 bits miss."""


class NearestOfCode:
    """The value of a code (ascending, from -1 to 1) that is nearest to each of many numbers, read from a table.

    Twenty times as fast as a search. A number within a thousandth of the middle between two values may get either,
    which are as far.
    """

    def __init__(self, code: Tensor) -> None:
        code, middles = (values.float() for values in _with_middles(code))
        edges = torch.linspace(-_SPAN, _SPAN, _CELLS + 1, device=code.device)
        self._values = code[torch.bucketize((edges[1:] + edges[:-1]) / 2, middles)]

    def __call__(self, units: Tensor, fraction: float = 1.0) -> Tensor:
        """Return them, times the fraction, for a code so much finer (float32, of any shape)."""
        cells = units.mul(_CELLS / (2 * _SPAN * fraction)).add_(_CELLS / 2).clamp_(0, _CELLS - 1).int()
        return self._values.index_select(0, cells.flatten()).view_as(units).mul_(fraction)

    def best_fractions(self, units: Tensor, felt: Tensor, fractions: Sequence[float]) -> Tensor:
        """Return the finer scale with which each row of numbers loses least.

        Args:
            units: in units of the given scales, `... x g`.
            felt: what the square of an error counts, as many or broadcast to it.
            fractions: scales that are tried.

        Returns:
            One of the fractions for every row, `...`.
        """
        best = torch.full(units.shape[:-1], torch.inf, device=units.device)
        found = torch.ones_like(best)
        for fraction in fractions:
            lost = (self(units, fraction).sub_(units).square_().mul_(felt)).sum(-1)
            found = torch.where(lost < best, fraction, found)
            best = torch.minimum(lost, best)
        return found


class ErrorFeedback:
    """Chooses values of a code that keep `||(W - W_q) X||_F` small, one input after the other.

    Each input is rounded to the nearest value, and what that changes in the outputs is made up for by the inputs not
    rounded yet, as far as they are correlated with it (GPTQ, arXiv 2210.17323). Inputs with the largest second moment
    go first: scales are fixed beforehand, so the order costs nothing later.

    Args:
        gram: `H = X X^T`, n x n.
        damping: added to the diagonal of `H`, as a share of its mean.
    """

    def __init__(self, gram: Tensor, damping: float = 0.01) -> None:
        self._order = gram.diagonal().argsort(descending=True, stable=True)
        self._upper = _upper_root_of_inverse(gram[self._order][:, self._order].double(), damping)

    def fitted_scales(self, weight: Tensor, code: Tensor, scales: Tensor) -> Tensor:
        """Scales with which rounding to a code loses less than with those of the largest values.

        Of an input's error only that part counts which no input rounded after it makes up for, so that a large value
        of an input that others stand in for need not stretch the code for its neighbors.

        Args:
            weight, code, scales: as for `round`.

        Returns:
            One for each given (float64): the best of 21 fractions of it.
        """
        m, n = weight.shape
        left_over = torch.empty(n, dtype=torch.float64, device=weight.device)
        left_over[self._order] = 1 / self._upper.diagonal().square()
        # In float32, which decides between fractions just as well and is several times as fast.
        grouped = weight.float().reshape(m, scales.shape[1], -1)
        felt = (left_over / left_over.mean()).float().view(1, scales.shape[1], -1)
        largest = torch.where(scales > 0, scales, 1).float()[..., None]
        found = NearestOfCode(code).best_fractions(grouped / largest, felt, _FRACTIONS)
        return found.double() * scales.double()

    def round(self, weight: Tensor, code: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The rounding of one matrix.

        Args:
            weight: `W`, m x n.
            code: the values a weight may have in units of its scale, ascending.
            scales: m x (n / g): one for every g neighboring inputs of an output.

        Returns:
            Which value of the code each weight became (int64, m x n), and the matrix they stand for (float64).
        """
        m, n = weight.shape
        order, upper = self._order, self._upper
        left = weight[:, order].double().clone()
        steps = scales.double().repeat_interleave(n // scales.shape[1], dim=1)[:, order]
        steps = torch.where(steps > 0, steps, 1)
        code, middles = _with_middles(code)
        chosen = torch.empty(m, n, dtype=torch.int64, device=weight.device)
        for begin in range(0, n, _COLUMNS_AT_ONCE):
            end = min(begin + _COLUMNS_AT_ONCE, n)
            errors = torch.empty(m, end - begin, dtype=torch.float64, device=weight.device)
            for column in range(begin, end):
                index = torch.bucketize(left[:, column] / steps[:, column], middles)
                chosen[:, column] = index
                error = (left[:, column] - code[index] * steps[:, column]) / upper[column, column]
                left[:, column + 1 : end] -= error[:, None] * upper[column, column + 1 : end]
                errors[:, column - begin] = error
            left[:, end:] -= errors @ upper[begin:end, end:]
        back = order.argsort()
        return chosen[:, back], (code[chosen] * steps)[:, back]


def _with_middles(code: Tensor) -> tuple[Tensor, Tensor]:
    """The code, and where between two of its values rounding changes from one to the other."""
    code = code.double()
    return code, (code[1:] + code[:-1]) / 2


def _upper_root_of_inverse(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular `U` with `U^T U = (H + damping)^-1`; inputs that never vary get a variance of their own."""
    mean = gram.diagonal().mean()
    if not float(mean) > 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    damped = gram.clone()
    damped.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
