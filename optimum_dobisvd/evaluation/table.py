"""Accuracies as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ..report.table import plain_table
from .harness import Figures


def tasks_table(title: str, found: Mapping[str, Mapping[str, Figures]], means: Mapping[str, Any] | None) -> Table:
    """A line for every metric of every task, and the means of `compare_means` below."""
    table = plain_table(title, ("task", "metric", "dense", "compressed", "ratio", "examples"))
    for task, models in found.items():
        compressed, dense = models["compressed"], models.get("dense", {})
        for metric in compressed:
            if metric != "samples":
                cells = _cells(dense.get(metric), compressed[metric])
                table.add_row(task, metric, *cells, str(compressed["samples"]))
    if means is not None and len(means["metrics"]) > 1:
        table.add_section()
        name = " or ".join(dict.fromkeys(means["metrics"].values()))
        table.add_row("mean", name, *_cells(means.get("dense"), means["compressed"]), "")
    return table


def means_line(means: Mapping[str, Any]) -> str:
    """Say which tasks the mean is over, and which accuracy of each."""
    by_metric: dict[str, list[str]] = {}
    for task, metric in means["metrics"].items():
        by_metric.setdefault(metric, []).append(task)
    return "mean of " + "; ".join(f"{metric} of {', '.join(tasks)}" for metric, tasks in by_metric.items())


def _cells(dense: Mapping[str, Any] | None, compressed: Mapping[str, Any]) -> tuple[str, str, str]:
    if dense is None:
        return "", _with_error(compressed), ""
    ratio = f"{compressed['value'] / dense['value']:.3f}" if dense["value"] else ""
    return _with_error(dense), _with_error(compressed), ratio


def _with_error(figure: Mapping[str, Any]) -> str:
    error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.4f}"
    return f"{figure['value']:.4f}{error}"
