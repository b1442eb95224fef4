"""The table of allocators."""

from optimum_dobisvd.allocation.global_allocation import allocate_globally
from optimum_dobisvd.allocation.registry import ALLOCATIONS, Allocation
from optimum_dobisvd.allocation.svd_llm_v2 import svd_llm_v2
from optimum_dobisvd.allocation.uniform import uniform


def test_an_allocation_says_what_it_reads_and_what_it_does() -> None:
    assert {name: ALLOCATIONS.get(name) for name in ALLOCATIONS} == {
        "uniform": Allocation(uniform, needs_spectra=False),
        "svd_llm_v2": Allocation(svd_llm_v2, needs_spectra=True),
        "global": Allocation(allocate_globally, needs_spectra=True, weighs_loss=True),
        "dobi_activation": Allocation(uniform, needs_spectra=False, learns="activation"),
        "dobi_fixed_basis": Allocation(allocate_globally, needs_spectra=True, weighs_loss=True, learns="fixed_basis"),
    }
