"""The tables of storages and allocators, and what the plain storage costs."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_dobisvd.allocation import (
    ALLOCATIONS,
    Allocation,
    allocation_named,
    register_allocation,
    svd_llm_v2,
    uniform,
)
from optimum_dobisvd.storage import STORAGES, Storage, register_storage, storage_named


@pytest.fixture(autouse=True)
def _tables_as_before() -> Iterator[None]:
    with patch.dict(STORAGES), patch.dict(ALLOCATIONS):
        yield


@given(m=st.integers(1, 300), n=st.integers(1, 300), size=st.sampled_from([1, 2, 4]))
def test_plain_is_smaller_than_dense_up_to_its_largest_useful_rank(m: int, n: int, size: int) -> None:
    plain = storage_named("plain")
    largest = plain.largest_useful_rank(m, n)
    assert plain.bytes_at(m, n, largest, size) < m * n * size <= plain.bytes_at(m, n, largest + 1, size)
    assert plain.largest_smaller_rank(m, n, size) == largest


def test_scales_count_when_a_storage_claims_every_rank() -> None:
    halved = Storage("halved", lambda m, n, k, size: k * (m + n) * size // 2 + 4 * k, min)
    assert halved.largest_smaller_rank(64, 64, 2) == 62, "63 ranks of 132 bytes exceed the 8192 of the dense matrix"
    assert halved.largest_smaller_rank(16, 64, 2) == 16
    assert halved.largest_smaller_rank(1, 1, 1) == 0


def test_storages_are_registered_once() -> None:
    storage = Storage("mine", lambda m, n, k, size: k, min)
    register_storage(storage)
    assert storage_named("mine") is storage
    with pytest.raises(ValueError, match="'mine' is already registered; choose another name"):
        register_storage(storage)


@pytest.mark.parametrize("name", ["dense", ""])
def test_storages_cannot_take_a_reserved_name(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be called"):
        register_storage(Storage(name, lambda m, n, k, size: k, min))


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
