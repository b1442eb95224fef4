"""The decomposition whose gradient stays finite: exact where it can be, bounded where `torch.linalg.svd` breaks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_dobisvd import stable_svd
from optimum_dobisvd.factorization.stable_svd import SERIES_TERMS, VANISHING, gap_quotients


def with_spectrum(values: list[float], rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64))[0]
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).to(dtype).requires_grad_(True)


def soft_truncation(svd, matrix: Tensor) -> Tensor:
    """A function of the vectors that does not care for their signs: what rank training computes."""
    left, values, right = svd(matrix)
    gates = torch.sigmoid(2.0 - torch.arange(values.shape[-1], dtype=values.dtype))
    return (left * (gates * values).unsqueeze(-2)) @ right.mT


def exact(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right_t = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right_t.mT


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_gradient_is_right_on_separated_spectra(shape: tuple[int, int]) -> None:
    matrix = with_spectrum([5.0, 3.0, 1.5, 0.4, 0.2][: min(shape)], *shape)
    assert torch.autograd.gradcheck(lambda x: soft_truncation(stable_svd, x), matrix)
    assert torch.autograd.gradcheck(lambda x: stable_svd(x)[1], matrix)


@given(
    rows=st.integers(2, 9), columns=st.integers(2, 9), seed=st.integers(0, 2**20), batch=st.sampled_from([(), (3,)])
)
@settings(max_examples=60, deadline=None)
def test_it_agrees_with_torch_where_values_are_apart(
    rows: int, columns: int, seed: int, batch: tuple[int, ...]
) -> None:
    count = min(rows, columns)
    values = [3.0 * 0.7**i for i in range(count)]
    parts = [with_spectrum(values, rows, columns, seed + i).detach() for i in range(3 if batch else 1)]
    matrix = torch.stack(parts) if batch else parts[0]
    weights = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = []
    for svd in (stable_svd, exact):
        leaf = matrix.clone().requires_grad_(True)
        (soft_truncation(svd, leaf) * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-8)


BROKEN = {
    "repeated": [2.0, 2.0, 2.0, 1.0],
    "nearly repeated": [2.0, 2.0 * (1 - 1e-7), 1.0, 1.0 * (1 - 1e-6)],
    "rank deficient": [3.0, 1.0, 0.0, 0.0],
    "zero": [0.0, 0.0, 0.0, 0.0],
    "tiny": [1e-25, 1e-30, 1e-30, 0.0],
    "one value for all": [1.0, 1.0, 1.0, 1.0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BROKEN)
def test_the_gradient_is_finite_on_every_spectrum(name: str, dtype: torch.dtype) -> None:
    matrix = with_spectrum(BROKEN[name], 7, 5, dtype=dtype)
    soft_truncation(stable_svd, matrix).sum().backward()
    assert bool(torch.isfinite(matrix.grad).all())


def test_torch_gives_no_finite_gradient_there() -> None:
    """Why this exists: the same loss on a matrix of zeros, and on an identity."""
    for matrix in (torch.zeros(5, 5), torch.eye(5)):
        gradients = []
        for svd in (exact, stable_svd):
            leaf = matrix.clone().requires_grad_(True)
            soft_truncation(svd, leaf).sum().backward()
            gradients.append(bool(torch.isfinite(leaf.grad).all()))
        assert gradients == [False, True]


def test_quotients_are_those_of_the_table() -> None:
    values = torch.tensor([4.0, 4.0, 4.0 * (1 - 1e-6), 1.0, 0.0, 0.0], dtype=torch.float64)
    found = gap_quotients(values, close=1e-4)
    torch.testing.assert_close(found, -found.T)
    assert float(found[1, 0]) == pytest.approx(SERIES_TERMS / 16)  # equal
    q = 1 - 1e-6
    assert float(found[2, 0]) == pytest.approx((1 - q**20) / ((1 - q**2) * 16), rel=1e-9)  # close: ten terms
    assert float(found[3, 0]) == pytest.approx(1 / (16 - 1))  # apart: exact
    assert float(found[4, 3]) == pytest.approx(1.0)
    assert float(found[5, 4]) == VANISHING
    assert not bool(found.diagonal().any())


def test_the_series_bounds_the_gradient_where_values_are_close() -> None:
    values = torch.tensor([1.0, 1 - 1e-9], dtype=torch.float64)
    assert float(gap_quotients(values)[1, 0]) == pytest.approx(SERIES_TERMS)
    assert float(gap_quotients(values, close=0.0)[1, 0]) == pytest.approx(0.5e9, rel=1e-3)


def test_truncated_below_the_matrix_rank_it_is_near_and_finite() -> None:
    """By construction approximate: the part of the spectrum that is not computed is taken for zero."""
    torch.manual_seed(0)
    matrix = with_spectrum([5.0, 4.0, 0.02, 0.01], 12, 8)
    left, values, right = stable_svd(matrix, 2)
    assert (left.shape, values.shape, right.shape) == ((12, 2), (2,), (8, 2))
    (left * values @ right.T).square().sum().backward()
    found, matrix.grad = matrix.grad, None
    left, values, right = exact(matrix)
    (left[:, :2] * values[:2] @ right[:, :2].T).square().sum().backward()
    assert float((found - matrix.grad).norm() / matrix.grad.norm()) < 0.01


def test_at_the_rank_of_the_matrix_truncation_is_exact() -> None:
    torch.manual_seed(0)
    matrix = with_spectrum([5.0, 3.0, 1.0], 12, 8)
    weights = torch.randn(12, 8, dtype=torch.float64)
    (soft_truncation(lambda x: stable_svd(x, 3, niter=4), matrix) * weights).sum().backward()
    found, matrix.grad = matrix.grad, None
    (soft_truncation(lambda x: tuple(part[..., :3] for part in exact(x)), matrix) * weights).sum().backward()
    torch.testing.assert_close(found, matrix.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("shape", "rank"), [((5,), None), ((5, 4), 0)])
def test_what_it_cannot_take_is_refused(shape: tuple[int, ...], rank: int | None) -> None:
    with pytest.raises(ValueError, match=r"stable_svd takes a matrix|rank must be at least 1"):
        stable_svd(torch.ones(shape), rank)
