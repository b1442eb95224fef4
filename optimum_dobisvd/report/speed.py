"""A benchmark as tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from ..benchmark.generation import Cell
from ..benchmark.matrices import SlowMatrix
from ..benchmark.result import CellFigures, SpeedReport
from ..benchmark.rounds import LARGEST_NOISE
from ..benchmark.session import is_slower
from .grid import grid_of
from .table import bytes_text, count_text, plain_table


def print_speed(report: SpeedReport, console: Console) -> None:
    """Print the models, the figures of every cell, and where and why the compressed model is slower."""
    console.print(models_table(report))
    console.print()
    console.print(cells_table(report))
    console.print()
    console.print(cold_table(report))
    console.print()
    machine = report.machine
    console.print(
        f"the bound: {bytes_text(machine.bandwidth)}/s read and {count_text(machine.flops)}FLOP/s in {report.dtype} "
        "products, measured in this run",
        soft_wrap=True,
    )
    for line in (*slower_lines(report), *report.notes):
        console.print(line, soft_wrap=True)


def models_table(report: SpeedReport) -> Table:
    """One line per model: bytes, times of loading, arithmetic."""
    where = f"{report.device}, {report.dtype}, {report.attention} attention"
    threads = f", {report.threads} threads" if report.device == "cpu" else ""
    headings = ("", "in memory", "read per token", "multiply-adds", "loaded cold", "warm")
    table = plain_table(f"{report.title}: {where}{threads}", headings)
    for model in report.models:
        table.add_row(
            f"{model.name} (offloaded)" if model.offloaded else model.name,
            bytes_text(model.weight_bytes),
            bytes_text(model.read_bytes),
            count_text(model.macs),
            "" if model.load_cold is None else f"{model.load_cold:.1f} s",
            "" if model.load_warm is None else f"{model.load_warm:.1f} s",
        )
    return table


def cells_table(report: SpeedReport) -> Table:
    """One line per row and cell: times, how many times as fast as dense, and the share of the bound."""
    title = f"{report.new_tokens} new tokens, greedy (×: times as fast as dense; bound: share of it that is reached)"
    first, decode = ("first, ms", "×", "bound"), ("ms/token", "p95", "×", "bound")

    def cells(found: CellFigures) -> tuple[str, ...]:
        def times(value: float | None) -> str:
            return "" if value is None else "?" if report.noise[found.cell] > LARGEST_NOISE else f"{value:.2f}"

        return (
            f"{1000 * found.first:.1f}",
            times(found.first_times),
            f"{found.first_reached:.0%}",
            f"{1000 * found.gap:.2f}",
            f"{1000 * found.gap_p95:.2f}",
            times(found.gap_times),
            f"{found.gap_reached:.0%}",
            f"{found.tokens_per_second:.1f}",
            times(found.tokens_times),
        )

    return _by_cell(report, title, (*first, *decode, "tokens/s", "×"), cells)


def cold_table(report: SpeedReport) -> Table:
    """One line per row and cell: the first generation in a process, and the most memory it held."""

    def cells(found: CellFigures) -> tuple[str, ...]:
        peak = "" if found.peak_bytes is None else bytes_text(found.peak_bytes)
        return f"{1000 * found.first_cold:.0f}", f"{found.total_cold:.1f}", peak

    return _by_cell(report, "the first generation", ("first token, ms", "all, compilation included, s", "peak"), cells)


def _by_cell(
    report: SpeedReport, title: str, headings: tuple[str, ...], cells: Callable[[CellFigures], tuple[str, ...]]
) -> Table:
    table = plain_table(title, ("batch", "prompt", "", *headings))
    table.columns[2].justify, table.columns[2].no_wrap = "left", True
    last = None
    for found in report.cells:
        if last not in (None, found.cell):
            table.add_section()
        head = (str(found.batch), str(found.prompt)) if found.cell != last else ("", "")
        table.add_row(*head, found.row, *cells(found))
        last = found.cell
    return table


def slower_lines(report: SpeedReport) -> list[str]:
    """Say where the compressed model is slower than dense, and which matrices make it so."""
    lines = [line for found in report.cells for line in _slower(found, report)]
    compared = [found for found in report.cells if found.gap_times is not None]
    told = [found for found in compared if report.noise[found.cell] <= LARGEST_NOISE]
    if told and not lines:
        lines.append("nowhere slower than dense, noise aside")
    for cell, matrices in report.slow.items():
        if matrices and report.noise[cell] <= LARGEST_NOISE and not any(str(cell) in line for line in lines):
            lines.append(f"at {cell} these matrices alone take longer than dense: {_of_types(matrices)}")
    return lines


def _slower(found: CellFigures, report: SpeedReport) -> Iterator[str]:
    if report.noise[found.cell] > LARGEST_NOISE:
        return
    matrices = report.slow.get(found.cell)
    for phase, times in (("first token", found.first_times), ("decode", found.gap_times)):
        if times is None or not is_slower(times):
            continue
        line = f"slower than dense: {found.row}, {found.cell}, {phase}: {times:.2f} ×"
        if matrices is None:
            yield line
            continue
        first = phase == "first token"
        guilty = [matrix for matrix in matrices if (matrix.first if first else matrix.gap) > 0]
        words = _of_types(guilty, first=first) if guilty else "no matrix by itself: what is around them takes longer"
        yield f"{line}; {words}"


def _of_types(matrices: Sequence[SlowMatrix], *, first: bool | None = None) -> str:
    """The matrices by type, those that cost most first; `first` tells the phase, None is the one that costs more."""
    grid = grid_of(matrices)
    found = []
    for kind in grid.types:
        of_type = grid.of_type(kind)
        in_first = sum(each.first for each in of_type)
        in_gap = sum(each.gap for each in of_type)
        at_first = in_first > in_gap if first is None else first
        lost = in_first if at_first else in_gap
        phase = "at the first token" if at_first else "a token"
        found.append((lost, f"{kind} ({len(of_type)} matrices, +{1000 * lost:.2f} ms {phase})"))
    return ", ".join(words for _, words in sorted(found, reverse=True))


def cells_of(report: SpeedReport) -> list[Cell]:
    """Return the cells there are figures of, in order."""
    return list(dict.fromkeys(found.cell for found in report.cells))
