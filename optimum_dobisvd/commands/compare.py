"""`optimum-cli dobisvd compare`: checkpoints of one model side by side: size, perplexity, what each writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option, UsageError
from .running import RUNNING
from .shared_options import DTYPE, TRUST_REMOTE_CODE

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ..report.comparison import Compared
    from .sources import ModelSource

_GROUPS = {
    "models": (
        Option("outs", "folders of compressed checkpoints", positional=True, required=True, many=True, metavar="OUT"),
        Option("dense", "the dense model (default: the one that the first OUT's recipe names)", metavar="MODEL"),
        DTYPE,
        Option("device", "where to compute: cpu, cuda, auto, ...", default="cpu"),
        TRUST_REMOTE_CODE,
    ),
    "what is compared": (
        Option(
            "dataset", "text for the perplexity: wikitext2, c4, ptb, a file or glob", required=True, metavar="TEXT"
        ),
        Option(
            "seqlen",
            "tokens in a window (default: 1024, or as many positions as the model has)",
            kind=int,
            metavar="N",
        ),
        Option("windows", "at most so many windows (default: all)", kind=int, metavar="N"),
        Option("prompt", "text that each model continues", metavar="TEXT"),
        Option("max_new_tokens", "tokens of that", kind=int, default=40, metavar="N"),
        Option("picture", "a PNG file to draw the comparison into (needs matplotlib)", metavar="FILE"),
    ),
    "running": RUNNING,
}

_EXAMPLES = """\
  optimum-cli dobisvd compare llama-0.5 llama-0.3 --dataset wikitext2 --windows 40 --prompt "The sea is"
  optimum-cli dobisvd compare out/half out/third --dense ./llama --dataset held-out.txt --picture sizes.png"""


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Measure and print; returns `{"models": [...], "recommended": name}`, the dense model first.

    Raises:
        ImportError: a picture without matplotlib.
        OSError, ValueError: a model or text that cannot be used. Text and tokenizers are read before any model.
    """
    from dataclasses import asdict

    from ..report.comparison import comparison_picture, recommendation, recommended
    from ..report.figure import require_matplotlib
    from .dense_source import dense_source
    from .evaluation_windows import evaluation_seqlen, evaluation_windows
    from .load_dense import load_tokenizer
    from .sources import model_source, text_of

    if options["picture"] is not None:
        require_matplotlib()
    found_dense = dense_source(options["outs"][0], options["dense"])
    if found_dense.source is None:
        raise ValueError(f"{found_dense.note}: pass --dense")
    dtype = found_dense.dtype
    sources = {"dense": found_dense.source, **{out: model_source(out) for out in options["outs"]}}
    trust = options["trust_remote_code"]
    tokenizers = {name: load_tokenizer(source, trust_remote_code=trust) for name, source in sources.items()}
    text = text_of(options["dataset"], "test", tokenizers["dense"])
    seqlen = evaluation_seqlen(found_dense.source, options["seqlen"], trust_remote_code=trust)
    options = {**options, "seqlen": seqlen}
    windows = {
        name: evaluation_windows(source, tokenizers[name], {options["dataset"]: text}, options)[options["dataset"]]
        for name, source in sources.items()
    }
    models = []
    for name, source in sources.items():
        as_compressed = name == "dense" and dtype is not None and options["dtype"] == "auto"
        asked = {**options, "dtype": dtype} if as_compressed else options
        models.append(_measure(source, tokenizers[name], name, windows[name], asked))
    _print(models, console)
    console.print(recommendation(models))
    if options["picture"] is not None:
        comparison_picture(models, options["picture"])
        console.print(f"picture: {options['picture']}")
    found = recommended(models)
    return {
        "dataset": options["dataset"],
        "prompt": options["prompt"],
        "models": [asdict(model) for model in models],
        "recommended": None if found is None else found.name,
    }


def check(options: dict[str, Any]) -> None:
    """Raise UsageError for numbers that make no sense."""
    for key, least in (("seqlen", 2), ("windows", 1), ("max_new_tokens", 1)):
        if options[key] is not None and options[key] < least:
            raise UsageError(f"compare: --{key.replace('_', '-')} must be at least {least}, got {options[key]}")


SPEC = CommandSpec(
    name="compare",
    summary="Compare compressed checkpoints with the dense model: size, perplexity, and what each writes.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
    check=check,
)


def _measure(source: ModelSource, tokenizer: Any, name: str, ids: Tensor, options: dict[str, Any]) -> Compared:
    """Measure one model; it is gone from memory afterwards."""
    from pathlib import Path

    from ..evaluation.perplexity import perplexity_of
    from ..model.footprint import checkpoint_bytes
    from ..report.comparison import Compared
    from ..report.report import REPORT_NAME, CompressionReport
    from .generate import continuation
    from .load_dense import load_dense

    trust = options["trust_remote_code"]
    model = load_dense(source, dtype=options["dtype"], device_map=options["device"], trust_remote_code=trust)
    found = perplexity_of(model, ids, f"{name}, perplexity")
    prompt, written = options["prompt"], None
    if prompt is not None:
        written = prompt + continuation(model, tokenizer, prompt, options["max_new_tokens"])
    seconds = None
    if name != "dense" and (Path(name) / REPORT_NAME).is_file():
        stages = CompressionReport.load(name).seconds
        seconds = stages.get("total", sum(stages.values()))
    return Compared(name, checkpoint_bytes(model), found, seconds, written)


def _print(models: list[Compared], console: Console) -> None:
    from ..report.table import bytes_text, plain_table

    dense = models[0]
    table = plain_table("compared", ("", "checkpoint", "of dense", "perplexity", "times dense", "made in"))
    for model in models:
        table.add_row(
            model.name,
            bytes_text(model.bytes),
            f"{model.bytes / dense.bytes:.0%}",
            f"{model.perplexity:.2f}",
            f"{model.perplexity / dense.perplexity:.3f}",
            "" if model.seconds is None else f"{model.seconds:.0f} s",
        )
    console.print(table)
    for model in models:
        if model.text is not None:
            console.print(f"\n{model.name}:\n  {model.text}", soft_wrap=True, markup=False, highlight=False)
    console.print()
