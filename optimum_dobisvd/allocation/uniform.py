"""Uniform allocation: the same fraction of every matrix is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .budget import open_budget, spend
from .patterns import Override
from .plan import PlannedModule, Target

if TYPE_CHECKING:
    from torch import Tensor


def uniform(
    targets: Sequence[Target],
    ratio: float,
    *,
    storage: str,
    overrides: Mapping[str, Override] | None = None,
    rank_multiple: int = 1,
    min_rank: int = 1,
    spectra: Mapping[str, Tensor] | None = None,
) -> dict[str, PlannedModule]:
    """Keeps the same fraction of the bytes of every matrix that has no override, up to the rounding of ranks.

    Args and errors are those of `open_budget`. `spectra` is accepted, as by every allocator, and not used.

    Returns:
        A planned module for every target, in order.
    """
    budget = open_budget(
        targets, ratio, storage=storage, overrides=overrides, rank_multiple=rank_multiple, min_rank=min_rank
    )
    return spend(budget, {name: ladder.target.dense_bytes for name, ladder in budget.ladders.items()})
