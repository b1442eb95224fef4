"""What the closed forms promise: the loss they predict, and that no matrix of the same rank has a smaller one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from integration_tests.factorization.weights_and_inputs import Case, cases, make_case, well_conditioned_cases
from optimum_dobisvd.factorization.factors import Decomposition
from optimum_dobisvd.factorization.registry import FACTORIZATIONS

TOLERANCE = 1e-6  # of ||WX||
OPTIMAL = ("svd_llm_v2", "output_pca")


def decompose(name: str, case: Case) -> Decomposition:
    row = FACTORIZATIONS.get(name)
    statistic = {None: None, "gram": case.gram, "abs_mean": case.abs_mean}[row.needs]
    return row.decompose(case.weight, None if statistic is None else row.prepare(statistic))


def assert_theorem_holds(name: str, case: Case) -> None:
    found = decompose(name, case)
    allowed = TOLERANCE * case.dense_output()
    for rank in case.ranks:
        factors = found.truncate(rank)
        for each in (factors, factors.balanced()):
            assert found.truncation_loss(rank) == pytest.approx(case.loss(each.product()), abs=allowed, rel=0)
    assert found.truncation_loss(0) == pytest.approx(case.dense_output(), rel=1e-6)


@pytest.mark.parametrize("name", ["svd", "asvd", *OPTIMAL])
@given(case=cases())
@settings(max_examples=30, deadline=None)
def test_the_spectrum_is_the_decompositions_own(name: str, case: Case) -> None:
    row = FACTORIZATIONS.get(name)
    statistic = {None: None, "gram": case.gram, "abs_mean": case.abs_mean}[row.needs]
    spectrum = row.spectrum(case.weight, None if statistic is None else row.prepare(statistic))
    values = decompose(name, case).singular_values
    torch.testing.assert_close(spectrum, values, rtol=0, atol=1e-7 * float(values.max()))


@pytest.mark.parametrize("name", OPTIMAL)
@given(case=cases())
@settings(max_examples=80, deadline=None)
def test_theorem_3_1_predicted_loss_is_the_actual_one(name: str, case: Case) -> None:
    assert_theorem_holds(name, case)


@given(case=well_conditioned_cases())
@settings(max_examples=60, deadline=None)
def test_theorem_3_1_holds_for_cholesky_where_the_gram_is_positive_definite(case: Case) -> None:
    assert_theorem_holds("svd_llm", case)


@pytest.mark.parametrize("name", OPTIMAL)
@given(case=cases())
@settings(max_examples=80, deadline=None)
def test_the_loss_is_the_eckart_young_optimum_of_the_outputs(name: str, case: Case) -> None:
    """Both reach it, so they have the same loss at every rank, singular Grams included."""
    found = decompose(name, case)
    best = case.best_losses()
    allowed = TOLERANCE * case.dense_output()
    for rank in case.ranks:
        optimum = float(best[rank]) if rank < len(best) else 0.0
        assert case.loss(found.truncate(rank).product()) == pytest.approx(optimum, abs=allowed, rel=0)


@given(case=cases(largest=12), seed=st.integers(0, 2**20), size=st.floats(-6, 0))
@settings(max_examples=60, deadline=None)
def test_no_other_matrix_of_that_rank_does_better(case: Case, seed: int, size: float) -> None:
    ours = decompose("svd_llm_v2", case)
    allowed = TOLERANCE * case.dense_output()
    generator = torch.Generator().manual_seed(seed)
    rank = 1 + seed % len(case.ranks)
    factors = ours.truncate(rank).balanced()
    loss = case.loss(factors.product())
    rivals = [decompose(name, case).truncate(rank).product() for name in ("svd", "asvd", "output_pca")]
    for _ in range(5):
        second, first = (
            side + 10**size * side.norm() * torch.randn(side.shape, generator=generator, dtype=side.dtype)
            for side in (factors.second, factors.first)
        )
        rivals.append(second @ first)
    for rival in rivals:
        assert loss <= case.loss(rival) + allowed


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_svd_is_optimal_for_the_weight_itself(case: Case) -> None:
    found = decompose("svd", case)
    values = torch.linalg.svdvals(case.weight)
    for rank in case.ranks:
        error = torch.linalg.norm(case.weight - found.truncate(rank).product())
        assert float(error) == pytest.approx(float(values[rank:].norm()), abs=1e-9 * float(values[0]))
        assert found.truncation_loss(rank) == pytest.approx(float(values[rank:].norm()), abs=1e-9 * float(values[0]))


@given(case=cases(kinds=("full", "dead_channels", "badly_scaled")))
@settings(max_examples=40, deadline=None)
def test_asvd_is_optimal_for_the_channels_weighted_by_the_root_of_their_size(case: Case) -> None:
    found = decompose("asvd", case)
    scale = case.inputs.abs().sum(1).div(case.inputs.shape[1]).sqrt()
    values = torch.linalg.svdvals(case.weight * scale)
    for rank in case.ranks:
        error = torch.linalg.norm((case.weight - found.truncate(rank).product()) * scale)
        assert float(error) == pytest.approx(float(values[rank:].norm()), abs=1e-9 * float(values[0]))


def test_the_methods_really_differ() -> None:
    """Guards the tests above: on inputs with structure the plain SVD is far from the optimum of the outputs."""
    case = make_case("badly_scaled", 12, 16, 64, seed=2)
    best = float(case.best_losses()[4])
    losses = {
        name: case.loss(decompose(name, case).truncate(4).product())
        for name in ("svd", "asvd", "svd_llm", "svd_llm_v2")
    }
    assert losses["svd"] > 1.5 * best
    assert losses["asvd"] > 1.0001 * best
    assert losses["svd_llm"] == pytest.approx(best, rel=1e-6)
    assert losses["svd_llm_v2"] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("name", ["svd", "asvd", "svd_llm", "svd_llm_v2", "output_pca"])
def test_full_rank_gives_the_weight_back(name: str) -> None:
    case = make_case("full", 12, 9, 40, seed=3)
    torch.testing.assert_close(decompose(name, case).truncate(9).product(), case.weight)


@pytest.mark.parametrize("name", OPTIMAL)
@pytest.mark.parametrize("shape", [(14, 6), (6, 14)])
def test_what_calibration_never_excites_costs_nothing(name: str, shape: tuple[int, int]) -> None:
    """Inputs in a plane: rank 2 is exact, whatever the weight does elsewhere; dead channels keep no weight in V2."""
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    inputs = torch.zeros(n, 30, dtype=torch.float64)
    inputs[:2] = torch.randn(2, 30, generator=generator, dtype=torch.float64)
    case = Case("plane", weight, inputs)
    product = decompose(name, case).truncate(2).product()
    assert case.loss(product) <= 1e-7 * case.dense_output()
    if name == "svd_llm_v2":
        assert not product[:, 2:].any()


@pytest.mark.parametrize("name", ["svd_llm", "svd_llm_v2", "output_pca"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_weights_are_computed_in_double(name: str, dtype: torch.dtype) -> None:
    case = make_case("full", 10, 8, 40, seed=4)
    rounded = Case("full", case.weight.to(dtype), case.inputs)
    exact = Case("full", rounded.weight.double(), case.inputs)
    low, high = decompose(name, rounded).truncate(3), decompose(name, exact).truncate(3)
    assert low.first.dtype == torch.float64
    assert torch.equal(low.product(), high.product())
