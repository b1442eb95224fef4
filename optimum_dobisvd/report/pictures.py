"""A report as pictures: ranks by layer and type, errors by layer and type."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..structures.format import AS_IS
from .figure import new_figure, save_figure
from .grid import Grid, grid_of
from .report import CompressionReport, ModuleReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

FORMATS_PICTURE = "dobisvd_formats.png"
RANKS_PICTURE = "dobisvd_ranks.png"
ERRORS_PICTURE = "dobisvd_errors.png"

_ANNOTATED_LAYERS = 40  # with more, the numbers in the cells are too small to read
_DENSE_COLOR = "#d9d9d9"
_SHADES = {"dense": "Greys", "low_rank": "Blues", "pivoted": "Oranges"}
"""A color map for every structure; those it does not name share one."""


def ranks_picture(report: CompressionReport, path: str | os.PathLike[str]) -> Path:
    """A heat map, layers along x and types along y, of the kept rank over the full rank `min(m, n)`.

    Cells hold the rank itself where there is room; matrices left dense are gray and hatched.

    Raises:
        ImportError: matplotlib is missing.
    """
    grid = grid_of(report.modules)
    values = {key: _mean_fraction(found) for key, found in grid.cells.items()}
    heat_map = _HeatMap(
        grid,
        values,
        labels={key: _rank_label(found) for key, found in grid.cells.items() if values[key] is not None},
        title="rank kept, by layer and type of matrix",
        scale="rank / full rank min(m, n)",
        colors="viridis",
    )
    return _draw(heat_map, report, path)


def errors_picture(report: CompressionReport, path: str | os.PathLike[str]) -> Path:
    """A heat map, layers along x and types along y, of `||(W-W')X|| / ||WX||` on the calibration text in per cent.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the report holds no errors.
    """
    if all(module.error is None for module in report.modules):
        raise ValueError(
            "the report holds no errors: the compression read no calibration text, or another library rounded it all"
        )
    grid = grid_of(report.modules)
    values = {key: _mean_error(found) for key, found in grid.cells.items()}
    heat_map = _HeatMap(
        grid,
        values,
        labels={key: _error_label(value) for key, value in values.items() if value is not None},
        title="relative error of the output, by layer and type of matrix",
        scale="‖(W − W′)X‖ / ‖WX‖  in %",
        colors="magma_r",
    )
    return _draw(heat_map, report, path)


def formats_picture(report: CompressionReport, path: str | os.PathLike[str]) -> Path:
    """A map, layers along x and types along y, of structure (the hue) and encoding (the shade), with the ranks.

    Raises:
        ImportError: matplotlib is missing.
    """
    grid = grid_of(report.modules)
    found = sorted({_format(module) for module in report.modules if not _is_left(module)})
    colors = {format: _color(format, found) for format in found}
    figure, axes = _new_map(grid)
    for (kind, layer), modules in grid.cells.items():
        x, y = grid.layers.index(layer), grid.types.index(kind)
        most = Counter(_format(module) for module in modules).most_common(1)[0][0]
        if all(_is_left(module) for module in modules):
            _mark_dense(axes, x, y)
            continue
        axes.add_patch(_cell(x, y, facecolor=colors.get(most, _DENSE_COLOR)))
        if len(grid.layers) <= _ANNOTATED_LAYERS and any(module.rank is not None for module in modules):
            red, green, blue, _ = colors.get(most, (1, 1, 1, 1))
            _write(axes, x, y, _rank_label(modules), light=0.299 * red + 0.587 * green + 0.114 * blue > 0.55)
    axes.set_xlim(-0.5, len(grid.layers) - 0.5)
    axes.set_ylim(len(grid.types) - 0.5, -0.5)
    _name_axes(axes, grid)
    _separate_cells(axes, grid)
    axes.set_title(_title(report, "structure, encoding and rank"), loc="left", fontsize=10)
    counts = Counter(_format(module) for module in report.modules if not _is_left(module))
    named = {
        f"{structure} {encoding}: {counts[structure, encoding]}": key for key in found for structure, encoding in [key]
    }
    handles = [_cell(0, 0, facecolor=colors[key], label=label) for label, key in named.items()]
    left = sum(_is_left(module) for module in report.modules)
    if left:
        handles.append(_cell(0, 0, facecolor=_DENSE_COLOR, hatch="////", label=f"as it is: {left}"))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return save_figure(figure, path)


def _format(module: ModuleReport) -> tuple[str, str]:
    return module.structure, module.encoding


def _is_left(module: ModuleReport) -> bool:
    return _format(module) == AS_IS.key


def _color(format: tuple[str, str], formats: list[tuple[str, str]]) -> tuple[float, float, float, float]:
    """A shade of the structure's color, by the encoding's place among those there are."""
    from matplotlib import colormaps

    encodings = [encoding for structure, encoding in formats if structure == format[0]]
    place = (encodings.index(format[1]) + 1) / (len(encodings) + 1)
    red, green, blue, alpha = colormaps[_SHADES.get(format[0], "Greens")](0.25 + 0.6 * place)
    return red, green, blue, alpha


@dataclass(frozen=True)
class _HeatMap:
    """A number for every type and layer.

    Attributes:
        grid: the matrices.
        values: `(type, layer) -> number`; None leaves the cell blank.
        labels: `(type, layer) -> text` in the cell, where there is room.
        title: what is drawn.
        scale: what the numbers are.
        colors: name of matplotlib's color map.
    """

    grid: Grid[ModuleReport]
    values: dict[tuple[str, int], float | None]
    labels: dict[tuple[str, int], str]
    title: str
    scale: str
    colors: str


def _mean_fraction(modules: list[ModuleReport]) -> float | None:
    fractions = [m.rank / min(m.out_features, m.in_features) for m in modules if m.rank is not None]
    return sum(fractions) / len(fractions) if fractions else None


def _rank_label(modules: list[ModuleReport]) -> str:
    ranks = [module.rank for module in modules if module.rank is not None]
    return str(round(sum(ranks) / len(ranks)))


def _mean_error(modules: list[ModuleReport]) -> float | None:
    """Mean error in per cent over the low-rank matrices; None where there are none or nothing was measured."""
    errors = [module.error for module in modules if module.error is not None and module.rank is not None]
    return 100 * sum(errors) / len(errors) if errors else None


def _error_label(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"


def _draw(heat_map: _HeatMap, report: CompressionReport, path: str | os.PathLike[str]) -> Path:
    grid, values, labels = heat_map.grid, heat_map.values, heat_map.labels
    figure, axes = _new_map(grid)
    rows = [[_or_nan(values.get((kind, layer))) for layer in grid.layers] for kind in grid.types]
    low, high = _limits(values)
    image = axes.imshow(rows, aspect="auto", cmap=heat_map.colors, interpolation="nearest", vmin=low, vmax=high)
    for y, kind in enumerate(grid.types):
        for x, layer in enumerate(grid.layers):
            modules = grid.cells.get((kind, layer))
            if modules and all(module.rank is None for module in modules):
                _mark_dense(axes, x, y)
            elif (kind, layer) in labels and len(grid.layers) <= _ANNOTATED_LAYERS:
                _annotate(axes, image, x, y, _or_nan(values[kind, layer]), labels[kind, layer])
    _name_axes(axes, grid)
    _separate_cells(axes, grid)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label(heat_map.scale)
    several = "; *: mean over a layer's experts" if any(len(found) > 1 for found in grid.cells.values()) else ""
    axes.set_title(_title(report, heat_map.title) + several, loc="left", fontsize=10)
    _add_legend(axes, report)
    return save_figure(figure, path)


def _new_map(grid: Grid[Any]) -> tuple[Figure, Axes]:
    """A figure with room for a cell for every type and layer."""
    cell = 0.36 if len(grid.layers) <= _ANNOTATED_LAYERS else 0.17
    figure = new_figure(max(6.5, 2.6 + cell * len(grid.layers)), max(2.6, 1.6 + 0.36 * len(grid.types)))
    return figure, figure.add_subplot()


def _limits(values: dict[tuple[str, int], float | None]) -> tuple[float, float]:
    known = [value for value in values.values() if value is not None]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    # Nearly equal values must look equal, not be blown up to both ends of the color scale.
    margin = max(0.0, 0.1 * high - (high - low)) / 2
    return low - margin, high + margin or 1.0


def _mark_dense(axes: Axes, x: int, y: int) -> None:
    axes.add_patch(_cell(x, y, facecolor=_DENSE_COLOR, edgecolor="white", hatch="////"))


def _cell(x: int, y: int, **look: Any) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, lw=0, **look)


def _annotate(axes: Axes, image: Any, x: int, y: int, value: float, label: str) -> None:
    red, green, blue, _ = image.cmap(image.norm(value))
    _write(axes, x, y, label, light=0.299 * red + 0.587 * green + 0.114 * blue > 0.55)


def _write(axes: Axes, x: int, y: int, label: str, *, light: bool) -> None:
    axes.text(x, y, label, ha="center", va="center", fontsize=6.5, color="black" if light else "white")


def _name_axes(axes: Axes, grid: Grid[Any]) -> None:
    step = next(
        step for step in (1, 2, 5, 10, 20, 50, 100) if len(grid.layers) / step <= _ANNOTATED_LAYERS or step == 100
    )
    axes.set_xticks(range(0, len(grid.layers), step), [str(layer) for layer in grid.layers[::step]])
    axes.set_yticks(range(len(grid.types)), grid.types)
    axes.set_xlabel("layer")
    axes.set_ylabel("type of matrix")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _separate_cells(axes: Axes, grid: Grid[Any]) -> None:
    axes.set_xticks([x + 0.5 for x in range(len(grid.layers) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(grid.types) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def _title(report: CompressionReport, what: str) -> str:
    kept = report.target_bytes / report.dense_target_bytes if report.dense_target_bytes else math.nan
    return f"{report.model}: {what}\n{report.method}, {kept:.1%} of the targets' bytes kept"


def _add_legend(axes: Axes, report: CompressionReport) -> None:
    if all(module.rank is not None for module in report.modules):
        return
    from matplotlib.patches import Patch

    dense = Patch(facecolor=_DENSE_COLOR, edgecolor="white", hatch="////", label="left dense")
    axes.legend(
        handles=[dense], loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, borderaxespad=0.2
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
