"""A benchmark as a picture: times of every row in every cell, with the bound."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..benchmark.result import CellFigures, SpeedReport
from .figure import new_figure, save_figure
from .speed import cells_of

_COLORS = ("#bdbdbd", "#737373", "#9ecae1", "#3182bd", "#08519c")


def speed_picture(report: SpeedReport, path: str | os.PathLike[str]) -> Path:
    """Draw two panels, the first token and decoding: a bar for every row in every cell, with its bound as a line.

    Raises:
        ImportError: matplotlib is missing.
    """
    cells = cells_of(report)
    figure = new_figure(max(7.0, 2 + 1.6 * len(cells)), 7)
    panels = figure.subplots(2, 1, sharex=True)
    first: tuple[Callable[[CellFigures], float], ...] = (
        lambda found: found.first,
        lambda found: found.first_bound,
    )
    gap: tuple[Callable[[CellFigures], float], ...] = (lambda found: found.gap, lambda found: found.gap_bound)
    _draw(panels[0], report, *first)
    _draw(panels[1], report, *gap)
    panels[0].set_ylabel("first token, ms")
    panels[1].set_ylabel("decode, ms per token")
    panels[1].set_xticks(range(len(cells)), [f"batch {cell.batch}\nprompt {cell.prompt}" for cell in cells])
    title = f"{report.title}: {report.device}, {report.dtype}; black: the bound of the machine"
    panels[0].set_title(title, loc="left", fontsize=10)
    panels[0].legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def _draw(
    axes: Any, report: SpeedReport, time: Callable[[CellFigures], float], bound: Callable[[CellFigures], float]
) -> None:
    cells, rows = cells_of(report), list(dict.fromkeys(found.row for found in report.cells))
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        there = [(place, found) for place, cell in enumerate(cells) if (found := report.of(row, cell)) is not None]
        places = [place + (number - (len(rows) - 1) / 2) * width for place, _ in there]
        color = _COLORS[number % len(_COLORS)]
        axes.bar(places, [1000 * time(found) for _, found in there], width, color=color, label=row)
        for place, (_, found) in zip(places, there, strict=True):
            axes.hlines(1000 * bound(found), place - width / 2, place + width / 2, color="black", linewidth=1.2)
    axes.set_yscale("log")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
