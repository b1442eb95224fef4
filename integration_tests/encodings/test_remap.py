"""Dobi-SVD's Alg. 3: 8 bits where a factor is no longer than the matrix's short side, 16 beyond."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from integration_tests.encodings.random_factors import (
    dtypes,
    product,
    quantized,
    random_factors,
    relative,
    shapes,
    tensor_bytes,
    written,
)
from integration_tests.encodings.test_int8 import scale_per_rank_and_row
from optimum_dobisvd.encodings.int8_matmul import UNIT


@given(shape=shapes(), dtype=dtypes, seed=st.integers(0, 2**20), spread=st.floats(0, 2))
def test_values_are_those_of_a_scale_per_rank_and_one_per_output_of_the_8_bit_part(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int, spread: float
) -> None:
    """The same integers and scales bit for bit; and what is beyond in units of the same scale per rank."""
    m, n, _ = shape
    short = min(m, n)
    factors = random_factors(*shape, seed, spread)
    balanced = factors.balanced()
    expected = scale_per_rank_and_row(balanced.second, balanced.first, dtype, short, short)
    modules, matrices = quantized("remap", written("remap", factors, dtype), dtype)
    first, second = modules["first"], modules["second"]
    assert torch.equal(second.weight, expected["second"])
    assert torch.equal(first.weight, expected["first"])
    assert torch.equal(second.scale, expected["row_scale"])
    assert torch.equal(first.scale, expected["scale"])
    outer = expected["second"].float() * (expected["row_scale"].float()[:, None] / UNIT)
    inner = expected["first"].float() * (expected["scale"].float()[:, None] / UNIT)
    if m > n:
        rest = (balanced.second[short:] / expected["outer"]).to(dtype)
        assert torch.equal(second.rest, rest)
        outer = torch.cat([outer, rest.float()])
    elif n > m:
        units = expected["scale"].double() / expected["outer"]
        rest = balanced.first[:, short:] / units[:, None]
        # The same quotient taken in another order: in one of 10^8 cases a value lies next to where rounding turns.
        torch.testing.assert_close(first.rest, rest.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
        inner = torch.cat([inner, first.rest.float() * expected["scale"].float()[:, None]], dim=1)
    assert torch.equal(matrices["second"] @ matrices["first"], outer @ inner)


@given(shape=shapes(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_factors_fill_rank_times_the_longer_side_slots_of_16_bits(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Alg. 3, to the slot: two 8-bit values in each of the first min(m, n) k, 16-bit values in the others."""
    m, n, k = shape
    modules, _ = quantized("remap", written("remap", random_factors(m, n, k), dtype), dtype)
    scales = sum(2 * module.scale.numel() for module in modules.values())
    assert sum(tensor_bytes(module) for module in modules.values()) - scales == 2 * k * max(m, n)
    assert [module.weight.numel() for module in modules.values()] == 2 * [k * min(m, n)]
    assert {module.weight.dtype for module in modules.values()} == {torch.int8}
    # Every rank's largest 8-bit value uses the whole range: the scale is that of the 8-bit rows alone.
    assert bool((modules["second"].weight.abs().amax(0) == 127).all())


@pytest.mark.parametrize(("m", "n"), [(96, 32), (32, 96)])
def test_the_longer_factor_is_in_units_of_its_own_scale(m: int, n: int) -> None:
    """Folding both scales into the 8-bit part blindly leaves the 16-bit rows wrong by their size."""
    factors = random_factors(m, n, 16, spread=4)
    found = product(quantized("remap", written("remap", factors, torch.bfloat16), torch.bfloat16)[1])
    wanted = factors.product()
    assert relative(found, wanted) < 0.01
    rest = slice(32, None)
    part = (found[rest], wanted[rest]) if m > n else (found[:, rest], wanted[:, rest])
    assert relative(*part) < 0.01


@pytest.mark.parametrize(("m", "n"), [(96, 32), (32, 96)])
def test_16_bit_values_that_overflow_are_refused(m: int, n: int) -> None:
    factors = random_factors(m, n, 4)
    longer = factors.second[32:] if m > n else factors.first[:, 32:]
    longer *= 1e6
    weights = vars(factors.with_equal_columns(torch.float16, rows=32))
    with pytest.raises(ValueError, match=r"does not fit into torch.float16: its values overflow; load the model in b"):
        quantized("remap", weights, torch.float16)
    quantized("remap", weights, torch.bfloat16)
