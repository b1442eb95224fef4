"""Rows of the matrix itself, and the other rows in terms of them."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optimum_dobisvd.encodings.int8 import fake_quantize_rows
from optimum_dobisvd.factorization.factors import Factors, Gauge
from optimum_dobisvd.structures.base import to_dense
from optimum_dobisvd.structures.format import format_named
from optimum_dobisvd.structures.pivoted import PivotedLinear
from optimum_dobisvd.structures.placement import replace_linear


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors_of(m: int, n: int, rank: int, seed: int = 0) -> Factors:
    return Factors(normal(m, rank, seed=seed), normal(rank, n, seed=seed + 1))


def pivoted(dense: nn.Module, factors: Factors, encoding: str = "float", gram: Tensor | None = None) -> PivotedLinear:
    model = nn.ModuleDict({"proj": dense})
    replace_linear(model, "proj", format_named("pivoted", encoding), factors.first.shape[0], factors, gram)
    module = model["proj"]
    assert isinstance(module, PivotedLinear)
    return module


@given(m=st.integers(1, 40), n=st.integers(1, 40), rank=st.integers(1, 40), bias=st.booleans(), conv=st.booleans())
@settings(max_examples=100, deadline=None)
def test_computes_the_matrix_of_the_factors_for_every_shape_and_rank(
    m: int, n: int, rank: int, bias: bool, conv: bool
) -> None:
    rank = min(m, n, rank)
    factors = factors_of(m, n, rank)
    dense = Conv1D(m, n) if conv else nn.Linear(n, m, bias=bias)
    if dense.bias is not None:
        nn.init.normal_(dense.bias)
    module = pivoted(dense.double(), factors)
    assert (type(module.first), type(module.second)) == (nn.Linear, nn.Linear)
    assert (module.first.weight.shape, module.second.weight.shape) == ((rank, n), (m - rank, rank))
    x = normal(2, 3, n, seed=7)
    expected = x @ factors.product().T + (0 if dense.bias is None else dense.bias)
    torch.testing.assert_close(module(x), expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(module.dense_matrix().double(), factors.product(), atol=1e-4, rtol=1e-4)
    again = to_dense(module)
    assert type(again) is type(dense)
    torch.testing.assert_close(again(x), expected, atol=1e-4, rtol=1e-4)
    second, first = module.factors()
    torch.testing.assert_close(second @ first, factors.product(), atol=1e-4, rtol=1e-4)


def test_first_has_rows_of_the_matrix_itself() -> None:
    factors = factors_of(12, 9, 4)
    weights = PivotedLinear.written(factors, Gauge.BALANCED, torch.float32)
    assert weights["permutation"].dtype == torch.uint8
    rows = weights["permutation"].long()
    torch.testing.assert_close(weights["first"], factors.product()[rows[:4]])
    torch.testing.assert_close(weights["second"] @ weights["first"], factors.product()[rows[4:]])


def test_directions_without_weight_leave_no_infinite_coefficients() -> None:
    factors = factors_of(12, 9, 6)
    padded = Factors(torch.cat([factors.second, torch.zeros(12, 2)], 1), torch.cat([factors.first, torch.zeros(2, 9)]))
    module = pivoted(nn.Linear(9, 12, bias=False).double(), padded)
    torch.testing.assert_close(module.dense_matrix().double(), factors.product(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("outputs", "dtype"), [(256, torch.uint8), (257, torch.int32)])
def test_the_permutation_has_the_smallest_dtype_that_can_be_broadcast(outputs: int, dtype: torch.dtype) -> None:
    module = PivotedLinear(4, outputs, 3)
    assert module.permutation.dtype == dtype
    own = module.permutation.nbytes
    assert format_named("pivoted", "float").bytes(outputs, 4, 3, 2) == 2 * 3 * (outputs + 4 - 3) + own


def test_under_autocast_the_output_has_the_dtype_of_an_ordinary_linears() -> None:
    module = pivoted(nn.Linear(9, 12), factors_of(12, 9, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(3, 9)
        assert module(x).dtype == nn.Linear(9, 12)(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("outputs", "dtype"), [(12, torch.uint8), (257, torch.int32)])
def test_copies_and_casts_leave_the_permutation_alone(outputs: int, dtype: torch.dtype) -> None:
    module = pivoted(nn.Linear(9, outputs), factors_of(outputs, 9, 4))
    places, x = module.permutation.clone(), torch.randn(3, 9)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda each: each.to(torch.float16)):
        changed = cast(copy.deepcopy(module))
        assert changed.first.weight.dtype == changed.bias.dtype == changed.weight.dtype != torch.float32
        assert changed.permutation.dtype == dtype
        assert torch.equal(changed.permutation, places)
        assert changed(x.to(changed.weight.dtype)).dtype == changed.weight.dtype
    again = copy.deepcopy(module)
    assert torch.equal(again(x), module(x))
    assert again.permutation.data_ptr() != module.permutation.data_ptr()


@given(m=st.integers(2, 300), n=st.integers(1, 300), size=st.sampled_from([2, 4]))
def test_numbers_and_multiply_adds_are_below_the_matrixs_at_every_rank(m: int, n: int, size: int) -> None:
    format = format_named("pivoted", "float")
    numbers = [format.macs(m, n, rank) for rank in range(1, min(m, n))]
    assert all(number < m * n for number in numbers)
    assert numbers == sorted(numbers)


def relative_error(module: PivotedLinear, exact: Tensor, x: Tensor) -> float:
    return float(((module.dense_matrix().double() - exact) @ x).norm() / (exact @ x).norm())


@pytest.mark.parametrize("encoding", ["int8", "float"])
def test_other_rows_are_refitted_to_the_rounded_pivots(encoding: str) -> None:
    """On inputs that are correlated, where errors in some rows can be made up for."""
    m, n, rank = 48, 40, 12
    factors, x = factors_of(m, n, rank), normal(n, 6) @ normal(6, 400) + 0.1 * normal(n, 400)
    errors = {}
    for gram in (None, x @ x.T):
        dense = nn.Linear(n, m, bias=False, dtype=torch.bfloat16)
        errors[gram is None] = relative_error(pivoted(dense, factors, encoding, gram), factors.product(), x)
    assert errors[False] < 0.9 * errors[True]


def test_pivots_that_are_exact_refit_nothing() -> None:
    weights = PivotedLinear.written(factors_of(9, 7, 4), Gauge.BALANCED, torch.float32)
    found = PivotedLinear.refitted("second", weights, weights, normal(7, 7) @ normal(7, 7).T)
    torch.testing.assert_close(found, weights["second"])


def test_the_refit_is_the_least_squares_fit() -> None:
    weights = PivotedLinear.written(factors_of(20, 16, 5), Gauge.BALANCED, torch.float32)
    rounded = {**weights, "first": fake_quantize_rows(weights["first"] * 3) / 3 + 0.05 * normal(5, 16)}
    x = normal(16, 200, seed=4)
    target = weights["second"] @ weights["first"]

    def lost(second: Tensor) -> float:
        return float(((target - second @ rounded["first"]) @ x).norm())

    found = PivotedLinear.refitted("second", weights, rounded, x @ x.T)
    best = torch.linalg.lstsq((rounded["first"] @ x).T, (target @ x).T).solution.T
    assert lost(best) <= lost(found) < 1.001 * lost(best) < lost(weights["second"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: found, None),
        (lambda found: found.index_fill(0, torch.tensor([0]), int(found[1])), "is no permutation of the numbers"),
        (lambda found: found.index_fill(0, torch.tensor([0]), 99), "is no permutation of the numbers from 0 to 8"),
    ],
)
def test_values_that_are_no_permutation_are_said(change: Callable[[Tensor], Tensor], says: str | None) -> None:
    found = PivotedLinear.written(factors_of(9, 7, 4), Gauge.BALANCED, torch.float32)["permutation"]
    problem = PivotedLinear.problem_with("permutation", change(found))
    assert problem is None if says is None else says in str(problem)


def test_needs_a_rank_and_factors() -> None:
    with pytest.raises(ValueError, match="structure 'pivoted' needs a rank"):
        PivotedLinear.linears(6, 9, None)
    with pytest.raises(TypeError, match="structure 'pivoted' is written from factors"):
        PivotedLinear.written(normal(6, 9), Gauge.BALANCED, torch.float32)


def test_trains_and_compiles_and_hands_gradients_to_both_linears_and_the_bias() -> None:
    module = pivoted(nn.Linear(9, 12), factors_of(12, 9, 4)).train()
    x = torch.randn(5, 9, requires_grad=True)
    exact = torch.func.functional_call(module, dict(module.named_parameters()), (x,))
    (exact**2).sum().backward()
    weight = module.dense_matrix().requires_grad_(True)
    copy = x.detach().clone().requires_grad_(True)
    (nn.functional.linear(copy, weight, module.bias) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, copy.grad, atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), exact)
