"""The tables of storages and allocators, and what the plain storage costs."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from integration_tests.allocation.samples import SIZES
from optimum_dobisvd.allocation import (
    ALLOCATIONS,
    Allocation,
    allocation_named,
    register_allocation,
    svd_llm_v2,
    uniform,
)
from optimum_dobisvd.storage import STORAGES, Storage, register_storage, storage_named
from optimum_dobisvd.storage.costs import dense_levels


@pytest.fixture(autouse=True)
def _tables_as_before() -> Iterator[None]:
    with patch.dict(STORAGES), patch.dict(ALLOCATIONS):
        yield


@given(m=st.integers(1, 300), n=st.integers(1, 300), size=st.sampled_from([1, 2, 4]))
def test_every_storage_breaks_even_where_its_next_rank_is_not_smaller_than_dense(m: int, n: int, size: int) -> None:
    for name in ("plain", "remap", "int8"):
        storage = storage_named(name)
        largest = storage.largest_rank_below(m * n * size, m, n, size)
        assert 0 <= largest <= min(m, n)
        assert largest == 0 or SIZES[name](m, n, largest, size) < m * n * size
        assert largest == min(m, n) or SIZES[name](m, n, largest + 1, size) >= m * n * size


def test_break_even_ranks_of_a_square_matrix_in_16_bits() -> None:
    found = {name: storage_named(name).largest_rank_below(2 * 64 * 64, 64, 64, 2) for name in STORAGES}
    # 8192 bytes dense. Of a rank: 256 bytes; 64 slots and a scale; 128 bytes and a scale. And 64 scales of rows.
    assert found == {"plain": 31, "remap": 62, "int8": 62}


def test_dense_int8_comes_before_dense_where_it_is_smaller() -> None:
    assert [form.name for form in dense_levels("dense_int8", 64, 64, 2)] == ["dense_int8", "dense"]
    assert [form.name for form in dense_levels("dense", 64, 64, 2)] == ["dense"]
    assert [form.name for form in dense_levels("dense_int8", 64, 1, 2)] == ["dense"], "64 bytes and 128 of scales"
    with pytest.raises(ValueError, match="unknown dense storage 'int8'; known: dense, dense_int8"):
        dense_levels("int8", 64, 64, 2)


def test_storages_are_registered_once() -> None:
    storage = Storage("mine", lambda m, n, rank, size: size * rank)
    register_storage(storage)
    assert storage_named("mine") is storage
    with pytest.raises(ValueError, match="'mine' is already registered; choose another name"):
        register_storage(storage)


@pytest.mark.parametrize("name", ["dense", "dense_int8", "", "gptq4_g32", "nf4"])
def test_storages_cannot_take_a_reserved_name(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be called"):
        register_storage(Storage(name, lambda m, n, rank, size: size * rank))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown storage 'plian'; known storages: .*plain"):
        storage_named("plian")
    with pytest.raises(ValueError, match=r"unknown allocation 'unifrom'; known allocations: .*svd_llm_v2.*uniform"):
        allocation_named("unifrom")


def test_allocations_are_registered_once() -> None:
    assert allocation_named("uniform") == Allocation("uniform", uniform, needs_spectra=False)
    assert allocation_named("svd_llm_v2") == Allocation("svd_llm_v2", svd_llm_v2, needs_spectra=True)
    register_allocation(Allocation("mine", uniform, needs_spectra=False))
    with pytest.raises(ValueError, match="'mine' is already registered"):
        register_allocation(Allocation("mine", uniform, needs_spectra=False))
