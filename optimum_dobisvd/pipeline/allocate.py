"""From spectra and a budget to a plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor
from tqdm.auto import tqdm

from ..allocation.budget import Budget
from ..allocation.global_allocation import QuantizationLosses
from ..allocation.plan import Plan, PlannedModule
from ..allocation.quantization_loss import quantization_losses
from ..factorization.decompositions import PreparedInputs, compute_spectra
from ..factorization.registry import FACTORIZATIONS
from ..model.offloaded import dense_weight
from ..statistics.store import StatisticsStore
from ..structures.format import Format
from .job import Job

logger = logging.getLogger(__name__)

_LOSS_METRIC = "kfac"
"""The factorizer whose metric losses are measured in: its squared singular values are nats per token."""


def allocate(job: Job, store: StatisticsStore | None, losses: QuantizationLosses | None = None) -> Plan:
    """Return the plan that the job gives, or ranks for every target within the byte budget, by its allocation.

    Args:
        job: what is to be done.
        store: the statistics, None where the method reads none.
        losses: what `measure_losses` gave.
    """
    if job.given_plan is not None:
        return job.given_plan
    method = job.method
    spectra: Mapping[str, Tensor] | None = None
    if method.allocator.needs_spectra:
        spectra = compute_spectra(job.layout, method.prices, store, job.device)
    if method.allocator.weighs_loss and not method.prices.in_units_of_loss:
        logger.warning(
            "allocation %r compares prices of the metric %r across matrices, where they are no measure of the loss "
            "(on raw output errors it is far worse than uniform ranks): take method 'global', or another allocation",
            method.allocation,
            method.metric,
        )
    modules = method.allocator.function(job.open_budget, spectra, losses)
    return Plan(modules=modules, method=job.config.method, ratio=job.config.ratio, allocation=method.allocation)


def measure_losses(job: Job, store: StatisticsStore | None) -> QuantizationLosses | None:
    """Return what rounding costs in every format that the allocation may choose, in nats per token.

    None where nothing is rounded but by 8 bits of ours, for which a fixed share of the energy will do, and where ranks
    are not priced so.
    """
    if job.budget is None or store is None or not job.method.weighs_loss:
        return None
    formats = [format for format in _formats_in(job.budget) if format.encoding.name != "float"]
    if not any(format.encoding.loss_is_measured for format in formats):
        return None
    row, layout = FACTORIZATIONS.get(_LOSS_METRIC), job.layout
    ranked = any(format.structure.has_rank for format in formats)
    found: dict[str, dict[tuple[str, str], Tensor]] = {}
    with tqdm(total=len(layout.linears), desc="measuring quantization losses", unit="matrix") as progress:
        for block in layout.blocks:
            prepared = PreparedInputs(row, store, block, job.device)
            for name, module in layout.linears_of(block).items():
                weight = dense_weight(module).to(job.device).double()
                gram, root = prepared.of(name)
                decomposition = row.decompose(weight, (gram, root)) if ranked else None
                found[name] = quantization_losses(formats, weight, decomposition, gram, root.root)
                progress.update()
    return found


def _formats_in(budget: Budget) -> list[Format]:
    """Every format that some matrix may have, each once."""
    every = [options for name in budget.options for options in budget.all_options(name)]
    formats = [
        format for options in every for format in (*([options.format] if options.ranks else ()), *options.dense)
    ]
    return list({format.key: format for format in formats}.values())


def predicted_increase(
    plan: Plan, store: StatisticsStore | None, factorization: str, losses: QuantizationLosses | None = None
) -> float | None:
    """Return what the prices say the loss gains, in nats per token; None for factors whose prices are no such thing.

    And None where encodings of other libraries are planned and `losses` does not say what they cost.
    """
    in_units = FACTORIZATIONS.get(factorization).in_units_of_loss
    spectra: Mapping[str, Tensor] | None = store.spectra(factorization) if store is not None and in_units else None
    if spectra is None or not plan.modules.keys() <= spectra.keys():
        return None
    increases = [
        _increase_of(module, spectra[name].double().square(), (losses or {}).get(name, {}).get(module.format.key))
        for name, module in plan.modules.items()
    ]
    return None if None in increases else sum(each for each in increases if each is not None)


def _increase_of(module: PlannedModule, scores: Tensor, loss: Tensor | None) -> float | None:
    """What one matrix adds: the directions it loses, and their rounding."""
    encoding = module.format.encoding
    if loss is None and encoding.loss_is_measured:
        return None
    lost = 0.0 if module.rank is None else float(scores.sum() - scores[list(module.kept)].sum())
    if loss is not None:
        return lost + float(loss if module.rank is None else loss[module.rank])
    # Of factors in 8 bits of ours, rounding is small beside what is truncated.
    return lost + (module.format.relative_error * float(scores.sum()) if module.rank is None else 0.0)
