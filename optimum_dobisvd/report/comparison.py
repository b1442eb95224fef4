"""Models of different size side by side: which to take, and a picture."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .figure import new_figure, save_figure
from .table import bytes_text

_CLOSE = 1.05
"""Perplexity over the dense model's up to which a model does for most uses."""
_DENSE_COLOR, _COLOR, _BEST_COLOR = "#bdbdbd", "#6baed6", "#31a354"


@dataclass(frozen=True)
class Compared:
    """One model of a comparison.

    Attributes:
        name: `dense`, or the folder of the checkpoint.
        bytes: of all its tensors.
        perplexity: on the text of the comparison.
        seconds: that compressing took, where that is known.
        text: what it writes after the prompt, the prompt included; None without a prompt.
    """

    name: str
    bytes: int
    perplexity: float
    seconds: float | None = None
    text: str | None = None


def recommended(models: Sequence[Compared]) -> Compared | None:
    """Return the smallest model whose perplexity is close to that of the first one, the dense; None if none is."""
    dense, *others = models
    close = [model for model in others if model.perplexity <= _CLOSE * dense.perplexity]
    return min(close, key=lambda model: model.bytes, default=None)


def recommendation(models: Sequence[Compared]) -> str:
    """Return in a sentence which model to take for most uses."""
    found, dense = recommended(models), models[0]
    if found is None:
        return f"None of these is within {_CLOSE - 1:.0%} of the dense perplexity: for most uses keep more bytes."
    return (
        f"For most uses take {found.name}: {found.bytes / dense.bytes:.0%} of the bytes at "
        f"{found.perplexity / dense.perplexity:.3f} times the dense perplexity."
    )


def comparison_picture(models: Sequence[Compared], path: str | os.PathLike[str]) -> Path:
    """Draw a bar of every model's bytes, with its perplexity and what it writes.

    Raises:
        ImportError: matplotlib is missing.
    """
    best = recommended(models)
    figure = new_figure(11, 0.9 + 1.15 * len(models))
    bars, words = figure.subplots(1, 2, width_ratios=(2, 3), sharey=True)
    for place, model in enumerate(models):
        color = _DENSE_COLOR if place == 0 else _BEST_COLOR if model is best else _COLOR
        bars.barh(place, model.bytes / 1e6, color=color, height=0.6)
        ratio = model.perplexity / models[0].perplexity
        beside = f"perplexity {model.perplexity:.1f}" + ("" if place == 0 else f" ({ratio:.2f} × dense)")
        bars.text(0.02 * models[0].bytes / 1e6, place, f"{bytes_text(model.bytes)}, {beside}", va="center")
        written = textwrap.fill(" ".join((model.text or "").split()), 78, max_lines=4, placeholder=" …")
        words.text(0, place, written, va="center", fontsize=9)
    bars.set_yticks(range(len(models)), [Path(model.name).name for model in models])
    bars.invert_yaxis()
    bars.set_xlabel("MB of the checkpoint")
    bars.set_title("size and perplexity", loc="left")
    words.set_axis_off()
    words.set_title("what it writes" if any(model.text for model in models) else "", loc="left")
    for side in ("top", "right"):
        bars.spines[side].set_visible(False)
    return save_figure(figure, path)
