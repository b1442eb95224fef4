"""One figure for many tasks: the mean of their accuracies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .harness import Figures

_ACCURACIES = ("acc_norm", "acc")  # the first of them that a task has


def compare_means(found: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any] | None:
    """Mean accuracies of the models in `{task: {model: figures}}`, models being `compressed` and perhaps `dense`.

    Returns:
        `{"metrics": {task: "acc_norm" or "acc"}, model: {"value": ..., "stderr": ...}, ..., "ratio": ...}`, the ratio
        being compressed / dense, where both are, and None over a dense mean of 0. Every task counts the same; one with
        neither metric is left out, and None comes back where all are.
    """
    metrics = {
        task: metric
        for task, models in found.items()
        if (metric := next((name for name in _ACCURACIES if name in models["compressed"]), None)) is not None
    }
    if not metrics:
        return None
    models = list(next(iter(found.values())))
    means = {model: _mean([found[task][model][metric] for task, metric in metrics.items()]) for model in models}
    result: dict[str, Any] = {"metrics": metrics, **means}
    if "dense" in means:
        against = means["dense"]["value"]
        result["ratio"] = means["compressed"]["value"] / against if against else None
    return result


def _mean(figures: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean and, tasks taken as independent, its standard error; None where that of a task is."""
    errors = [each["stderr"] for each in figures]
    return {
        "value": math.fsum(each["value"] for each in figures) / len(figures),
        "stderr": None if None in errors else math.hypot(*errors) / len(errors),
    }
