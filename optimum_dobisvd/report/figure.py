"""Figures of matplotlib, which is an extra."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic_files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MISSING = "pictures need matplotlib: pip install 'optimum-dobisvd[plots]'"


def matplotlib_is_installed() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise ImportError, naming the extra, if pictures cannot be drawn."""
    if not matplotlib_is_installed():
        raise ImportError(_MISSING)


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches. No pyplot: it keeps figures alive and may look for a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(_MISSING) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a PNG, whole or not at all."""
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=150))
    return Path(path)
