"""Calibration passes over a model, into the store of statistics."""

from __future__ import annotations

import logging
from typing import Any

from ..calibration.backward import BackwardRunner
from ..calibration.dataset import CalibrationWindows
from ..calibration.loss import NextTokenLoss
from ..calibration.paired import PairedRunner
from ..calibration.runner import BlockRunner
from ..model.layout import Layout
from ..statistics.collect import InputCollector
from ..statistics.gradients import GradientCollector
from ..statistics.store import StatisticsStore
from .job import Job

logger = logging.getLogger(__name__)


def collect(model: Any, job: Job, windows: CalibrationWindows, fingerprint: dict[str, Any]) -> StatisticsStore:
    """Return the statistics that the method reads: those in the config's folder, and what was missing there.

    `fingerprint` is that of the model and the windows.
    """
    layout = job.layout
    store = StatisticsStore(fingerprint, list(layout.blocks), job.config.statistics)
    if store.is_complete:
        store.require({block: layout.linears_of(block) for block in layout.blocks})
    else:
        collector = InputCollector(layout.linears_of, store.put, lambda block: not store.has(block))
        block_runner(model, job, windows).run(collector)
    borrowed = borrowed_by(layout, store)
    if borrowed:
        logger.warning(
            "%d of %d linears were given fewer calibration tokens than they have inputs, as experts that are seldom "
            "chosen are, and are compressed by what all experts of their layer see; calibrate on more text (nsamples) "
            "to have them judged by their own. They are: %s",
            len(borrowed),
            len(layout.linears),
            ", ".join(borrowed),
        )
    if job.method.needs_gradients:
        _collect_gradients(model, job, windows, store)
    return store


def borrowed_by(layout: Layout, store: StatisticsStore | None) -> list[str]:
    """Return the linears that were given too few tokens, and have the statistics of all experts of their layer."""
    if store is None:
        return []
    borrowed = {name for block in layout.blocks for name in store.block(block).borrowed}
    return [name for name in layout.linears if name in borrowed]


def _collect_gradients(model: Any, job: Job, windows: CalibrationWindows, store: StatisticsStore) -> None:
    """Add the gradient statistics that the store lacks, over the first windows."""
    config, layout = job.config, job.layout
    chosen = windows.first(config.gradient_windows)
    store.open_gradients(job.gradient_settings())
    collector = GradientCollector(layout.linears_of, store.put_gradients, lambda block: not store.has_gradients(block))
    runner = BackwardRunner(model, layout.blocks, chosen, batch_size=config.batch_size, device=config.device)
    runner.run_backward(collector, NextTokenLoss(config.fisher, config.seed))


def quantization_runner(model: Any, job: Job) -> PairedRunner | None:
    """Return what takes the windows of the quantization through the model; None without."""
    if job.quantization_windows is None:
        return None
    config, learned = job.config, job.config.encoding.learned
    size = config.batch_size if learned is None else learned.batch_size
    return PairedRunner(model, job.layout.blocks, job.quantization_windows, batch_size=size, device=config.device)


def block_runner(model: Any, job: Job, windows: CalibrationWindows) -> BlockRunner:
    """Return what takes windows through the model block by block."""
    config = job.config
    return BlockRunner(model, job.layout.blocks, windows, batch_size=config.batch_size, device=config.device)
