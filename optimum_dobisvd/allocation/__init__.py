"""Which rank each matrix gets for a byte budget. Numbers and spectra only: no model, no module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from .budget import Budget, open_budget
from .patterns import Override, matching_names, resolve_overrides, select
from .plan import Plan, PlannedModule
from .prices import global_prices
from .svd_llm_v2 import svd_llm_v2
from .target import Target
from .uniform import uniform

if TYPE_CHECKING:
    from torch import Tensor


class AllocationFunction(Protocol):
    """A budget and, where the allocator reads them, spectra in; a planned module for every target out."""

    def __call__(self, budget: Budget, spectra: Mapping[str, Tensor] | None = None) -> dict[str, PlannedModule]: ...


@dataclass(frozen=True)
class Allocation:
    """One row of the table of allocators.

    Attributes:
        name: what configs and plans call it.
        function: the allocator.
        needs_spectra: whether it reads `spectra`, which then have to be computed.
        learns: whether its ranks are then learned on the loss, and in which of the two modes of `learning.learn`.
    """

    name: str
    function: AllocationFunction
    needs_spectra: bool
    learns: Literal["fixed_basis", "activation"] | None = None


ALLOCATIONS: dict[str, Allocation] = {}


def register_allocation(allocation: Allocation) -> None:
    """Adds an allocator to `ALLOCATIONS`.

    Raises:
        ValueError: the name is taken.
    """
    if allocation.name in ALLOCATIONS:
        raise ValueError(f"allocation {allocation.name!r} is already registered; choose another name")
    ALLOCATIONS[allocation.name] = allocation


def allocation_named(name: str) -> Allocation:
    """The registered allocator of that name.

    Raises:
        ValueError: there is none; the message lists the names there are.
    """
    if name not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {name!r}; known allocations: {', '.join(sorted(ALLOCATIONS))}")
    return ALLOCATIONS[name]


register_allocation(Allocation("uniform", uniform, needs_spectra=False))
register_allocation(Allocation("svd_llm_v2", svd_llm_v2, needs_spectra=True))
register_allocation(Allocation("global", global_prices, needs_spectra=True))
register_allocation(Allocation("dobi_activation", uniform, needs_spectra=False, learns="activation"))
register_allocation(Allocation("dobi_fixed_basis", global_prices, needs_spectra=True, learns="fixed_basis"))


__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "AllocationFunction",
    "Budget",
    "Override",
    "Plan",
    "PlannedModule",
    "Target",
    "allocation_named",
    "global_prices",
    "matching_names",
    "open_budget",
    "register_allocation",
    "resolve_overrides",
    "select",
    "svd_llm_v2",
    "uniform",
]
