"""Rows of a matrix in terms of some of them: the interpolative decomposition, by LU and swaps of rows (maxvol)."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_COEFFICIENT = 1.01
"""The magnitude above which a coefficient makes its two rows change places."""
_MOST_SWAPS = 10
"""As multiples of the number of pivots."""


def interpolate(matrix: Tensor, largest: float = _LARGEST_COEFFICIENT) -> tuple[Tensor, Tensor]:
    """Write the rows of `A` (`m x k`, `k <= m`) in terms of `k` of them: `A[rest] = C A[pivots]`, exactly.

    Pivots are those of an LU decomposition; then rows change places while a coefficient exceeds `largest`, each of
    which grows the volume of the pivot rows (maxvol, Goreinov et al. 2010). Without, coefficients reach hundreds, and
    an error in a pivot row is felt in all others as many times over. Works on singular `A`, too.

    Returns:
        The numbers of all rows: the pivots, ascending, and then the others, ascending (int64, `m`); and `C` (`m - k x
        k`, float64), whose rows and columns are in that order.
    """
    rows, count = matrix.shape
    order, coefficients = _by_elimination(matrix.double())
    for _ in range(_MOST_SWAPS * count if rows > count else 0):
        place = int(coefficients.abs().argmax())
        row, column = divmod(place, count)
        value = coefficients[row, column].clone()
        if float(value.abs()) <= largest:
            break
        # The row becomes a pivot, and the pivot a row, in terms of it.
        step = coefficients[row].clone()
        step[column] -= 1
        falls = coefficients[:, column].clone()
        falls[row] += 1
        coefficients.addr_(falls, step / value, alpha=-1)
        order[[column, count + row]] = order[[count + row, column]]
    pivots, rest = order[:count].argsort(), order[count:].argsort()
    return torch.cat([order[:count][pivots], order[count:][rest]]), coefficients[rest][:, pivots].contiguous()


def _by_elimination(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As `interpolate`, with the pivots of partial pivoting, in their order."""
    rows, count = matrix.shape
    packed, swaps, _ = torch.linalg.lu_factor_ex(matrix)
    order = list(range(rows))
    for place, other in enumerate((swaps - 1).tolist()):
        order[place], order[other] = order[other], order[place]
    lower = packed.tril(-1)
    # L is unit lower triangular even where U is singular.
    coefficients = torch.linalg.solve_triangular(lower[:count].T, lower[count:].T, upper=True, unitriangular=True).T
    return torch.tensor(order, device=matrix.device), coefficients.contiguous()
