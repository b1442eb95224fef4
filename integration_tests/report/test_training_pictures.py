"""Pictures of learned ranks: drawn for every shape of a training, and true to what is in it."""

import math
import random
from pathlib import Path

import numpy as np
import pytest

from optimum_dobisvd.learning.curve import Evaluation, Step, TrainingCurve
from optimum_dobisvd.report.training_pictures import (
    before_after_picture,
    predictions_picture,
    training_picture,
)
from recipes.benchmarks.svd_gradients import draw, svd_gradient_norm

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")


def made_up_curve(layers: int, kinds: tuple[str, ...] = KINDS, steps: int = 6, dense: bool = False) -> TrainingCurve:
    rng = random.Random(0)
    names = [f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    curve = TrainingCurve("fixed_basis", names, [64] * len(names), best=steps // 2)
    for step in range(steps):
        ranks: list[float | None] = [rng.uniform(1, 64) for _ in names]
        if dense:
            ranks[0] = None if step % 2 else ranks[0]
            ranks[-1] = None
        curve.steps.append(Step(3 - 0.1 * step, ranks))
    curve.kept = [rng.randint(1, 64) for _ in names]
    curve.evaluations = [Evaluation(step, 3 - 0.1 * step) for step in range(0, steps + 1, 2)]
    return curve


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return imread(path)


@pytest.mark.parametrize("draw", [training_picture, before_after_picture])
@pytest.mark.parametrize(
    "curve",
    [made_up_curve(1), made_up_curve(30), made_up_curve(4, dense=True), made_up_curve(2, ("fc",), 1)],
    ids=["one layer", "thirty layers", "dense ones", "one matrix, one step"],
)
def test_a_picture_is_drawn(tmp_path: Path, draw, curve: TrainingCurve) -> None:
    path = draw(curve, tmp_path / "new" / "picture.png")
    image = pixels(path)
    assert 200 < image.shape[0] < 3000
    assert 400 < image.shape[1] < 3000
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 50, "nearly empty"


def test_every_matrix_has_its_line_and_dense_steps_are_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[list[float]] = []
    original = Axes.plot

    def plot(self: Axes, *args, **kwargs):
        if len(args) == 2 and kwargs.get("linewidth") == 1 and "label" not in kwargs:
            drawn.append(list(args[1]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", plot)
    curve = made_up_curve(3, dense=True)
    training_picture(curve, tmp_path / "p.png")
    assert len(drawn) == len(curve.names)
    wanted = [[math.nan if step.ranks[i] is None else step.ranks[i] / 64 for step in curve.steps] for i in range(15)]
    assert sorted(map(str, drawn)) == sorted(map(str, wanted))


@pytest.mark.parametrize("draw", [training_picture, before_after_picture])
def test_a_training_without_a_step_has_nothing_to_draw(tmp_path: Path, draw) -> None:
    with pytest.raises(ValueError, match="took no step"):
        draw(TrainingCurve("activation", ["a"], [4]), tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


def test_predictions_against_what_happened(tmp_path: Path) -> None:
    points = [("0.8", 0.3, 0.36), ("0.6", 0.9, 1.1), ("0.4", 1.5, 2.1)]
    assert pixels(predictions_picture(points, tmp_path / "p.png", title="a model")).size


def test_the_two_gradients_agree_where_values_are_apart_and_only_one_stays_small(tmp_path: Path) -> None:
    assert svd_gradient_norm(0.1, stable=True) == pytest.approx(svd_gradient_norm(0.1, stable=False), rel=1e-3)
    assert svd_gradient_norm(1e-5, stable=False) > 1e4
    assert svd_gradient_norm(1e-5, stable=True) < 1e3
    assert math.isfinite(svd_gradient_norm(0.0, stable=True))
    assert pixels(draw(tmp_path / "p.png")).size
