"""Factors and matrices in 8 bits: what rounding may lose, exact bytes, exact round trips."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from integration_tests.allocation.budget_cases import SIZES
from optimum_dobisvd.nn.dense_linear import compressed_class
from optimum_dobisvd.storage import STORAGES, Storage, pack, pack_dense, register_storage, storage_named, unpack
from optimum_dobisvd.storage.eight_bit import UNIT, remapped_matrices

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)
sizes = st.integers(1, 40)
eight_bit = pytest.mark.parametrize("storage", ["int8", "remap"])


def factors(m: int, n: int, k: int, seed: int = 0, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Random factors whose ranks differ by up to 10^spread in size."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (spread * (torch.rand(k, generator=generator) - 0.5))
    return torch.randn(m, k, generator=generator) * scale, torch.randn(k, n, generator=generator) * scale[:, None]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@eight_bit
@given(m=sizes, n=sizes, k=sizes, dtype=dtypes, seed=st.integers(0, 99), spread=st.floats(0, 3))
def test_every_value_is_within_half_a_step_of_its_own_scale(
    storage: str, m: int, n: int, k: int, dtype: torch.dtype, seed: int, spread: float
) -> None:
    second, first = factors(m, n, k, seed, spread)
    tensors = pack(storage, second, first, dtype)
    found_second, found_first = unpack(storage, tensors, m, n)
    # The scale per rank lies on `first`; what `second` is in its own units says how much of it is whose.
    rows = torch.ones(m, dtype=torch.float64)
    counted = slice(None) if storage == "int8" else slice(0, min(m, n))
    rows[counted] = tensors["row_scale"].double()
    outer = (second.double() / rows[:, None])[counted].abs().amax(0) * UNIT / 127
    outer = torch.where(outer > 0, outer, 1)
    inner = tensors["scale"].double() / outer
    eps = torch.finfo(dtype).eps
    for found, wanted, scale in (
        (found_second.double() * outer, second.double(), rows[:, None] * outer),
        (found_first.double() / outer[:, None], first.double(), inner[:, None]),
    ):
        lost = (found - wanted).abs()
        # Half a step of 1/128 where values have 8 bits, the dtype's own rounding where they have 16.
        assert bool((lost <= scale / (2 * UNIT) * (1 + 1e-3) + eps * wanted.abs() + 1e-30).all())


@eight_bit
@given(m=sizes, n=sizes, k=sizes, size=st.sampled_from([2, 4]))
def test_the_tensors_have_the_declared_bytes(storage: str, m: int, n: int, k: int, size: int) -> None:
    tensors = pack(storage, *factors(m, n, k), torch.float32 if size == 4 else torch.bfloat16)
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert found == storage_named(storage).bytes_at(m, n, k, size) == SIZES[storage](m, n, k, size)


@given(m=sizes, n=sizes, k=sizes, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_remapped_factors_fill_rank_times_the_longer_side_slots_of_16_bits(
    m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    """Alg. 3, to the slot: two 8-bit values in each of the first min(m, n) k, 16-bit values in the others."""
    second, first = factors(m, n, k)
    tensors = pack("remap", second, first, dtype)
    slots = [tensor for key, tensor in tensors.items() if not key.endswith("scale")]
    assert all(tensor.element_size() == 2 for tensor in slots)
    assert sum(tensor.numel() for tensor in slots) == k * max(m, n)
    outer, inner = remapped_matrices(tensors["packed"])
    assert outer.data_ptr() == tensors["packed"].data_ptr(), "no copy is made to compute from"
    assert outer.numel() + inner.numel() == 2 * tensors["packed"].numel()
    # Every rank's largest 8-bit value uses the whole range: the scale is that of the 8-bit rows alone.
    assert bool((outer.abs().amax(0) == 127).all())


@eight_bit
@given(m=sizes, n=sizes, k=sizes, dtype=dtypes, seed=st.integers(0, 9))
def test_packing_what_was_unpacked_gives_the_same_product(
    storage: str, m: int, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    tensors = pack(storage, *factors(m, n, k, seed), dtype)
    second, first = (each.double() for each in unpack(storage, tensors, m, n))
    again_second, again_first = (each.double() for each in unpack(storage, pack(storage, second, first, dtype), m, n))
    product = second @ first
    # A value that was rounded to ±127 of its scale may have been slightly less: one more rounding of the scale.
    # Measured against the sizes of the terms, since their sum may be almost nothing.
    terms = second.abs() @ first.abs()
    assert float((again_second @ again_first - product).norm()) <= 3e-2 * float(terms.norm())


def test_the_longer_factor_is_in_units_of_its_own_scale() -> None:
    """Folding both scales into the 8-bit part blindly leaves the 16-bit rows wrong by their size."""
    for m, n in ((96, 32), (32, 96)):
        second, first = factors(m, n, 16, spread=4)
        product = second @ first
        found_second, found_first = unpack("remap", pack("remap", second, first, torch.bfloat16), m, n)
        assert relative(found_second @ found_first, product) < 0.01
        rest = slice(32, None)
        found, wanted = found_second @ found_first, product
        part = (found[rest], wanted[rest]) if m > n else (found[:, rest], wanted[:, rest])
        assert relative(*part) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_rounded_up_so_that_nothing_is_clipped(dtype: torch.dtype) -> None:
    second, first = factors(64, 64, 32, seed=1, spread=2)
    tensors = pack("int8", second, first, dtype)
    rows = tensors["row_scale"].double()
    by_rank = (second.double() / rows[:, None]).abs().amax(0) * first.abs().amax(1).double() * (UNIT / 127) ** 2
    for scale, exact in ((rows, second.abs().amax(1).double()), (tensors["scale"].double(), by_rank)):
        assert bool((scale >= exact * (1 - 1e-12)).all())
        assert bool((scale <= exact * (1 + torch.finfo(dtype).eps)).all())


@eight_bit
def test_a_few_large_output_channels_do_not_set_the_step_of_all(storage: str) -> None:
    second, first = factors(64, 64, 32)
    second[:3] *= 300
    found_second, found_first = unpack(storage, pack(storage, second, first, torch.bfloat16), 64, 64)
    assert relative((found_second @ found_first)[3:], (second @ first)[3:]) < 0.015


@eight_bit
@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_ranks_and_tiny_ones_stay_finite(storage: str, dtype: torch.dtype) -> None:
    second, first = factors(24, 16, 6)
    second[:, 0] = 0
    first[1] = 0
    second[:, 2], first[2] = second[:, 2] * 1e-9, first[2] * 1e-9  # far below what float16 holds
    tensors = pack(storage, second, first, dtype)
    assert bool((torch.isfinite(tensors["scale"]) & (tensors["scale"] > 0)).all())
    found_second, found_first = unpack(storage, tensors, 24, 16)
    assert relative(found_second @ found_first, second @ first) < 0.02


@eight_bit
@pytest.mark.parametrize(("outer", "inner"), [(1e6, 1), (1, 1e6)])
def test_a_scale_that_overflows_is_refused(storage: str, outer: float, inner: float) -> None:
    second, first = factors(8, 8, 2)
    with pytest.raises(ValueError, match=r"does not fit into torch.float16: its scale overflows; load the model in b"):
        pack(storage, outer * second, inner * first, torch.float16)


@given(m=sizes, n=sizes, dtype=dtypes, seed=st.integers(0, 99))
def test_a_whole_matrix_loses_half_a_step_of_its_rows_scale(m: int, n: int, dtype: torch.dtype, seed: int) -> None:
    weight = factors(m, n, m, seed)[1][:m]
    tensors, found = pack_dense("dense_int8", weight, dtype)
    scale = tensors["scale"].double()[:, None]
    in_float32 = 2**-23 * weight.double().abs()  # in which the rounded matrix is given
    assert bool(((found.double() - weight.double()).abs() <= scale / (2 * UNIT) + in_float32).all())
    size = torch.finfo(dtype).bits // 8
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert stored == SIZES["dense_int8"](m, n, 0, size)


def test_the_matrix_as_it_is_has_no_packed_form() -> None:
    with pytest.raises(ValueError, match="storage 'dense' keeps the matrix as it is"):
        pack_dense("dense", torch.ones(2, 2), torch.float32)


def test_a_storage_without_a_form_on_disk_is_refused_and_not_stored_as_another() -> None:
    """Registering a cost curve does not say how tensors are packed."""
    with patch.dict(STORAGES):
        register_storage(Storage("mine", lambda m, n, rank, size: rank * (size)))
        with pytest.raises(ValueError, match="storage 'mine' has no form on disk; .*: plain, remap, int8"):
            pack("mine", *factors(4, 4, 2), torch.float32)


def test_every_storage_of_factors_has_a_form_and_a_module() -> None:
    for name in STORAGES:
        tensors = pack(name, *factors(6, 4, 2), torch.float32)
        module = compressed_class(name)(4, 6, 2, bias=False, dtype=torch.float32)
        shapes = {key: (parameter.shape, parameter.dtype) for key, parameter in module.named_parameters()}
        assert shapes == {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
