"""The metric of the loss: what `kfac` predicts is the weighted error, and nothing of that rank has a smaller one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from integration_tests.factorization.weights_and_inputs import Case, cases
from optimum_dobisvd.factorization.factors import Decomposition
from optimum_dobisvd.factorization.kfac import OutputRoot, kfac, kfac_spectrum, output_root
from optimum_dobisvd.factorization.registry import FACTORIZATIONS
from optimum_dobisvd.factorization.truncated_svd import output_pca

TOLERANCE = 1e-6


def gradients_of(case: Case, seed: int, rank: int) -> Tensor:
    """`m x 30`, of a rank that may be smaller than `m`, with rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    m = len(case.weight)
    low = torch.randn(m, min(rank, m), generator=generator, dtype=torch.float64)
    scale = 10.0 ** (4 * torch.rand(m, 1, generator=generator, dtype=torch.float64) - 2)
    return scale * (low @ torch.randn(low.shape[1], 30, generator=generator, dtype=torch.float64))


def weighted(root: OutputRoot, matrix: Tensor, case: Case) -> float:
    return float(torch.linalg.norm(root.root.T @ matrix @ case.inputs))


@given(case=cases(), seed=st.integers(0, 2**20), rank=st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_the_truncation_loss_is_the_weighted_error_and_the_smallest_there_is(case: Case, seed: int, rank: int) -> None:
    gradients = gradients_of(case, seed, rank)
    root = output_root(gradients @ gradients.T)
    found = kfac(case.weight, (case.gram, root))
    dense = weighted(root, case.weight, case)
    best = torch.linalg.svdvals(root.root.T @ case.weight @ case.inputs)
    for kept in case.ranks:
        error = weighted(root, case.weight - found.truncate(kept).product(), case)
        optimum = float(torch.linalg.vector_norm(best[kept:]))
        assert found.truncation_loss(kept) == pytest.approx(error, abs=TOLERANCE * dense)
        assert error == pytest.approx(optimum, abs=TOLERANCE * dense)


@given(case=cases(), seed=st.integers(0, 2**20))
@settings(max_examples=30, deadline=None)
def test_the_spectrum_is_the_decompositions_own(case: Case, seed: int) -> None:
    gradients = gradients_of(case, seed, 8)
    metric = (case.gram, output_root(gradients @ gradients.T))
    values = kfac(case.weight, metric).singular_values
    torch.testing.assert_close(kfac_spectrum(case.weight, metric), values, rtol=0, atol=1e-7 * float(values.max()))


@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_at_full_rank_nothing_is_lost(case: Case) -> None:
    gradients = gradients_of(case, 0, 3)
    found = kfac(case.weight, (case.gram, output_root(gradients @ gradients.T)))
    product = found.truncate(min(case.weight.shape)).product()
    torch.testing.assert_close(product, case.weight, rtol=0, atol=1e-8 * float(case.weight.abs().max()))


def test_with_a_loss_that_feels_all_outputs_alike_it_is_output_pca() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 9), (9, 40)))
    gram = inputs @ inputs.T
    ours: Decomposition = kfac(weight, (gram, output_root(7 * torch.eye(6))))
    theirs = FACTORIZATIONS.get("output_pca").decompose(weight, gram)
    for rank in range(1, 7):
        torch.testing.assert_close(ours.truncate(rank).product(), theirs.truncate(rank).product())
    torch.testing.assert_close(ours.singular_values, (7 * 1.01) ** 0.5 * theirs.singular_values)


def test_outputs_that_the_loss_does_not_feel_are_given_up_first() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    felt = torch.tensor([1e4, 1e4, 0, 0, 0, 0], dtype=torch.float64)
    kept = kfac(weight, (torch.eye(9, dtype=torch.float64), output_root(felt.diag()))).truncate(2).product()
    lost = torch.linalg.vector_norm(kept - weight, dim=1) / torch.linalg.vector_norm(weight, dim=1)
    assert float(lost[:2].max()) < 0.1
    assert float(lost[2:].min()) > 0.5


def test_what_the_loss_does_not_feel_costs_nothing_and_keeps_its_largest_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 5), (5, 40)))
    metric = (x @ x.T, output_root(torch.zeros(3, 3)))
    found = kfac(weight, metric)
    assert not bool(found.singular_values.any())
    assert not bool(kfac_spectrum(weight, metric).any())
    best = output_pca(weight, x @ x.T).truncate(2).product()
    torch.testing.assert_close(found.truncate(2).product(), best)
