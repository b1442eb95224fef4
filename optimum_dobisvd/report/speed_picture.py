"""A benchmark as a picture: how many times as fast as the first row every row is, in every cell."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..benchmark.result import CellFigures, SpeedReport
from .figure import new_figure, save_figure
from .speed import cells_of

_COLORS = ("#bdbdbd", "#737373", "#9ecae1", "#3182bd", "#08519c")
_Seconds = Callable[[CellFigures], float]


def speed_picture(report: SpeedReport, path: str | os.PathLike[str]) -> Path:
    """Draw two panels, the first token and decoding, with a bar for every row in every cell.

    Bars are speeds over that of the cell's first row (dense, where it is measured), with the milliseconds on them;
    black marks are the same of the bounds: what the bytes and operations saved are worth on this machine.

    Raises:
        ImportError: matplotlib is missing.
    """
    cells = cells_of(report)
    figure = new_figure(max(8.0, 3 + 1.8 * len(cells)), 7)
    top, bottom = figure.subplots(2, 1, sharex=True)
    base = report.cells[0].row
    _draw(top, report, lambda found: found.first, lambda found: found.first_bound)
    _draw(bottom, report, lambda found: found.gap, lambda found: found.gap_bound)
    top.set_ylabel(f"first token, times as fast as {base}")
    bottom.set_ylabel(f"decode, times as fast as {base}")
    bottom.set_xticks(range(len(cells)), [f"batch {cell.batch}\nprompt {cell.prompt}" for cell in cells])
    where = f"{report.device}, {report.dtype}; on the bars: ms; black: the same by what has to be moved and multiplied"
    top.set_title(f"{report.title}\n{where}", loc="left", fontsize=10)
    top.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save_figure(figure, path)


def _draw(axes: Any, report: SpeedReport, seconds: _Seconds, bound: _Seconds) -> None:
    rows = list(dict.fromkeys(found.row for found in report.cells))
    width = 0.84 / len(rows)
    for number, row in enumerate(rows):
        label: str | None = row
        for place, cell in enumerate(cells_of(report)):
            found = report.of(row, cell)
            if found is None:
                continue
            base = next(each for each in report.cells if each.cell == cell)
            x, times = place + (number - (len(rows) - 1) / 2) * width, seconds(base) / seconds(found)
            axes.bar(x, times, 0.94 * width, color=_COLORS[number % len(_COLORS)], label=label)
            axes.text(x, times, _short(1000 * seconds(found)), ha="center", va="bottom", fontsize=6.5)
            ideal = bound(base) / bound(found)
            axes.hlines(ideal, x - width / 2, x + width / 2, color="black", linewidth=1.5)
            label = None
    axes.axhline(1, color="#bdbdbd", linewidth=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
