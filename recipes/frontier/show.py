"""The frontier as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimum_dobisvd.atomic_files import write_text_atomically

from .results import Results
from .rows import OFF_GRID, ROWS, Row
from .settings import Settings

_COLORS = {
    "dense": "black",
    "bitsandbytes": "tab:orange",
    "GPTQ": "tab:red",
    "SVD": "tab:cyan",
    "SVD, 8 bits": "tab:blue",
    "SVD + 4 bits and fewer": "tab:purple",
    "mixture": "tab:green",
}
_NOT_DONE = "–"
_PHASES = ("prefill", "decode")


def write_table(results: Results, settings: Settings, path: Path) -> None:
    """Write a Markdown table: a line for every row and state; what was not measured is a dash."""
    texts = [Path(name).name for name in settings.eval_dataset]
    times = [f"{phase}, ms/token, {device}" for device in results.devices for phase in _PHASES]
    heads = ["", "", "disk, MB", "memory, MB", *texts, "mean accuracy", *times]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in ROWS:
        for healed in (False, True):
            cells = _cells(results, row, healed, texts)
            if any(cell != _NOT_DONE for cell in cells):
                name = f"{row.name} ({row.mark})" if row.mark else row.name
                lines.append("| " + " | ".join([name, "healed" if healed else "", *cells]) + " |")
    write_text_atomically(path, "\n".join(lines) + "\n")


def draw(results: Results, settings: Settings, path: Path) -> None:
    """Draw bytes on disk against perplexity of every text and against decoding time; healed rows are filled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = [Path(name).name for name in settings.eval_dataset]
    wanted = [
        *((f"perplexity, {text}", ("perplexity", text)) for text in texts),
        *((f"time to decode a token, {device}, dense = 1", (*_DECODE, device)) for device in results.devices),
    ]
    panels = [panel for panel in wanted if any(line["step"] == panel[1][0] for line in results.lines)]
    size = (7 * max(len(panels), 1), 7)
    figure, axes = pyplot.subplots(1, max(len(panels), 1), figsize=size, constrained_layout=True, squeeze=False)
    labels = [_panel(axis, results, title, value) for axis, (title, value) in zip(axes[0], panels, strict=False)]
    families = dict.fromkeys(row.family for row in ROWS)
    handles = [pyplot.Line2D([], [], marker="o", linestyle="", color=_COLORS[family]) for family in families]
    figure.legend(handles, list(families), loc="outside lower center", ncols=len(handles))
    figure.suptitle("hollow: as compressed; filled: healed; squares: made from the model off its 4-bit grid")
    figure.draw_without_rendering()  # only now do points have places on the page
    for axis, named in zip(axes[0], labels, strict=False):
        _label(axis, named)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_DECODE = ("speed", "decode")  # of a device
_HIGHEST = 8
"""Times the lowest of a measure: what is worse is drawn there as an arrow, so that the others keep apart."""


def _panel(axis: Any, results: Results, title: str, value: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Draw one measure against bytes, both logarithmic, with the Pareto front of the rows.

    Returns the points of every row, the one to be labeled first.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    found = [(row, _points(results, row, value)) for row in ROWS]
    highest = _HIGHEST * min((figure for _, pair in found for _, figure, _ in pair), default=1)
    points: list[tuple[float, float]] = []
    named: dict[str, list[tuple[float, float]]] = {}
    for row, measured in found:
        pair = []
        for size, figure, healed in measured:
            pair.append((size, min(figure, highest)))
            axis.plot(
                *pair[-1],
                marker="^" if figure > highest else "s" if row.base == OFF_GRID else "o",
                color=_COLORS[row.family],
                fillstyle="full" if healed else "none",
                linestyle="",
            )
        if pair:
            beyond = [f"{figure:.4g}" for _, figure, _ in measured if figure > highest]
            named[f"{_short(row)} ({', '.join(beyond)})" if beyond else _short(row)] = pair
            axis.plot(*zip(*pair, strict=True), color=_COLORS[row.family], linewidth=0.6)
        if row.base != OFF_GRID:
            points += pair
    front = _pareto_front(points)
    if front:
        axis.plot(*zip(*front, strict=True), color="gray", linewidth=0.8, linestyle="--", drawstyle="steps-post")
    axis.set(xscale="log", yscale="log", xlabel="weights on disk, MB", title=title)
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
        each.set_major_formatter(StrMethodFormatter("{x:g}"))
        each.set_minor_formatter(NullFormatter())
    axis.margins(x=0.15)
    axis.grid(which="major", linewidth=0.2)
    return named


def _points(results: Results, row: Row, value: Sequence[str]) -> list[tuple[float, float, bool]]:
    """Return MB on disk, the measure, and whether healed; as far as they were taken."""
    found = []
    for healed in (False, True):
        size, figure = (_figure(results, row, healed, key) for key in (("sizes", "disk"), value))
        if size is not None and figure is not None:
            found.append((size / 1e6, figure, healed))
    return found


def _label(axis: Any, named: dict[str, list[tuple[float, float]]]) -> None:
    """Write every name beside its point, where it covers other names and points least."""
    # In points of the page: a letter of size 7 is about 3.9 wide, a mark 7.
    scale = 72 / axis.figure.dpi
    places = {name: axis.transData.transform(points) * scale for name, points in named.items()}
    frame: _Box = tuple(value * scale for value in axis.bbox.extents)
    taken = [(x - 3.5, y - 3.5, x + 3.5, y + 3.5) for points in places.values() for x, y in points]
    for name, points in places.items():
        width, (x, y) = 3.9 * len(name), points[0]
        offsets = [(right, up) for up in (-2, 5, -10, 12, -17, 19, -24) for right in (6, -6 - width, -width / 2)]
        boxes = [(x + right, y + up, x + right + width, y + up + 7) for right, up in offsets]
        crowding = [
            sum(_shared(box, other) for other in taken) + width * 7 - _shared(box, frame) + 0.2 * number
            for number, box in enumerate(boxes)
        ]
        best = crowding.index(min(crowding))
        taken.append(boxes[best])
        axis.annotate(name, named[name][0], fontsize=7, xytext=offsets[best], textcoords="offset points")


_Box = tuple[float, float, float, float]


def _shared(one: _Box, other: _Box) -> float:
    """Return the area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no smaller one equals, by size."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _short(row: Row) -> str:
    return (
        row.name.replace(f", {OFF_GRID}", " (off grid)")
        .replace("mixture, bytes of ", "mix ~")
        .replace("mixture of structures, bytes of ", "mix+ ~")
    )


def _figure(results: Results, row: Row, healed: bool, key: Sequence[str]) -> float | None:
    if key[:2] == _DECODE:
        speed = results.found(row, healed, "speed", key[2])
        # Times of different rows were taken at different hours; each is comparable with the dense one beside it.
        return None if speed is None else 1 / speed["decode"]["speedup"]
    found: Any = results.found(row, healed, key[0])
    for part in key[1:]:
        found = None if found is None else found[part]
    return found


def _cells(results: Results, row: Row, healed: bool, texts: list[str]) -> list[str]:
    cells = []
    for key in ("disk", "memory"):
        size = _figure(results, row, healed, ("sizes", key))
        cells.append(_NOT_DONE if size is None else f"{size / 1e6:.1f}")
    for text in texts:
        figure = _figure(results, row, healed, ("perplexity", text))
        cells.append(_NOT_DONE if figure is None else f"{figure:.4g}")
    mean: Any = (results.found(row, healed, "accuracy") or {}).get("mean")
    cells.append(_NOT_DONE if mean is None else f"{mean['value']:.3f} ± {mean['stderr']:.3f}")
    for device in results.devices:
        speed = results.found(row, healed, "speed", device)
        for phase in _PHASES:
            cells.append(
                _NOT_DONE
                if speed is None
                else f"{speed[phase]['ms_per_token']:.3g} ({speed[phase]['speedup']:.2f} × as fast as dense)"
            )
    return cells
