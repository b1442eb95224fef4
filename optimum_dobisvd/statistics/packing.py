"""Symmetric matrices packed as their upper triangle, row after row: half the bytes on disk and in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS_AT_ONCE = 256


def packed_length(size: int) -> int:
    """Return the number of elements of the packed triangle of a `size x size` matrix."""
    return size * (size + 1) // 2


def unpacked_size(length: int) -> int:
    """Return the size of the matrix whose packed triangle has that many elements, 0 if there is none."""
    size = (math.isqrt(8 * length + 1) - 1) // 2
    return size if packed_length(size) == length else 0


def pack(matrix: Tensor) -> Tensor:
    """Pack a symmetric `n x n` matrix into `n(n+1)/2` values, float32."""
    packed = torch.empty(packed_length(len(matrix)), dtype=torch.float32)
    for row, values in enumerate(_rows(packed, len(matrix))):
        values.copy_(matrix[row, row:])
    return packed


def add_to_upper_triangle(matrix: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the symmetric `left^T right` (`n x n`) to the upper triangle, all that `pack` reads; the rest is undefined.

    In blocks of rows, each from the diagonal on: two thirds of the whole product's time.
    """
    for begin in range(0, len(matrix), _ROWS_AT_ONCE):
        end = min(begin + _ROWS_AT_ONCE, len(matrix))
        matrix[begin:end, begin:] += left[:, begin:end].T @ right[:, begin:]


def unpack(packed: Tensor, size: int) -> Tensor:
    """Unpack `n(n+1)/2` values into an `n x n` matrix, float64; `size` is `n`. ValueError if the length is another."""
    expected = packed_length(size)
    if packed.shape != (expected,):
        raise ValueError(f"a packed {size} x {size} Gram has {expected} values, found the shape {tuple(packed.shape)}")
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for row, values in enumerate(_rows(packed, size)):
        matrix[row, row:] = values
    return matrix + matrix.triu(1).T


def packed_diagonal(packed: Tensor, size: int) -> Tensor:
    """Return the diagonal of a packed `n x n` matrix, `n` values; `size` is `n`."""
    rows = torch.arange(size)
    return packed[rows * size - rows * (rows - 1) // 2]


def _rows(packed: Tensor, size: int) -> Sequence[Tensor]:
    """Return the rows of a packed triangle as views: an index tensor would be four times the matrix."""
    return packed.split(list(range(size, 0, -1)))
