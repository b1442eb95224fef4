"""Rounding with error feedback, and the rotation of ranks before it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_dobisvd.factorization.factors import Factors
from optimum_dobisvd.factorization.feedback import fit_scales, round_with_feedback

CODE = torch.linspace(-1, 1, 15, dtype=torch.float64)


def problem(m: int, n: int, seed: int, correlated: bool = True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    inputs = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
    if correlated:
        inputs = inputs @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    return weight, inputs.T @ inputs


def nearest(weight, scales):
    steps = scales.repeat_interleave(weight.shape[1] // scales.shape[1], dim=1)
    return CODE[torch.bucketize(weight / steps, (CODE[1:] + CODE[:-1]) / 2)] * steps


def lost(error, gram):
    return float(((error @ gram) * error).sum())


@given(m=st.integers(1, 9), groups=st.integers(1, 40), size=st.sampled_from([1, 4, 8]), seed=st.integers(0, 99))
def test_every_value_is_of_the_code_in_units_of_its_scale(m: int, groups: int, size: int, seed: int) -> None:
    weight, gram = problem(m, groups * size, seed)
    scales = weight.view(m, groups, size).abs().amax(-1)
    chosen, rounded = round_with_feedback(weight, gram, CODE, scales)
    assert torch.allclose(rounded, CODE[chosen] * scales.repeat_interleave(size, dim=1))


@given(seed=st.integers(0, 99))
def test_outputs_are_closer_than_with_the_nearest_values_where_inputs_are_correlated(seed: int) -> None:
    weight, gram = problem(24, 160, seed)  # more columns than one block of the algorithm
    scales = weight.view(24, 10, 16).abs().amax(-1)
    _, rounded = round_with_feedback(weight, gram, CODE, scales)
    assert lost(rounded - weight, gram) < 0.7 * lost(nearest(weight, scales) - weight, gram)


def test_uncorrelated_inputs_get_the_nearest_values() -> None:
    weight, _ = problem(8, 32, 0)
    scales = weight.view(8, 2, 16).abs().amax(-1)
    gram = torch.diag(torch.rand(32, dtype=torch.float64) + 0.1)
    assert torch.allclose(round_with_feedback(weight, gram, CODE, scales)[1], nearest(weight, scales))


def test_dead_inputs_and_zero_rows_do_no_harm() -> None:
    weight, gram = problem(8, 32, 1)
    gram[:, 5] = gram[5, :] = 0
    weight[3] = 0
    scales = weight.view(8, 2, 16).abs().amax(-1)
    for each in (gram, torch.zeros_like(gram)):
        rounded = round_with_feedback(weight, each, CODE, scales)[1]
        assert bool(torch.isfinite(rounded).all())
        assert float(rounded[3].abs().max()) < 1e-12


@given(m=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(1, 30))
def test_mixing_the_ranks_changes_no_product_and_is_the_same_every_time(m: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(m * n)
    spread = 10 ** (4 * torch.rand(k, generator=generator, dtype=torch.float64))
    second = torch.randn(m, k, generator=generator, dtype=torch.float64) * spread
    factors = Factors(second, torch.randn(k, n, generator=generator, dtype=torch.float64))
    mixed = factors.mixed()
    assert torch.allclose(mixed.product(), factors.product(), atol=1e-10 * float(spread.max()) * k)
    assert torch.equal(mixed.second, factors.mixed().second)


def test_mixed_ranks_are_alike() -> None:
    spread = torch.logspace(0, 4, 64, dtype=torch.float64)
    factors = Factors(torch.randn(100, 64, dtype=torch.float64) * spread, torch.randn(64, 80, dtype=torch.float64))
    sizes = factors.mixed().second.norm(dim=0)
    assert float(sizes.max() / sizes.min()) < 5
    assert float(spread.max() / spread.min()) == pytest.approx(1e4)


@given(m=st.integers(1, 9), groups=st.integers(1, 12), size=st.sampled_from([1, 4, 8]), seed=st.integers(0, 99))
def test_fitted_scales_bring_outputs_closer_and_no_others_closer_still(
    m: int, groups: int, size: int, seed: int
) -> None:
    weight, gram = problem(m, groups * size, seed)
    scales = weight.view(m, groups, size).abs().amax(-1)
    units = CODE[round_with_feedback(weight, gram, CODE, scales)[0]]

    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)

    def lost_with(these):  # by output
        error = units * these.repeat_interleave(size, dim=1) - weight
        return ((error @ damped) * error).sum(1)

    fitted = fit_scales(weight, gram, units, scales)
    best = lost_with(fitted) - 1e-9 * ((weight @ damped) * weight).sum(1)
    assert bool((best <= lost_with(scales)).all())
    changed = (fitted != scales).any(1)
    for factor in (0.999, 1.001):
        other = fitted.clone()
        other[:, seed % groups] *= factor
        assert bool((best <= lost_with(other))[changed].all())


def test_groups_may_lie_anywhere() -> None:
    weight, gram = problem(6, 32, 3)
    scales = weight.view(6, 4, 8).abs().amax(-1)
    units = CODE[round_with_feedback(weight, gram, CODE, scales)[0]]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    fitted = fit_scales(weight, gram, units, scales)
    groups = (torch.arange(32) // 8)[order]
    moved = fit_scales(weight[:, order], gram[order][:, order], units[:, order], scales, groups)
    assert torch.allclose(moved, fitted)


def test_scales_of_rows_and_groups_of_zeros_are_kept() -> None:
    weight, gram = problem(8, 32, 1)
    weight[3] = 0
    weight[5, :8] = 0
    scales = weight.view(8, 4, 8).abs().amax(-1)
    units = CODE[round_with_feedback(weight, gram, CODE, scales)[0]]
    units[3], units[5, :8] = 0, 0
    fitted = fit_scales(weight, gram, units, scales)
    assert bool(torch.isfinite(fitted).all())
    assert torch.equal(fitted[3], scales[3])
    assert fitted[5, 0] == scales[5, 0]
    assert not torch.equal(fitted[5], scales[5])
