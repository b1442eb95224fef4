"""Ours: which singular directions are kept, by what each is measured to be worth to the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..allocation.budget import Budget
from ..allocation.global_allocation import allocate_by_importance
from ..allocation.plan import PlannedModule
from ..allocation.spectra import check_spectrum
from .rank_optimizer import NoGradientError, check_gradient, require_ranks


class Measurable(Protocol):
    """The loss as a function of which directions are kept."""

    def loss_and_gains(
        self, planned: Mapping[str, PlannedModule], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, Tensor]]: ...


class DirectionOptimizer:
    """The price list of `global`, corrected direction by direction.

    K-FAC says that direction `i` of a matrix is worth `s_i` nats per token (its squared singular value). At a
    truncated model the loss tells better: `gain_i = -dLoss/dt_i` of a gate that is open (`t_i = 1`, kept) or shut is
    what it is worth but for the curvature, `score_i = gain_i + (2 t_i - 1) c s_i`. Here `c s_i` is the second-order
    term as K-FAC has it, and `c` what that is off by: where the kept directions of all matrices end, worth must not
    jump, and `c` is what makes it so.

    One batch measures every direction, with much noise: a direction's worth is mostly what its matrix's other
    directions near the border say (`f s_i`, with one factor `f` a matrix), corrected by its own mean as far as the
    spread of these means is more than their noise (empirical Bayes), and at most by `_TRUST`. What directions are
    worth depends on which others are kept; the limit keeps the choice where the measurements were taken, and older
    ones decay. Ranks and kept directions are then chosen anew from all worths, as `global` chooses them.

    Args:
        objective: gives losses and gains.
        budget: what the ranks may weigh.
        start: a planned module for every target.
        spectra: singular values in the metric `kfac`, so that their squares are nats per token.

    Raises:
        ValueError: no matrix has a rank to learn; a spectrum is missing.
    """

    _HORIZON = 10.0  # steps after which a measurement weighs 1/e
    _PRIOR = 1.0  # measurements that K-FAC's own price counts for in a matrix's factor
    _FARTHEST = 16.0  # of a matrix's factor
    _TRUST = 0.5  # of the logarithm of a direction's worth, off its matrix's factor
    _LEAST = 0.02  # what directions must be worth on average, of K-FAC's price: less is noise
    _MOST_STALE_STEPS = 5
    _CURVATURE_STEPS = 4  # later the kept directions near the border are chosen for their gains, which hides the jump

    def __init__(
        self,
        objective: Measurable,
        budget: Budget,
        start: Mapping[str, PlannedModule],
        spectra: Mapping[str, Tensor],
    ) -> None:
        require_ranks(budget, start)
        for options in budget.options.values():
            check_spectrum(options.target, spectra, "dobi_fixed_basis")
        self._objective, self._budget = objective, budget
        self._prices = {name: spectra[name].detach().cpu().double().square() for name in budget.options}
        self._largest = {name: each.ranks[-1] if each.ranks else 0 for name, each in budget.options.items()}
        self._sums = {name: torch.zeros_like(prices) for name, prices in self._prices.items()}
        self._squares = {name: torch.zeros_like(prices) for name, prices in self._prices.items()}
        # By matrix, in the order of the budget: measured and expected worth of the directions near its border.
        self._borders = torch.zeros(2, len(self._prices), dtype=torch.float64)
        self._weights = torch.zeros(2, dtype=torch.float64)  # sums of the measurements' weights and of their squares
        self._curvature = torch.zeros(2, dtype=torch.float64)  # a sum and how many
        self._stale_steps = torch.zeros(1, dtype=torch.float64)  # steps in a row that said nothing
        self._planned = dict(start)

    def ranks(self) -> dict[str, float | None]:
        found = {name: self._planned[name].rank for name in self._prices}
        return {name: None if rank is None else float(rank) for name, rank in found.items()}

    def planned(self) -> dict[str, PlannedModule]:
        return dict(self._planned)

    def step(self, step: int, ids: Tensor, mask: Tensor) -> float:
        loss, gains = self._objective.loss_and_gains(self._planned, ids, mask)
        gains = {name: gains[name] for name in self._prices}
        check_gradient({name: float(found.abs().sum()) for name, found in gains.items()})
        kept = {name: _kept(self._planned[name], len(prices)) for name, prices in self._prices.items()}
        if step < self._CURVATURE_STEPS:
            self._curvature += torch.tensor([self._jump(gains, kept), 1.0])
        curvature = min(max(float(self._curvature[0] / self._curvature[1]), 0.0), 1.0)
        decay = 1 - 1 / self._HORIZON
        self._weights = self._weights * torch.tensor([decay, decay**2], dtype=torch.float64) + 1
        borders = []
        for name, prices in self._prices.items():
            measured = gains[name] + curvature * (2 * kept[name] - 1) * prices
            self._sums[name] = decay * self._sums[name] + measured
            self._squares[name] = decay * self._squares[name] + measured.square()
            border = self._border(name)
            borders.append([float(measured[border].mean()), float(prices[border].mean())])
        self._borders = decay * self._borders + torch.tensor(borders, dtype=torch.float64).T
        scores = self._importance()
        if scores is not None:
            self._planned = allocate_by_importance(self._budget, scores)
        self._stale_steps = torch.zeros_like(self._stale_steps) if scores is not None else self._stale_steps + 1
        if float(self._stale_steps) >= self._MOST_STALE_STEPS:
            raise NoGradientError(
                f"by {self._MOST_STALE_STEPS} batches in a row the directions at the border of what is kept are worth "
                "next to nothing, so there is nothing to choose by; take more windows a step, or a ratio further from 1"
            )
        return loss

    def _importance(self) -> dict[str, Tensor] | None:
        """What every direction is worth, up to one scale; None where the measurements say that nothing is."""
        sizes = torch.tensor([float(size) for size in self._largest.values()], dtype=torch.float64)
        measured, expected = (self._borders * sizes).sum(1).tolist()
        if not measured > self._LEAST * expected > 0:
            return None
        common = measured / expected
        total, squared = self._weights.tolist()
        count = total**2 / squared
        scores = {}
        for place, (name, prices) in enumerate(self._prices.items()):
            border = self._border(name)
            found, listed = self._borders[:, place].tolist()
            price = float(prices[border].mean())
            if not price > 0:  # a matrix that calibration never excites
                scores[name] = prices
                continue
            factor = (found / common + self._PRIOR * price) / (listed + self._PRIOR * price)
            factor = min(max(factor, 1 / self._FARTHEST), self._FARTHEST)
            matrix = factor * prices
            if count > 1.5:
                mean = self._sums[name] / total / common
                spread = (self._squares[name] / total / common**2 - mean.square()).clamp_min(0)
                noise = spread / (count - 1)
                own = _own_share(mean, noise, prices, border)
                limit = math.exp(self._TRUST)
                scores[name] = (matrix + own * (mean - matrix)).clamp(matrix / limit, matrix * limit)
            else:
                scores[name] = matrix
        return scores

    def _border(self, name: str) -> Tensor:
        """The directions among which a matrix's border lies; of a dense matrix those that it would lose first."""
        rank = self._planned[name].rank
        number = torch.arange(1, len(self._prices[name]) + 1)
        if rank is None:
            return number > 0.75 * self._largest[name]
        return (number > rank / 2) & (number <= 1.5 * rank + 4)

    def _jump(self, gains: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> float:
        """Half of what the gains, in units of the price list, rise by where the kept directions end."""
        sums = {True: [0.0, 0.0], False: [0.0, 0.0]}
        for name, prices in self._prices.items():
            rank = self._planned[name].rank
            if rank is None:
                continue
            number = torch.arange(1, len(prices) + 1)
            near = (number > 0.75 * rank) & (number <= 1.25 * rank + 2)
            for inside, total in sums.items():
                chosen = near & (kept[name].bool() == inside)
                total[0] += float(gains[name][chosen].sum())
                total[1] += float(prices[chosen].sum())
        if not (sums[True][1] > 0 and sums[False][1] > 0):
            return 0.0
        return (sums[False][0] / sums[False][1] - sums[True][0] / sums[True][1]) / 2

    def state(self) -> dict[str, Tensor]:
        found = {"borders": self._borders, "weights": self._weights, "curvature": self._curvature}
        found["stale_steps"] = self._stale_steps
        for name, prices in self._prices.items():
            planned = self._planned[name]
            if planned.rank is None:
                kept = prices.new_full((len(prices),), -1.0 - self._dense_encodings(name).index(planned.encoding))
            else:
                kept = _kept(planned, len(prices))
            found[name] = torch.stack([self._sums[name], self._squares[name], kept])
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._borders, self._weights, self._curvature = (state[key] for key in ("borders", "weights", "curvature"))
        self._stale_steps = state["stale_steps"]
        for name, options in self._budget.options.items():
            self._sums[name], self._squares[name], kept = state[name]
            if float(kept[0]) < 0:
                self._planned[name] = PlannedModule("dense", self._dense_encodings(name)[-1 - int(kept[0])])
            else:
                chosen = tuple(kept.nonzero().flatten().tolist())
                self._planned[name] = PlannedModule(*options.format.key, len(chosen), chosen)

    def _dense_encodings(self, name: str) -> list[str]:
        return [format.encoding.name for format in self._budget.options[name].dense]


def _kept(module: PlannedModule, count: int) -> Tensor:
    """1 where a direction is kept, 0 elsewhere."""
    if module.rank is None:
        return torch.ones(count, dtype=torch.float64)
    found = torch.zeros(count, dtype=torch.float64)
    found[list(module.kept)] = 1
    return found


def _own_share(mean: Tensor, noise: Tensor, prices: Tensor, border: Tensor) -> Tensor:
    """How much of a direction's own mean to believe: the variance of what directions are worth over that of the means.

    Both relative to the price list and over the directions at the border; the noise of a mean goes with the price
    itself (the gradient of a direction that is worth more is larger), so relative to it the small ones are noisier.
    """
    near = border & (prices > 1e-9 * prices[0])  # below, prices are the rounding errors of a singular Gram
    relative = (mean / prices)[near]
    if len(relative) < 2:
        return torch.zeros_like(prices)
    noisy = float((noise / prices.square())[near].mean())
    real = max(float(relative.var()) - noisy, 0.01)
    return real / (real + noisy * float(prices[near].mean()) / prices.clamp_min(1e-300))
