"""A report as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from .grid import grid_of
from .report import CompressionReport, ModuleReport

_NAMED = 6  # of linears that borrow; the report beside the checkpoint has all


def print_report(report: CompressionReport, console: Console, *, modules: bool = False) -> None:
    """Print the summary, types and stages; with `modules` also a line for every matrix."""
    tables = [module_table(report)] if modules else []
    tables.append(kind_table(report))
    if report.seconds:
        tables.append(stage_table(report))
    for table in (*tables, summary_table(report)):
        console.print(table)
        console.print()
    for line in (coverage_line(report), slower_line(report), borrowed_line(report)):
        if line:
            console.print(line)


def summary_table(report: CompressionReport) -> Table:
    """Dense against compressed: bytes of the targets and of the model, arithmetic per token, perplexities."""
    asked = "" if report.ratio is None else f", asked to keep {report.ratio:g}"
    title = f"{report.model}, {report.method}{asked}"
    table = plain_table(title, ("", "dense", "compressed", "ratio"))
    table.add_row(
        "target matrices",
        bytes_text(report.dense_target_bytes),
        bytes_text(report.target_bytes),
        ratio_text(report.target_bytes, report.dense_target_bytes),
    )
    table.add_row(
        "whole checkpoint",
        bytes_text(report.dense_model_bytes),
        bytes_text(report.compressed_model_bytes),
        ratio_text(report.compressed_model_bytes, report.dense_model_bytes),
    )
    if report.dense_memory_bytes and report.compressed_memory_bytes is not None:
        table.add_row(
            "in memory after loading",
            bytes_text(report.dense_memory_bytes),
            bytes_text(report.compressed_memory_bytes),
            ratio_text(report.compressed_memory_bytes, report.dense_memory_bytes),
        )
    table.add_row(
        "FLOPs per token",
        count_text(2 * report.dense_macs),
        count_text(2 * report.compressed_macs),
        ratio_text(report.compressed_macs, report.dense_macs),
    )
    if report.predicted_increase is not None:
        table.add_row("predicted increase of the loss", "", f"{report.predicted_increase:.3f} nats", "")
    for name, found in report.perplexity.items():
        dense, compressed = found.get("dense"), found.get("compressed")
        table.add_row(
            f"perplexity, {name}",
            "" if dense is None else f"{dense:.2f}",
            "" if compressed is None else f"{compressed:.2f}",
            "" if dense is None or compressed is None else f"{compressed / dense:.2f}",
        )
    return table


def stage_table(report: CompressionReport) -> Table:
    """Seconds and memory of every stage."""
    table = plain_table("stages", ("stage", "seconds", "peak memory above its start"))
    for name, seconds in report.seconds.items():
        memory = report.peak_bytes.get(name)
        table.add_row(name, f"{seconds:,.1f}", "" if memory is None else bytes_text(memory))
    return table


def kind_table(report: CompressionReport) -> Table:
    """One line per type of matrix."""
    grid = grid_of(report.modules)
    headings = ("type", "matrices", "become", "shape", "ranks", "bytes", "kept", "mean error", "worst error")
    table = plain_table("by type of matrix", headings)
    for kind in grid.types:
        found = grid.of_type(kind)
        ranks = [module.rank for module in found if module.rank is not None]
        formats = Counter(_format_text(module) for module in found)
        errors = [module.error for module in found if module.error is not None and not module.leaves_as_is]
        table.add_row(
            kind,
            str(len(found)),
            ", ".join(f"{count} {name}" for name, count in formats.most_common()),
            _joined(f"{module.out_features}×{module.in_features}" for module in found),
            _range_text(ranks),
            bytes_text(sum(module.bytes for module in found)),
            ratio_text(sum(module.bytes for module in found), sum(module.dense_bytes for module in found)),
            f"{sum(errors) / len(errors):.2%}" if errors else "",
            f"{max(errors):.2%}" if errors else "",
        )
    return table


def _format_text(module: ModuleReport) -> str:
    """Structure and encoding, where these are not the model's own."""
    if module.leaves_as_is:
        return "as is"
    return module.structure if module.encoding == "float" else f"{module.structure} {module.encoding}"


def module_table(report: CompressionReport) -> Table:
    """One line per matrix."""
    title = "matrices (error: ‖(W−W′)X‖ / ‖WX‖ on the calibration text)"
    table = plain_table(title, ("name", "shape", "structure", "rank", "encoding", "bytes", "kept", "error"))
    for module in report.modules:
        table.add_row(*_module_cells(module))
    return table


def plain_table(title: str, headings: tuple[str, ...]) -> Table:
    """An empty table: the first column to the left, the others to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.min_width = len(title)  # or the title would be wrapped
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", overflow="fold")
    return table


def coverage_line(report: CompressionReport) -> str:
    """Say what share of the linears' weights were targets, and what was not."""
    return f"targets are {report.coverage:.1%} of the weights of all linears; not among them: {report.left_dense}"


def borrowed_line(report: CompressionReport) -> str:
    """Name the linears that had too few tokens for statistics of their own; empty if none."""
    if not report.borrowed:
        return ""
    shown = ", ".join(report.borrowed[:_NAMED]) + (", ..." if len(report.borrowed) > _NAMED else "")
    return (
        f"{len(report.borrowed)} of {len(report.modules)} matrices were given too few calibration tokens and are "
        f"compressed by what all experts of their layer see: {shown}"
    )


def slower_line(report: CompressionReport) -> str:
    """Say how many matrices take more arithmetic than dense, as 8-bit factors of a high rank do; empty if none."""
    dearer = [module for module in report.modules if module.macs > module.out_features * module.in_features]
    if not dearer:
        return ""
    dense = sum(module.out_features * module.in_features for module in dearer)
    ratio = sum(module.macs for module in dearer) / dense
    return (
        f"{len(dearer)} of {len(report.modules)} matrices take more arithmetic as factors than dense ({ratio:.2f} "
        "times): they save memory, and time only where reading weights is what takes it (few tokens at once)"
    )


def bytes_text(count: float) -> str:
    """Bytes for people, in powers of 1000: `1.23 GB`."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: float) -> str:
    """A large number for people: `1.23 G`."""
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def ratio_text(part: float, total: float) -> str:
    """`part / total`, or nothing where it makes no sense."""
    return f"{part / total:.4f}" if total else ""


def _module_cells(module: ModuleReport) -> tuple[str, ...]:
    return (
        module.name,
        f"{module.out_features}×{module.in_features}",
        module.structure,
        "" if module.rank is None else str(module.rank),
        module.encoding,
        bytes_text(module.bytes),
        ratio_text(module.bytes, module.dense_bytes),
        "" if module.error is None else f"{module.error:.2%}",
    )


def _range_text(ranks: list[int]) -> str:
    if not ranks:
        return ""
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"


def _joined(values: Iterable[str]) -> str:
    """The distinct values; more than two are summed up."""
    distinct = list(dict.fromkeys(values))
    return ", ".join(distinct) if len(distinct) <= 2 else f"{distinct[0]}, ... ({len(distinct)})"


def _scaled(count: float, units: tuple[str, ...]) -> str:
    value, unit = float(count), units[0]
    for unit in units:
        if abs(value) < 999.5 or unit == units[-1]:
            break
        value /= 1000
    if unit == units[0]:
        return f"{value:.0f} {unit}".strip()
    return f"{value:.{max(0, 2 - (len(str(int(abs(value)))) - 1))}f} {unit}"
