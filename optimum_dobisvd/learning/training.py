"""The loop of the rank training: optimizer steps, evaluations on held-out text, and a journal to resume from."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..allocation.plan import PlannedModule
from ..allocation.rank_training import RankTraining
from ..atomic_files import write_atomically
from ..calibration.loss import NotFiniteError
from .curve import Evaluation, Step, TrainingCurve
from .fixed_basis import FixedBasis
from .rank_optimizer import NoGradientError, RankOptimizer

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]


class RankLearner:
    """The training loop: keeps the integer ranks with the lowest loss on the held-out windows, the start included.

    Args:
        deployed: the model with the weights that integer ranks give, to evaluate them.
        start: a planned module for every target.
        mode: `fixed_basis` or `activation`, for the curve.
        journal: a file that holds the state after every step; a killed run resumes from it.

    Raises:
        ValueError: the journal is damaged; names it.
    """

    def __init__(
        self,
        deployed: FixedBasis,
        optimizer: RankOptimizer,
        start: Mapping[str, PlannedModule],
        settings: RankTraining,
        *,
        mode: str,
        journal: str | os.PathLike[str] | None = None,
    ) -> None:
        self._deployed, self._optimizer, self._settings = deployed, optimizer, settings
        self._journal = Path(journal) if journal is not None else None
        self._start = dict(start)
        self._names = list(optimizer.ranks())
        self._best, self._best_loss, self._stale = self._start, math.inf, 0
        self._curve = TrainingCurve(mode, self._names, [deployed.count(name) for name in self._names])
        self._resume()

    def run(
        self, batches: Sequence[Batch], held_out: Sequence[Batch]
    ) -> tuple[dict[str, PlannedModule], TrainingCurve]:
        """Train. A loss or gradient that is not finite ends the training early: the curve says why.

        There is one of `batches` for every step, from the first again when they are used up: `(ids, mask)`, both
        `batch x seqlen`. ValueError if the loss of the start is not finite, or no rank has a gradient.

        Returns:
            The best ranks on the held-out batches, a planned module for every target, and the curve.
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
                    self._evaluate(self._optimizer.planned(), held_out)
                    if curve.stopped is None and self._stale >= settings.patience:
                        curve.stopped = f"no gain on the held-out windows in {settings.patience} evaluations"
                self._save()
                progress.set_postfix(loss=f"{curve.steps[-1].loss:.4f}")
                progress.update()
        if curve.stopped is not None:
            logger.warning("rank training ended after %d steps: %s", len(curve.steps), curve.stopped)
        return self._best, curve

    def _step(self, step: int, batch: Batch) -> None:
        ranks = list(self._optimizer.ranks().values())
        try:
            loss = self._optimizer.step(step, *batch)
        except (NotFiniteError, NoGradientError) as error:
            told = f"step {step + 1}: {error}"
            if step == 0 and isinstance(error, NoGradientError):
                raise ValueError(told) from error
            self._curve.stopped = told
            return
        self._curve.steps.append(Step(loss, ranks))

    def _evaluate(self, planned: Mapping[str, PlannedModule], held_out: Sequence[Batch]) -> None:
        step = len(self._curve.steps)
        self._deployed.put(planned)
        try:
            loss = self._deployed.loss(held_out)
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
        best = {name: astuple(module) for name, module in self._best.items()}
        noted = {"best": best, "best_loss": self._best_loss, "stale": self._stale, "curve": self._curve.to_dict()}
        tensors = {name: tensor.contiguous() for name, tensor in self._optimizer.state().items()}
        metadata = {"training": json.dumps(noted)}
        write_atomically(self._journal, lambda path: save_file(tensors, path, metadata=metadata))

    def _resume(self) -> None:
        if self._journal is None or not self._journal.exists():
            return
        try:
            with safe_open(self._journal, framework="pt") as file:
                noted = json.loads((file.metadata() or {})["training"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            curve = TrainingCurve.from_dict(noted["curve"])
            if curve.names != self._names or noted["best"].keys() != self._start.keys():
                raise ValueError("it is of other matrices")
            self._optimizer.restore(state)
            self._best = {name: PlannedModule(*entry) for name, entry in noted["best"].items()}
            self._best_loss, self._stale = float(noted["best_loss"]), int(noted["stale"])
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{self._journal} is damaged ({error}); delete it to train from the start") from error
        self._curve = curve
