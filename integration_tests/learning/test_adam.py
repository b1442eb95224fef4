"""Adam on real ranks: the budget holds at every step, and what is dense or overridden stays so."""

import pytest
import torch

from integration_tests.allocation.budget_cases import random_spectra
from integration_tests.learning.losses_without_models import (
    BATCH,
    DENSE_BYTES,
    TARGETS,
    QuadraticLoss,
    adam_learner,
    budget_at,
    total_bytes,
)
from optimum_dobisvd.allocation.global_allocation import allocate_globally
from optimum_dobisvd.allocation.plan import PlannedModule
from optimum_dobisvd.allocation.rank_training import RankTraining
from optimum_dobisvd.allocation.uniform import uniform
from optimum_dobisvd.learning.adam import AdamRankOptimizer
from optimum_dobisvd.learning.training import RankLearner
from optimum_dobisvd.model.patterns import Override


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_ranks_move_to_where_the_loss_wants_them_and_the_budget_holds_at_every_step(ratio: float) -> None:
    model = QuadraticLoss.random()
    planned, curve = adam_learner(model, ratio, steps=60).run([BATCH], [BATCH])
    losses = [found.loss for found in curve.evaluations]
    assert min(losses) < 0.9 * losses[0]
    assert 0.99 * ratio * DENSE_BYTES <= total_bytes(planned) <= ratio * DENSE_BYTES
    for step in curve.steps:
        sizes = [
            rank * (t.out_features + t.in_features) * 2
            for rank, name in zip(step.ranks, curve.names, strict=True)
            for t in TARGETS
            if t.name == name
        ]
        assert sum(sizes) == pytest.approx(int(ratio * DENSE_BYTES), rel=1e-6)


def test_matrices_that_start_dense_stay_dense_and_are_paid_for() -> None:
    spectra = random_spectra(TARGETS, 0)
    spectra["layers.0.q"] = 1e6 * torch.ones(64, dtype=torch.float64)
    start = allocate_globally(budget_at(0.6), spectra)
    assert start["layers.0.q"].rank is None
    model = QuadraticLoss.random()
    planned, curve = adam_learner(model, 0.6, start=start, steps=20).run([BATCH], [BATCH])
    assert planned["layers.0.q"] == PlannedModule("dense", "float")
    place = curve.names.index("layers.0.q")
    assert all(step.ranks[place] is None for step in curve.steps)
    assert all(call["layers.0.q"] is None for call in model.calls)
    assert total_bytes(planned) <= 0.6 * DENSE_BYTES


@pytest.mark.parametrize("seed", range(20))
def test_adam_never_unmakes_a_dense_matrix(seed: int) -> None:
    spectra = random_spectra(TARGETS, seed)
    for name in list(spectra)[::4]:
        spectra[name] = 1e6 * torch.ones_like(spectra[name])
    start = allocate_globally(budget_at(0.7), spectra)
    dense = [name for name, module in start.items() if module.rank is None]
    model = QuadraticLoss.random(seed)
    planned, _ = adam_learner(model, 0.7, start=start, steps=9, evaluate_every=1, patience=99).run([BATCH], [BATCH])
    assert dense
    assert all(planned[name].rank is None for name in dense)


def test_overridden_matrices_are_left_alone() -> None:
    budget = budget_at(0.5, overrides={"layers.1.up": Override(rank=5), "layers.2.up": Override(dense=True)})
    start = uniform(budget)
    model = QuadraticLoss.random()
    settings = RankTraining(steps=10)
    optimizer = AdamRankOptimizer(model, budget, start, settings)
    learner = RankLearner(model, optimizer, start, settings, mode="test")  # type: ignore[arg-type]
    planned, curve = learner.run([BATCH], [BATCH])
    assert planned["layers.1.up"] == PlannedModule("low_rank", "float", 5)
    assert planned["layers.2.up"] == PlannedModule("dense", "float")
    assert not {"layers.1.up", "layers.2.up"} & set(curve.names)
    assert total_bytes(planned) <= 0.5 * DENSE_BYTES


def test_a_gradient_that_is_nan_names_the_matrix() -> None:
    model = QuadraticLoss.random()
    model.weights["layers.2.v"] = float("nan")
    model.value = lambda ranks: 1.0  # type: ignore[method-assign]
    _, curve = adam_learner(model, steps=5).run([BATCH], [BATCH])
    assert curve.stopped == "step 1: the gradient of the rank of layers.2.v is not finite"


def test_no_gradient_at_all_is_an_error() -> None:
    model = QuadraticLoss.random()
    model.slope = 0.0
    with pytest.raises(ValueError, match="step 1: no rank has a gradient"):
        adam_learner(model, steps=5).run([BATCH], [BATCH])


def test_nothing_to_learn_is_an_error() -> None:
    start = {target.name: PlannedModule("dense", "float") for target in TARGETS}
    with pytest.raises(ValueError, match="no matrix has a rank to learn: all are dense or overridden"):
        adam_learner(QuadraticLoss.random(), 1.0, start=start)
