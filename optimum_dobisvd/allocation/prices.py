"""The whole model's ranks at once, by what each costs the loss: a Lagrangian choice over all matrices."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from .budget import Budget, Ladder, top_up
from .plan import PlannedModule
from .spectra import check_spectrum

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """What rounding costs one matrix in one storage, in the units of squared singular values.

    `whole`: rounding the matrix as a whole; None where the storage has no such form. `ranks` (`min(m, n)`, float64):
    what rounding each rank of its factors adds; None where it has no factors.
    """

    whole: float | None
    ranks: Tensor | None


Roundings = Mapping[str, Mapping[str, Rounding]]
"""By matrix and storage."""


def global_prices(
    budget: Budget, spectra: Mapping[str, Tensor] | None = None, roundings: Roundings | None = None
) -> dict[str, PlannedModule]:
    """Minimizes the sum over all matrices of `tail_j(k_j) = sum_{i > k_j} s_i^2` within the byte budget.

    A dense matrix has no tail and its own bytes, so the error of a matrix is not convex in its bytes at the rank where
    the factors outgrow it. The choice runs along the lower convex hull of each matrix's (bytes, tail) points, steepest
    edge of the whole model first: that is the minimum of `tail + lambda * bytes` for every lambda that is passed. What
    the last edges leave over is spent on single steps.

    Args:
        budget: what `open_budget` returned.
        spectra: for every matrix to allocate, its min(m, n) singular values, descending, in a metric in which matrices
            can be compared (`kfac`; in that of the outputs' raw error they cannot).
        roundings: what rounding costs, where it was measured; a fixed share of the energy elsewhere.

    Returns:
        A planned module for every target, in order.

    Raises:
        ValueError: a spectrum is missing, not of min(m, n) values, not finite, negative or not descending.
    """
    spectra = spectra or {}
    for ladder in budget.ladders.values():
        check_spectrum(ladder.target, spectra, "global")
    worth = {name: spectra[name].detach().cpu().double().square() for name in budget.ladders}
    if budget.alternatives:
        return allocate_mixture(budget, worth, roundings)
    return allocate_by_worth(budget, worth, roundings)


def allocate_mixture(
    budget: Budget, worth: Mapping[str, Tensor], roundings: Roundings | None = None
) -> dict[str, PlannedModule]:
    """Storage and rank of every matrix: `global_prices` over the sizes that it can take in any of the storages.

    Args:
        budget: what `open_budget` returned for alternative storages.
        worth: for every matrix, what each of its directions is worth, not rising.
        roundings: what rounding costs.
    """
    menus, tails = {}, {}
    for name, ladder in budget.ladders.items():
        choices = []
        for each in (ladder, *budget.alternatives.get(name, ())):
            lost = level_tails(each, worth[name], roundings)
            choices += [(each.bytes_at(level), lost[level], each.module_at(level)) for level in range(len(lost))]
        best: list[tuple[int, float, PlannedModule]] = []
        for choice in sorted(choices, key=lambda choice: choice[:2]):
            if not best or choice[1] < best[-1][1]:  # a larger one must lose less
                best.append(choice)
        menus[name] = Menu(tuple((size, module) for size, _, module in best))
        tails[name] = [lost for _, lost, _ in best]
    return allocate_by_tails(budget, tails, menus)


@dataclass(frozen=True)
class Menu:
    """The sizes one matrix can take and what it becomes there, smallest first: a ladder over several storages."""

    choices: tuple[tuple[int, PlannedModule], ...]

    @property
    def top_level(self) -> int:
        """The last level."""
        return len(self.choices) - 1

    def bytes_at(self, level: int) -> int:
        """Bytes on disk at a level."""
        return self.choices[level][0]

    def module_at(self, level: int) -> PlannedModule:
        """What the matrix becomes at a level."""
        return self.choices[level][1]


def allocate_by_worth(
    budget: Budget, worth: Mapping[str, Tensor], roundings: Roundings | None = None
) -> dict[str, PlannedModule]:
    """Keeps the singular directions that are worth most, as many of each matrix as the budget is best spent on.

    Args:
        budget: what `open_budget` returned.
        worth: for every matrix to allocate, what keeping each of its min(m, n) directions takes off the loss; they
            need not fall from one to the next. Below zero counts as zero.
        roundings: what rounding costs, where it was measured.

    Returns:
        A planned module for every target, in order.
    """
    orders = {name: values.argsort(descending=True, stable=True) for name, values in worth.items()}
    menus, tails = {}, {}
    for name, ladder in budget.ladders.items():
        lost = level_tails(ladder, worth[name][orders[name]].clamp_min(0), roundings)
        # Where the last ranks lose next to nothing, rounding may lose more: a size that a smaller one beats is none.
        levels = [
            level for level, (loss, least) in enumerate(zip(lost, accumulate(lost, min), strict=True)) if loss <= least
        ]
        menus[name] = Menu(tuple((ladder.bytes_at(level), ladder.module_at(level)) for level in levels))
        tails[name] = [lost[level] for level in levels]
    planned = allocate_by_tails(budget, tails, menus)
    for name in budget.ladders:
        rank = planned[name].rank
        if rank is not None:
            planned[name] = replace(planned[name], directions=tuple(sorted(orders[name][:rank].tolist())))
    return planned


def level_tails(ladder: Ladder, worth: Tensor, roundings: Roundings | None = None) -> list[float]:
    """What is lost at every level of a ladder that keeps the first directions, rounding included.

    The last, the matrix as it is, loses nothing; one rounded as a whole loses its share of everything.

    Args:
        ladder: of one matrix.
        worth: of its min(m, n) directions, float64, none below zero.
        roundings: what rounding costs, where it was measured.
    """
    measured = (roundings or {}).get(ladder.target.name, {})
    tails = torch.cat([worth.flip(0).cumsum(0).flip(0), worth.new_zeros(1)])
    total = float(tails[0])
    found: list[float] = []
    if ladder.dense_level:
        price = measured.get(ladder.storage.name)
        by_rank = ladder.storage.lost_share * worth if price is None or price.ranks is None else price.ranks
        lost = tails + torch.cat([worth.new_zeros(1), by_rank.to(worth).cumsum(0)])
        ranks = [ladder.lowest_rank + level * ladder.rank_step for level in range(ladder.dense_level)]
        found = lost[ranks].tolist()
    for form in ladder.dense_forms:
        price = measured.get(form.name)
        found.append(form.lost_share * total if price is None or price.whole is None else price.whole)
    return found


def allocate_by_tails(
    budget: Budget, tails: Mapping[str, Sequence[float]], ladders: Mapping[str, Menu]
) -> dict[str, PlannedModule]:
    """Levels of these menus that minimize the sum of `tails` (by name and level, not rising) within the budget."""
    levels = dict.fromkeys(ladders, 0)
    left = budget.free_bytes - sum(ladder.bytes_at(0) for ladder in ladders.values())
    edges = {name: _hull(ladder, tails[name]) for name, ladder in ladders.items()}
    queue = [(-edges[name][0][0], order, name, 0) for order, name in enumerate(ladders) if edges[name]]
    heapq.heapify(queue)
    while queue:
        _, order, name, position = heapq.heappop(queue)
        _, level = edges[name][position]
        cost = ladders[name].bytes_at(level) - ladders[name].bytes_at(levels[name])
        # An edge that does not fit ends this matrix's walk: what lies beyond would be larger still.
        if cost <= left:
            left -= cost
            levels[name] = level
            if position + 1 < len(edges[name]):
                heapq.heappush(queue, (-edges[name][position + 1][0], order, name, position + 1))

    def gain_per_byte(name: str, level: int) -> float:
        if level == ladders[name].top_level:
            return 0.0
        cost = ladders[name].bytes_at(level + 1) - ladders[name].bytes_at(level)
        gain = tails[name][level] - tails[name][level + 1]
        return gain / cost if cost else float("inf")

    top_up(ladders, budget.free_bytes, levels, gain_per_byte)
    planned = budget.settled | {name: ladder.module_at(levels[name]) for name, ladder in ladders.items()}
    return {name: planned[name] for name in budget.names}


def _hull(ladder: Menu, tails: Sequence[float]) -> list[tuple[float, int]]:
    """The lower convex hull of (bytes, tail) from level 0 up: `(gain per byte, level)` of its edges' far ends."""
    hull: list[tuple[int, float, int]] = []
    for level, tail in enumerate(tails):
        size = ladder.bytes_at(level)
        if hull and size == hull[-1][0]:
            hull.pop()  # the higher level costs the same
        while len(hull) >= 2 and _bends_up(hull[-2], hull[-1], (size, tail, level)):
            hull.pop()
        hull.append((size, tail, level))
    return [((before[1] - after[1]) / (after[0] - before[0]), after[2]) for before, after in pairwise(hull)]


def _bends_up(one: tuple[int, float, int], two: tuple[int, float, int], three: tuple[int, float, int]) -> bool:
    """Whether the middle point lies on or above the line between the other two."""
    return (one[1] - two[1]) * (three[0] - one[0]) <= (one[1] - three[1]) * (two[0] - one[0])
