"""Dobi-SVD's optimizer: Adam on real ranks, within a byte budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..allocation.budget import Budget, spend
from ..allocation.options import SizeOptions
from ..allocation.plan import PlannedModule, planned_bytes
from ..allocation.rank_training import RankTraining
from .activation import ActivationTruncation
from .fixed_basis import FixedBasis
from .rank_optimizer import check_gradient, require_ranks

SHARPEST = 10.0
"""The paper's `beta`, per rank."""

_WIDTH = (0.05, 0.02)
"""Softness of the gates in the first and in the last step, as shares of the largest useful rank."""

HARD = 50.0
"""A sharpness at which the gates are a step: all 0 or 1."""


class AdamRankOptimizer:
    """Adam with a cosine schedule on real ranks, projected onto the budget after every step (Dobi-SVD).

    A matrix that starts dense stays dense: from its largest useful rank no gradient leads to the dense weight. The
    ranks of the others lie between the smallest allowed and the largest useful one, and their bytes always sum to what
    the dense ones leave of the budget: the mean gradient per byte is subtracted, and after a step all shares are
    shifted alike until the sum is right again. Overridden matrices keep their rank, with gates that are a step.

    `start` has a planned module for every target. ValueError if no matrix has a rank to learn.
    """

    _MOMENTS = (0.9, 0.95)
    _RATE = 0.02

    def __init__(
        self,
        objective: FixedBasis | ActivationTruncation,
        budget: Budget,
        start: Mapping[str, PlannedModule],
        settings: RankTraining,
    ) -> None:
        self._objective, self._budget, self._settings = objective, budget, settings
        self._fixed = {name: module.rank for name, module in start.items() if name not in budget.options}
        require_ranks(budget, start)
        options = {
            name: next(each for each in budget.all_options(name) if each.format.key == start[name].format.key)
            for name in budget.options
            if start[name].rank is not None
        }
        self._names = list(options)
        self._largest = _vector(each.ranks[-1] for each in options.values())
        self._curves = [_SizeCurve(each) for each in options.values()]
        self._lowest = _vector(each.ranks[0] for each in options.values()) / self._largest
        dense = {name: start[name] for name in budget.options if name not in options}
        taken = sum(planned_bytes(budget.options[name].target, module) for name, module in dense.items())
        self._sliding = replace(
            budget, fixed=budget.fixed | dense, options=options, free_bytes=budget.free_bytes - taken, alternatives={}
        )
        self._bytes = float(self._sliding.free_bytes)
        self._shares = self._held(_vector(start[name].rank for name in options) / self._largest)
        self._first, self._second = torch.zeros_like(self._shares), torch.zeros_like(self._shares)

    def ranks(self) -> dict[str, float | None]:
        real: dict[str, float | None] = dict.fromkeys(self._budget.options)
        return real | dict(zip(self._names, (self._shares * self._largest).tolist(), strict=True))

    def step(self, step: int, ids: Tensor, mask: Tensor) -> float:
        betas = dict(zip(self._names, _betas(self._settings, step, self._largest), strict=True))
        ranks = {**self._fixed, **self.ranks()}
        loss, slopes = self._objective.loss_and_slopes(ranks, {**dict.fromkeys(ranks, HARD), **betas}, ids, mask)
        check_gradient({name: slopes.get(name, 0.0) for name in self._names})
        self._move(step, slopes)
        return loss

    def _move(self, step: int, slopes: Mapping[str, float]) -> None:
        ranks = (self._shares * self._largest).tolist()
        cost = _vector(curve.slope(rank) for curve, rank in zip(self._curves, ranks, strict=True))
        per_byte = _vector(slopes[name] for name in self._names) / cost
        weight = cost * self._largest
        # The part common to all bytes would only change their sum, which is fixed.
        excess = per_byte - (per_byte * weight).sum() / weight.sum()
        self._first = self._MOMENTS[0] * self._first + (1 - self._MOMENTS[0]) * excess
        self._second = self._MOMENTS[1] * self._second + (1 - self._MOMENTS[1]) * excess.square()
        corrected = self._first / (1 - self._MOMENTS[0] ** (step + 1))
        scale = (self._second / (1 - self._MOMENTS[1] ** (step + 1))).sqrt()
        rate = (self._settings.learning_rate or self._RATE) * (1 + math.cos(math.pi * step / self._settings.steps)) / 2
        self._shares = self._held(self._shares - rate * corrected / scale.clamp_min(1e-300))

    def planned(self) -> dict[str, PlannedModule]:
        sizes = self._sizes(self._shares).tolist()
        return spend(self._sliding, {name: max(1, round(size)) for name, size in zip(self._names, sizes, strict=True)})

    def state(self) -> dict[str, Tensor]:
        return {"shares": self._shares, "first": self._first, "second": self._second}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._shares, self._first, self._second = (state[key] for key in ("shares", "first", "second"))

    def _sizes(self, shares: Tensor) -> Tensor:
        ranks = (shares * self._largest).tolist()
        return _vector(curve.bytes(rank) for curve, rank in zip(self._curves, ranks, strict=True))

    def _held(self, shares: Tensor) -> Tensor:
        """Shift all shares alike until their bytes sum to the budget, each clipped to its limits."""

        def shifted(by: float) -> Tensor:
            return torch.minimum(torch.maximum(shares + by, self._lowest), torch.ones_like(shares))

        low, high = -2.0, 2.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self._sizes(shifted(middle)).sum()) <= self._bytes else (low, middle)
        return shifted(low)


class _SizeCurve:
    """The bytes of one matrix at real ranks: for some structures a rank costs the less the more there are."""

    def __init__(self, options: SizeOptions) -> None:
        count = len(options.ranks)
        self._ranks, self._sizes = np.array(options.ranks, dtype=float), np.array(options.sizes()[:count], dtype=float)

    def bytes(self, rank: float) -> float:
        return float(np.interp(rank, self._ranks, self._sizes))

    def slope(self, rank: float) -> float:
        """Bytes per rank, over one step of ranks."""
        if len(self._ranks) == 1:
            return float(self._sizes[0] / self._ranks[0])
        half = (self._ranks[1] - self._ranks[0]) / 2
        middle = min(max(rank, self._ranks[0] + half), self._ranks[-1] - half)
        return (self.bytes(middle + half) - self.bytes(middle - half)) / (2 * half)


def _betas(settings: RankTraining, step: int, largest: Tensor) -> list[float]:
    """Return the sharpness of every matrix's gates, per rank; softness decays geometrically over the steps."""
    begin, end = settings.width or _WIDTH
    width = begin * (end / begin) ** (step / max(1, settings.steps - 1))
    return (1 / (width * largest)).clamp_max(SHARPEST).tolist()


def _vector(values: Any) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)
