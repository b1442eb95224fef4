"""`optimum-cli dobisvd inspect`: structure, ranks, bytes and errors of a compressed checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option
from .running import RUNNING
from .shared_options import TRUST_REMOTE_CODE

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

_GROUPS = {
    "input": (
        Option("out", "folder of a compressed checkpoint", positional=True, required=True, metavar="OUT"),
        TRUST_REMOTE_CODE,
    ),
    "output": (Option("pictures", "draw ranks and errors into this folder", metavar="DIR"),),
    "running": RUNNING,
}

_EXAMPLES = """\
  optimum-cli dobisvd inspect llama-0.8
  optimum-cli dobisvd inspect llama-0.8 --pictures pictures
  optimum-cli dobisvd inspect llama-0.8 --json - | jq .ratios"""


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Print the report of a checkpoint, or what its files tell without one; returns it as JSON values.

    Raises:
        FileNotFoundError, ValueError: there is no compressed checkpoint, or it is damaged.
        ImportError: pictures were asked for and matplotlib is missing.
    """
    from pathlib import Path

    from ..report.report import REPORT_NAME, CompressionReport
    from ..report.table import print_report

    folder = Path(options["out"])
    if (folder / REPORT_NAME).exists():
        report = CompressionReport.load(folder)
    else:
        from .checkpoint_report import report_from_files

        report = report_from_files(folder, trust_remote_code=options["trust_remote_code"])
        console.print(
            f"{REPORT_NAME} is missing: ranks and bytes are read from the files, errors and times are unknown\n"
        )
    print_report(report, console, modules=True)
    result = report.to_dict()
    if options["pictures"] is not None:
        drawn = _draw(folder, options["pictures"], report)
        console.print(f"\npictures: {', '.join(drawn)}")
        result["pictures"] = drawn
    return result


SPEC = CommandSpec(
    name="inspect",
    summary="Show ranks, bytes and errors of a compressed checkpoint, as tables and pictures.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
)


def _draw(checkpoint: Path, folder: str, report: Any) -> list[str]:
    from ..allocation.plan import Plan
    from ..learning.curve import TrainingCurve
    from ..report.figure import matplotlib_is_installed
    from ..report.write import PLAN_NAME, write_pictures

    if not matplotlib_is_installed():
        raise ImportError("--pictures needs matplotlib: pip install 'optimum-dobisvd[plots]'")
    plan = Plan.load(checkpoint / PLAN_NAME) if (checkpoint / PLAN_NAME).exists() else None
    return [str(path) for path in write_pictures(folder, report, TrainingCurve.load(checkpoint), plan)]
