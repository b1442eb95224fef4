"""Rounding with error feedback: outputs are closer than with the nearest values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_dobisvd.encodings.bitsandbytes import CODES
from optimum_dobisvd.encodings.error_feedback import ErrorFeedback, NearestOfCode

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
    chosen, rounded = ErrorFeedback(gram).round(weight, CODE, scales)
    assert torch.allclose(rounded, CODE[chosen] * scales.repeat_interleave(size, dim=1))


@given(seed=st.integers(0, 99))
def test_outputs_are_closer_than_with_the_nearest_values_where_inputs_are_correlated(seed: int) -> None:
    weight, gram = problem(24, 160, seed)  # more columns than one block of the algorithm
    scales = weight.view(24, 10, 16).abs().amax(-1)
    _, rounded = ErrorFeedback(gram).round(weight, CODE, scales)
    assert lost(rounded - weight, gram) < 0.7 * lost(nearest(weight, scales) - weight, gram)


@given(kind=st.sampled_from(["nf4", "fp4"]), fraction=st.floats(0.6, 1.2), seed=st.integers(0, 99))
def test_a_table_gives_a_value_as_near_as_the_nearest(kind: str, fraction: float, seed: int) -> None:
    code = torch.tensor(sorted(CODES[kind]))
    # Up to 1.05: scales in 8 bits are not quite the largest values.
    units = torch.rand(3, 50, generator=torch.Generator().manual_seed(seed)) * 2.1 - 1.05
    distances = (units[..., None] - fraction * code).abs()
    found = NearestOfCode(code)(units, fraction)
    assert bool(torch.isin(found, fraction * code).all())
    assert bool(((units - found).abs() <= distances.amin(-1) + 1e-3).all())


@given(m=st.integers(1, 9), groups=st.integers(1, 9), size=st.sampled_from([2, 8]), seed=st.integers(0, 99))
def test_fitted_scales_lose_no_more_than_those_of_the_largest_values(
    m: int, groups: int, size: int, seed: int
) -> None:
    weight, _ = problem(m, groups * size, seed)
    variances = torch.rand(groups * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = torch.diag(variances.square())
    scales = weight.view(m, groups, size).abs().amax(-1)
    feedback = ErrorFeedback(gram, damping=0.0)
    fitted = feedback.fitted_scales(weight, CODE, scales)
    before = lost(nearest(weight, scales) - weight, gram)
    assert lost(feedback.round(weight, CODE, fitted)[1] - weight, gram) <= before * (1 + 1e-9)


def test_an_unimportant_large_value_does_not_stretch_the_code_for_its_neighbors() -> None:
    code = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    weight = torch.tensor([[0.61, -0.58, 0.62, 1.0]], dtype=torch.float64)
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-6], dtype=torch.float64))
    feedback = ErrorFeedback(gram)
    fitted = feedback.fitted_scales(weight, code, torch.ones(1, 1, dtype=torch.float64))
    assert float(fitted) == pytest.approx(0.6, abs=0.01)
    assert torch.allclose(feedback.round(weight, code, fitted)[1] / fitted, weight.sign())


def test_uncorrelated_inputs_get_the_nearest_values() -> None:
    weight, _ = problem(8, 32, 0)
    scales = weight.view(8, 2, 16).abs().amax(-1)
    gram = torch.diag(torch.rand(32, dtype=torch.float64) + 0.1)
    assert torch.allclose(ErrorFeedback(gram).round(weight, CODE, scales)[1], nearest(weight, scales))


def test_dead_inputs_and_zero_rows_do_no_harm() -> None:
    weight, gram = problem(8, 32, 1)
    gram[:, 5] = gram[5, :] = 0
    weight[3] = 0
    scales = weight.view(8, 2, 16).abs().amax(-1)
    for each in (gram, torch.zeros_like(gram)):
        feedback = ErrorFeedback(each)
        rounded = feedback.round(weight, CODE, feedback.fitted_scales(weight, CODE, scales))[1]
        assert bool(torch.isfinite(rounded).all())
        assert float(rounded[3].abs().max()) < 1e-12
