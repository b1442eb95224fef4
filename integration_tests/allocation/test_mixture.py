"""Rank and form of every matrix at once."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_dobisvd.allocation import Target, global_prices, open_budget
from optimum_dobisvd.allocation.plan import PlannedModule, planned_bytes
from optimum_dobisvd.allocation.prices import Rounding, level_tails

FORMS = ("gptq4_g32", "gptq2_g32", "gptq8_g32", "int8", "plain")


def model(seed: int, count: int = 20):
    """Matrices whose spectra fall at different rates, and what rounding each of them costs."""
    generator = torch.Generator().manual_seed(seed)
    targets, spectra, roundings = [], {}, {}
    for index in range(count):
        shape = [(128, 256), (256, 128), (64, 128)][index % 3]
        target = Target(f"layers.{index}.proj", *shape, 2)
        rate = 0.002 + 0.1 * float(torch.rand(1, generator=generator))
        size = 10 ** float(2 * torch.rand(1, generator=generator))
        values = size * torch.exp(-rate * torch.arange(min(shape), dtype=torch.float64))
        targets.append(target)
        spectra[target.name] = values
        energy = values.square()
        sensitivity = 10 ** float(torch.rand(1, generator=generator))
        shares = {"gptq2_g32": 0.1, "gptq4_g32": 5e-3, "gptq8_g32": 2e-5, "int8": 2e-4, "dense_int8": 1e-4}
        roundings[target.name] = {
            name: Rounding(share * sensitivity * float(energy.sum()), 2 * share * sensitivity * energy)
            for name, share in shares.items()
        }
    return targets, spectra, roundings


def loss_of(targets, spectra, roundings, planned) -> float:
    total = 0.0
    for target in targets:
        module, energy = planned[target.name], spectra[target.name].square()
        price = roundings[target.name].get(module.storage)
        if module.rank is None:
            total += 0.0 if price is None else price.whole
        else:
            total += float(energy[module.rank :].sum())
            total += 0.0 if price is None else float(price.ranks[: module.rank].sum())
    return total


@given(seed=st.integers(0, 200), ratio=st.sampled_from([0.14, 0.2, 0.28, 0.4, 0.6]))
@settings(max_examples=25)
def test_a_mixture_loses_less_than_any_of_its_forms_alone_within_the_same_bytes(seed: int, ratio: float) -> None:
    targets, spectra, roundings = model(seed)
    budget = open_budget(targets, ratio, storage=FORMS[0], alternatives=FORMS[1:])
    mixed = global_prices(budget, spectra, roundings)
    size = sum(planned_bytes(target, mixed[target.name]) for target in targets)
    assert size <= ratio * sum(target.dense_bytes for target in targets)
    found = loss_of(targets, spectra, roundings, mixed)
    for form in FORMS:
        try:
            alone = global_prices(open_budget(targets, ratio, storage=form), spectra, roundings)
        except ValueError:
            continue  # this form alone cannot be as small
        # What the last step leaves over is spent step by step, which may cost a little.
        assert found <= 1.02 * loss_of(targets, spectra, roundings, alone)


def test_measured_prices_are_what_levels_lose() -> None:
    targets, spectra, roundings = model(3, count=1)
    (ladder,) = open_budget(targets, 0.5, storage="gptq4_g32").ladders.values()
    tails = level_tails(ladder, spectra[ladder.target.name].square(), roundings)
    for level in range(ladder.top_level + 1):
        planned = {ladder.target.name: ladder.module_at(level)}
        assert tails[level] == pytest.approx(loss_of(targets, spectra, roundings, planned))
    assert tails[-1] == 0


@given(seed=st.integers(0, 200), ratio=st.sampled_from([0.16, 0.2, 0.25, 0.3, 0.4]))
@settings(max_examples=25)
def test_no_byte_is_spent_on_a_size_that_loses_more(seed: int, ratio: float) -> None:
    """Ranks of spectra that fall fast lose less by truncation than by two bits of rounding."""
    targets, spectra, roundings = model(seed)
    budget = open_budget(targets, ratio, storage="gptq2_g32")
    planned = global_prices(budget, spectra, roundings)
    for target in targets:
        ladder = budget.ladders[target.name]
        tails = level_tails(ladder, spectra[target.name].square(), roundings)
        taken = next(level for level in range(len(tails)) if ladder.module_at(level) == _plain(planned[target.name]))
        assert tails[taken] == min(tails[: taken + 1])


def _plain(module: PlannedModule) -> PlannedModule:
    """As a ladder has it: the leading directions are not listed."""
    return replace(module, directions=None)
