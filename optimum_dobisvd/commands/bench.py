"""`optimum-cli dobisvd bench`: how fast a compressed model generates, beside the dense one and the machine's bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option, UsageError
from .running import RUNNING
from .shared_options import DTYPE, QUANTIZATION_HELP, TRUST_REMOTE_CODE

if TYPE_CHECKING:
    from rich.console import Console

ROWS = ("dense", "dense-compiled", "checkpoint", "fused", "compiled")
_SHAPES = ("llama-7b", "llama-1b", "llama-8x2048")

_GROUPS = {
    "models": (
        Option("out", "folder of a compressed checkpoint, or its hub id", positional=True, metavar="OUT"),
        Option("dense", "the dense model (default: the one that OUT's recipe names)", metavar="MODEL"),
        DTYPE,
        Option("device", "where to compute: cpu, cuda, ...", default="cpu"),
        Option("attention", "attention kernel of all models, by transformers' name", default="sdpa", metavar="NAME"),
        Option(
            "memory",
            "a limit on the device's memory, such as 12GB: weights that do not fit beside the largest generation are "
            "offloaded, from a GPU to the CPU's memory, from a CPU to disk",
            metavar="SIZE",
        ),
        TRUST_REMOTE_CODE,
    ),
    "random weights instead of OUT": (
        Option("synthetic", "a model of this shape, dense and compressed: no download", choices=_SHAPES),
        Option(
            "shape",
            'fields of its LlamaConfig that are to differ, such as {"num_hidden_layers": 8}',
            kind=dict,
            default={},
        ),
        Option(
            "keep", "share of the bytes of its matrices that is kept (default: 0.5, where there are ranks)", kind=float
        ),
        Option("structure", "how its matrices are written: low_rank, pivoted or dense", default="pivoted"),
        Option("quantization", f"{QUANTIZATION_HELP} (default: the dtype)", metavar="ENCODING"),
    ),
    "what is measured": (
        Option("batch", "sequences at once", kind=int, many=True, metavar="N"),
        Option("prompt", "tokens before the first new one", kind=int, many=True, metavar="N"),
        Option("new_tokens", "tokens of every sequence", kind=int, default=32, metavar="N"),
        Option("rows", f"which of {', '.join(ROWS)} (default: all)", many=True, metavar="ROW"),
        Option("rounds", "of which medians are taken, all rows by turns", kind=int, default=7, metavar="N"),
        Option("seconds", "begin no further round of a cell after so long, three done", kind=float, default=120.0),
        Option("picture", "a PNG file to draw the figures into (needs matplotlib)", metavar="FILE"),
    ),
    "running": RUNNING,
}
_BATCHES, _PROMPTS = [1, 4, 16], [32, 512]

_EXAMPLES = """\
  optimum-cli dobisvd bench llama-0.5
  optimum-cli dobisvd bench llama-0.5 --device cuda --dtype bfloat16 --json speed.json --picture speed.png
  optimum-cli dobisvd bench --synthetic llama-7b --keep 0.5 --device cuda
  optimum-cli dobisvd bench --synthetic llama-8x2048 --structure low_rank --quantization int8 --keep 0.25 --batch 1
  optimum-cli dobisvd bench llama-0.5 --memory 12GB --device cuda --rows dense checkpoint --batch 1 --prompt 32"""


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Measure and print; returns the values of `benchmark.result.SpeedReport`.

    Raises:
        ImportError: a picture without matplotlib, or an encoding without its library.
        OSError, ValueError: models that cannot be loaded or do not fit, a prompt that is too long, a cell that does
            not fit while there is no other.
    """
    from ..report.figure import require_matplotlib
    from ..report.speed import print_speed
    from ..report.speed_picture import speed_picture
    from .bench_models import measure

    if options["picture"] is not None:
        require_matplotlib()
    report = measure(with_defaults(options), console)
    print_speed(report, console)
    if options["picture"] is not None:
        speed_picture(report, options["picture"])
        console.print(f"picture: {options['picture']}")
    return report.to_dict()


def with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with batches, prompts and rows filled in."""
    usual = {"batch": _BATCHES, "prompt": _PROMPTS, "rows": list(ROWS)}
    return {**options, **{key: options[key] or values for key, values in usual.items()}}


def check(options: dict[str, Any]) -> None:
    """Raise UsageError for options that make no sense, alone or together."""
    if (options["out"] is None) == (options["synthetic"] is None):
        raise UsageError("bench: name a checkpoint OUT, or --synthetic SHAPE; one of both")
    if options["synthetic"] is not None and options["dense"] is not None:
        raise UsageError("bench: --dense is for a checkpoint; --synthetic makes the dense model itself")
    if options["out"] is not None:
        for key in ("shape", "keep", "quantization"):
            if options[key] not in (None, {}):
                raise UsageError(f"bench: --{key} is for --synthetic; a checkpoint is what it is")
    for key, least in (("batch", 1), ("prompt", 1), ("new_tokens", 2), ("rounds", 3)):
        for value in options[key] if isinstance(options[key], list) else [options[key]]:
            if value is not None and value < least:
                raise UsageError(f"bench: --{key.replace('_', '-')} must be at least {least}, got {value}")
    if options["seconds"] <= 0:
        raise UsageError(f"bench: --seconds must be above 0, got {options['seconds']:g}")
    for row in options["rows"] or []:
        if row not in ROWS:
            raise UsageError(f"bench: there is no row {row!r}; there are: {', '.join(ROWS)}")


SPEC = CommandSpec(
    name="bench",
    summary="Measure how fast a compressed model generates: dense, as it is, fused and compiled, all by turns.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
    check=check,
)
