"""The loop of the rank training: take the derivative, move, judge whole ranks on held-out text, note it all down."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor
from tqdm.auto import tqdm

from ..allocation.plan import PlannedModule
from ..calibration.loss import NotFiniteError
from ..storage.atomic import write_text_atomically
from .curve import Evaluation, Step, TrainingCurve
from .fixed_basis import FixedBasis
from .movers import Mover
from .settings import RankTraining

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]

HARD = 50.0
"""A sharpness at which gates are open or shut."""


class Objective(Protocol):
    """The loss as a function of real ranks."""

    def loss_and_slopes(
        self, ranks: Mapping[str, float | None], betas: Mapping[str, float], ids: Tensor, mask: Tensor
    ) -> tuple[float, dict[str, float]]: ...


class RankLearner:
    """Learns ranks; keeps those that were best on the held-out windows, the ones it started from among them.

    Args:
        objective: gives losses and their derivatives by ranks.
        judge: the deployed weights; whole ranks are judged with it.
        mover: follows the derivatives within the budget.
        start: a planned module for every target.
        settings: of the training.
        mode: what the curve calls it.
        journal: a file that holds the state after every step; with it a killed run goes on where it was.
    """

    def __init__(
        self,
        objective: Objective,
        judge: FixedBasis,
        mover: Mover,
        start: Mapping[str, PlannedModule],
        settings: RankTraining,
        *,
        mode: str,
        journal: str | os.PathLike[str] | None = None,
    ) -> None:
        self._objective, self._judge, self._mover, self._settings = objective, judge, mover, settings
        self._journal = Path(journal) if journal is not None else None
        self._start = dict(start)
        self._names = list(mover.ranks())
        self._best, self._best_loss, self._stale = self._start, math.inf, 0
        self._curve = TrainingCurve(mode, self._names, [judge.count(name) for name in self._names])
        self._resume()

    def run(
        self, batches: Sequence[Batch], held_out: Sequence[Batch]
    ) -> tuple[dict[str, PlannedModule], TrainingCurve]:
        """Train; returns the best ranks, a planned module for every target, and the curve.

        A loss or gradient that is not finite ends the training; the curve says so, and the best ranks until then are
        returned.

        Raises:
            ValueError: the start's loss is not finite, or no rank has a gradient.
        """
        settings, curve = self._settings, self._curve
        if not curve.evaluations:
            self._evaluate(self._start, held_out)
        with tqdm(total=settings.steps, initial=len(curve.steps), desc="learning ranks", unit="step") as progress:
            while len(curve.steps) < settings.steps and curve.stopped is None:
                self._step(len(curve.steps), batches[len(curve.steps) % len(batches)])
                if curve.stopped is not None:
                    self._save()
                    break
                if len(curve.steps) % settings.evaluate_every == 0 or len(curve.steps) == settings.steps:
                    self._evaluate(self._mover.planned(), held_out)
                    if curve.stopped is None and self._stale >= settings.patience:
                        curve.stopped = f"no gain on the held-out windows in {settings.patience} evaluations"
                self._save()
                progress.set_postfix(loss=f"{curve.steps[-1].loss:.4f}")
                progress.update()
        if curve.stopped is not None:
            logger.warning("rank training ended after %d steps: %s", len(curve.steps), curve.stopped)
        return self._best, curve

    def _step(self, step: int, batch: Batch) -> None:
        ranks = self._mover.ranks()
        fixed = {name: self._start[name].rank for name in self._judge.linears if name not in ranks}
        try:
            loss, slopes = self._objective.loss_and_slopes({**fixed, **ranks}, self._betas(step, fixed), *batch)
        except NotFiniteError as error:
            self._curve.stopped = f"step {step + 1}: {error}"
            return
        broken = [name for name in ranks if not math.isfinite(slopes.get(name, 0.0))]
        if broken:
            self._curve.stopped = f"step {step + 1}: the gradient of the rank of {broken[0]} is not finite"
            return
        if not any(slopes.get(name) for name in ranks):
            nothing = f"step {step + 1}: no rank has a gradient; the loss does not feel these matrices"
            if step == 0:
                raise ValueError(nothing)
            self._curve.stopped = nothing
            return
        self._mover.move(step, slopes)
        self._curve.steps.append(Step(loss, list(ranks.values())))

    def _betas(self, step: int, fixed: Mapping[str, int | None]) -> dict[str, float]:
        """Those of the mover; an overridden matrix is truncated hard."""
        return {**dict.fromkeys(fixed, HARD), **self._mover.betas(step)}

    def _evaluate(self, planned: Mapping[str, PlannedModule], held_out: Sequence[Batch]) -> None:
        step = len(self._curve.steps)
        self._judge.put_ranks({name: planned[name].rank for name in self._judge.linears})
        try:
            loss = self._judge.loss(held_out)
        except NotFiniteError as error:
            if step == 0:
                raise
            self._curve.stopped = f"on the held-out windows after step {step}: {error}"
            return
        self._curve.evaluations.append(Evaluation(step, loss))
        if loss < self._best_loss:
            self._best, self._best_loss, self._stale = dict(planned), loss, 0
            self._curve.best, self._curve.kept = step, [planned[name].rank for name in self._names]
        else:
            self._stale += 1

    def _save(self) -> None:
        if self._journal is None:
            return
        best = {name: [module.rank, module.storage] for name, module in self._best.items()}
        state = {"mover": self._mover.state(), "best": best, "best_loss": self._best_loss, "stale": self._stale}
        write_text_atomically(self._journal, json.dumps({**state, "curve": self._curve.to_dict()}) + "\n")

    def _resume(self) -> None:
        if self._journal is None or not self._journal.exists():
            return
        try:
            state = json.loads(self._journal.read_text(encoding="utf-8"))
            curve = TrainingCurve.from_dict(state["curve"])
            if curve.names != self._names or state["best"].keys() != self._start.keys():
                raise ValueError("it is of other matrices")
            self._mover.restore(state["mover"])
            self._best = {name: PlannedModule(rank, storage) for name, (rank, storage) in state["best"].items()}
            self._best_loss, self._stale = float(state["best_loss"]), int(state["stale"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._journal} is damaged ({error}); delete it to train from the start") from error
        self._curve = curve
