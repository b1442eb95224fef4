"""From a config and spectra to a plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from .allocation import allocation_named, global_prices
from .allocation.budget import Budget, open_budget
from .allocation.patterns import resolve_overrides
from .allocation.plan import Plan
from .calibration.layout import Layout
from .config import DobiSVDConfig
from .factorization.registry import factorization_named
from .statistics.spectra import compute_spectra
from .statistics.store import StatisticsStore

logger = logging.getLogger(__name__)


def budget_of(config: DobiSVDConfig, layout: Layout) -> Budget:
    """The bytes there are for every target, by the config.

    Raises:
        ValueError: overrides that cannot be honoured, or a ratio that is too small.
    """
    return open_budget(
        layout.targets,
        config.ratio,
        storage=config.resolved_method().storage,
        overrides=resolve_overrides(config.overrides, list(layout.linears)),
        rank_multiple=config.rank_multiple,
        min_rank=config.min_rank,
    )


def make_plan(
    config: DobiSVDConfig, layout: Layout, store: StatisticsStore | None, device: torch.device | None = None
) -> Plan:
    """Ranks for every target within the byte budget, by the method's allocation."""
    method = config.resolved_method()
    allocation = allocation_named(method.allocation)
    spectra: Mapping[str, Tensor] | None = None
    if allocation.needs_spectra:
        spectra = compute_spectra(layout, factorization_named(method.metric), store, device)
    if allocation.function is global_prices and method.metric != "kfac":
        logger.warning(
            "allocation %r compares prices of the metric %r across matrices, where they are no measure of the loss "
            "(on raw output errors it is far worse than uniform ranks): take method 'global', or another allocation",
            method.allocation,
            method.metric,
        )
    modules = allocation.function(budget_of(config, layout), spectra)
    return Plan(modules=modules, method=config.method, ratio=config.ratio, allocation=method.allocation)


def predicted_increase(plan: Plan, store: StatisticsStore | None, factorization: str) -> float | None:
    """What the prices say the loss gains, in nats per token; None for factors whose prices are no such thing."""
    spectra = store.spectra("kfac") if store is not None and factorization == "kfac" else None
    if spectra is None or not plan.modules.keys() <= spectra.keys():
        return None
    increase = 0.0
    for name, module in plan.modules.items():
        if module.rank is not None:
            prices = spectra[name].double().square()
            increase += float(prices.sum() - prices[list(module.kept)].sum())
    return increase
