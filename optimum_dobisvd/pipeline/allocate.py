"""From spectra and a budget to a plan."""

from __future__ import annotations

import logging

from torch import Tensor
from tqdm.auto import tqdm

from ..allocation.budget import Budget
from ..allocation.global_allocation import QuantizationLosses
from ..allocation.plan import Plan, PlannedModule
from ..allocation.quantization_loss import quantization_losses
from ..factorization.decompositions import PreparedInputs, compute_spectra, map_linears
from ..factorization.registry import FACTORIZATIONS
from ..model.offloaded import dense_weight
from ..statistics.store import StatisticsStore
from ..structures.format import Format
from .job import Job

logger = logging.getLogger(__name__)

_LOSS_METRIC = "kfac"
"""The factorizer whose metric losses are measured in: its squared singular values are nats per token."""


def allocate(job: Job, store: StatisticsStore | None, losses: QuantizationLosses | None = None) -> Plan:
    """Return the job's plan, or ranks for all targets by its allocation; `losses` are what `measure_losses` gave."""
    if job.given_plan is not None:
        return job.given_plan
    method = job.method
    reads = method.allocator.needs_spectra
    spectra = compute_spectra(job.layout, method.importance, store, job.device) if reads else None
    if method.allocator.weighs_loss and not method.importance.in_units_of_loss:
        logger.warning(
            "allocation %r compares importance scores of the metric %r across matrices, where they are no measure of "
            "the loss (on raw output errors it is far worse than uniform ranks): take method 'global', or another "
            "allocation",
            method.allocation,
            method.metric,
        )
    modules = method.allocator.function(job.open_budget, spectra, losses)
    return Plan(modules=modules, method=job.config.method, ratio=job.config.ratio, allocation=method.allocation)


def measure_losses(job: Job, store: StatisticsStore | None) -> QuantizationLosses | None:
    """Return what rounding costs in every format that the allocation may choose, in nats per token.

    It is taken from the store where that has it, and kept there otherwise. None where importance scores are no losses,
    and where all of it is small enough to be taken for a fixed share.
    """
    formats = _measured_formats(job)
    if store is None or not formats:
        return None
    missing = [format for format in formats if not _has_losses(store, format, job)]
    if missing:
        _measure(job, store, missing)
    return known_losses(job, store)


def known_losses(job: Job, store: StatisticsStore | None) -> QuantizationLosses | None:
    """Return what `measure_losses` does, if it is in the store."""
    formats = _measured_formats(job)
    if store is None or not formats or not all(_has_losses(store, format, job) for format in formats):
        return None
    found = {format.key: store.losses(format.loss_name) or {} for format in formats}
    shares = {format.key: format.encoding.loss_share for format in formats}
    scale = _dependences(job, store)
    return {
        name: {key: scale[name] * shares[key] * losses[name] for key, losses in found.items()}
        for name in job.layout.linears
    }


def _dependences(job: Job, store: StatisticsStore) -> dict[str, float]:
    """Return what losses by K-FAC are multiplied with for errors as small as those of rounding.

    K-FAC takes large inputs and large gradients to be unrelated. Where few tokens have most of both, as those that
    attention rests on do, it says several times too much of a small error. It does not of a large one, which second
    derivatives do not tell: losses of truncation stay as they are.
    """
    found: dict[str, float] = {}
    for block in job.layout.blocks:
        names = job.layout.linears_of(block)
        if names:
            statistics, gradients = store.block(block), store.gradients(block)
            inputs = {name: statistics.inputs[statistics.input_key[name]] for name in names}
            found |= {name: gradients[name].dependence(inputs[name]) for name in names}
    return found


def _measured_formats(job: Job) -> list[Format]:
    if job.budget is None or not job.method.weighs_loss:
        return []
    formats = [format for format in _formats_in(job.budget) if not format.encoding.trainable]
    return formats if any(format.loss_is_measured for format in formats) else []


def _has_losses(store: StatisticsStore, format: Format, job: Job) -> bool:
    known = store.losses(format.loss_name)
    return known is not None and all(name in known for name in job.layout.linears)


def _measure(job: Job, store: StatisticsStore, formats: list[Format]) -> None:
    """Measure what rounding costs in these formats, for all targets, into the store."""
    row, layout, device = FACTORIZATIONS.get(_LOSS_METRIC), job.layout, job.device
    ranked = any(format.structure.has_rank for format in formats)

    def measure(name: str, inputs: PreparedInputs) -> tuple[str, dict[tuple[str, str], Tensor]]:
        weight = dense_weight(layout.linears[name]).to(device).double()
        gram, root = inputs.of(name)
        decomposition = row.decompose(weight, (gram, root)) if ranked else None
        return name, quantization_losses(formats, weight, decomposition, gram, root.root)

    found: dict[tuple[str, str], dict[str, Tensor]] = {format.key: {} for format in formats}
    measured = map_linears(layout, row, store, device, layout.linears, measure)
    progress = tqdm(measured, total=len(layout.linears), desc="measuring quantization losses", unit="matrix")
    for name, losses in progress:
        for key, loss in losses.items():
            found[key][name] = loss
    for format in formats:
        store.put_losses(format.loss_name, found[format.key])


def _formats_in(budget: Budget) -> list[Format]:
    """Every format that some matrix may have, each once."""
    found: dict[tuple[str, str], Format] = {}
    for options in (each for name in budget.options for each in budget.all_options(name)):
        found |= {each.key: each for each in (*([options.format] if options.ranks else ()), *options.dense)}
    return list(found.values())


def predicted_increase(
    plan: Plan, store: StatisticsStore | None, factorization: str, losses: QuantizationLosses | None = None
) -> float | None:
    """Return what the importance scores say the loss gains, in nats per token.

    None where they are no losses, and where `losses` lacks what encodings of other libraries cost.
    """
    in_units = FACTORIZATIONS.get(factorization).in_units_of_loss
    spectra = store.spectra(factorization) if store is not None and in_units else None
    if spectra is None or not plan.modules.keys() <= spectra.keys():
        return None
    increases = [
        _increase_of(module, spectra[name].double().square(), (losses or {}).get(name, {}).get(module.format.key))
        for name, module in plan.modules.items()
    ]
    return None if None in increases else sum(each for each in increases if each is not None)


def _increase_of(module: PlannedModule, scores: Tensor, loss: Tensor | None) -> float | None:
    """What one matrix adds: the directions it loses, and their rounding."""
    if loss is None and module.format.loss_is_measured:
        return None
    lost = 0.0 if module.rank is None else float(scores.sum() - scores[list(module.kept)].sum())
    if loss is not None:
        return lost + float(loss if module.rank is None else loss[module.rank])
    return lost + module.format.relative_error * float(scores.sum())
