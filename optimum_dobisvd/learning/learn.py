"""The rank training of one job: from an untrained plan to learned ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..allocation.plan import Plan, PlannedModule
from ..allocation.rank_training import RankTraining
from ..calibration.dataset import CalibrationWindows
from ..calibration.loss import labeled
from ..factorization.decompositions import decompositions
from .activation import ActivationTruncation
from .adam import AdamRankOptimizer
from .curve import TrainingCurve
from .directions import DirectionOptimizer
from .fixed_basis import FixedBasis
from .rank_optimizer import RankOptimizer
from .training import Batch, RankLearner

if TYPE_CHECKING:
    from ..pipeline.job import Job
    from ..statistics.store import StatisticsStore


def learn_ranks(
    model: Any, job: Job, start: Plan, store: StatisticsStore | None
) -> tuple[dict[str, PlannedModule], TrainingCurve]:
    """Learn the ranks of a dense model's linears. The model's weights are truncated meanwhile, and restored.

    The method's mode decides what is truncated: `fixed_basis` the weights, in the basis of its factorizer;
    `activation`, the paper's, the output of every linear.

    It trains the plan `start` on the job's windows, from the last to the first, since the gradient statistics are of
    the first ones, and evaluates integer ranks on the held-out windows. The model's weights are in memory.

    Returns:
        A planned module for every target, and the curve. ValueError if there is no text, no rank to learn, or the loss
        at the start is not finite.
    """
    method, settings, layout = job.method, job.config.rank_training, job.layout
    if job.windows is None or job.held_out is None or method.learning_mode is None:
        raise ValueError("ranks are learned on calibration text, and there is none")
    row, mode = method.factorizer, method.learning_mode
    with torch.no_grad():
        found = decompositions(layout, row, store, job.device, layout.linears)
        basis = FixedBasis(model, layout.linears, found)
    with basis:
        optimizer: RankOptimizer
        if settings.optimizer_for(mode, method.metric, row.name) == "importance":
            spectra = store.spectra(method.metric) if store is not None else None
            optimizer = DirectionOptimizer(basis, job.open_budget, start.modules, spectra or {})
        else:
            objective = basis if mode == "fixed_basis" else ActivationTruncation(basis)
            optimizer = AdamRankOptimizer(objective, job.open_budget, start.modules, settings)
        learner = RankLearner(basis, optimizer, start.modules, settings, mode=mode, journal=_journal(job, start))
        return learner.run(_batches(job.windows, settings), list(job.held_out.batches(1)))


def _journal(job: Job, start: Plan) -> Path | None:
    """Return the journal's path, named by a digest of all that decides the training; None without a store's folder."""
    if job.config.statistics is None:
        return None
    settings = (start.to_dict(), asdict(job.method), job.config.to_dict(), job.config.rank_training.to_dict())
    decides = [*settings, *(windows.sha256() for windows in (job.windows, job.held_out) if windows is not None)]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    return Path(job.config.statistics) / f"training-{digest}.safetensors"


def _batches(windows: CalibrationWindows, settings: RankTraining) -> Sequence[Batch]:
    """Return one batch per step, `(ids, mask)`, of windows cut to `seqlen` tokens; a remainder is dropped."""
    longest = windows.input_ids.shape[1]
    length = min(settings.seqlen or longest, longest)
    pieces = [
        (ids[begin : begin + length], mask[begin : begin + length])
        for ids, mask in zip(windows.input_ids.flip(0), windows.attention_mask.flip(0), strict=True)
        for begin in range(0, longest - length + 1, length)
        if bool(labeled(mask[None, begin : begin + length]).any())
    ]
    if not pieces:
        raise ValueError("no window of calibration text has two tokens in a row to learn ranks from")
    count = min(settings.windows, len(pieces))
    groups = [pieces[i : i + count] for i in range(0, len(pieces) - count + 1, count)]
    return [(torch.stack([ids for ids, _ in group]), torch.stack([mask for _, mask in group])) for group in groups]
