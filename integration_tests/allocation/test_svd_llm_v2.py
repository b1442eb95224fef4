"""SVD-LLM V2's Algorithm 1: who gives up how much, before and after rounding."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from integration_tests.allocation.budget_cases import dense_sum, random_spectra, request, smollm2_targets
from optimum_dobisvd.allocation.budget import Budget, open_budget
from optimum_dobisvd.allocation.svd_llm_v2 import svd_llm_v2, target_bytes, truncation_loss
from optimum_dobisvd.allocation.uniform import uniform
from optimum_dobisvd.model.patterns import Override
from optimum_dobisvd.model.target import Target

LAYERS = [Target(f"layers.{i}.q_proj", 48, 64, 2) for i in range(5)]


def flat_spectra(losses: list[float], targets: list[Target] = LAYERS, ratio: float = 0.5) -> dict[str, torch.Tensor]:
    """Flat spectra with the given truncation losses at the rank that the ratio gives."""
    spectra = {}
    for target, loss in zip(targets, losses, strict=False):
        m, n = target.out_features, target.in_features
        tail = min(m, n) - int(ratio * m * n / (m + n))
        spectra[target.name] = torch.full((min(m, n),), loss / math.sqrt(tail), dtype=torch.float64)
    return spectra


def removed_fractions(budget: Budget, wanted: dict[str, int | Fraction]) -> list[Fraction]:
    return [1 - Fraction(wanted[name]) / each.target.dense_bytes for name, each in budget.options.items()]


@pytest.mark.parametrize("ratio", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_kind_removes_its_bytes_exactly(ratio: float, seed: int) -> None:
    targets = smollm2_targets()
    budget = open_budget(targets, request(ratio, overrides={targets[3].name: Override(rank=20)}))
    wanted = target_bytes(budget, random_spectra(targets, seed))
    free = [each.target for each in budget.options.values()]
    keep = Fraction(budget.free_bytes, dense_sum(free))
    for kind in {target.kind for target in free}:
        members = [target for target in free if target.kind == kind]
        assert sum(wanted[target.name] for target in members) == keep * dense_sum(members)
        assert len({wanted[target.name] for target in members}) > 1, "the losses differ, so must the shares"


def test_removed_fractions_follow_the_papers_formula() -> None:
    losses = [1e6, 3e6, 1e7, 2e5, 4e6]
    budget = open_budget(LAYERS, request(0.5))
    removed = removed_fractions(budget, target_bytes(budget, flat_spectra(losses)))
    g = [1 / math.log(loss) for loss in losses]
    assert [float(fraction) for fraction in removed] == pytest.approx([5 * 0.5 * gj / sum(g) for gj in g], rel=1e-12)
    assert sum(removed) / 5 == Fraction(1, 2)


@given(st.lists(st.floats(1, 1e9), min_size=5, max_size=5), st.integers(1, 4))
@example([1.0, 1.0, 3.0, 79.0, 1181800.0], 2)
@settings(max_examples=50, deadline=None)
def test_a_larger_loss_never_gets_a_smaller_rank(losses: list[float], rank_multiple: int) -> None:
    budget = open_budget(LAYERS, request(0.5, rank_multiple=rank_multiple))
    spectra = flat_spectra(losses)
    wanted = target_bytes(budget, spectra)
    planned = svd_llm_v2(budget, spectra)
    rows = [
        (loss, wanted[layer.name], planned[layer.name].rank or 48) for loss, layer in zip(losses, LAYERS, strict=True)
    ]
    for loss, size, rank in rows:
        for other_loss, other_size, other_rank in rows:
            if loss > 1.000001 * other_loss:
                assert size >= other_size
            # Equal target bytes (of losses up to e, or below half of the kind's share) share the remainder in the
            # order of the layers. Dense counts as the full 48.
            if size > 1.000001 * other_size:
                assert rank >= other_rank


def test_a_clearly_larger_loss_gets_a_larger_rank() -> None:
    planned = svd_llm_v2(open_budget(LAYERS, request(0.5)), flat_spectra([1e2, 1e4, 1e5, 1e6, 1e9]))
    ranks = [planned[target.name].rank for target in LAYERS]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


@pytest.mark.parametrize("loss", [0.0, 1e-30, 0.5, 1.0, math.e])
def test_losses_up_to_e_all_weigh_the_same(loss: float) -> None:
    spectra = flat_spectra([loss, math.e, 1.0, 0.2, 0.0])
    budget = open_budget(LAYERS, request(0.5))
    assert svd_llm_v2(budget, spectra) == uniform(budget)


def test_what_clipping_frees_is_shared_by_the_others() -> None:
    losses = [1.0, 1e8, 1.2e8, 1.5e8, 2e8]
    budget = open_budget(LAYERS, request(0.2, min_rank=4))
    removed = removed_fractions(budget, target_bytes(budget, flat_spectra(losses, ratio=0.2)))
    most = 1 - Fraction(4 * (48 + 64), 48 * 64)
    assert removed[0] == most, "5·0.8·g would be more than all of it"
    assert sum(removed) == 5 * (1 - Fraction(budget.free_bytes, dense_sum(LAYERS)))
    rest = [1 / math.log(loss) for loss in losses[1:]]
    freed = (float(sum(removed)) - float(most)) / sum(rest)
    assert [float(fraction) for fraction in removed[1:]] == pytest.approx([freed * g for g in rest], rel=1e-12)


@given(st.lists(st.floats(1, 1e9), min_size=5, max_size=5), st.floats(0.2, 0.9))
@settings(max_examples=50, deadline=None)
def test_nothing_keeps_less_than_half_of_its_kinds_share(losses: list[float], ratio: float) -> None:
    budget = open_budget(LAYERS, request(ratio))
    for fraction in removed_fractions(budget, target_bytes(budget, flat_spectra(losses, ratio=ratio))):
        assert 1 - fraction >= Fraction(budget.free_bytes, dense_sum(LAYERS)) / 2


def test_a_kind_that_cannot_give_its_share_leaves_it_to_the_other_kinds() -> None:
    targets = [Target("layers.0.k_proj", 8, 64, 2), Target("layers.0.up_proj", 256, 64, 2)]
    budget = open_budget(targets, request(0.4, min_rank=4))
    wanted = target_bytes(budget, flat_spectra([1e6, 1e6], targets))
    assert wanted["layers.0.k_proj"] == 4 * (8 + 64) * 2 > Fraction(2, 5) * 8 * 64 * 2
    assert sum(wanted.values()) == budget.free_bytes


def test_matrices_of_different_sizes_in_one_kind_keep_the_kinds_bytes() -> None:
    targets = [Target("layers.0.w", 32, 32, 2), Target("layers.1.w", 64, 96, 2), Target("layers.2.w", 48, 48, 4)]
    budget = open_budget(targets, request(0.5))
    wanted = target_bytes(budget, flat_spectra([1e4, 1e6, 1e8], targets))
    assert sum(wanted.values()) == budget.free_bytes
    removed = removed_fractions(budget, wanted)
    assert removed[0] > removed[1] > removed[2]


def test_truncation_loss_is_the_output_error_of_the_best_approximation() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    inputs = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    left, spectrum, _ = torch.linalg.svd(weight @ inputs, full_matrices=False)
    for rank in range(7):
        basis = left[:, :rank]
        error = (weight - basis @ basis.T @ weight) @ inputs
        assert truncation_loss(spectrum, rank) == pytest.approx(error.norm().item(), abs=1e-10)


def test_half_precision_spectra_are_summed_in_double() -> None:
    assert truncation_loss(torch.full((4,), 6e4, dtype=torch.float16), 0) == pytest.approx(2 * 6e4, rel=1e-3)


def test_overridden_matrices_need_no_spectrum() -> None:
    spectra = flat_spectra([1e6] * 5)
    del spectra[LAYERS[2].name]
    planned = svd_llm_v2(open_budget(LAYERS, request(0.5, overrides={LAYERS[2].name: Override(rank=3)})), spectra)
    assert planned[LAYERS[2].name].rank == 3


@pytest.mark.parametrize(
    ("spectrum", "message"),
    [
        (None, "no spectrum; allocation 'svd_llm_v2' needs one"),
        (torch.ones(47), r"shape \(47,\), expected \(48,\); give every singular value"),
        (torch.ones(49), r"shape \(49,\), expected \(48,\)"),
        (torch.ones(48, 1), r"shape \(48, 1\), expected \(48,\)"),
        (torch.tensor([float("nan")] + [1.0] * 47), "not finite; look for NaN"),
        (torch.tensor([float("inf")] + [1.0] * 47), "not finite"),
        (torch.tensor([1.0] * 47 + [-1.0]), "non-negative and descending"),
        (torch.arange(48.0), "non-negative and descending"),
    ],
)
def test_a_bad_spectrum_is_an_error_that_names_the_module(spectrum: torch.Tensor | None, message: str) -> None:
    spectra = flat_spectra([1e6] * 5)
    del spectra["layers.3.q_proj"]
    if spectrum is not None:
        spectra["layers.3.q_proj"] = spectrum
    with pytest.raises(ValueError, match=f"layers.3.q_proj: .*{message}"):
        svd_llm_v2(open_budget(LAYERS, request(0.5)), spectra)


def test_no_spectra_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj: no spectrum"):
        svd_llm_v2(open_budget(LAYERS, request(0.5)))
