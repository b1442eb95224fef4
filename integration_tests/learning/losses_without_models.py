"""Losses that are simple functions of ranks or directions, in place of a model's, and trainings on them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_dobisvd.allocation.budget import Budget, BudgetRequest, open_budget
from optimum_dobisvd.allocation.global_allocation import allocate_globally
from optimum_dobisvd.allocation.plan import PlannedModule, planned_bytes
from optimum_dobisvd.allocation.rank_training import RankTraining
from optimum_dobisvd.allocation.uniform import uniform
from optimum_dobisvd.learning.adam import AdamRankOptimizer
from optimum_dobisvd.learning.directions import DirectionOptimizer
from optimum_dobisvd.learning.training import RankLearner
from optimum_dobisvd.model.target import Target
from optimum_dobisvd.structures.format import format_named

SHAPES = {"q": (64, 64), "v": (16, 64), "up": (96, 64)}
TARGETS = [Target(f"layers.{i}.{kind}", *shape, 2) for i in range(4) for kind, shape in SHAPES.items()]
DENSE_BYTES = sum(target.dense_bytes for target in TARGETS)
BATCH = (torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool))


def budget_at(ratio: float, encoding: str = "float", **options: Any) -> Budget:
    return open_budget(TARGETS, BudgetRequest(format_named("low_rank", encoding), ratio, **options))


def total_bytes(planned: Mapping[str, PlannedModule]) -> int:
    return sum(planned_bytes(target, planned[target.name]) for target in TARGETS)


class QuadraticLoss:
    """A loss that is the sum of every matrix's weight times the squared share of the ranks it lacks."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self.linears = dict.fromkeys(weights)
        self.calls: list[dict[str, float | None]] = []
        self.placed: dict[str, PlannedModule] = {}
        self.fail_at: int | None = None
        self.fail: BaseException | None = None
        self.slope = -1.0

    @classmethod
    def random(cls, seed: int = 0) -> "QuadraticLoss":
        generator = torch.Generator().manual_seed(seed)
        return cls({t.name: float(10 ** (2 * torch.rand(1, generator=generator) - 1)) for t in TARGETS})

    def count(self, name: str) -> int:
        return next(min(t.out_features, t.in_features) for t in TARGETS if t.name == name)

    def value(self, ranks: Mapping[str, float | None]) -> float:
        return sum(w * (1 - (ranks[n] or 1e9) / self.count(n)) ** 2 for n, w in self.weights.items() if ranks[n])

    def loss_and_slopes(
        self, ranks: Mapping[str, float | None], betas: Mapping[str, float], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, float]]:
        if self.fail is not None and len(self.calls) == self.fail_at:
            raise self.fail
        self.calls.append(dict(ranks))
        found = {
            n: 2 * self.slope * self.weights[n] * (1 - rank / self.count(n)) / self.count(n)
            for n, rank in ranks.items()
            if rank is not None
        }
        return self.value(ranks), found

    def put(self, planned: Mapping[str, PlannedModule]) -> None:
        self.placed = dict(planned)

    def loss(self, batches: Any) -> float:
        return self.value({name: module.rank for name, module in self.placed.items()})


def adam_learner(
    model: QuadraticLoss, ratio: float = 0.5, journal: Path | None = None, start: Any = None, **settings: Any
) -> RankLearner:
    begin = start or uniform(budget_at(ratio))
    training = RankTraining(**settings)
    optimizer = AdamRankOptimizer(model, budget_at(ratio), begin, training)
    return RankLearner(model, optimizer, begin, training, mode="test", journal=journal)  # type: ignore[arg-type]


class SumOverDirections:
    """A loss that is a sum over directions: each, while it is left out, costs its importance; its gains are noisy.

    A gate `t` costs `(1 - t) * linear + (1 - t)^2 * 0.6 * score`, which is the importance at `t = 0`: open and shut
    gates both tell of it. `scores` are what K-FAC would say, `importance` is the truth.
    """

    def __init__(self, spread: float = 0.5, noise: float = 0.0, seed: int = 0, by_matrix: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.spectra = {
            target.name: torch.arange(1, min(target.out_features, target.in_features) + 1, dtype=torch.float64) ** -0.4
            for target in TARGETS
        }
        self.scores = {name: spectrum.double().square() for name, spectrum in self.spectra.items()}
        self.importance = {
            name: scores * torch.randn(len(scores), generator=generator, dtype=torch.float64).mul(spread).exp()
            for name, scores in self.scores.items()
        }
        for importance in self.importance.values():
            importance *= math.exp(by_matrix * float(torch.randn(1, generator=generator)))
        self.linears = dict.fromkeys(self.importance)
        self.noise = noise
        self.calls = 0
        self.fail_at: int | None = None
        self.placed: dict[str, PlannedModule] = {}

    def count(self, name: str) -> int:
        return len(self.importance[name])

    def value(self, planned: Mapping[str, PlannedModule]) -> float:
        return sum(
            float(importance.sum() - importance[list(planned[name].kept)].sum())
            for name, importance in self.importance.items()
            if planned[name].rank is not None
        )

    def loss_and_gains(
        self, planned: Mapping[str, PlannedModule], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, Tensor]]:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        gains = {}
        for name, importance in self.importance.items():
            shut = torch.ones_like(importance)
            shut[list(range(len(importance)) if planned[name].rank is None else planned[name].kept)] = 0
            curved = 0.6 * self.scores[name]
            noise = torch.randn(len(importance), generator=generator, dtype=torch.float64) * self.scores[name]
            gains[name] = importance - curved + 2 * curved * shut + self.noise * noise
        return self.value(planned), gains

    def put(self, planned: Mapping[str, PlannedModule]) -> None:
        self.placed = dict(planned)

    def loss(self, batches: Any) -> float:
        return self.value(self.placed)


def direction_learner(
    loss: SumOverDirections, ratio: float, journal: Path | None = None, encoding: str = "float", **settings: Any
) -> RankLearner:
    budget = budget_at(ratio, encoding, rank_multiple=1)
    start = allocate_globally(budget, loss.spectra)
    optimizer = DirectionOptimizer(loss, budget, start, loss.spectra)
    return RankLearner(loss, optimizer, start, RankTraining(**settings), mode="test", journal=journal)  # type: ignore[arg-type]
