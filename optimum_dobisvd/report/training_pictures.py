"""Pictures of learned ranks: how they moved and where they went; and of predicted against measured loss."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..learning.curve import TrainingCurve
from .figure import new_figure, save_figure
from .grid import Grid, grid_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING_PICTURE = "dobisvd_training.png"
BEFORE_AFTER_PICTURE = "dobisvd_ranks_learned.png"


@dataclass(frozen=True)
class _Path:
    """One matrix's share of its full rank at every step, NaN where it is dense."""

    name: str
    shares: list[float]


def training_picture(curve: TrainingCurve, path: str | os.PathLike[str]) -> Path:
    """The loss over the steps, and for every type of matrix the ranks of its layers (Dobi-SVD, Figures 8 to 10).

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the training took no step.
    """
    grid = grid_of(_paths(curve))
    columns = min(4, len(grid.types))
    rows = -(-len(grid.types) // columns)
    figure = new_figure(3.1 * columns, 2.4 + 2.1 * rows)
    above, below = figure.subfigures(2, 1, height_ratios=[2.4, 2.1 * rows], squeeze=False).flat
    _draw_losses(above.subplots(), curve)
    panels = below.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    first = min(grid.layers)
    scale = ScalarMappable(Normalize(first, max(*grid.layers, first + 1)), colormaps["viridis"])
    for place, axes in enumerate(panels.flat):
        if place >= len(grid.types):
            axes.set_visible(False)
            continue
        _draw_paths(axes, grid, grid.types[place], scale)
    for axes in panels[:, 0]:
        axes.set_ylabel("k / min(m, n)")
    below.colorbar(scale, ax=panels, label="layer", pad=0.01, fraction=0.03)
    return save_figure(figure, path)


def before_after_picture(curve: TrainingCurve, path: str | os.PathLike[str]) -> Path:
    """Two heat maps, layers along x and types along y: every rank over its full rank at the start, and as kept.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the training took no step.
    """
    if not curve.steps:
        raise ValueError("the rank training took no step; there is nothing to draw")
    grid = grid_of(
        [
            _Path(name, [_share_of(begin, full), _share_of(end, full)])
            for name, begin, end, full in zip(curve.names, curve.steps[0].ranks, curve.kept, curve.full, strict=True)
        ]
    )
    figure = new_figure(max(6.5, 2.6 + 0.3 * len(grid.layers)), 1.6 + 0.7 * len(grid.types))
    panels = figure.subplots(2, 1, sharex=True)
    images = []
    for axes, step, title in zip(
        panels, (0, 1), ("before training", f"after {curve.best} steps, as kept"), strict=True
    ):
        rows = [[_share(grid, kind, layer, step) for layer in grid.layers] for kind in grid.types]
        images.append(axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=1))
        axes.set_yticks(range(len(grid.types)), grid.types)
        axes.set_title(title, loc="left", fontsize=10)
    panels[-1].set_xticks(range(len(grid.layers)), [str(layer) for layer in grid.layers], fontsize=7)
    panels[-1].set_xlabel("layer (blank: left dense)")
    figure.colorbar(images[0], ax=panels, label="rank / full rank min(m, n)", pad=0.01, fraction=0.03)
    return save_figure(figure, path)


def predictions_picture(
    points: Sequence[tuple[str, float, float]], path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """The increase of the loss that importance scores predicted, against the measured one.

    Args:
        points: `(label, predicted, measured)`, in nats per token, above 0.
        path: of the PNG.
        title: above the picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(6.0, 5.0)
    from matplotlib.ticker import LogLocator, NullFormatter

    axes = figure.subplots()
    for label, predicted, measured in points:
        axes.plot(predicted, measured, "o", color="#31688e")
        axes.annotate(label, (predicted, measured), textcoords="offset points", xytext=(6, -3), fontsize=8)
    values = [value for _, *pair in points for value in pair]
    ends = (min(values) * 0.8, max(values) * 1.25)
    axes.plot(ends, ends, "--", color="gray", linewidth=1, label="as predicted")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("predicted increase of the loss, nats per token")
    axes.set_ylabel("measured increase of the loss, nats per token")
    axes.legend(frameon=False)
    axes.set_title(title, loc="left", fontsize=10)
    return save_figure(figure, path)


def _paths(curve: TrainingCurve) -> list[_Path]:
    if not curve.steps:
        raise ValueError("the rank training took no step; there is nothing to draw")
    return [
        _Path(name, [_share_of(step.ranks[place], full) for step in curve.steps])
        for place, (name, full) in enumerate(zip(curve.names, curve.full, strict=True))
    ]


def _share_of(rank: float | None, full: int) -> float:
    return float("nan") if rank is None else rank / full


def _draw_losses(axes: Axes, curve: TrainingCurve) -> None:
    axes.plot(range(1, len(curve.steps) + 1), [step.loss for step in curve.steps], color="#b0b0b0", label="training")
    steps, losses = [e.step for e in curve.evaluations], [e.loss for e in curve.evaluations]
    axes.plot(steps, losses, "o-", color="#31688e", label="held-out windows, integer ranks")
    axes.axvline(curve.best, color="#35b779", linestyle=":", label="kept")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"learned ranks, {curve.mode} mode", loc="left", fontsize=10)


def _draw_paths(axes: Axes, grid: Grid[_Path], kind: str, scale: Any) -> None:
    for layer in grid.layers:
        for found in grid.cells.get((kind, layer), []):
            axes.plot(range(1, len(found.shares) + 1), found.shares, color=scale.to_rgba(layer), linewidth=1)
    axes.set_title(kind, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)


def _share(grid: Grid[_Path], kind: str, layer: int, step: int) -> float:
    found = grid.cells.get((kind, layer), [])
    return sum(each.shares[step] for each in found) / len(found) if found else float("nan")
