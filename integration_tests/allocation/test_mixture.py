"""Rank and encoding of every matrix at once, by what both cost the loss."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from integration_tests.allocation.budget_cases import request
from optimum_dobisvd.allocation.budget import open_budget
from optimum_dobisvd.allocation.global_allocation import allocate_globally, option_losses
from optimum_dobisvd.allocation.plan import PlannedModule, planned_bytes
from optimum_dobisvd.model.target import Target
from optimum_dobisvd.structures.format import format_named

ENCODINGS = ("gptq4_g32", "gptq2_g32", "gptq8_g32", "int8", "float")


def model(seed: int, count: int = 20):
    """Matrices whose spectra fall at different rates, and what rounding each of them costs."""
    generator = torch.Generator().manual_seed(seed)
    targets, spectra, losses = [], {}, {}
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
        lost = {"gptq2_g32": 0.1, "gptq4_g32": 5e-3, "gptq8_g32": 2e-5, "int8": 1e-4}
        losses[target.name] = {}
        for encoding, share in lost.items():
            of_ranks = 2 * (2e-4 if encoding == "int8" else share) * sensitivity * energy
            losses[target.name]["dense", encoding] = share * sensitivity * energy.sum()
            losses[target.name]["low_rank", encoding] = torch.cat([energy.new_zeros(1), of_ranks.cumsum(0)])
    return targets, spectra, losses


def loss_of(targets, spectra, losses, planned) -> float:
    total = 0.0
    for target in targets:
        module, energy = planned[target.name], spectra[target.name].square()
        rounding = losses[target.name].get((module.structure, module.encoding))
        if module.rank is None:
            total += 0.0 if rounding is None else float(rounding)
        else:
            total += float(energy[module.rank :].sum())
            total += 0.0 if rounding is None else float(rounding[module.rank])
    return total


@given(seed=st.integers(0, 200), ratio=st.sampled_from([0.14, 0.2, 0.28, 0.4, 0.6]))
@settings(max_examples=25)
def test_a_mixture_loses_less_than_any_of_its_encodings_alone_within_the_same_bytes(seed: int, ratio: float) -> None:
    targets, spectra, losses = model(seed)
    alternatives = tuple(format_named("low_rank", encoding) for encoding in ENCODINGS[1:])
    budget = open_budget(targets, request(ratio, ENCODINGS[0], alternatives=alternatives))
    mixed = allocate_globally(budget, spectra, losses)
    size = sum(planned_bytes(target, mixed[target.name]) for target in targets)
    assert size <= ratio * sum(target.dense_bytes for target in targets)
    found = loss_of(targets, spectra, losses, mixed)
    for encoding in ENCODINGS:
        try:
            alone = allocate_globally(open_budget(targets, request(ratio, encoding)), spectra, losses)
        except ValueError:
            continue  # this encoding alone cannot be as small
        # What the last edge leaves over is spent option by option: up to 3.8 % in three of all these cases.
        assert found <= 1.04 * loss_of(targets, spectra, losses, alone)


def test_measured_losses_are_what_options_lose() -> None:
    targets, spectra, losses = model(3, count=1)
    (options,) = open_budget(targets, request(0.5, "gptq4_g32")).options.values()
    found = option_losses(options, spectra[options.target.name].square(), losses)
    for option in range(len(options)):
        planned = {options.target.name: options.module_at(option)}
        assert found[option] == pytest.approx(loss_of(targets, spectra, losses, planned))
    assert len(found) == len(options)
    assert found[-1] == 0


@given(seed=st.integers(0, 200), ratio=st.sampled_from([0.16, 0.2, 0.25, 0.3, 0.4]))
@settings(max_examples=25)
def test_no_byte_is_spent_on_a_size_that_loses_more(seed: int, ratio: float) -> None:
    """Ranks of spectra that fall fast lose less by truncation than by two bits of rounding."""
    targets, spectra, losses = model(seed)
    budget = open_budget(targets, request(ratio, "gptq2_g32"))
    planned = allocate_globally(budget, spectra, losses)
    for target in targets:
        options = budget.options[target.name]
        found = option_losses(options, spectra[target.name].square(), losses)
        module = _without_directions(planned[target.name])
        taken = next(option for option in range(len(options)) if options.module_at(option) == module)
        assert found[taken] == min(found[: taken + 1])


@pytest.mark.parametrize(
    ("encoding", "of_factors", "of_the_matrix"),
    [("float", 0, None), ("remap", 0, None), ("int8", 0, 8e-5), ("nf4", 2 * 0.008, 0.008), ("llm_int8", 2e-4, 8e-5)],
)
def test_what_was_not_measured_is_a_share_of_the_energy(
    encoding: str, of_factors: float, of_the_matrix: float | None
) -> None:
    """Of factors twice that of a linear, of the directions they keep; in 8 bits of ours it is left out of account."""
    targets, spectra, _ = model(4, count=1)
    (options,) = open_budget(targets, request(0.5, encoding)).options.values()
    energy = spectra[options.target.name].square()
    found = option_losses(options, energy)
    for option, rank in enumerate(options.ranks):
        assert found[option] == pytest.approx(float(energy[rank:].sum() + of_factors * energy[:rank].sum()))
    if of_the_matrix is not None:
        assert found[len(options.ranks)] == pytest.approx(of_the_matrix * float(energy.sum()))
    assert found[-1] == 0


def _without_directions(module: PlannedModule) -> PlannedModule:
    """As options have it: the leading directions are not listed."""
    return replace(module, directions=None)
