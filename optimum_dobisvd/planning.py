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
from .allocation.prices import Roundings
from .calibration.layout import Layout
from .config import DobiSVDConfig
from .factorization.registry import factorization_named
from .inner import inner_storage, other_storages
from .learning.settings import DIRECTIONS_OF
from .statistics.roundings import price_roundings
from .statistics.spectra import compute_spectra
from .statistics.store import StatisticsStore
from .storage import DENSE, dense_storage_named
from .storage.inner_forms import inner_form_named

logger = logging.getLogger(__name__)


def budget_of(config: DobiSVDConfig, layout: Layout) -> Budget:
    """The bytes there are for every target, by the config.

    Raises:
        ValueError: overrides that cannot be honored, or a ratio or budget that is too small.
    """
    if config.budget is not None and int(config.budget) <= layout.other_bytes:
        raise ValueError(
            f"budget {config.budget} bytes: what is not compressed (embeddings, norms, excluded layers) takes "
            f"{layout.other_bytes} already; raise it"
        )
    storage, alternatives = config.storages
    return open_budget(
        layout.targets,
        config.ratio,
        size=None if config.budget is None else int(config.budget) - layout.other_bytes,
        storage=storage,
        alternatives=alternatives,
        dense_storage=config.dense_storage,
        overrides=resolve_overrides(config.overrides, list(layout.linears)),
        rank_multiple=config.rank_multiple,
        min_rank=config.min_rank,
    )


def given_plan(config: DobiSVDConfig, layout: Layout) -> Plan | None:
    """The plan that the config gives, checked; None if it gives none.

    Raises:
        ValueError: it does not fit the model, names forms that the config's `inner` does not make, or directions that
            its factors do not have.
    """
    if config.plan is None:
        return None
    plan = config.plan if isinstance(config.plan, Plan) else Plan.load(config.plan)
    plan.check(layout.targets)
    where = "the plan" if isinstance(config.plan, Plan) else str(config.plan)
    forms = [] if config.inner is None else [inner_storage(config.inner), *other_storages(config.inner)]
    for name, module in plan.modules.items():
        if inner_form_named(module.storage) is not None and module.storage not in forms:
            makes = f"inner makes {forms[0]}" if forms else "there is no inner"
            raise ValueError(
                f"{where} stores {name} as {module.storage}, and {makes}: pass the inner= that the plan was made with"
            )
    factorization = config.resolved_method().factorization
    if plan.names_directions_of is not None and factorization != DIRECTIONS_OF:
        raise ValueError(
            f"{where} names directions of {DIRECTIONS_OF} for {plan.names_directions_of}, and the factors are made by "
            f"{factorization!r}: pass factorization={DIRECTIONS_OF!r}, or remove 'directions' from the plan"
        )
    return plan


def check_basis(plan: Plan | None, basis: str) -> None:
    """ValueError if the plan names directions of other weights, text or gradients than those at hand."""
    if plan is not None and plan.names_directions_of is not None and plan.basis != basis:
        raise ValueError(
            f"the plan names directions (of {plan.names_directions_of}, for one) that were found on other weights, "
            f"calibration text or gradients (basis {plan.basis}, here it is {basis}): calibrate as then (same model "
            "and dtype, dataset, nsamples, seqlen, seed, gradient_nsamples and fisher; of token tensors, without the "
            "held-out rows), or remove 'directions' from the plan to keep the leading ones"
        )


def make_plan(
    config: DobiSVDConfig,
    layout: Layout,
    store: StatisticsStore | None,
    device: torch.device | None = None,
    roundings: Roundings | None = None,
) -> Plan:
    """Ranks for every target within the byte budget, by the method's allocation.

    `roundings` is what `rounding_prices` gave.
    """
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
    budget = budget_of(config, layout)
    if allocation.function is global_prices:
        modules = global_prices(budget, spectra, roundings)
    else:
        modules = allocation.function(budget, spectra)
    return Plan(modules=modules, method=config.method, ratio=config.ratio, allocation=method.allocation)


def rounding_prices(
    config: DobiSVDConfig, layout: Layout, store: StatisticsStore | None, device: torch.device | None = None
) -> Roundings | None:
    """What rounding costs in every form that the allocation may choose, in the units of the price list of `kfac`.

    None where nothing is rounded but by our own 8 bits, for which a fixed share of the energy will do, and where ranks
    are not priced so.
    """
    method = config.resolved_method()
    if allocation_named(method.allocation).function is not global_prices or method.metric != "kfac" or store is None:
        return None
    budget = budget_of(config, layout)
    every = [(ladder, *budget.alternatives.get(name, ())) for name, ladder in budget.ladders.items()]
    ladders = [ladder for several in every for ladder in several]
    factored = {ladder.storage.name for ladder in ladders if ladder.dense_level}
    whole = {form.name for ladder in ladders for form in ladder.dense_forms if form.name != DENSE}
    if all(inner_form_named(name) is None for name in factored | whole):
        return None
    damping = getattr(config.inner, "damp_percent", 0.1)
    return price_roundings(layout, store, sorted(factored - {"plain"}), sorted(whole), device, damping)


def predicted_increase(
    plan: Plan, store: StatisticsStore | None, factorization: str, roundings: Roundings | None = None
) -> float | None:
    """What the prices say the loss gains, in nats per token; None for factors whose prices are no such thing.

    And None where forms of other libraries are planned and `roundings` does not say what they cost.
    """
    spectra = store.spectra("kfac") if store is not None and factorization == "kfac" else None
    if spectra is None or not plan.modules.keys() <= spectra.keys():
        return None
    increase = 0.0
    for name, module in plan.modules.items():
        price = (roundings or {}).get(name, {}).get(module.storage)
        if price is None and inner_form_named(module.storage) is not None:
            return None
        prices = spectra[name].double().square()
        if module.rank is None:
            share = dense_storage_named(module.storage).lost_share * float(prices.sum())
            increase += share if price is None or price.whole is None else price.whole
        else:
            increase += float(prices.sum() - prices[list(module.kept)].sum())
            if price is not None and price.ranks is not None:
                increase += float(price.ranks[: module.rank].sum())
    return increase
