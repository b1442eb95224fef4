"""What holds for every allocator: the byte budget, to the last step, whatever the shapes, ratio and overrides."""

import re
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from integration_tests.allocation.budget_cases import (
    LEFT_AS_IS,
    Case,
    UnreachableOverride,
    cases,
    dense_sum,
    random_spectra,
    reachable_cases,
    request,
    smollm2_targets,
)
from optimum_dobisvd.allocation.budget import BudgetRequest, byte_budget, open_budget, proportional_shares, spend
from optimum_dobisvd.allocation.plan import Plan, PlannedModule
from optimum_dobisvd.allocation.registry import ALLOCATIONS
from optimum_dobisvd.allocation.uniform import uniform
from optimum_dobisvd.model.patterns import Override
from optimum_dobisvd.model.target import Target
from optimum_dobisvd.structures.format import Format, format_named

both_allocators = pytest.mark.parametrize("allocation", ["uniform", "svd_llm_v2"])
all_allocators = pytest.mark.parametrize("allocation", ["uniform", "svd_llm_v2", "global"])


def allocate(allocation: str, case: Case) -> dict[str, PlannedModule]:
    spectra = random_spectra(case.targets, seed=0)
    return ALLOCATIONS.get(allocation).function(open_budget(case.targets, case.request), spectra)


@all_allocators
@given(case=reachable_cases())
@settings(max_examples=150, deadline=None)
def test_budget_is_used_to_the_last_step_and_overrides_are_exact(allocation: str, case: Case) -> None:
    planned = allocate(allocation, case)
    assert list(planned) == [target.name for target in case.targets]
    room = case.budget - case.total(planned)
    assert room >= 0
    for target in case.targets:
        module = planned[target.name]
        if target.name in case.overrides:
            assert module == case.overridden(target)
            continue
        choices = case.choices(target)
        assert module in choices
        if module != choices[-1]:
            above = choices[choices.index(module) + 1]
            assert case.size(target, above) - case.size(target, module) > room, "a further step fits"


@both_allocators
@given(case=reachable_cases())
@settings(max_examples=60, deadline=None)
def test_same_arguments_give_the_same_plan_and_it_passes_its_own_check(allocation: str, case: Case) -> None:
    planned = allocate(allocation, case)
    assert planned == allocate(allocation, case)
    plan = Plan(planned, method="m", ratio=case.ratio, allocation=allocation)
    assert plan.bytes(case.targets) == case.total(planned)
    assert plan.ratio_of(case.targets) == case.total(planned) / dense_sum(case.targets)


@both_allocators
@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_unreachable_budgets_are_refused_with_the_smallest_reachable_ratio(allocation: str, case: Case) -> None:
    try:
        smallest = case.smallest_total()
    except UnreachableOverride:
        with pytest.raises(ValueError, match=r"the override's ratio .* raise that ratio"):
            allocate(allocation, case)
        return
    assume(smallest > case.budget)
    with pytest.raises(ValueError, match="the smallest reachable") as caught:
        allocate(allocation, case)
    reachable = float(re.findall(r"raise ratio to (\S+), the smallest", str(caught.value))[0])
    assert 0 <= Fraction(str(reachable)) * dense_sum(case.targets) - smallest <= dense_sum(case.targets) / 10**6
    enough = replace(case, ratio=reachable)
    assert enough.total(allocate(allocation, enough)) <= enough.budget


@both_allocators
@given(case=reachable_cases())
@settings(max_examples=50, deadline=None)
def test_ratio_one_leaves_all_that_is_not_overridden_as_it_is(allocation: str, case: Case) -> None:
    case = replace(case, ratio=1.0)
    planned = allocate(allocation, case)
    assert all(planned[target.name] == LEFT_AS_IS for target in case.free)


@both_allocators
@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("rank_multiple", [1, 8])
def test_smollm2_is_within_two_thousandths_of_the_budget(allocation: str, ratio: float, rank_multiple: int) -> None:
    targets = smollm2_targets()
    overrides = {targets[0].name: Override(ratio=0.9), targets[-1].name: Override(dense=True)}
    for chosen in ({}, overrides):
        case = Case(targets, ratio, "float", chosen, rank_multiple, 1)
        planned = allocate(allocation, case)
        assert 0.998 * case.budget <= case.total(planned) <= case.budget
        assert all((module.rank or 0) % rank_multiple == 0 for module in planned.values())


def test_uniform_keeps_the_same_fraction_of_every_matrix() -> None:
    targets = smollm2_targets()
    planned = uniform(open_budget(targets, request(0.6)))
    for target in targets:
        m, n = target.out_features, target.in_features
        # The last bytes may buy a second step where only the small matrices' steps still fit.
        assert 0 <= planned[target.name].rank - int(0.6 * m * n / (m + n)) <= 2


def test_remainder_goes_to_the_largest_relative_shortfall() -> None:
    # 106 bytes: 56 for a at 22 a rank (short by 12/56), 50 for b at 20 a rank (short by 10/50); 22 are left for one.
    targets = [Target("a", 8, 14, 1), Target("b", 10, 10, 1)]
    for order in (targets, targets[::-1]):
        planned = uniform(open_budget(order, request(0.5)))
        assert (planned["a"].rank, planned["b"].rank) == (3, 2)


def test_overrides_leave_the_rest_to_the_others() -> None:
    targets = [Target(f"layers.{i}.q_proj", 64, 64, 2) for i in range(4)]
    planned = uniform(open_budget(targets, request(0.5, overrides={"layers.0.q_proj": Override(rank=1)})))
    assert [module.rank for module in planned.values()] == [1, 21, 21, 21]
    planned = uniform(open_budget(targets, request(0.5, overrides={"layers.0.q_proj": Override(dense=True)})))
    assert planned["layers.0.q_proj"] == LEFT_AS_IS
    assert [module.rank for module in planned.values()][1:] == [11, 11, 10]


def test_a_matrix_too_small_for_the_rank_multiple_is_left_as_it_is_and_paid_for() -> None:
    targets = [Target("small", 8, 8, 2), Target("large", 256, 256, 2)]
    planned = uniform(open_budget(targets, request(0.5, rank_multiple=16)))
    assert planned["small"] == LEFT_AS_IS
    assert planned["large"].rank == 48, "64 would be half of large alone, and leave nothing for small"


def test_the_largest_possible_share_is_the_matrix_itself_not_a_rank_that_is_larger() -> None:
    # 2·(6+3) = 18 = 6·3 bytes: as large as dense, which is exact.
    planned = uniform(open_budget([Target("a", 6, 3, 1)], request(1.0)))
    assert planned == {"a": LEFT_AS_IS}
    assert uniform(open_budget([Target("a", 6, 3, 1)], request(0.99)))["a"].rank == 1


@pytest.mark.parametrize(
    ("ratio", "dense_bytes", "budget"), [(0.29, 100, 29), (0.7, 10, 7), (0.999, 10, 9), (1, 10, 10)]
)
def test_byte_budget_reads_the_ratio_as_a_decimal(ratio: float, dense_bytes: int, budget: int) -> None:
    assert byte_budget([Target("a", dense_bytes, 1, 1)], ratio) == budget


def test_large_models_need_few_evaluations_of_the_bytes_at_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, uncounted = 0, Format.bytes

    def count(self: Format, m: int, n: int, rank: int | None, size: int) -> int:
        nonlocal calls
        calls += rank is not None
        return uncounted(self, m, n, rank, size)

    monkeypatch.setattr(Format, "bytes", count)
    targets = [Target(f"layers.{i}.up_proj", 28672 - i, 8192, 2) for i in range(1500)]
    uniform(open_budget(targets, request(0.6)))
    assert 0 < calls < 60 * len(targets)


@given(
    rows=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 30), st.integers(0, 90)), min_size=1, max_size=9),
    fraction=st.fractions(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_proportional_shares_are_exact(rows: list[tuple[int, int, int]], fraction: Fraction) -> None:
    weights, lower, widths = zip(*rows, strict=True)
    upper = [low + width for low, width in zip(lower, widths, strict=True)]
    total = sum(lower) + fraction * sum(widths)
    shares = proportional_shares(weights, lower, upper, total)
    assert sum(shares) == total
    assert all(low <= share <= high for low, share, high in zip(lower, shares, upper, strict=True))
    scales = {
        share / Fraction(w)
        for w, low, share, high in zip(weights, lower, shares, upper, strict=True)
        if low < share < high
    }
    assert len(scales) <= 1, "shares that meet no bound are in proportion"
    for scale in scales:
        for weight, low, share, high in zip(weights, lower, shares, upper, strict=True):
            assert share == min(max(scale * weight, low), high)


def test_spend_takes_any_target_bytes_and_keeps_their_proportions() -> None:
    targets = [Target("a", 64, 64, 2), Target("b", 64, 64, 2)]
    budget = open_budget(targets, request(0.5))
    planned = spend(budget, {"a": 300, "b": 100})
    assert [planned["a"].rank, planned["b"].rank] == [24, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, "ratio is 0; .* kept, above 0"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"ratio": True}, "ratio is True"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"rank_multiple": 0}, "rank_multiple is 0; it must be a whole number"),
        ({"min_rank": 2.0}, "min_rank is 2.0; it must be a whole number"),
        ({"ratio": None}, "give either a ratio or a size for the matrices to compress"),
        ({"size": 100}, "give either a ratio or a size for the matrices to compress"),
        ({"ratio": None, "size": 100}, "the size asked for leaves 100 of 8192 bytes.*raise it to leave 256 for them"),
        (
            {"encoding": "gptq4_g32", "rank_multiple": 16},
            "rank_multiple is 16, and gptq4_g32 takes ranks in multiples of 32 only; leave rank_multiple out",
        ),
        ({"targets": []}, "no matrix to compress; check which modules are excluded"),
        ({"targets": [Target("a", 4, 4, 2)] * 2}, "'a' is given twice"),
        ({"overrides": {"layers.0.q_porj": Override(rank=1)}}, "'layers.0.q_porj'.*near names: 'layers.0.q_proj'"),
        ({"overrides": {"layers.0.q_proj": Override(rank=65)}}, "q_proj: rank 65 is above 64, .* 64x64 matrix has"),
        (
            {"overrides": {"layers.0.q_proj": Override(rank=40)}},
            "q_proj: at rank 40 .* use at most 31, or leave it as it is",
        ),
        ({"overrides": {"layers.0.q_proj": Override(ratio=0.01)}}, "q_proj: the override's ratio 0.01 of 8192 bytes"),
    ],
)
def test_errors_say_what_and_where(arguments: dict, message: str) -> None:
    defaults = {"targets": [Target("layers.0.q_proj", 64, 64, 2)], "ratio": 0.5}
    given = defaults | arguments
    with pytest.raises(ValueError, match=message):
        open_budget(given.pop("targets"), request(**given))


def test_a_size_is_spent_as_a_ratio_of_the_same_bytes_is() -> None:
    targets = smollm2_targets()
    budget = open_budget(targets, request(0.6))
    assert open_budget(targets, request(None, size=byte_budget(targets, 0.6))) == budget


@pytest.mark.parametrize(
    ("override", "structure", "rank"),
    [
        (Override(rank=20), "pivoted", 20),  # the smaller of the two at that rank
        (Override(rank=58), "pivoted", 58),  # two factors would be as large as the matrix
        (Override(rank=2), "low_rank", 2),  # the permutation takes more bytes than the gauge
        (Override(ratio=0.75), "pivoted", 31),  # the one with more ranks in those bytes
        (Override(dense=True), "dense", None),
    ],
)
def test_an_override_takes_the_structure_that_makes_most_of_it(
    override: Override, structure: str, rank: int | None
) -> None:
    target = Target("a.q_proj", 64, 64, 2)
    formats = [format_named(name, "float") for name in ("low_rank", "pivoted")]
    asked = BudgetRequest(formats[0], 0.9, alternatives=(formats[1],), overrides={"a.q_proj": override})
    budget = open_budget([target, Target("a.k_proj", 64, 64, 2)], asked)
    fixed = budget.fixed["a.q_proj"]
    assert (fixed.structure, fixed.rank) == (structure, rank)
