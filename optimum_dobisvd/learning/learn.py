"""From an untrained plan to learned ranks: the bases, the windows and the objective put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..allocation.plan import PlannedModule
from ..calibration.dataset import CalibrationWindows
from ..calibration.layout import Layout
from ..factorization.registry import Factorization
from ..nn.dense_linear import weight_matrix
from ..statistics.spectra import decompositions
from .activation import ActivationTruncation
from .adam import AdamMover
from .curve import TrainingCurve
from .directions import DirectionMover
from .fixed_basis import FixedBasis
from .mover import Mover
from .settings import Mode, RankTraining
from .training import Batch, RankLearner

if TYPE_CHECKING:
    from ..allocation.budget import Budget
    from ..statistics.store import StatisticsStore


def learn_ranks(
    model: Any,
    layout: Layout,
    start: Mapping[str, PlannedModule],
    budget: Budget,
    *,
    mode: Mode,
    metric: str,
    row: Factorization,
    spectra: Mapping[str, Tensor] | None,
    store: StatisticsStore | None,
    windows: CalibrationWindows,
    held_out: CalibrationWindows,
    settings: RankTraining,
    device: torch.device | None = None,
    journal: Path | None = None,
) -> tuple[dict[str, PlannedModule], TrainingCurve]:
    """Learn the ranks of a dense model's linears; the model is given back as it was.

    Args:
        model: a dense causal language model, its weights in memory.
        layout: its linears.
        start: the untrained plan, a planned module for every target.
        budget: what the ranks may weigh.
        mode: `fixed_basis` truncates the weights in the basis of `row`; `activation`, the paper's, every output.
        metric: what the ranks of the start were priced in.
        row: the factorizer that the plan is for.
        spectra: singular values in that metric, for the optimizer that corrects prices.
        store: its statistics.
        windows: to train on; taken from the last to the first, since the first ones are those of the gradients.
        held_out: to judge whole ranks on.
        settings: of the training.
        device: where to decompose.
        journal: a file to resume from.

    Raises:
        ValueError: no rank to learn; whatever the loss raises at the start.
    """
    with torch.no_grad():
        found = ((name, each) for name, each, _ in decompositions(layout, row, store, device, layout.linears))
        basis = FixedBasis(model, layout.linears, found)
    with basis:
        mover: Mover
        if settings.optimizer_for(mode, metric, row.name) == "prices":
            mover = DirectionMover(basis, budget, start, spectra or {})
        else:
            objective = basis if mode == "fixed_basis" else ActivationTruncation(basis)
            mover = AdamMover(objective, budget, start, settings)
        learner = RankLearner(basis, mover, start, settings, mode=mode, journal=journal)
        return learner.run(_batches(windows, settings), list(held_out.batches(1)))


def check_learnable(layout: Layout) -> None:
    """Raise ValueError, naming it, if a weight is offloaded."""
    for name, module in layout.linears.items():
        if weight_matrix(module).device.type == "meta":
            raise ValueError(
                f"{name}: its weight is offloaded, and learning ranks rebuilds every weight in every step; load the "
                "model without offload, or use allocation='global', which needs no training"
            )


def _batches(windows: CalibrationWindows, settings: RankTraining) -> Sequence[Batch]:
    """Windows cut to `seqlen`, what is left of one dropped, as many a step as the settings say."""
    length = min(settings.seqlen or windows.input_ids.shape[1], windows.input_ids.shape[1])
    pieces: list[Batch] = []
    for ids, mask in zip(windows.input_ids.flip(0), windows.attention_mask.flip(0), strict=True):
        for begin in range(0, len(ids) - length + 1, length):
            piece = mask[begin : begin + length]
            if bool((piece[1:] & piece[:-1]).any()):  # some token of it has a label
                pieces.append((ids[begin : begin + length], piece))
    if not pieces:
        raise ValueError("no window of calibration text has two tokens in a row to learn ranks from")
    count = min(settings.windows, len(pieces))
    groups = [pieces[i : i + count] for i in range(0, len(pieces) - count + 1, count)]
    return [(torch.stack([ids for ids, _ in group]), torch.stack([mask for _, mask in group])) for group in groups]
