"""Forms of other libraries: names, bytes, what they can hold, and how values are rounded in them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_dobisvd.integrations.gptq_linear import GPTQTensors
from optimum_dobisvd.storage import dense_storage_named, storage_named
from optimum_dobisvd.storage.costs import dense_levels
from optimum_dobisvd.storage.inner_forms import GPTQ_BITS, inner_form_named
from optimum_dobisvd.storage.rounding import rounded


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    bits=st.sampled_from(GPTQ_BITS),
    group_size=st.sampled_from([-1, 16, 32, 64]),
)
def test_gptq_bytes_are_those_of_its_tensors(m: int, n: int, bits: int, group_size: int) -> None:
    m, n = 32 * m, 64 * n
    form = inner_form_named(f"gptq{bits}_rows" if group_size == -1 else f"gptq{bits}_g{group_size}")
    assert form is not None
    assert form.obstacle(m, n) is None
    tensors = GPTQTensors(n, m, False, bits, group_size, "meta").tensors()
    assert form.bytes_of(m, n, 2) == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_a_storage_is_both_factors_and_a_whole_form_the_matrix() -> None:
    form = inner_form_named("gptq4_g32")
    assert form is not None
    assert storage_named("gptq4_g32").bytes_at(128, 256, 64, 2) == form.bytes_of(64, 256, 2) + form.bytes_of(
        128, 64, 2
    )
    assert dense_storage_named("gptq4_g32").bytes_of(128, 256, 2) == form.bytes_of(128, 256, 2)
    assert storage_named("gptq4_g64").rank_multiple == 64
    assert storage_named("nf4").rank_multiple == 64
    assert storage_named("llm_int8").rank_multiple == 1


@pytest.mark.parametrize("name", ["gptq5_g32", "gptq4", "gptq4_g0", "nf5", "NF4", "", "gptq4_g32 "])
def test_other_names_are_none(name: str) -> None:
    assert inner_form_named(name) is None


def test_what_a_form_cannot_hold_is_said() -> None:
    form = inner_form_named("gptq4_g128")
    assert form is not None
    assert "inputs in multiples of 128, and it has 576" in str(form.obstacle(576, 576))
    assert "outputs in multiples of 32, and it has 100" in str(form.obstacle(100, 128))
    assert "ranks in multiples of 128, and it is to have 96" in str(form.obstacle(128, 128, 96))
    # Where it cannot hold the matrix, 8 and 16 bits are left.
    assert [each.name for each in dense_levels("gptq4_g128", 576, 576, 2)] == ["dense_int8", "dense"]
    assert [each.name for each in dense_levels("gptq4_g64", 576, 576, 2)] == ["gptq4_g64", "dense_int8", "dense"]
    # Eight bits of bitsandbytes are dearer than ours.
    assert [each.name for each in dense_levels("llm_int8", 576, 576, 2)] == ["dense_int8", "llm_int8", "dense"]


@pytest.mark.parametrize("storage", ["gptq2_g32", "gptq3_g32", "gptq4_g32", "gptq8_g32", "nf4", "fp4", "dense_int8"])
def test_rounding_is_idempotent_and_of_few_values(storage: str) -> None:
    weight = torch.randn(32, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = rounded(weight, storage)
    bits = {"nf4": 4, "fp4": 4, "dense_int8": 8}.get(storage, int(storage[4]) if storage.startswith("gptq") else 0)
    for row in once.view(-1, 32):
        assert len(row.unique()) <= 2**bits
    if not storage.startswith("gptq"):  # GPTQ's grid has no value at plus its largest magnitude
        assert torch.allclose(rounded(once, storage), once, atol=1e-6)
    error = (once - weight).norm() / weight.norm()
    assert error < {2: 0.6, 3: 0.25, 4: 0.2, 8: 0.02}[bits]


def test_finer_forms_lose_less() -> None:
    weight = torch.randn(64, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    errors = [float((rounded(weight, f"gptq{bits}_g32") - weight).norm()) for bits in GPTQ_BITS]
    assert errors == sorted(errors, reverse=True)
    assert float((rounded(weight, "nf4") - weight).norm()) < float((rounded(weight, "fp4") - weight).norm())
