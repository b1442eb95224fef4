"""Files beside every checkpoint for people: the plan, the report, the pictures."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ..allocation.plan import Plan
from ..learning.curve import TrainingCurve
from .directions_picture import DIRECTIONS_PICTURE, chooses_directions, directions_picture
from .figure import matplotlib_is_installed
from .pictures import (
    ERRORS_PICTURE,
    FORMATS_PICTURE,
    RANKS_PICTURE,
    errors_picture,
    formats_picture,
    ranks_picture,
)
from .report import CompressionReport
from .training_pictures import (
    BEFORE_AFTER_PICTURE,
    TRAINING_PICTURE,
    before_after_picture,
    training_picture,
)

logger = logging.getLogger(__name__)

PLAN_NAME = "dobisvd_plan.json"


def write_beside(
    folder: str | os.PathLike[str],
    plan: Plan,
    report: CompressionReport,
    curve: TrainingCurve | None = None,
    pictures: bool = True,
) -> list[Path]:
    """Write plan, report, the curve of learned ranks and, with matplotlib, pictures; returns the files."""
    folder = Path(folder)
    plan.save(folder / PLAN_NAME)
    written = [folder / PLAN_NAME, report.save(folder)]
    if curve is not None:
        written.append(curve.save(folder))
    if pictures:
        written += write_pictures(folder, report, curve, plan)
    return written


def write_pictures(
    folder: str | os.PathLike[str],
    report: CompressionReport,
    curve: TrainingCurve | None = None,
    plan: Plan | None = None,
) -> list[Path]:
    """Write the pictures alone; none, and a line in the log, where matplotlib is missing."""
    if not matplotlib_is_installed():
        logger.info("no pictures: matplotlib is not installed (pip install 'optimum-dobisvd[plots]')")
        return []
    folder = Path(folder)
    written = [
        formats_picture(report, folder / FORMATS_PICTURE),
        ranks_picture(report, folder / RANKS_PICTURE),
    ]
    if any(module.error is not None for module in report.modules):
        written.append(errors_picture(report, folder / ERRORS_PICTURE))
    if plan is not None and chooses_directions(plan):
        full = {module.name: min(module.out_features, module.in_features) for module in report.modules}
        written.append(directions_picture(plan, full, folder / DIRECTIONS_PICTURE))
    if curve is not None and curve.steps:
        written.append(training_picture(curve, folder / TRAINING_PICTURE))
        written.append(before_after_picture(curve, folder / BEFORE_AFTER_PICTURE))
    return written
