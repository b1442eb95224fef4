"""The allocators by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ..registry import Registry
from .budget import Budget
from .global_allocation import QuantizationLosses, allocate_globally
from .plan import PlannedModule
from .svd_llm_v2 import svd_llm_v2
from .uniform import uniform

if TYPE_CHECKING:
    from torch import Tensor


class AllocationFunction(Protocol):
    """A budget in, a planned module for every target out, in order.

    `spectra`: for every matrix to allocate its min(m, n) singular values, descending; an overridden one needs none.
    `losses`: what rounding costs, where it was measured. Allocators may ignore either.
    """

    def __call__(
        self,
        budget: Budget,
        spectra: Mapping[str, Tensor] | None = None,
        losses: QuantizationLosses | None = None,
    ) -> dict[str, PlannedModule]: ...


@dataclass(frozen=True)
class Allocation:
    """One row of the table of allocators.

    Attributes:
        function: the allocator.
        needs_spectra: whether it reads `spectra`, which then have to be computed.
        weighs_loss: whether it compares matrices by what the loss feels of them, so that spectra must be in its units
            (see `Factorization.in_units_of_loss`), and what rounding costs is weighed, too.
        learns: whether its ranks are then learned on the loss, and in which of the two modes of `learning.learn`.
    """

    function: AllocationFunction
    needs_spectra: bool
    weighs_loss: bool = False
    learns: Literal["fixed_basis", "activation"] | None = None


ALLOCATIONS: Registry[Allocation] = Registry("allocation")
ALLOCATIONS.register("uniform", Allocation(uniform, needs_spectra=False))
ALLOCATIONS.register("svd_llm_v2", Allocation(svd_llm_v2, needs_spectra=True))
ALLOCATIONS.register("global", Allocation(allocate_globally, needs_spectra=True, weighs_loss=True))
ALLOCATIONS.register("dobi_activation", Allocation(uniform, needs_spectra=False, learns="activation"))
ALLOCATIONS.register(
    "dobi_fixed_basis", Allocation(allocate_globally, needs_spectra=True, weighs_loss=True, learns="fixed_basis")
)
