"""One int8 integer a value, one scale a row: what rounding may lose, and the values of Dobi-SVD's Alg. 3 exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from integration_tests.encodings.random_factors import (
    DTYPES,
    dtypes,
    product,
    quantized,
    random_factors,
    relative,
    shapes,
    sizes,
    tensor_bytes,
    written,
)
from optimum_dobisvd.encodings.int8_matmul import UNIT
from optimum_dobisvd.structures.format import format_named

both = pytest.mark.parametrize("encoding", ["int8", "remap"])


def least_not_below(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest values of the dtype that are not below these, none below its normal range."""
    nearest = scale.clamp_min(torch.finfo(dtype).tiny).to(dtype)
    up = torch.nextafter(nearest, torch.full_like(nearest, float("inf")))
    return torch.where(nearest.double() < scale, up, nearest)


def largest_of_rows(rows: Tensor, step: float = 1) -> Tensor:
    """Times a step; 1 for a row of zeros."""
    largest = rows.abs().amax(1) * step
    return torch.where(largest > 0, largest, 1)


def scale_per_rank_and_row(second: Tensor, first: Tensor, dtype: torch.dtype, rows: int, columns: int) -> dict:
    """Both factors in 8 bits with one scale per rank, as in Dobi-SVD's Alg. 3, and one per output.

    `second first = diag(row_scale) (Q_2 / 128) diag(scale) (Q_1 / 128)`: row scales are the largest magnitudes of
    `second`, each rank's column of what is left is rounded against its own largest magnitude, and `scale` is that one
    together with the largest magnitude of the rank's row of `first`. Scales are rounded up to the dtype.

    Args:
        second: m x k, balanced.
        first: k x n.
        dtype: of the scales.
        rows: how many rows of `second` are in 8 bits.
        columns: how many columns of `first` are.
    """
    row_scale = least_not_below(largest_of_rows(second[:rows]), dtype)
    fractions = second[:rows] / row_scale.double()[:, None]
    outer = largest_of_rows(fractions.T, UNIT / 127)
    inner = largest_of_rows(first[:, :columns], UNIT / 127)
    scale = least_not_below(inner * outer, dtype)
    return {
        "second": torch.round(fractions / outer * UNIT).to(torch.int8),
        "first": torch.round(first[:, :columns] * (outer / scale.double())[:, None] * UNIT).to(torch.int8),
        "scale": scale,
        "row_scale": row_scale,
        "outer": outer,
    }


@given(
    shape=st.tuples(sizes, sizes, sizes),
    dtype=dtypes,
    seed=st.integers(0, 2**20),
    spread=st.floats(0, 3),
    dead=st.booleans(),
)
def test_values_are_those_of_a_scale_per_rank_and_one_per_output(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int, spread: float, dead: bool
) -> None:
    """Both linears with a scale per row each: the same integers, scales and product, bit for bit."""
    factors = random_factors(*shape, seed, spread)
    if dead:
        factors.second[0] = 0
        factors.first[-1] = 0
    balanced = factors.balanced()
    expected = scale_per_rank_and_row(balanced.second, balanced.first, dtype, shape[0], shape[1])
    modules, matrices = quantized("int8", written("int8", factors, dtype), dtype)
    first, second = modules["first"], modules["second"]
    assert torch.equal(second.weight, expected["second"])
    assert torch.equal(first.weight, expected["first"])
    assert torch.equal(second.scale, expected["row_scale"])
    assert torch.equal(first.scale, expected["scale"])
    outer = expected["second"].float() * (expected["row_scale"].float()[:, None] / UNIT)
    inner = expected["first"].float() * (expected["scale"].float()[:, None] / UNIT)
    assert torch.equal(matrices["second"] @ matrices["first"], outer @ inner)


@both
@given(shape=shapes(), dtype=dtypes, seed=st.integers(0, 99), spread=st.floats(0, 3))
def test_every_value_is_within_half_a_step_of_its_own_scale(
    encoding: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int, spread: float
) -> None:
    factors = random_factors(*shape, seed, spread)
    weights = written(encoding, factors, dtype)
    terms = factors.second.abs() @ factors.first.abs()
    assert bool(((product(weights) - factors.product()).abs() <= 1e-12 * terms).all()), "the gauge changes no product"
    modules, matrices = quantized(encoding, weights, dtype)
    eps = torch.finfo(dtype).eps
    for name, weight in weights.items():
        scale = torch.ones(len(weight), 1, dtype=torch.float64)
        scale[: len(modules[name].scale), 0] = modules[name].scale.double()
        lost = (matrices[name].double() - weight).abs()
        # Half a step of 1/128 where values have 8 bits, the dtype's own rounding where they have 16.
        assert bool((lost <= scale / (2 * UNIT) * (1 + 1e-3) + eps * weight.abs() + 1e-30).all())
        rows, columns = modules[name].weight.shape
        eight_bit = lost[:rows, :columns] <= scale[:rows] / (2 * UNIT) + 2**-23 * weight[:rows, :columns].abs()
        assert bool(eight_bit.all())


@both
@given(shape=shapes(), dtype=dtypes, seed=st.integers(0, 9))
def test_quantizing_what_was_quantized_gives_the_same_product(
    encoding: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    once = quantized(encoding, written(encoding, random_factors(*shape, seed), dtype), dtype)[1]
    twice = quantized(encoding, {name: matrix.double() for name, matrix in once.items()}, dtype)[1]
    # A value that was rounded to ±127 of its scale may have been slightly less: one more rounding of the scale.
    # Measured against the sizes of the terms, since their sum may be almost nothing.
    terms = once["second"].double().abs() @ once["first"].double().abs()
    assert float((product(twice) - product(once)).norm()) <= 3e-2 * float(terms.norm())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_rounded_up_so_that_nothing_is_clipped(dtype: torch.dtype) -> None:
    weights = written("int8", random_factors(64, 64, 32, seed=1, spread=2), dtype)
    for name, module in quantized("int8", weights, dtype)[0].items():
        exact = weights[name].abs().amax(1) * UNIT / 127
        scale = module.scale.double()
        assert bool((scale >= exact * (1 - 1e-12)).all())
        assert bool((scale <= exact * (1 + torch.finfo(dtype).eps)).all())
        assert int(module.weight.abs().amax()) == 127


@both
def test_a_few_large_output_channels_do_not_set_the_step_of_all(encoding: str) -> None:
    factors = random_factors(64, 64, 32)
    factors.second[:3] *= 300
    found = product(quantized(encoding, written(encoding, factors, torch.bfloat16), torch.bfloat16)[1])
    assert relative(found[3:], factors.product()[3:]) < 0.015


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_ranks_and_tiny_ones_stay_finite(encoding: str, dtype: torch.dtype) -> None:
    factors = random_factors(24, 16, 6)
    factors.second[:, 0] = 0
    factors.first[1] = 0
    factors.second[:, 2] *= 1e-9  # far below what float16 holds
    factors.first[2] *= 1e-9
    modules, matrices = quantized(encoding, written(encoding, factors, dtype), dtype)
    for module in modules.values():
        assert bool((torch.isfinite(module.scale) & (module.scale > 0)).all())
    assert relative(product(matrices), factors.product()) < 0.02


@both
@pytest.mark.parametrize(("outer", "inner"), [(1e6, 1), (1, 1e6)])
def test_a_scale_that_overflows_is_refused(encoding: str, outer: float, inner: float) -> None:
    factors = random_factors(8, 8, 2)
    factors.second.mul_(outer)
    factors.first.mul_(inner)
    with pytest.raises(ValueError, match=r"does not fit into torch.float16: its scale overflows; load the model in b"):
        quantized(encoding, vars(factors.with_equal_columns(torch.float16)), torch.float16)


@given(m=sizes, n=sizes, dtype=dtypes, seed=st.integers(0, 99))
def test_a_matrix_that_is_not_factorized_loses_half_a_step_of_its_rows_scale(
    m: int, n: int, dtype: torch.dtype, seed: int
) -> None:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    format = format_named("dense", "int8")
    weights = format.structure.written(weight, format.encoding.gauge, dtype)
    modules, matrices = format.quantize(weights, None, dtype, min(m, n))
    scale = modules["linear"].scale.double()[:, None]
    in_float32 = 2**-23 * weight.double().abs()  # in which the rounded matrix is given
    lost = (matrices["linear"].double() - weight.double()).abs()
    assert bool((lost <= scale / (2 * UNIT) + in_float32).all())
    size = torch.finfo(dtype).bits // 8
    assert tensor_bytes(modules["linear"]) == m * n + m * size
