"""A picture of the singular directions that a plan keeps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from ..allocation.plan import Plan, PlannedModule
from .figure import new_figure, save_figure
from .grid import grid_of

DIRECTIONS_PICTURE = "dobisvd_directions.png"
_BINS = 40
_FARTHEST = 2.0  # places, over the rank


class _Named:
    def __init__(self, name: str, module: PlannedModule) -> None:
        self.name, self.module = name, module


def chooses_directions(plan: Plan) -> bool:
    """Whether any matrix keeps others than its leading directions."""
    return any(module.directions is not None for module in plan.modules.values())


def directions_picture(plan: Plan, full: Mapping[str, int], path: str | os.PathLike[str]) -> Path:
    """A heat map, types along y: how many of the directions at a place in the spectrum are kept, over all layers.

    The place is the direction's number over its matrix's rank, so that truncation would be a sharp edge at 1.

    Args:
        plan: what is kept.
        full: `min(m, n)` by module.
        path: of the PNG.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no matrix is low-rank.
    """
    low = [_Named(name, module) for name, module in plan.modules.items() if module.rank is not None]
    if not low:
        raise ValueError("no matrix of the plan is low-rank; there are no directions to draw")
    grid = grid_of(low)
    rows = [kept_by_place([(each.module, full[each.name]) for each in grid.of_type(kind)]) for kind in grid.types]
    figure = new_figure(7.5, 1.6 + 0.35 * len(rows))
    axes = figure.subplots()
    extent = (0.0, _FARTHEST, len(rows) - 0.5, -0.5)
    image = axes.imshow(rows, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=1, extent=extent)
    axes.axvline(1, color="white", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), grid.types)
    axes.set_xlabel("place in the spectrum, over the rank (truncation would end at the line)")
    axes.set_title("which singular directions are kept", loc="left", fontsize=10)
    figure.colorbar(image, ax=axes, label="share kept", pad=0.01, fraction=0.05)
    return save_figure(figure, path)


def kept_by_place(modules: list[tuple[PlannedModule, int]]) -> list[float]:
    """The share of the directions in each of 40 bins of `number / rank`, from 0 to 2, that these matrices keep.

    NaN where there are none: no matrix has so many, or ranks are so small that a bin falls between two directions.
    """
    kept, there = [0] * _BINS, [0] * _BINS
    for module, full in modules:
        rank, chosen = module.rank or 0, set(module.kept)
        for number in range(full):
            place = int((number + 0.5) / rank / _FARTHEST * _BINS)
            if place < _BINS:
                there[place] += 1
                kept[place] += number in chosen
    return [some / all_ if all_ else float("nan") for some, all_ in zip(kept, there, strict=True)]
