"""The training loop: the best ranks on held-out windows are kept, and a killed run resumes."""

import json
from pathlib import Path
from typing import Any

import pytest

from integration_tests.learning.losses_without_models import (
    BATCH,
    DENSE_BYTES,
    QuadraticLoss,
    SumOverDirections,
    adam_learner,
    budget_at,
    direction_learner,
    total_bytes,
)
from optimum_dobisvd.allocation.uniform import uniform
from optimum_dobisvd.calibration.loss import NotFiniteError
from optimum_dobisvd.learning.curve import TrainingCurve


def test_the_best_ranks_on_the_held_out_windows_are_kept_the_start_among_them() -> None:
    model = QuadraticLoss.random()
    model.slope = 1.0  # uphill: every step makes it worse
    planned, curve = adam_learner(model, 0.5, steps=30, evaluate_every=4, patience=3).run([BATCH], [BATCH])
    assert planned == uniform(budget_at(0.5))
    assert curve.best == 0
    assert len(curve.steps) == 12
    assert curve.stopped == "no gain on the held-out windows in 3 evaluations"


@pytest.mark.parametrize("killed", [1, 4, 7])
def test_a_killed_training_resumes_and_ends_alike(tmp_path: Path, killed: int) -> None:
    settings = {"steps": 10, "evaluate_every": 3}
    uninterrupted = adam_learner(QuadraticLoss.random(), **settings).run([BATCH], [BATCH])
    model = QuadraticLoss.random()
    model.fail_at, model.fail = killed, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        adam_learner(model, journal=tmp_path / "j", **settings).run([BATCH], [BATCH])
    model = QuadraticLoss.random()
    resumed = adam_learner(model, journal=tmp_path / "j", **settings).run([BATCH], [BATCH])
    assert len(model.calls) == 10 - killed
    assert resumed[0] == uninterrupted[0]
    assert resumed[1].to_dict() == uninterrupted[1].to_dict()


@pytest.mark.parametrize("killed", [1, 4, 7])
@pytest.mark.parametrize(("encoding", "ratio"), [("float", 0.6), ("remap", 0.6), ("int8", 0.45)])
def test_a_killed_choice_of_directions_resumes_and_ends_alike(
    tmp_path: Path, encoding: str, ratio: float, killed: int
) -> None:
    settings = {"encoding": encoding, "steps": 10, "evaluate_every": 3}
    uninterrupted = direction_learner(SumOverDirections(noise=1.0), ratio, **settings).run([BATCH], [BATCH])
    loss = SumOverDirections(noise=1.0)
    loss.fail_at = killed
    with pytest.raises(KeyboardInterrupt):
        direction_learner(loss, ratio, tmp_path / "j", **settings).run([BATCH], [BATCH])
    loss = SumOverDirections(noise=1.0)
    loss.calls = killed  # the noise goes on where it was
    resumed = direction_learner(loss, ratio, tmp_path / "j", **settings).run([BATCH], [BATCH])
    assert loss.calls == 10
    formats = {module.format.key for module in uninterrupted[0].values()}
    assert formats >= ({("low_rank", "int8"), ("dense", "int8")} if encoding == "int8" else {("low_rank", encoding)})
    assert total_bytes(uninterrupted[0]) <= ratio * DENSE_BYTES
    assert resumed[0] == uninterrupted[0]
    assert resumed[1].to_dict() == uninterrupted[1].to_dict()


def test_a_loss_that_turns_nan_ends_the_training_with_the_last_good_ranks() -> None:
    model = QuadraticLoss.random()
    model.fail_at, model.fail = 7, NotFiniteError("the loss is nan after 0 tokens of text")
    planned, curve = adam_learner(model, steps=20, evaluate_every=3).run([BATCH], [BATCH])
    assert curve.stopped is not None
    assert curve.stopped.startswith("step 8: the loss is nan")
    assert len(curve.steps) == 7
    assert curve.best == 6
    assert planned != uniform(budget_at(0.5))
    assert curve.kept == [planned[name].rank for name in curve.names]


def test_a_loss_that_is_nan_on_the_held_out_windows_only_ends_it_too(tmp_path: Path) -> None:
    model = QuadraticLoss.random()
    evaluated: list[float] = []

    def loss(batches: Any) -> float:
        evaluated.append(model.value({name: module.rank for name, module in model.placed.items()}))
        if len(evaluated) == 3:
            raise NotFiniteError("the loss is nan after 7 tokens of text")
        return evaluated[-1]

    model.loss = loss  # type: ignore[method-assign]
    settings = {"journal": tmp_path / "j", "steps": 20, "evaluate_every": 3}
    planned, curve = adam_learner(model, **settings).run([BATCH], [BATCH])
    assert curve.stopped == "on the held-out windows after step 6: the loss is nan after 7 tokens of text"
    assert (len(curve.steps), curve.best) == (6, 3)
    again, _ = adam_learner(QuadraticLoss.random(), **settings).run([BATCH], [BATCH])
    assert again == planned


def test_an_error_that_is_no_such_thing_is_not_swallowed() -> None:
    model = QuadraticLoss.random()
    model.fail_at, model.fail = 2, ValueError("something else")
    with pytest.raises(ValueError, match="something else"):
        adam_learner(model, steps=5).run([BATCH], [BATCH])


@pytest.mark.parametrize("damage", ["", "{}", '{"shares": []}'])
def test_a_damaged_journal_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "j").write_text(damage)
    with pytest.raises(ValueError, match=r"j is damaged .*delete it to train from the start"):
        adam_learner(QuadraticLoss.random(), journal=tmp_path / "j")


def test_the_curve_survives_its_file(tmp_path: Path) -> None:
    _, curve = adam_learner(QuadraticLoss.random(), steps=4, evaluate_every=2).run([BATCH], [BATCH])
    curve.save(tmp_path)
    assert TrainingCurve.load(tmp_path) == curve
    assert TrainingCurve.load(tmp_path / "elsewhere") is None
    (tmp_path / "dobisvd_training.json").write_text(json.dumps({"mode": "x"}))
    with pytest.raises(ValueError, match=r"dobisvd_training.json is damaged"):
        TrainingCurve.load(tmp_path)
