"""Factors, decompositions, the measured error, and the table of factorizers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from integration_tests.factorization.weights_and_inputs import make_case
from optimum_dobisvd.factorization.errors import output_error
from optimum_dobisvd.factorization.factors import Decomposition, Factors
from optimum_dobisvd.factorization.registry import FACTORIZATIONS, Factorization


@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(1, 6), st.integers(0, 2**20), st.floats(-8, 8), st.floats(-8, 8)
)
@settings(max_examples=80, deadline=None)
def test_balancing_keeps_the_product_and_equalizes_the_norms(
    m: int, n: int, rank: int, seed: int, left: float, right: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    second = torch.randn(m, rank, generator=generator, dtype=torch.float64) * 10**left
    first = torch.randn(rank, n, generator=generator, dtype=torch.float64) * 10**right
    spread = 10 ** (6 * torch.rand(rank, generator=generator, dtype=torch.float64) - 3)
    dead = torch.rand(rank, generator=generator) < 0.2
    second, first = second * spread, first / spread[:, None]
    if seed % 2:
        second[:, dead] = 0
    else:
        first[dead] = 0
    before = Factors(second, first)
    after = before.balanced()
    torch.testing.assert_close(after.product(), before.product(), rtol=1e-9, atol=1e-12 * 10 ** (left + right))
    outer, inner = after.second.norm(dim=0), after.first.norm(dim=1)
    torch.testing.assert_close(outer, inner, rtol=1e-9, atol=0)
    assert not outer[dead].any()
    assert torch.isfinite(outer).all()


def test_truncating_takes_a_prefix_and_pads_with_zeros() -> None:
    decomposition = Decomposition(torch.rand(5, 3), torch.rand(3, 4), torch.tensor([3.0, 2.0, 1.0]))
    factors = decomposition.truncate(2)
    assert torch.equal(factors.second, decomposition.left[:, :2])
    assert torch.equal(factors.first, decomposition.right[:2])
    padded = decomposition.truncate(6)
    assert (padded.second.shape, padded.first.shape) == ((5, 6), (6, 4))
    assert torch.equal(padded.product(), decomposition.truncate(3).product())
    assert not padded.second[:, 3:].any()
    assert not padded.first[3:].any()
    assert [decomposition.truncation_loss(k) for k in (0, 1, 2, 3, 6)] == pytest.approx([14**0.5, 5**0.5, 1, 0, 0])


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    decomposition = Decomposition(torch.rand(5, 3), torch.rand(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match="at least 1"):
        decomposition.truncate(rank)


@pytest.mark.parametrize("kind", ["full", "few_tokens", "badly_scaled"])
def test_output_error_is_what_the_inputs_say(kind: str) -> None:
    case = make_case(kind, 7, 9, 30, seed=9)
    factors = Factors(torch.rand(7, 2).double(), torch.rand(2, 9).double())
    lost, total = output_error(case.weight, factors.product(), case.gram)
    assert lost == pytest.approx(case.loss(factors.product()), rel=1e-7)
    assert total == pytest.approx(case.dense_output(), rel=1e-7)


def test_output_error_sees_the_rounding_of_what_is_stored() -> None:
    case = make_case("full", 7, 9, 30, seed=10)
    exact = FACTORIZATIONS.get("svd").decompose(case.weight, None).truncate(7).balanced()
    rounded = Factors(exact.second.bfloat16(), exact.first.bfloat16())
    assert output_error(case.weight, exact.product(), case.gram)[0] < 1e-9
    lost, total = output_error(case.weight, rounded.product(), case.gram)
    assert 1e-4 < lost / total < 1e-1


def test_the_table_refuses_a_second_row_of_one_name() -> None:
    before = {name: FACTORIZATIONS.get(name) for name in FACTORIZATIONS}
    row = FACTORIZATIONS.get("svd_llm_v2")
    another = Factorization("svd_llm_v2", None, row.prepare, row.decompose, row.spectrum)
    with pytest.raises(ValueError, match="factorization 'svd_llm_v2' is already registered"):
        FACTORIZATIONS.register("svd_llm_v2", another)
    assert before == {name: FACTORIZATIONS.get(name) for name in FACTORIZATIONS}


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown factorization 'svdllm'; known: .*svd_llm_v2"):
        FACTORIZATIONS.get("svdllm")


def test_any_directions_can_be_kept_and_missing_ones_are_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(5, 3, generator=generator), torch.randn(3, 7, generator=generator)
    decomposition = Decomposition(left, right, torch.tensor([3.0, 2.0, 1.0]))
    some = decomposition.keep((0, 2))
    torch.testing.assert_close(some.product(), left[:, [0, 2]] @ right[[0, 2]])
    beyond = decomposition.keep((1, 3, 4))
    assert beyond.second.shape == (5, 3)
    torch.testing.assert_close(beyond.product(), torch.outer(left[:, 1], right[1]))
    assert float(decomposition.keep((4, 5)).product().abs().sum()) == 0
    assert torch.equal(decomposition.keep(range(2)).product(), decomposition.truncate(2).product())


@given(m=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(1, 30))
def test_rotating_the_ranks_changes_no_product_and_is_the_same_every_time(m: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(m * n)
    spread = 10 ** (4 * torch.rand(k, generator=generator, dtype=torch.float64))
    second = torch.randn(m, k, generator=generator, dtype=torch.float64) * spread
    factors = Factors(second, torch.randn(k, n, generator=generator, dtype=torch.float64))
    rotated = factors.rotated()
    assert torch.allclose(rotated.product(), factors.product(), atol=1e-10 * float(spread.max()) * k)
    assert torch.equal(rotated.second, factors.rotated().second)


def test_rotated_ranks_are_alike() -> None:
    spread = torch.logspace(0, 4, 64, dtype=torch.float64)
    factors = Factors(torch.randn(100, 64, dtype=torch.float64) * spread, torch.randn(64, 80, dtype=torch.float64))
    sizes = factors.rotated().second.norm(dim=0)
    assert float(sizes.max() / sizes.min()) < 5
    assert float(spread.max() / spread.min()) == pytest.approx(1e4)
