"""Dobi-SVD's Algorithm 2: how near the running basis comes to the best one, and what it must not depend on."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_dobisvd.factorization.dobi_ipca import IncrementalBasis, project, sample_basis


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def sample_outputs(count: int, tokens: int, width: int, seed: int = 0) -> list[Tensor]:
    """Outputs that share some directions and have others of their own: no one basis holds all."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    common = torch.linalg.qr(normal(generator, width, width))[0]
    samples = []
    for _ in range(count):
        own = torch.linalg.qr(normal(generator, width, width))[0]
        mixed = normal(generator, tokens, width) * decay @ common.T
        samples.append(mixed + 0.8 * normal(generator, tokens, width) * decay @ own.T)
    return samples


def streamed(bases: Sequence[Tensor], width: int, rank: int) -> Tensor:
    running = IncrementalBasis(width, rank)
    for basis in bases:
        running.update(basis)
    return running.basis()


def listing(bases: Sequence[Tensor], rank: int) -> Tensor:
    """Algorithm 2 as it is printed: the running basis goes on without its singular values."""
    basis = bases[0]
    for other in bases[1:]:
        basis = torch.linalg.svd(torch.cat([basis, other], 1), full_matrices=False)[0][:, :rank]
    return basis


def objective(basis: Tensor, bases: Sequence[Tensor]) -> float:
    """Mean share of the samples' bases that lies in `basis`."""
    return sum(float((basis.T @ other).square().sum()) / other.shape[1] for other in bases) / len(bases)


def best_basis(bases: Sequence[Tensor], rank: int) -> Tensor:
    total = sum(basis @ basis.T for basis in bases)
    return torch.linalg.eigh(total)[1].flip(1)[:, :rank]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_comes_near_the_optimum_and_the_listing_does_not(seed: int) -> None:
    rank, width = 12, 64
    bases = [sample_basis(outputs, rank) for outputs in sample_outputs(64, 48, width, seed)]
    best = objective(best_basis(bases, rank), bases)
    assert objective(streamed(bases, width, rank), bases) >= 0.95 * best
    assert objective(listing(bases, rank), bases) < 0.88 * best


@given(seed=st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_signs_and_rotations_of_a_samples_vectors_do_not_matter(seed: int) -> None:
    rank, width = 4, 12
    bases = [sample_basis(outputs, rank) for outputs in sample_outputs(6, 20, width, seed)]
    generator = torch.Generator().manual_seed(seed)
    signed = [basis * (1 - 2 * torch.randint(0, 2, (rank,), generator=generator)) for basis in bases]
    turned = [basis @ torch.linalg.qr(normal(generator, rank, rank))[0] for basis in bases]
    expected = streamed(bases, width, rank)
    for other in (signed, turned):
        found = streamed(other, width, rank)
        torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_of_samples_hardly_matters(seed: int) -> None:
    """As printed, the last samples outweigh the first ones; carried singular values make them equal."""
    rank, width = 12, 64
    bases = [sample_basis(outputs, rank) for outputs in sample_outputs(64, 48, width, seed)]
    found = streamed(bases, width, rank)
    early, late = objective(found, bases[:8]), objective(found, bases[-8:])
    assert late < 1.08 * early
    as_printed = listing(bases, rank)
    assert objective(as_printed, bases[-8:]) > 1.15 * objective(as_printed, bases[:8])
    shuffled = [bases[i] for i in torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
    again = objective(streamed(shuffled, width, rank), bases)
    assert again == pytest.approx(objective(found, bases), rel=0.03)


@pytest.mark.parametrize("width", [5, 12])
def test_without_truncation_it_is_the_exact_principal_components_in_any_order(width: int) -> None:
    """A running basis as wide as the outputs loses nothing; the first columns are then the exact leading ones."""
    bases = [sample_basis(outputs, 3) for outputs in sample_outputs(7, 20, width, seed=3)]
    exact = torch.linalg.eigh(sum(basis @ basis.T for basis in bases))[1].flip(1)
    for order in (bases, bases[::-1]):
        found = streamed(order, width, width)
        torch.testing.assert_close(found.T @ found, torch.eye(width, dtype=torch.float64))
        for leading in range(1, width):
            mine, theirs = found[:, :leading], exact[:, :leading]
            torch.testing.assert_close(mine @ mine.T, theirs @ theirs.T, rtol=0, atol=1e-7)


def test_nothing_is_centered() -> None:
    """Every sample's first direction is the same: its mean, were it subtracted, would take the answer with it."""
    direction = torch.nn.functional.normalize(torch.arange(1.0, 7.0, dtype=torch.float64), dim=0)
    generator = torch.Generator().manual_seed(0)
    outputs = [100 * torch.outer(normal(generator, 10).abs() + 1, direction) for _ in range(5)]
    found = streamed([sample_basis(each, 1) for each in outputs], 6, 1)
    torch.testing.assert_close(found @ found.T, torch.outer(direction, direction))


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    running = IncrementalBasis(16, 3)
    for outputs in sample_outputs(40, 20, 16):
        running.update(sample_basis(outputs, 3))
        held = sum(value.numel() for value in vars(running).values() if isinstance(value, Tensor))
        assert held == 16 * 3


@pytest.mark.parametrize(("tokens", "width"), [(6, 20), (20, 6), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 9, 30])
def test_a_samples_basis_spans_its_leading_right_singular_vectors(tokens: int, width: int, rank: int) -> None:
    outputs = normal(torch.Generator().manual_seed(4), tokens, width)
    basis = sample_basis(outputs, rank)
    count = min(rank, tokens, width)
    assert basis.shape == (width, count)
    expected = torch.linalg.svd(outputs, full_matrices=False)[2][:count].T
    torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("tokens", "width"), [(8, 20), (40, 20)])
def test_directions_without_energy_are_left_out(tokens: int, width: int) -> None:
    """Three directions carry everything; what fills the rest of a basis would be arbitrary."""
    generator = torch.Generator().manual_seed(5)
    spanning = normal(generator, 3, width)
    basis = sample_basis(normal(generator, tokens, 3) @ spanning, 6)
    assert basis.shape == (width, 3)
    torch.testing.assert_close(basis @ (basis.T @ spanning.T), spanning.T)
    assert sample_basis(torch.zeros(tokens, width), 6).shape == (width, 0)


def test_samples_without_energy_change_nothing_and_alone_are_an_error() -> None:
    outputs = sample_outputs(3, 20, 8)
    bases = [sample_basis(each, 3) for each in outputs]
    silent = sample_basis(torch.zeros(20, 8), 3)
    assert torch.equal(streamed([silent, *bases, silent], 8, 3), streamed(bases, 8, 3))
    with pytest.raises(ValueError, match="outputs were zero on all"):
        streamed([silent, silent], 8, 3)
    with pytest.raises(ValueError, match="no calibration sample"):
        streamed([], 8, 3)


def test_fewer_directions_than_the_rank_leave_zero_columns() -> None:
    bases = [sample_basis(normal(torch.Generator().manual_seed(6), 2, 8), 5)]
    found = streamed(bases, 8, 5)
    assert found.shape == (8, 5)
    torch.testing.assert_close(found.T @ found, torch.diag(torch.tensor([1.0, 1, 0, 0, 0], dtype=torch.float64)))


def test_project_puts_the_weight_into_the_basis() -> None:
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(normal(generator, 8, 3))[0]
    weight = normal(generator, 8, 5).to(torch.bfloat16)
    factors = project(weight, basis)
    assert torch.equal(factors.second, basis)
    torch.testing.assert_close(factors.product(), basis @ basis.T @ weight.double())


@pytest.mark.parametrize("rank", [0, 9])
def test_an_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.8"):
        IncrementalBasis(8, rank)
