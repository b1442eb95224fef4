"""Rows of a matrix in terms of some of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_dobisvd.factorization.pivots import interpolate


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(matrix: Tensor, largest: float = 1.01) -> Tensor:
    rows, count = matrix.shape
    order, coefficients = interpolate(matrix)
    assert sorted(order.tolist()) == list(range(rows))
    assert order[:count].tolist() == sorted(order[:count].tolist())
    assert order[count:].tolist() == sorted(order[count:].tolist())
    assert coefficients.shape == (rows - count, count)
    torch.testing.assert_close(coefficients @ matrix[order[:count]], matrix[order[count:]], atol=1e-9, rtol=1e-9)
    assert float(coefficients.abs().max() if coefficients.numel() else 0) <= largest
    return coefficients


@given(rows=st.integers(1, 40), count=st.integers(1, 40), rank=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_rows_are_those_of_the_pivots_times_small_coefficients(rows: int, count: int, rank: int, seed: int) -> None:
    count = min(rows, count)
    matrix = normal(rows, count, seed)
    matrix[:, min(rank, count) :] = 0  # directions that a rank-deficient metric left empty
    check(matrix)


def test_without_exchanges_coefficients_are_larger() -> None:
    matrix = normal(300, 120)
    _, coefficients = interpolate(matrix, largest=float("inf"))
    assert float(coefficients.abs().max()) > 1.5
    assert float(check(matrix).norm()) < 0.9 * float(coefficients.norm())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_a_matrix_changes_nothing(scale: float) -> None:
    matrix = normal(30, 7)
    torch.testing.assert_close(interpolate(scale * matrix)[1], interpolate(matrix)[1])


def test_a_matrix_of_zeros_is_zeros_in_terms_of_any_rows() -> None:
    assert not check(torch.zeros(5, 3, dtype=torch.float64)).any()
