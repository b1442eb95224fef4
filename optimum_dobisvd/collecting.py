"""Calibration passes over a model, into the store of statistics."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .calibration.backward import BackwardRunner
from .calibration.dataset import CalibrationWindows
from .calibration.layout import Layout
from .calibration.loss import NextTokenLoss
from .calibration.runner import BlockRunner
from .config import DobiSVDConfig
from .statistics.collect import InputCollector
from .statistics.gradients import GradientCollector
from .statistics.store import StatisticsStore


def collect_statistics(
    model: Any, layout: Layout, config: DobiSVDConfig, windows: CalibrationWindows, identity: dict[str, Any]
) -> StatisticsStore:
    """The statistics that the config's method reads: those in its folder, and what was missing there.

    `identity` is the `fingerprint` of the model and the windows.
    """
    store = StatisticsStore(identity, list(layout.blocks), config.statistics)
    if store.is_complete:
        store.require({block: layout.linears_of(block) for block in layout.blocks})
    else:
        collector = InputCollector(layout.linears_of, store.put, lambda block: not store.has(block))
        block_runner(model, layout, config, windows).run(collector)
    if config.resolved_method().needs_gradients:
        _collect_gradients(model, layout, config, windows, store)
    return store


def _collect_gradients(
    model: Any, layout: Layout, config: DobiSVDConfig, windows: CalibrationWindows, store: StatisticsStore
) -> None:
    """Add the gradient statistics that the store lacks, over the first windows."""
    chosen = windows.first(config.gradient_windows)
    store.open_gradients(gradient_settings(config, windows))
    collector = GradientCollector(layout.linears_of, store.put_gradients, lambda block: not store.has_gradients(block))
    loss = NextTokenLoss(config.fisher, config.seed)
    runner = BackwardRunner(model, layout.blocks, chosen, batch_size=config.batch_size, device=config.device)
    runner.run_backward(collector, loss)


def gradient_settings(config: DobiSVDConfig, windows: CalibrationWindows) -> dict[str, Any]:
    """What decides the gradient statistics, beside the model; JSON values."""
    chosen = windows.first(config.gradient_windows)
    settings = {"tokens": int(chosen.attention_mask.sum()), "windows": chosen.sha256(), "fisher": config.fisher}
    return {**settings, "seed": config.seed} if config.fisher == "sampled" else settings


def basis_of(identity: dict[str, Any], config: DobiSVDConfig, windows: CalibrationWindows) -> str:
    """A digest of all that decides the singular directions of `kfac`: weights, text, gradients."""
    decides = [*(identity[key] for key in ("weights", "tokens", "dtype")), gradient_settings(config, windows)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def block_runner(model: Any, layout: Layout, config: DobiSVDConfig, windows: CalibrationWindows) -> BlockRunner:
    """What takes the windows through the model block by block."""
    return BlockRunner(model, layout.blocks, windows, batch_size=config.batch_size, device=config.device)
