"""`global`: the whole model's ranks by what they cost the loss."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from integration_tests.allocation.budget_cases import LEFT_AS_IS, random_spectra, request, smollm2_targets
from optimum_dobisvd.allocation.budget import Budget, BudgetRequest, byte_budget, open_budget
from optimum_dobisvd.allocation.global_allocation import allocate_globally, option_losses
from optimum_dobisvd.allocation.plan import PlannedModule, check_possible, planned_bytes
from optimum_dobisvd.allocation.uniform import uniform
from optimum_dobisvd.model.patterns import Override
from optimum_dobisvd.model.target import Target
from optimum_dobisvd.structures.format import Format, format_named


def predicted(planned: dict[str, PlannedModule], spectra: dict[str, Tensor]) -> float:
    """The summed truncation losses of a plan."""
    return sum(
        0.0 if module.rank is None else float(spectra[name].double()[module.rank :].square().sum())
        for name, module in planned.items()
    )


def points_of(budget: Budget, spectra: dict[str, Tensor]) -> dict[str, list[tuple[int, float]]]:
    """`(bytes, loss)` of all that every matrix may become, in ascending order."""
    found = {}
    for name in budget.options:
        every = [(each, option_losses(each, spectra[name].double().square())) for each in budget.all_options(name)]
        found[name] = sorted({(each.bytes_at(at), loss) for each, losses in every for at, loss in enumerate(losses)})
    return found


def best_by_trying_all(budget: Budget, spectra: dict[str, Tensor]) -> float:
    """The smallest sum of losses within the budget: of all combinations but those worse and no smaller than others."""
    best = [(0, 0.0)]
    for points in points_of(budget, spectra).values():
        sums = sorted((size + other, loss + lost) for size, loss in points for other, lost in best)
        best = sums[:1]
        for each in sums:
            if each[1] < best[-1][1] and each[0] <= budget.free_bytes:
                best.append(each)
    return best[-1][1]


def edges_of(budget: Budget, spectra: dict[str, Tensor]) -> list[tuple[float, float, int]]:
    """`(gain per byte, gain, bytes)` of all edges of all lower hulls, by brute force."""
    edges = []
    for points in points_of(budget, spectra).values():
        sizes, losses = [size for size, _ in points], [loss for _, loss in points]
        option, last = 0, len(losses) - 1
        while option < last:
            # The steepest way on; of equal ones the longest.
            reachable = [
                ((losses[option] - losses[to]) / (sizes[to] - sizes[option]), to)
                for to in range(option + 1, last + 1)
                if sizes[to] > sizes[option]
            ]
            slope, to = max(reachable)
            edges.append((slope, losses[option] - losses[to], sizes[to] - sizes[option]))
            option = to
    return sorted(edges, reverse=True)


def relaxed_optimum(budget: Budget, spectra: dict[str, Tensor]) -> float:
    """The smallest sum of losses if every edge could be taken in part: no plan can be below it."""
    points = points_of(budget, spectra).values()
    left = budget.free_bytes - sum(each[0][0] for each in points)
    total = sum(each[0][1] for each in points)
    for slope, _, size in edges_of(budget, spectra):
        taken = min(size, left)
        total -= slope * taken
        left -= taken
    return total


def largest_edge(budget: Budget, spectra: dict[str, Tensor]) -> float:
    return max((gain for _, gain, _ in edges_of(budget, spectra)), default=0.0)


SMALL = [Target("a", 9, 12, 2), Target("b", 12, 7, 2), Target("c", 10, 10, 2), Target("d", 16, 5, 2)]


LOW_RANK, PIVOTED = format_named("low_rank", "float"), format_named("pivoted", "float")


def small_spectra(seed: int, decay: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spectra = {}
    for target in SMALL:
        count = min(target.out_features, target.in_features)
        values = torch.rand(count, generator=generator, dtype=torch.float64)
        values *= torch.arange(1, count + 1) ** -decay * 10 ** float(torch.rand(1, generator=generator))
        spectra[target.name] = values.sort(descending=True).values
    return spectra


def small_budget(ratio: float, *formats: Format) -> Budget:
    return open_budget(SMALL, BudgetRequest(formats[0], round(ratio, 3), alternatives=formats[1:]))


@pytest.mark.parametrize(
    "formats", [(LOW_RANK,), (PIVOTED,), (LOW_RANK, PIVOTED)], ids=["low_rank", "pivoted", "auto"]
)
@given(seed=st.integers(0, 2**20), ratio=st.floats(0.35, 0.99), decay=st.floats(0.0, 3.0))
@settings(max_examples=100, deadline=None)
def test_close_to_the_best_of_all_plans(formats: tuple[Format, ...], seed: int, ratio: float, decay: float) -> None:
    """Never below the optimum, nor above it by more than the steepest edge that did not fit: there is one a matrix."""
    spectra, budget = small_spectra(seed, decay), small_budget(ratio, *formats)
    found = predicted(allocate_globally(budget, spectra), spectra)
    best = best_by_trying_all(budget, spectra)
    assert best * (1 - 1e-12) <= found <= relaxed_optimum(budget, spectra) + largest_edge(budget, spectra) + 1e-12


@given(seed=st.integers(0, 2**20), ratio=st.floats(0.35, 0.99), decay=st.floats(0.0, 3.0))
@settings(max_examples=100, deadline=None)
def test_a_choice_of_structures_loses_no_more_than_either_alone_and_uses_up_the_budget(
    seed: int, ratio: float, decay: float
) -> None:
    """But for the one edge that did not fit: by that it may be above what could be reached in parts of steps."""
    spectra, budget = small_spectra(seed, decay), small_budget(ratio, LOW_RANK, PIVOTED)
    planned = allocate_globally(budget, spectra)
    for alone in ((LOW_RANK,), (PIVOTED,)):
        other = small_budget(ratio, *alone)
        assert best_by_trying_all(budget, spectra) <= best_by_trying_all(other, spectra)
        assert predicted(planned, spectra) <= relaxed_optimum(other, spectra) + largest_edge(budget, spectra) + 1e-12
        assert relaxed_optimum(other, spectra) <= predicted(allocate_globally(other, spectra), spectra) + 1e-12
    sizes = {target.name: planned_bytes(target, planned[target.name]) for target in SMALL}
    left = byte_budget(SMALL, round(ratio, 3)) - sum(sizes.values())
    assert left >= 0
    for name, points in points_of(budget, spectra).items():
        lost = predicted({name: planned[name]}, spectra)
        better = [size for size, loss in points if size > sizes[name] and loss < lost - 1e-9]
        assert not better or min(better) - sizes[name] > left, "a step that loses less fits into what is left"


def possible_shapes() -> st.SearchStrategy[tuple[int, int]]:
    sizes = st.one_of(st.integers(1, 12).map(lambda count: 32 * count), st.integers(1, 300))
    return st.tuples(sizes, sizes)


@given(
    shapes=st.lists(possible_shapes(), min_size=1, max_size=5),
    encoding=st.sampled_from(["gptq4_g32", "gptq3_g32", "nf4", "nf4_dq", "llm_int8", "int8", "float"]),
    multiple=st.sampled_from([None, 64, 128]),
    alone=st.booleans(),
    seed=st.integers(0, 2**20),
    above=st.floats(0.0, 1.0),
)
@settings(max_examples=100, deadline=None)
def test_every_linear_of_what_is_chosen_has_a_shape_that_its_encoding_takes(
    shapes: list[tuple[int, int]], encoding: str, multiple: int | None, alone: bool, seed: int, above: float
) -> None:
    """Of `pivoted` the rows that are left as well: `m - k` in multiples of 32 for GPTQ."""
    targets = [Target(f"m{number}", *shape, 2) for number, shape in enumerate(shapes)]
    formats = [format_named(structure, encoding) for structure in ("low_rank", "pivoted")][int(alone) :]
    given = BudgetRequest(formats[0], 1.0, alternatives=tuple(formats[1:]), rank_multiple=multiple)
    everything = open_budget(targets, given)
    smallest = sum(min(each.bytes_at(0) for each in everything.all_options(name)) for name in everything.options)
    total = sum(target.dense_bytes for target in targets)
    size = total - everything.free_bytes + smallest + int(above * (everything.free_bytes - smallest))
    budget = open_budget(targets, replace(given, ratio=None, size=size))
    planned = allocate_globally(budget, random_spectra(targets, seed))
    assert sum(planned_bytes(target, planned[target.name]) for target in targets) <= size
    for target in targets:
        module = planned[target.name]
        check_possible(target, module)
        if module.structure == "pivoted":
            assert 1 <= module.rank < target.out_features
            if encoding.startswith("gptq"):
                assert module.rank % 32 == (target.out_features - module.rank) % 32 == target.in_features % 32 == 0


@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.6, 0.4, 0.2])
@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_full_model_better_than_uniform_and_within_a_thousandth_of_the_budget(ratio: float, seed: int) -> None:
    targets = smollm2_targets()
    spectra = random_spectra(targets, seed)
    planned = allocate_globally(open_budget(targets, request(ratio)), spectra)
    assert predicted(planned, spectra) <= predicted(uniform(open_budget(targets, request(ratio))), spectra)
    by_name = {target.name: target for target in targets}
    used = sum(planned_bytes(by_name[name], module) for name, module in planned.items())
    budget = ratio * sum(target.dense_bytes for target in targets)
    assert 0.999 * budget <= used <= budget
    assert list(planned) == [target.name for target in targets]


def test_a_matrix_that_the_loss_feels_is_left_as_it_is() -> None:
    """Between the largest useful rank and the dense matrix lies a step of no bytes and all the error that is left."""
    targets = [Target("felt", 64, 64, 2), Target("idle", 64, 64, 2)]
    spectra = {"felt": torch.full((64,), 10.0), "idle": torch.full((64,), 0.1)}
    planned = allocate_globally(open_budget(targets, request(0.6)), spectra)
    assert planned["felt"] == LEFT_AS_IS
    assert planned["idle"].rank == math.floor((2 * 0.6 - 1) * 64 / 2)


def test_matrices_of_equal_spectra_get_equal_ranks() -> None:
    """And none is left as it is at the cost of the others."""
    targets = [Target(f"m{i}", 64, 64, 2) for i in range(4)]
    steep = {target.name: 0.5 ** torch.arange(64, dtype=torch.float64) for target in targets}
    ranks = [module.rank for module in allocate_globally(open_budget(targets, request(0.5)), steep).values()]
    assert None not in ranks
    assert max(ranks) - min(ranks) <= 1


def test_the_scale_of_all_spectra_does_not_matter_that_of_one_matrix_does() -> None:
    targets = smollm2_targets()
    spectra = random_spectra(targets, 3)
    budget = open_budget(targets, request(0.6))
    planned = allocate_globally(budget, spectra)
    assert allocate_globally(budget, {k: 1024 * v for k, v in spectra.items()}) == planned
    name = next(name for name, module in planned.items() if module.rank is not None and module.rank > 10)
    rescaled = allocate_globally(budget, {**spectra, name: 4 * spectra[name]})
    assert (rescaled[name].rank or 10**6) > planned[name].rank


def test_overrides_hold_and_the_others_are_allocated_around_them() -> None:
    targets = smollm2_targets()
    spectra = random_spectra(targets, 0)
    first, second = targets[0].name, targets[1].name
    overrides = {first: Override(rank=3), second: Override(dense=True)}
    del spectra[first]  # nobody asks for it
    planned = allocate_globally(open_budget(targets, request(0.5, overrides=overrides, rank_multiple=8)), spectra)
    assert planned[first].rank == 3
    assert planned[second].rank is None
    assert all((module.rank or 0) % 8 == 0 for name, module in planned.items() if name != first)


def test_a_missing_spectrum_is_named() -> None:
    with pytest.raises(ValueError, match="a: no spectrum; allocation 'global' needs one"):
        allocate_globally(open_budget(SMALL, request(0.5)), {})


def test_a_target_below_one_rank_per_matrix_says_what_can_be_reached() -> None:
    spectra = {target.name: torch.ones(min(target.out_features, target.in_features)) for target in SMALL}
    with pytest.raises(ValueError, match=r"raise ratio to 0.\d+, the smallest reachable"):
        allocate_globally(open_budget(SMALL, request(0.05)), spectra)
