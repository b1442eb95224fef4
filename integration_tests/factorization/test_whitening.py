"""The edges of the whitenings: singular Grams, SVD-LLM V1's repair and its failure, inputs that are all zero."""

import pytest
import torch
from torch import Tensor

from integration_tests.factorization.weights_and_inputs import make_case
from optimum_dobisvd.factorization.registry import FACTORIZATIONS
from optimum_dobisvd.factorization.truncated_svd import output_pca, whitened_svd
from optimum_dobisvd.factorization.whitening import cholesky_whitening, eigen_whitening


def upstream_svd_llm(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """SVD-LLM's public code, line by line, in float64."""
    try:
        scaling = torch.linalg.cholesky(gram)
    except torch.linalg.LinAlgError:
        eigenvalues = torch.linalg.eigvalsh(gram)
        gram = gram + (-eigenvalues[0] + 1e-6) * torch.eye(len(gram), dtype=gram.dtype)
        scaling = torch.linalg.cholesky(gram)
    inverse = torch.linalg.inv(scaling)
    left, values, right = torch.linalg.svd(weight @ scaling, full_matrices=False)
    return left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank] @ inverse


@pytest.mark.parametrize("kind", ["full", "dead_channels"])
def test_svd_llm_is_upstreams_repair_included(kind: str) -> None:
    case = make_case(kind, 10, 12, 60, seed=5)
    if kind == "dead_channels":
        with pytest.raises(torch.linalg.LinAlgError):
            torch.linalg.cholesky(case.gram)
    found = whitened_svd(case.weight, cholesky_whitening(case.gram)).truncate(4).product()
    torch.testing.assert_close(found, upstream_svd_llm(case.weight, case.gram, 4), rtol=1e-6, atol=1e-8)


def test_the_repair_shifts_the_whole_diagonal_by_a_millionth() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    root = cholesky_whitening(gram).root
    torch.testing.assert_close(root @ root.T, gram + 1e-6 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_repair_that_is_not_enough_is_an_error_with_advice() -> None:
    """A millionth is lost beside 1e20: upstream's repair then fails for some Grams, and must never pass unnoticed."""
    failures = 0
    for seed in range(40):
        gram = make_case("rank_deficient", 1, 12, 40, seed).gram * 1e20
        root, message = None, ""
        try:
            root = cholesky_whitening(gram).root
        except ValueError as error:
            message = str(error)
        if root is None:
            failures += 1
            assert "Cholesky repair was not enough" in message
            assert "svd_llm_v2" in message
        else:
            torch.testing.assert_close(root @ root.T, gram, rtol=0, atol=1e-12 * float(gram.diagonal().max()))
        case = make_case("rank_deficient", 8, 12, 40, seed)
        eigen_whitening(gram)  # V2 takes them all
        output_pca(case.weight, gram)
    assert failures > 0


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@pytest.mark.parametrize("name", ["svd_llm", "svd_llm_v2", "output_pca", "asvd"])
def test_inputs_that_are_always_zero_leave_the_plain_svd_at_no_cost(name: str, shape: tuple[int, int]) -> None:
    row, n = FACTORIZATIONS.get(name), shape[1]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prepared = row.prepare(torch.zeros(n) if name == "asvd" else torch.zeros(n, n))
    found, plain = row.decompose(weight, prepared), FACTORIZATIONS.get("svd").decompose(weight, None)
    assert not bool(found.singular_values.any())
    assert not bool(row.spectrum(weight, prepared).any())
    for rank in (1, 2, 4):
        torch.testing.assert_close(found.truncate(rank).product(), plain.truncate(rank).product())


@pytest.mark.parametrize("name", ["svd", "asvd", "svd_llm", "svd_llm_v2", "output_pca"])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_a_weight_of_zeros_becomes_factors_of_zeros(name: str, shape: tuple[int, int]) -> None:
    """Blocks added to a model for further training begin with zero weights."""
    case = make_case("full", *shape, 40, seed=6)
    row = FACTORIZATIONS.get(name)
    statistic = {None: torch.empty(0), "gram": case.gram, "abs_mean": case.abs_mean}[row.needs]
    found = row.decompose(torch.zeros(shape), row.prepare(statistic))
    factors = found.truncate(3).balanced()
    assert (factors.second.shape, factors.first.shape) == ((shape[0], 3), (3, shape[1]))
    assert not factors.second.any()
    assert not factors.first.any()
    assert found.truncation_loss(0) == 0


def test_whitening_squares_to_the_gram_and_its_inverse_undoes_it() -> None:
    for kind in ("full", "badly_scaled", "rank_deficient", "dead_channels"):
        case = make_case(kind, 4, 12, 60, seed=7)
        whitening = eigen_whitening(case.gram)
        scale = case.gram.diagonal().sqrt()
        outer = scale[:, None] * scale + 1e-300
        torch.testing.assert_close((whitening.root @ whitening.root.T) / outer, case.gram / outer, rtol=0, atol=1e-10)
        identity = torch.eye(whitening.root.shape[1], dtype=torch.float64)
        torch.testing.assert_close(whitening.inverse @ whitening.root, identity, rtol=0, atol=1e-8)


def test_the_eigenvalue_floor_drops_directions() -> None:
    gram = torch.diag(torch.tensor([1.0, 1.0], dtype=torch.float64))
    gram[0, 1] = gram[1, 0] = 1 - 1e-9
    assert eigen_whitening(gram).root.shape == (2, 2)
    assert eigen_whitening(gram, floor=1e-6).root.shape == (2, 1)


def test_a_slightly_asymmetric_gram_is_symmetrized() -> None:
    case = make_case("full", 5, 6, 40, seed=8)
    skew = torch.zeros(6, 6, dtype=torch.float64)
    skew[1, 4] = 1e-3
    crooked = case.gram + skew - skew.T
    for prepare in (eigen_whitening, cholesky_whitening):
        expected = whitened_svd(case.weight, prepare(case.gram)).singular_values
        torch.testing.assert_close(whitened_svd(case.weight, prepare(crooked)).singular_values, expected)
    torch.testing.assert_close(
        output_pca(case.weight, crooked).singular_values, output_pca(case.weight, case.gram).singular_values
    )
