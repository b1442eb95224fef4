"""A rank optimizer that keeps the singular directions measured to be most important to the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..allocation.budget import Budget
from ..allocation.global_allocation import allocate_by_importance
from ..allocation.plan import PlannedModule
from ..allocation.spectra import check_spectrum
from ..structures.registry import STRUCTURES
from .fixed_basis import FixedBasis
from .rank_optimizer import NoGradientError, check_gradient, require_ranks


class DirectionOptimizer:
    """Importance scores of K-FAC, corrected direction by direction by measurements at the truncated model.

    K-FAC says that dropping direction `i` of a matrix costs `s_i` nats per token, its squared singular value. The
    gradient at the truncated model says it better. With a gate `t_i` on every direction (1: kept, 0: dropped),
    `gain_i = -dLoss/dt_i` is its importance to first order, and `gain_i + (2 t_i - 1) c s_i` to second order: `c s_i`
    is the curvature by K-FAC, which `c`, one number from 0 to 1 for the whole model, corrects. Importance must not
    jump where the kept directions end, and that determines `c`.

    One batch measures every direction, with much noise. So the importance of a direction is mostly what the other
    directions near its matrix's border say (`f s_i`, with one factor `f` per matrix). Its own mean corrects that as
    far as the means vary by more than their noise (empirical Bayes), and by at most a factor of `exp(_TRUST)`. The
    importance of a direction depends on which others are kept: the limit keeps the choice near where it was measured,
    and old measurements decay. Ranks and directions are then chosen from all scores as allocation `global` does.

    `start` has a planned module for every target, `spectra` the `min(m, n)` singular values by name in the metric
    `kfac`: their squares are nats per token. ValueError if no matrix has a rank to learn, or a spectrum is missing.
    """

    _HORIZON = 10.0  # steps after which the weight of a measurement has decayed to 1/e
    _PRIOR = 1.0  # how many measurements K-FAC's own score counts as in a matrix's factor
    _LARGEST_FACTOR = 16.0  # limit of a matrix's factor, and of its inverse
    _TRUST = 0.5  # limit of how far a direction's log importance may be from its matrix's
    _LEAST = 0.02  # smallest measured importance at the borders, as a share of K-FAC's: below it all is noise
    _MOST_STALE_STEPS = 5  # in a row, before the training ends
    _CURVATURE_STEPS = 4  # later, directions near the border have been chosen for their gains, which hides the jump

    def __init__(
        self, objective: FixedBasis, budget: Budget, start: Mapping[str, PlannedModule], spectra: Mapping[str, Tensor]
    ) -> None:
        require_ranks(budget, start)
        for options in budget.options.values():
            check_spectrum(options.target, spectra, "dobi_fixed_basis")
        self._objective, self._budget = objective, budget
        self._scores = {name: spectra[name].detach().cpu().double().square() for name in budget.options}
        self._largest = {name: _largest_rank(budget, name) for name in budget.options}
        # Sums of every direction's measurements and of their squares, `2 x min(m, n)`.
        self._sums = {name: scores.new_zeros(2, len(scores)) for name, scores in self._scores.items()}
        # Mean importance near the border by matrix, in the order of the budget: measured, and by K-FAC.
        self._borders = torch.zeros(2, len(self._scores), dtype=torch.float64)
        self._weights = torch.zeros(2, dtype=torch.float64)  # sums of the measurements' weights and of their squares
        self._curvature = torch.zeros(2, dtype=torch.float64)  # sum of the estimates of `c`, and how many
        self._stale_steps = torch.zeros(1, dtype=torch.float64)  # steps in a row that measured nothing but noise
        self._planned = dict(start)

    def ranks(self) -> dict[str, float | None]:
        found = {name: self._planned[name].rank for name in self._scores}
        return {name: None if rank is None else float(rank) for name, rank in found.items()}

    def planned(self) -> dict[str, PlannedModule]:
        return dict(self._planned)

    def step(self, step: int, ids: Tensor, mask: Tensor) -> float:
        loss, gains = self._objective.loss_and_gains(self._planned, ids, mask)
        gains = {name: gains[name] for name in self._scores}
        check_gradient({name: float(found.abs().sum()) for name, found in gains.items()})
        kept = {name: _kept(self._planned[name], len(scores)) for name, scores in self._scores.items()}
        if step < self._CURVATURE_STEPS:
            self._curvature += torch.tensor([self._jump(gains, kept), 1.0])
        curvature = min(max(float(self._curvature[0] / self._curvature[1]), 0.0), 1.0)
        decay = 1 - 1 / self._HORIZON
        self._weights = self._weights * torch.tensor([decay, decay**2], dtype=torch.float64) + 1
        borders = []
        for name, scores in self._scores.items():
            measured = gains[name] + curvature * (2 * kept[name] - 1) * scores
            self._sums[name] = decay * self._sums[name] + torch.stack([measured, measured.square()])
            border = self._border(name)
            borders.append([float(measured[border].mean()), float(scores[border].mean())])
        self._borders = decay * self._borders + torch.tensor(borders, dtype=torch.float64).T
        importance = self._importance()
        if importance is not None:
            self._planned = allocate_by_importance(self._budget, importance)
        self._stale_steps = torch.zeros_like(self._stale_steps) if importance is not None else self._stale_steps + 1
        if float(self._stale_steps) >= self._MOST_STALE_STEPS:
            raise NoGradientError(
                f"by {self._MOST_STALE_STEPS} batches in a row the directions at the border of what is kept have next "
                "to no importance to the loss, so there is nothing to choose by; take more windows a step, or a ratio "
                "further from 1"
            )
        return loss

    def _importance(self) -> dict[str, Tensor] | None:
        """Return importance scores of all directions, up to one scale; None where the measurements are only noise."""
        sizes = torch.tensor([float(size) for size in self._largest.values()], dtype=torch.float64)
        measured, expected = (self._borders * sizes).sum(1).tolist()
        if not measured > self._LEAST * expected > 0:
            return None
        common = measured / expected
        total, squared = self._weights.tolist()
        count = total**2 / squared
        importance = {}
        for place, (name, scores) in enumerate(self._scores.items()):
            border = self._border(name)
            found, listed = self._borders[:, place].tolist()
            score = float(scores[border].mean())
            if not score > 0:  # a matrix that calibration never excites
                importance[name] = scores
                continue
            factor = (found / common + self._PRIOR * score) / (listed + self._PRIOR * score)
            factor = min(max(factor, 1 / self._LARGEST_FACTOR), self._LARGEST_FACTOR)
            importance[name] = matrix = factor * scores
            if count > 1.5:
                mean, squares = self._sums[name][0] / total / common, self._sums[name][1] / total / common**2
                spread = (squares - mean.square()).clamp_min(0)
                noise = spread / (count - 1)
                own = _own_share(mean, noise, scores, border)
                limit = math.exp(self._TRUST)
                importance[name] = (matrix + own * (mean - matrix)).clamp(matrix / limit, matrix * limit)
        return importance

    def _border(self, name: str) -> Tensor:
        """Return which directions are near a matrix's border, `min(m, n)` booleans; of a dense one, the last."""
        rank = self._planned[name].rank
        number = torch.arange(1, len(self._scores[name]) + 1)
        if rank is None:
            return number > 0.75 * self._largest[name]
        return (number > rank / 2) & (number <= 1.5 * rank + 4)

    def _jump(self, gains: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> float:
        """Return half of the step up of the gains, in units of K-FAC's scores, where the kept directions end."""
        sums = torch.zeros(2, 2, dtype=torch.float64)  # gains and scores, outside and inside
        for name, scores in self._scores.items():
            rank = self._planned[name].rank
            if rank is None:
                continue
            number = torch.arange(1, len(scores) + 1)
            near = (number > 0.75 * rank) & (number <= 1.25 * rank + 2)
            for side in (0, 1):
                chosen = near & (kept[name] == side)
                sums[side] += torch.stack([gains[name][chosen].sum(), scores[chosen].sum()])
        outside, inside = (sums[:, 0] / sums[:, 1]).tolist()
        return (outside - inside) / 2 if bool((sums[:, 1] > 0).all()) else 0.0

    def state(self) -> dict[str, Tensor]:
        found = {"borders": self._borders, "weights": self._weights, "curvature": self._curvature}
        found["stale_steps"] = self._stale_steps
        places = [self._formats(name).index(self._planned[name].format.key) for name in self._scores]
        found["formats"] = torch.tensor(places)
        for name, scores in self._scores.items():
            found[name] = torch.stack([*self._sums[name], _kept(self._planned[name], len(scores))])
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._borders, self._weights, self._curvature = (state[key] for key in ("borders", "weights", "curvature"))
        self._stale_steps = state["stale_steps"]
        for name, place in zip(self._budget.options, state["formats"].tolist(), strict=True):
            self._sums[name], kept = state[name][:2], state[name][2]
            structure, encoding = self._formats(name)[place]
            chosen = tuple(kept.nonzero().flatten().tolist()) if STRUCTURES.get(structure).has_rank else None
            rank = None if chosen is None else len(chosen)
            self._planned[name] = PlannedModule(structure, encoding, rank, chosen)

    def _formats(self, name: str) -> list[tuple[str, str]]:
        """Return the keys of the formats that a matrix can have."""
        found = self._budget.all_options(name)
        return [*(each.format.key for each in found), *(format.key for each in found for format in each.dense)]


def _largest_rank(budget: Budget, name: str) -> int:
    return max((each.ranks[-1] for each in budget.all_options(name) if each.ranks), default=0)


def _kept(module: PlannedModule, count: int) -> Tensor:
    """Return 1 for every kept direction and 0 for the others, `count` numbers (float64)."""
    found = torch.full((count,), float(module.rank is None), dtype=torch.float64)
    if module.rank is not None:
        found[list(module.kept)] = 1
    return found


def _own_share(mean: Tensor, noise: Tensor, scores: Tensor, border: Tensor) -> Tensor:
    """Return how far to believe each direction's own mean, 0 to 1: real variance over real variance and noise.

    Both are relative to K-FAC's scores and estimated near the border. The noise of a mean is proportional to the score
    (the gradient of an important direction is larger), so relative to it unimportant directions are noisier.

    `mean` is the measured importance of every direction, `noise` the variance of each of these means, `scores` are
    K-FAC's in descending order, and `border` says which directions are near it.
    """
    near = border & (scores > 1e-9 * scores[0])  # below, scores are the rounding errors of a singular Gram
    relative = (mean / scores)[near]
    if len(relative) < 2:
        return torch.zeros_like(scores)
    noisy = float((noise / scores.square())[near].mean())
    real = max(float(relative.var()) - noisy, 0.01)
    return real / (real + noisy * float(scores[near].mean()) / scores.clamp_min(1e-300))
