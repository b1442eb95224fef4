"""The whole model's ranks and formats at once, by what each costs the loss: a Lagrangian choice over all matrices."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from .budget import Budget, planned, spend_remainder
from .options import ParetoFront, SizeOptions, pareto_front
from .plan import PlannedModule
from .spectra import check_spectrum

if TYPE_CHECKING:
    from torch import Tensor


QuantizationLosses = Mapping[str, Mapping[tuple[str, str], "Tensor"]]
"""What rounding costs, by matrix and `Format.key`, in the units of squared singular values.

A tensor of one number for a structure without rank; otherwise `min(m, n) + 1` numbers, the loss at every rank from 0.
"""


def allocate_globally(
    budget: Budget, spectra: Mapping[str, Tensor] | None = None, losses: QuantizationLosses | None = None
) -> dict[str, PlannedModule]:
    """Minimize the sum over all matrices of `loss_j(k_j) = sum_{i > k_j} s_i^2` within the byte budget.

    A matrix that is not factorized has no truncation loss and its own bytes, so the loss of a matrix is not convex in
    its bytes at the rank where the factors outgrow it. The choice runs along the lower convex hull of each matrix's
    (bytes, loss) points, steepest edge of the whole model first: that is the minimum of `loss + lambda * bytes` for
    every lambda that is passed. What the last edges leave over is spent on single steps.

    `spectra` must be in a metric in which matrices can be compared (`kfac`; in that of the outputs' raw error they
    cannot). What rounding costs is a fixed share of the energy where `losses` does not say. Raises ValueError as
    `check_spectrum` does.
    """
    spectra = spectra or {}
    for options in budget.options.values():
        check_spectrum(options.target, spectra, "global")
    scores = {name: spectra[name].detach().cpu().double().square() for name in budget.options}
    if scores and not any(bool(each.any()) for each in scores.values()):
        raise ValueError(
            "no matrix has an importance score above zero, so that there is nothing to allocate bytes by: the "
            "calibration text excites none of them; calibrate on other text, or choose a method that reads none (svd)"
        )
    return allocate_by_importance(budget, scores, losses)


def allocate_by_importance(
    budget: Budget, scores: Mapping[str, Tensor], losses: QuantizationLosses | None = None
) -> dict[str, PlannedModule]:
    """Keep the most important singular directions, as many of each matrix as the budget is best spent on.

    Every matrix takes whichever of its formats loses least at its bytes.

    Args:
        budget: what `open_budget` returned.
        scores: for every matrix to allocate, what keeping each of its min(m, n) directions takes off the loss; they
            need not fall from one to the next. Below zero counts as zero.
        losses: what rounding costs, where it was measured.
    """
    orders = {name: values.argsort(descending=True, stable=True) for name, values in scores.items()}
    fronts = {}
    for name in budget.options:
        falling = scores[name][orders[name]].clamp_min(0)
        fronts[name] = pareto_front(
            [(options, option_losses(options, falling, losses)) for options in budget.all_options(name)]
        )
    chosen = allocate_by_loss(budget, fronts)
    for name in budget.options:
        rank = chosen[name].rank
        if rank is not None:
            chosen[name] = replace(chosen[name], directions=tuple(sorted(orders[name][:rank].tolist())))
    return chosen


def option_losses(options: SizeOptions, scores: Tensor, losses: QuantizationLosses | None = None) -> list[float]:
    """Return what is lost at every option that keeps the first directions, truncation and rounding.

    The last, the matrix as it is, loses nothing; one that is only rounded loses its share of everything.

    Args:
        options: of one matrix.
        scores: of its min(m, n) directions, float64, none below zero.
        losses: what rounding costs, where it was measured.
    """
    measured = (losses or {}).get(options.target.name, {})
    truncated = torch.cat([scores.flip(0).cumsum(0).flip(0), scores.new_zeros(1)])
    found: list[float] = []
    if options.ranks:
        rounding = measured.get(options.format.key)
        if rounding is None:
            share = options.format.relative_error * scores
            rounding = torch.cat([scores.new_zeros(1), share.cumsum(0)])
        found = (truncated + rounding.to(scores))[list(options.ranks)].tolist()
    for format in options.dense:
        loss = measured.get(format.key)
        found.append(format.relative_error * float(truncated[0]) if loss is None else float(loss))
    return found


def allocate_by_loss(budget: Budget, fronts: Mapping[str, ParetoFront]) -> dict[str, PlannedModule]:
    """Choose the options of all matrices that minimize the sum of their losses within the budget."""
    chosen = dict.fromkeys(fronts, 0)
    left = budget.free_bytes - sum(front.bytes_at(0) for front in fronts.values())
    edges = {name: _hull(front) for name, front in fronts.items()}
    queue = [(-edges[name][0][0], order, name, 0) for order, name in enumerate(fronts) if edges[name]]
    heapq.heapify(queue)
    while queue:
        _, order, name, position = heapq.heappop(queue)
        _, option = edges[name][position]
        cost = fronts[name].bytes_at(option) - fronts[name].bytes_at(chosen[name])
        # An edge that does not fit ends this matrix's walk: what lies beyond would be larger still.
        if cost <= left:
            left -= cost
            chosen[name] = option
            if position + 1 < len(edges[name]):
                heapq.heappush(queue, (-edges[name][position + 1][0], order, name, position + 1))

    def gain_per_byte(name: str, option: int) -> float:
        front = fronts[name]
        if option == len(front) - 1:
            return 0.0
        return (front.losses[option] - front.losses[option + 1]) / (front.sizes[option + 1] - front.sizes[option])

    spend_remainder(fronts, budget.free_bytes, chosen, gain_per_byte)
    return planned(budget, fronts, chosen)


def _hull(front: ParetoFront) -> list[tuple[float, int]]:
    """The lower convex hull of (bytes, loss) from the first option up: `(gain per byte, option)` by edge."""
    hull: list[tuple[int, float, int]] = []
    for option, (size, loss) in enumerate(zip(front.sizes, front.losses, strict=True)):
        while len(hull) >= 2 and _bends_up(hull[-2], hull[-1], (size, loss, option)):
            hull.pop()
        hull.append((size, loss, option))
    return [((before[1] - after[1]) / (after[0] - before[0]), after[2]) for before, after in pairwise(hull)]


def _bends_up(one: tuple[int, float, int], two: tuple[int, float, int], three: tuple[int, float, int]) -> bool:
    """Whether the middle point lies on or above the line between the other two."""
    return (one[1] - two[1]) * (three[0] - one[0]) <= (one[1] - three[1]) * (two[0] - one[0])
