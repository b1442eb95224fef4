"""Two ways to move ranks along the derivative of the loss within a byte budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..allocation.budget import Budget, Ladder, spend
from ..allocation.plan import PlannedModule
from ..allocation.prices import allocate_by_tails, level_tails
from ..allocation.spectra import check_spectrum
from .gates import slopes as slopes_of
from .settings import RankTraining

SHARPEST = 10.0
"""The paper's beta."""


class Mover(Protocol):
    """Ranks that know how to follow a gradient; everything in it is for the matrices of `Budget.ladders`."""

    def ranks(self) -> dict[str, float | None]:
        """Where the next derivative is to be taken; None is dense."""

    def betas(self, step: int) -> dict[str, float]:
        """Sharpness of the gates there, per rank."""

    def move(self, step: int, slopes: Mapping[str, float]) -> None:
        """Follow the derivatives of the loss (nats per token) by the ranks that are not dense."""

    def planned(self) -> dict[str, PlannedModule]:
        """Whole ranks within the budget, for every target."""

    def state(self) -> dict[str, Any]:
        """All that the next move depends on, as JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave. KeyError or TypeError where it was not that."""


class AdamMover:
    """Dobi-SVD's: Adam with a cosine schedule on real ranks, projected onto the budget after every step.

    A matrix that starts dense stays so: between its largest useful rank and the dense weight there is nothing to slide
    along. The others' ranks lie between the smallest allowed and the largest useful one, and their bytes always add up
    to what the dense ones leave of the budget: the part of the gradient that all bytes have in common is taken off,
    and what a step changes in the sum is put right by a shift of all shares.
    """

    _MOMENTS = (0.9, 0.95)
    _RATE = 0.02

    def __init__(self, budget: Budget, start: Mapping[str, PlannedModule], settings: RankTraining) -> None:
        self._budget, self._settings = budget, settings
        ranks = {name: start[name].rank for name in budget.ladders}
        ladders = {name: ladder for name, ladder in budget.ladders.items() if ranks[name] is not None}
        if not ladders:
            raise ValueError("no matrix has a rank to learn: all are dense or overridden; lower ratio")
        self._names = list(ladders)
        self._largest = _vector(largest_rank(ladder) for ladder in ladders.values())
        self._cost = _vector(bytes_per_rank(ladder) for ladder in ladders.values())
        self._lowest = _vector(each.lowest_rank for each in ladders.values()) / self._largest
        dense = {name: start[name] for name, rank in ranks.items() if rank is None}
        taken = sum(budget.ladders[name].target.dense_bytes for name in dense)
        self._sliding = replace(
            budget, settled=budget.settled | dense, ladders=ladders, free_bytes=budget.free_bytes - taken
        )
        self._bytes = float(self._sliding.free_bytes)
        self._shares = self._held(_vector(ranks[name] or 0 for name in ladders) / self._largest)
        self._first = torch.zeros_like(self._shares)
        self._second = torch.zeros_like(self._shares)

    def ranks(self) -> dict[str, float | None]:
        real: dict[str, float | None] = dict.fromkeys(self._budget.ladders)
        return real | dict(zip(self._names, (self._shares * self._largest).tolist(), strict=True))

    def betas(self, step: int) -> dict[str, float]:
        return dict(zip(self._names, betas_of(self._settings, step, self._largest), strict=True))

    def move(self, step: int, slopes: Mapping[str, float]) -> None:
        per_byte = _vector(slopes[name] for name in self._names) / self._cost
        weight = self._cost * self._largest
        # What all bytes have in common buys nothing: they are all spent already.
        excess = per_byte - (per_byte * weight).sum() / weight.sum()
        self._first = self._MOMENTS[0] * self._first + (1 - self._MOMENTS[0]) * excess
        self._second = self._MOMENTS[1] * self._second + (1 - self._MOMENTS[1]) * excess.square()
        corrected = self._first / (1 - self._MOMENTS[0] ** (step + 1))
        scale = (self._second / (1 - self._MOMENTS[1] ** (step + 1))).sqrt()
        rate = (self._settings.learning_rate or self._RATE) * (1 + math.cos(math.pi * step / self._settings.steps)) / 2
        self._shares = self._held(self._shares - rate * corrected / scale.clamp_min(1e-300))

    def planned(self) -> dict[str, PlannedModule]:
        sizes = (self._shares * self._largest * self._cost).tolist()
        return spend(self._sliding, {name: max(1, round(size)) for name, size in zip(self._names, sizes, strict=True)})

    def state(self) -> dict[str, Any]:
        return {key: getattr(self, f"_{key}").tolist() for key in ("shares", "first", "second")}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._shares, self._first, self._second = (_vector(state[key]) for key in ("shares", "first", "second"))

    def _held(self, shares: Tensor) -> Tensor:
        """The shares shifted alike until their bytes are the budget's, each within its limits."""
        weight = self._cost * self._largest

        def shifted(by: float) -> Tensor:
            return torch.minimum(torch.maximum(shares + by, self._lowest), torch.ones_like(shares))

        low, high = -2.0, 2.0
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if float((weight * shifted(middle)).sum()) <= self._bytes else (low, middle)
        return shifted(low)


class PriceMover:
    """Ours: the derivatives correct the price list, and the ranks are those that `global` chooses by it.

    The spectrum says how the price of a matrix's next rank falls with its rank, and is off by a factor of the matrix:
    the loss is not quadratic and truncations interact. Where the ranks are right, a byte is worth the same in every
    matrix. A matrix in which it is worth more than on average, `-dLoss/dk` over the bytes of a rank, has its prices
    raised, and lowered where it is worth less, exponentially in what it is worth beyond the average; all ranks are
    then chosen anew within the budget, the dense weight among the choices. So a matrix may become dense or cease to
    be, the budget holds by construction. The ranks that are judged and kept are those of the factors' running mean: a
    batch's derivatives are noisy, and the ranks they are taken at jump about the ones that are meant.
    (The logarithm of what a byte is worth would be the natural step, but a noisy one has a lower mean: small matrices,
    whose derivatives are noisiest, would drift down.)
    """

    _RATE = 0.6
    _KEEP = 0.85  # of the running mean, a step
    _LIMIT = 20.0  # of the logarithm of a factor
    _FURTHEST = 1.0  # how far one batch may move the logarithm of a factor, times the rate

    def __init__(
        self,
        budget: Budget,
        start: Mapping[str, PlannedModule],
        spectra: Mapping[str, Tensor],
        settings: RankTraining,
    ) -> None:
        if all(start[name].rank is None for name in budget.ladders):
            raise ValueError("no matrix has a rank to learn: all are dense or overridden; lower ratio")
        for ladder in budget.ladders.values():
            check_spectrum(ladder.target, spectra, "dobi_fixed_basis")
        self._budget, self._settings = budget, settings
        self._tails = {
            name: torch.tensor(level_tails(ladder, spectra[name]), dtype=torch.float64)
            for name, ladder in budget.ladders.items()
        }
        self._count = {name: len(spectra[name]) for name in budget.ladders}
        self._largest = {name: largest_rank(ladder) for name, ladder in budget.ladders.items()}
        self._cost = {name: bytes_per_rank(ladder) for name, ladder in budget.ladders.items()}
        self._factors = dict.fromkeys(budget.ladders, 0.0)  # natural logarithms
        self._means = dict.fromkeys(budget.ladders, 0.0)
        self._weight = 0.0  # of what the means have seen
        self._placed = dict(start)

    def ranks(self) -> dict[str, float | None]:
        found = {name: self._placed[name].rank for name in self._budget.ladders}
        return {name: None if rank is None else float(rank) for name, rank in found.items()}

    def betas(self, step: int) -> dict[str, float]:
        values = betas_of(self._settings, step, _vector(self._largest.values()))
        return dict(zip(self._largest, values, strict=True))

    def move(self, step: int, slopes: Mapping[str, float]) -> None:
        moving = [name for name, rank in self.ranks().items() if rank is not None]
        # At a whole rank sharp gates have less than one rank's slope between them; the derivative is by a whole one.
        betas = self.betas(step)
        gains = {name: -slopes[name] / self._slope_at(name, betas[name]) for name in moving}
        worth = sum(gains[name] * self._largest[name] for name in moving)
        price = worth / sum(self._cost[name] * self._largest[name] for name in moving)
        if price <= 0:
            return  # on this batch bytes are worth nothing at all: noise, so no news
        fall = 0.05 + 0.95 * (1 + math.cos(math.pi * step / self._settings.steps)) / 2
        rate = (self._settings.learning_rate or self._RATE) * fall
        for name in moving:
            news = gains[name] / (self._cost[name] * price) - 1
            moved = self._factors[name] + rate * min(max(news, -self._FURTHEST), self._FURTHEST)
            self._factors[name] = min(max(moved, -self._LIMIT), self._LIMIT)
        self._weight = self._KEEP * self._weight + 1 - self._KEEP
        for name, factor in self._factors.items():
            self._means[name] = self._KEEP * self._means[name] + (1 - self._KEEP) * factor
        self._placed = self._allocated(self._factors)

    def _allocated(self, factors: Mapping[str, float]) -> dict[str, PlannedModule]:
        tails = {name: (math.exp(factors[name]) * tail).tolist() for name, tail in self._tails.items()}
        return allocate_by_tails(self._budget, tails)

    def _slope_at(self, name: str, beta: float) -> float:
        rank = torch.tensor(float(self._placed[name].rank or 0), dtype=torch.float64)
        return max(float(slopes_of(rank, self._count[name], beta).sum()), 1e-3)

    def planned(self) -> dict[str, PlannedModule]:
        if not self._weight:
            return self._placed
        return self._allocated({name: mean / self._weight for name, mean in self._means.items()})

    def state(self) -> dict[str, Any]:
        ranks = {name: each.rank for name, each in self._placed.items()}
        return {"factors": self._factors, "means": self._means, "weight": self._weight, "ranks": ranks}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._factors = {name: float(state["factors"][name]) for name in self._factors}
        self._means = {name: float(state["means"][name]) for name in self._means}
        self._weight = float(state["weight"])
        for name, ladder in self._budget.ladders.items():
            rank = state["ranks"][name]
            dense = PlannedModule(None, "dense")
            self._placed[name] = dense if rank is None else PlannedModule(rank, ladder.storage.name)


def largest_rank(ladder: Ladder) -> int:
    """The largest rank whose factors are smaller than the dense matrix."""
    return ladder.module_at(ladder.dense_level - 1).rank or 0


def bytes_per_rank(ladder: Ladder) -> float:
    """The mean over the ladder: a storage's scales may make the first ranks dearer."""
    return ladder.bytes_at(ladder.dense_level - 1) / largest_rank(ladder)


def betas_of(settings: RankTraining, step: int, largest: Tensor) -> list[float]:
    """Sharpness of gates, per rank: softness falls geometrically from the first width to the last."""
    begin, end = settings.width
    width = begin * (end / begin) ** (step / max(1, settings.steps - 1))
    return (1 / (width * largest)).clamp_max(SHARPEST).tolist()


def _vector(values: Any) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)
