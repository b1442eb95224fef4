"""Learning ranks: Adam on real ranks, the byte budget held exactly after every step (Dobi-SVD, Algorithm 1)."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..allocation.budget import Budget, Ladder, spend
from ..allocation.plan import PlannedModule
from ..storage.atomic import write_text_atomically
from .curve import Evaluation, Step, TrainingCurve
from .fixed_basis import FixedBasis
from .settings import RankTraining

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
SHARPEST = 10.0  # the paper's beta
_MOMENTS = (0.9, 0.95)


class Objective(Protocol):
    """The loss as a function of real ranks."""

    def loss_and_slopes(
        self, ranks: Mapping[str, float | None], betas: Mapping[str, float], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, float]]: ...


@dataclass
class _State:
    """All that the next step depends on, in JSON values: shares of the largest useful rank, and Adam's moments."""

    shares: list[float]
    first: list[float]
    second: list[float]
    best: dict[str, int | None]
    best_loss: float
    stale: int = 0
    curve: dict[str, Any] = field(default_factory=dict)


class RankLearner:
    """Moves bytes from matrix to matrix, down the gradient of the loss.

    A matrix that starts dense stays so: between its largest useful rank and the dense weight there is nothing to slide
    along. The others' real ranks lie between the smallest allowed and the largest useful one, and their bytes always
    add up to what the dense ones leave of the budget: of each gradient the part that all bytes have in common is taken
    off, and what a step changes in the sum is put right by a shift of all shares.

    Args:
        objective: gives losses and their derivatives by ranks.
        judge: the deployed weights; whole ranks are judged with it.
        budget: what `open_budget` returned.
        start: a planned module for every target.
        settings: of the training.
        journal: a file that holds the state after every step; with it a killed run goes on where it was.
    """

    def __init__(
        self,
        objective: Objective,
        judge: FixedBasis,
        budget: Budget,
        start: Mapping[str, PlannedModule],
        settings: RankTraining,
        journal: str | os.PathLike[str] | None = None,
    ) -> None:
        self._objective, self._judge, self._budget, self._settings = objective, judge, budget, settings
        self._journal = Path(journal) if journal is not None else None
        self._start = dict(start)
        ranks = {name: start[name].rank for name in budget.ladders}
        self._ladders = {name: ladder for name, ladder in budget.ladders.items() if ranks[name] is not None}
        if not self._ladders:
            raise ValueError("no matrix has a rank to learn: all are dense or overridden; lower ratio")
        self._largest = torch.tensor([float(_largest_rank(each)) for each in self._ladders.values()]).double()
        self._cost = torch.tensor([_bytes_per_rank(each) for each in self._ladders.values()]).double()
        self._lowest = torch.tensor([each.lowest_rank for each in self._ladders.values()]).double() / self._largest
        dense = sum(budget.ladders[name].target.dense_bytes for name, rank in ranks.items() if rank is None)
        self._bytes = float(budget.free_bytes - dense)
        begin = torch.tensor([float(ranks[name] or 0) for name in self._ladders]).double() / self._largest
        zeros = [0.0] * len(self._ladders)
        self._state = _State(self._held(begin).tolist(), zeros, zeros, self._whole(start), math.inf)
        self._curve = TrainingCurve("", list(self._ladders), [judge.count(name) for name in self._ladders])
        self._resume()

    def run(
        self, batches: Sequence[Batch], held_out: Sequence[Batch]
    ) -> tuple[dict[str, PlannedModule], TrainingCurve]:
        """Train; returns the ranks that were best on `held_out`, the start among them, and the curve.

        Raises:
            ValueError: the start's loss is not finite, or no rank has a gradient.
        """
        settings, curve = self._settings, self._curve
        if not curve.evaluations:
            self._evaluate(self._whole(self._start), held_out)
        with tqdm(total=settings.steps, initial=len(curve.steps), desc="learning ranks", unit="step") as progress:
            while len(curve.steps) < settings.steps and curve.stopped is None:
                step = len(curve.steps)
                self._step(step, batches[step % len(batches)])
                if len(curve.steps) % settings.evaluate_every == 0 or len(curve.steps) == settings.steps:
                    self._evaluate(self._whole(self._planned()), held_out)
                    if self._state.stale >= settings.patience:
                        curve.stopped = f"no gain on the held-out windows in {settings.patience} evaluations"
                self._save()
                progress.set_postfix(loss=f"{curve.steps[-1].loss:.4f}" if curve.steps else "")
                progress.update()
        if curve.stopped:
            logger.warning("rank training stopped after %d steps: %s", len(curve.steps), curve.stopped)
        return self._modules(self._state.best), curve

    def _step(self, step: int, batch: Batch) -> None:
        shares = torch.tensor(self._state.shares).double()
        names = list(self._ladders)
        ranks = dict(zip(names, (shares * self._largest).tolist(), strict=True))
        betas = dict(zip(names, self._betas(step).tolist(), strict=True))
        everything = {name: ranks.get(name, self._start[name].rank) for name in self._judge.linears}
        try:
            loss, slopes = self._objective.loss_and_slopes(everything, betas, *batch)
        except ValueError as error:
            self._curve.stopped = f"step {step + 1}: {error}"
            return
        gradient = torch.tensor([slopes[name] for name in names]).double()
        if not bool(torch.isfinite(gradient).all()):
            name = names[int((~torch.isfinite(gradient)).nonzero()[0])]
            self._curve.stopped = f"step {step + 1}: the gradient of the rank of {name} is not finite"
            return
        if not bool(gradient.any()):
            raise ValueError(f"step {step + 1}: no rank has a gradient; the loss does not feel these matrices")
        self._curve.steps.append(Step(loss, list(ranks.values())))
        self._state.shares = self._held(shares - self._descent(step, gradient)).tolist()

    def _descent(self, step: int, gradient: Tensor) -> Tensor:
        """Adam's step on the shares, from the derivative of the loss by the ranks."""
        per_byte = gradient / self._cost
        weight = self._cost * self._largest
        # What all bytes have in common buys nothing: they are all spent already.
        excess = per_byte - (per_byte * weight).sum() / weight.sum()
        first, second = torch.tensor(self._state.first).double(), torch.tensor(self._state.second).double()
        first = _MOMENTS[0] * first + (1 - _MOMENTS[0]) * excess
        second = _MOMENTS[1] * second + (1 - _MOMENTS[1]) * excess.square()
        self._state.first, self._state.second = first.tolist(), second.tolist()
        corrected = first / (1 - _MOMENTS[0] ** (step + 1))
        scale = (second / (1 - _MOMENTS[1] ** (step + 1))).sqrt()
        rate = self._settings.learning_rate * (1 + math.cos(math.pi * step / self._settings.steps)) / 2
        return rate * corrected / scale.clamp_min(torch.finfo(torch.float64).tiny)

    def _betas(self, step: int) -> Tensor:
        """Sharpness of every matrix's gates, per rank: annealed geometrically from the first width to the last."""
        begin, end = self._settings.width
        width = begin * (end / begin) ** (step / max(1, self._settings.steps - 1))
        return (1 / (width * self._largest)).clamp_max(SHARPEST)

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

    def _planned(self) -> dict[str, PlannedModule]:
        """Whole ranks of the present shares, the budget met exactly."""
        real = torch.tensor(self._state.shares).double() * self._largest * self._cost
        wishes = {name: self._budget.ladders[name].target.dense_bytes for name in self._budget.ladders}
        wishes |= {name: max(1, round(size)) for name, size in zip(self._ladders, real.tolist(), strict=True)}
        return spend(self._budget, wishes)

    def _evaluate(self, ranks: dict[str, int | None], held_out: Sequence[Batch]) -> None:
        self._judge.put_ranks(ranks)
        loss = self._judge.loss(held_out)
        step = len(self._curve.steps)
        self._curve.evaluations.append(Evaluation(step, loss))
        if loss < self._state.best_loss:
            self._state.best, self._state.best_loss, self._state.stale = ranks, loss, 0
            self._curve.best = step
        else:
            self._state.stale += 1

    def _whole(self, planned: Mapping[str, PlannedModule]) -> dict[str, int | None]:
        return {name: planned[name].rank for name in self._judge.linears}

    def _modules(self, ranks: Mapping[str, int | None]) -> dict[str, PlannedModule]:
        return {
            name: PlannedModule(None, "dense")
            if ranks[name] is None
            else PlannedModule(ranks[name], self._storage_of(name))
            for name in self._start
        }

    def _storage_of(self, name: str) -> str:
        ladder = self._budget.ladders.get(name)
        return ladder.storage.name if ladder is not None else self._start[name].storage

    def _save(self) -> None:
        if self._journal is not None:
            self._state.curve = self._curve.to_dict()
            write_text_atomically(self._journal, json.dumps(self._state.__dict__) + "\n")

    def _resume(self) -> None:
        if self._journal is None or not self._journal.exists():
            return
        try:
            state = _State(**json.loads(self._journal.read_text(encoding="utf-8")))
            curve = TrainingCurve.from_dict(state.curve)
            if curve.names != list(self._ladders):
                raise ValueError("it is of other matrices")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._journal} is damaged ({error}); delete it to train from the start") from error
        self._state, self._curve = state, curve


def _largest_rank(ladder: Ladder) -> int:
    return ladder.module_at(ladder.dense_level - 1).rank or 0


def _bytes_per_rank(ladder: Ladder) -> float:
    """The mean over the ladder: a storage's scales may make the first ranks dearer."""
    return ladder.bytes_at(ladder.dense_level - 1) / _largest_rank(ladder)
