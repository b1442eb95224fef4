"""Both objectives' derivatives by the ranks are those of the loss they report."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from integration_tests.statistics.tiny_model_statistics import collect, collect_gradients
from integration_tests.tiny_models import tiny, tokens
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.factorization.decompositions import decompositions
from optimum_dobisvd.factorization.registry import FACTORIZATIONS
from optimum_dobisvd.learning import activation
from optimum_dobisvd.learning.activation import ActivationTruncation
from optimum_dobisvd.learning.fixed_basis import FixedBasis, gates, reach, slopes
from optimum_dobisvd.model.layout import find_layout
from optimum_dobisvd.model.linears import weight_matrix

IDS = tokens(3, 20)
MASK = torch.ones_like(IDS, dtype=torch.bool)


def fixed_basis(model: torch.nn.Module, row: str = "kfac", exclude: tuple[str, ...] = ()) -> FixedBasis:
    layout = find_layout(model, exclude)
    store = collect(model, IDS)
    gradients = collect_gradients(model, IDS)
    store.open_gradients({"tokens": IDS.numel()})
    for block in layout.blocks:
        store.put_gradients(block, gradients.gradients(block))
    with torch.no_grad():
        found = list(decompositions(layout, FACTORIZATIONS.get(row), store, None, layout.linears))
    return FixedBasis(model, layout.linears, found)


def ranks_of(basis: FixedBasis, share: float = 0.5) -> dict[str, float]:
    """Real ranks, none of them an integer, different from matrix to matrix."""
    return {
        name: max(1.3, (share + 0.2 * (i % 3 - 1)) * basis.count(name) + 0.137 * i % 1)
        for i, name in enumerate(basis.linears)
    }


def all_at(basis: FixedBasis, rank: int) -> dict[str, PlannedModule]:
    return dict.fromkeys(basis.linears, PlannedModule("low_rank", "float", rank))


def expected_loss(model: torch.nn.Module, ids: Tensor) -> float:
    logits = model(ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


@given(rank=st.floats(0.5, 40), count=st.integers(1, 40), beta=st.floats(0.05, 20), shift=st.floats(-1, 1))
@settings(max_examples=100, deadline=None)
def test_gates_fall_from_open_to_shut_and_slopes_are_their_derivative(
    rank: float, count: int, beta: float, shift: float
) -> None:
    k = torch.tensor(rank, dtype=torch.float64, requires_grad=True)
    found = gates(k, count, beta)
    assert bool((found[1:] <= found[:-1]).all())
    assert bool(((found >= 0) & (found <= 1)).all())
    for i in range(count):
        k.grad = None
        gates(k, count, beta)[i].backward()
        assert float(k.grad) == pytest.approx(float(slopes(k.detach(), count, beta)[i]), rel=1e-9, abs=1e-12)
    first, last = reach(rank, count, beta)
    assert 0 <= first < last <= count
    assert bool((found[:first] > 0.999).all())
    assert bool((found[last:] < 1e-3).all())


@pytest.mark.parametrize("beta", [0.2, 1.0, 10.0])
def test_away_from_the_ends_gates_sum_to_the_rank(beta: float) -> None:
    for rank in (60.0, 60.25, 60.5, 61.0) if beta < 2 else (60.0, 60.5, 61.0):
        k = torch.tensor(rank, dtype=torch.float64)
        assert float(gates(k, 120, beta).sum()) == pytest.approx(rank, abs=0.01)


def test_sharp_gates_have_no_slope_at_integers() -> None:
    """So sharpness is annealed: at the paper's 10 a rank gets stuck."""
    at_integer, between = (slopes(torch.tensor(rank, dtype=torch.float64), 40, 10.0).sum() for rank in (20.0, 20.5))
    assert float(at_integer) < 1e-2 < 4.9 < float(between)


# How far apart to take finite differences, and how much to trust them: Llama's norms compute in float32, whatever the
# model's dtype is.
DIFFERENCES = [("gpt2", 1e-4, 1e-4), ("opt", 1e-4, 1e-4), ("llama", 0.02, 0.03), ("qwen2", 0.02, 0.03)]


@pytest.mark.parametrize(("model_type", "step", "tolerance"), DIFFERENCES)
def test_slopes_in_the_fixed_basis_are_the_derivative_of_the_loss(
    model_type: str, step: float, tolerance: float
) -> None:
    model = tiny(model_type, dtype=torch.float64)
    with fixed_basis(model) as basis:
        ranks = ranks_of(basis)
        betas = dict.fromkeys(ranks, 0.4)
        loss, found = basis.loss_and_slopes(ranks, betas, IDS, MASK)
        assert loss == pytest.approx(expected_loss(model, IDS), rel=1e-9)
        for name in list(ranks)[:: max(1, len(ranks) // 7)]:
            above, _ = basis.loss_and_slopes({**ranks, name: ranks[name] + step}, betas, IDS, MASK)
            below, _ = basis.loss_and_slopes({**ranks, name: ranks[name] - step}, betas, IDS, MASK)
            assert found[name] == pytest.approx((above - below) / (2 * step), rel=tolerance, abs=tolerance / 100), name


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_gains_are_what_the_loss_rises_by_when_a_direction_is_let_in_or_out_a_little(model_type: str) -> None:
    model = tiny(model_type, dtype=torch.float64)
    with fixed_basis(model) as basis:
        planned = {
            name: PlannedModule("low_rank", "float", 3, (0, 2, 5)) if i % 3 else PlannedModule("dense", "float")
            for i, name in enumerate(basis.linears)
        }
        loss, gains = basis.loss_and_gains(planned, IDS, MASK)
        assert loss == pytest.approx(expected_loss(model, IDS), rel=1e-9)
        for name in list(planned)[:: max(1, len(planned) // 5)]:
            weight = weight_matrix(basis.linears[name])
            left, right = basis._bases[name]
            assert gains[name].shape == (len(right),)
            for direction in (0, 1, 2):
                step = 1e-4 if model_type == "gpt2" else 0.02  # Llama's norms compute in float32
                change = step * torch.outer(left[:, direction], right[direction])
                with torch.no_grad():
                    weight += change
                    above = basis.loss([(IDS, MASK)])
                    weight -= 2 * change
                    below = basis.loss([(IDS, MASK)])
                    weight += change
                slope = (below - above) / (2 * step)
                assert float(gains[name][direction]) == pytest.approx(slope, rel=0.05, abs=1e-4), (name, direction)


def test_a_plan_with_directions_is_put_as_the_sum_of_these_terms() -> None:
    model = tiny("llama", dtype=torch.float64)
    with fixed_basis(model) as basis:
        planned = dict.fromkeys(basis.linears, PlannedModule("low_rank", "float", 2, (1, 4)))
        basis.put(planned)
        for name, module in basis.linears.items():
            left, right = basis._bases[name]
            expected = torch.outer(left[:, 1], right[1]) + torch.outer(left[:, 4], right[4])
            torch.testing.assert_close(weight_matrix(module), expected)


@pytest.mark.parametrize(("model_type", "step", "tolerance"), DIFFERENCES[:2])
@pytest.mark.parametrize("length", [20, 60])
def test_slopes_through_the_activations_are_the_derivative_of_the_loss(
    model_type: str, step: float, tolerance: float, length: int
) -> None:
    """Windows shorter and longer than the matrices are wide, key and value projections narrower than the others."""
    model = tiny(model_type, dtype=torch.float64)
    ids = tokens(2, length, seed=1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with fixed_basis(model, "output_pca") as basis:
        objective = ActivationTruncation(basis)
        ranks = ranks_of(basis, 0.6)
        betas = dict.fromkeys(ranks, 0.3)
        _, found = objective.loss_and_slopes(ranks, betas, ids, mask)
        assert all(abs(value) > 0 for value in found.values())
        for name in list(ranks)[:: max(1, len(ranks) // 5)]:
            above, _ = objective.loss_and_slopes({**ranks, name: ranks[name] + step}, betas, ids, mask)
            below, _ = objective.loss_and_slopes({**ranks, name: ranks[name] - step}, betas, ids, mask)
            assert found[name] == pytest.approx((above - below) / (2 * step), rel=tolerance, abs=tolerance / 100), name


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("length", [12, 20])
def test_grouped_queries_have_slopes_too_those_of_torchs_own_decomposition(
    model_type: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On spectra that are apart; finite differences say nothing here, since later layers' values cross."""
    model = tiny(model_type, dtype=torch.float64)
    ids = tokens(2, length, seed=1)
    with fixed_basis(model, "output_pca") as basis:
        objective, ranks = ActivationTruncation(basis), ranks_of(basis, 0.6)
        arguments = (ranks, dict.fromkeys(ranks, 0.3), ids, torch.ones_like(ids, dtype=torch.bool))
        _, found = objective.loss_and_slopes(*arguments)

        def exact(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            return left, values, right.mT

        monkeypatch.setattr(activation, "stable_svd", exact)
        _, expected = objective.loss_and_slopes(*arguments)
    assert {name.rpartition(".")[2] for name in found} >= {"q_proj", "k_proj", "v_proj"}
    assert all(abs(value) > 0 for value in found.values())
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_sharp_gates_give_the_loss_of_integer_ranks() -> None:
    model = tiny("llama", dtype=torch.float64)
    with fixed_basis(model) as basis:
        ranks = dict.fromkeys(basis.linears, 7)
        soft, _ = basis.loss_and_slopes({k: float(v) for k, v in ranks.items()}, dict.fromkeys(ranks, 50.0), IDS, MASK)
        basis.put(all_at(basis, 7))
        assert basis.loss([(IDS, MASK)]) == pytest.approx(soft, rel=1e-9)
        assert basis.loss([(IDS, MASK)]) == pytest.approx(expected_loss(model, IDS), rel=1e-9)


def test_wide_open_activations_change_nothing() -> None:
    model = tiny("llama", dtype=torch.float64)
    expected = expected_loss(model, IDS)
    with fixed_basis(model, "output_pca") as basis:
        ranks = dict.fromkeys(basis.linears, 1000.0)
        loss, _ = ActivationTruncation(basis).loss_and_slopes(ranks, dict.fromkeys(ranks, 5.0), IDS, MASK)
    assert loss == pytest.approx(expected, rel=1e-9)


def test_padding_takes_no_part() -> None:
    model = tiny("gpt2", dtype=torch.float64)
    short, short_mask = IDS[:1, :12], MASK[:1, :12]
    padded = torch.cat([short, torch.full((1, 8), 5)], dim=1)
    mask = torch.cat([short_mask, torch.zeros(1, 8, dtype=torch.bool)], dim=1)
    with fixed_basis(model, "output_pca") as basis:
        ranks = ranks_of(basis)
        betas = dict.fromkeys(ranks, 0.4)
        for objective in (basis, ActivationTruncation(basis)):
            loss, found = objective.loss_and_slopes(ranks, betas, short, short_mask)
            other, others = objective.loss_and_slopes(ranks, betas, padded, mask)
            assert other == pytest.approx(loss, rel=1e-9)
            assert others == pytest.approx(found, rel=1e-6, abs=1e-10)


def test_a_dense_matrix_has_no_slope_and_its_own_weight() -> None:
    model = tiny("llama", dtype=torch.float64)
    with fixed_basis(model) as basis:
        first = next(iter(basis.linears))
        before = weight_matrix(basis.linears[first]).clone()
        ranks: dict[str, float | None] = dict(ranks_of(basis))
        basis.put(all_at(basis, 3))
        ranks[first] = None
        betas = dict.fromkeys(ranks, 0.4)
        for objective in (basis, ActivationTruncation(basis)):
            _, found = objective.loss_and_slopes(ranks, betas, IDS, MASK)
            assert first not in found
            assert len(found) == len(ranks) - 1
            assert torch.equal(weight_matrix(basis.linears[first]), before)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails: bool) -> None:
    model = tiny("gpt2")
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train()
    basis = fixed_basis(model)
    mask = torch.zeros_like(MASK) if fails else MASK

    def use() -> None:
        with basis:
            basis.put(all_at(basis, 2))
            basis.loss_and_slopes(ranks_of(basis), dict.fromkeys(basis.linears, 0.4), IDS, mask)

    if fails:
        with pytest.raises(ValueError, match="the calibration text: no token has a label"):
            use()
    else:
        use()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
