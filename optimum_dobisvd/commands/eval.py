"""`optimum-cli dobisvd eval`: perplexity of a compressed model beside the dense one it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option
from .running import RUNNING
from .shared_options import DTYPE, TRUST_REMOTE_CODE

if TYPE_CHECKING:
    from rich.console import Console

    from .sources import ModelSource

_GROUPS = {
    "models": (
        Option(
            "out", "folder of a compressed checkpoint, or its hub id", positional=True, required=True, metavar="OUT"
        ),
        Option("dense", "the dense model (default: the one that OUT's recipe names)", metavar="MODEL"),
        DTYPE,
        Option("device", "where to compute: cpu, cuda, auto, ...", default="cpu"),
        TRUST_REMOTE_CODE,
    ),
    "texts": (
        Option(
            "dataset",
            "wikitext2, c4, ptb (their test split), files, globs, or package:NAME/FILES",
            many=True,
            required=True,
            metavar="TEXT",
        ),
        Option("seqlen", "tokens in a window", kind=int, default=1024, metavar="N"),
        Option("windows", "at most so many windows of each text (default: all)", kind=int, metavar="N"),
    ),
    "running": RUNNING,
}

_EXAMPLES = """\
  optimum-cli dobisvd eval llama-0.8 --dataset wikitext2 c4 --windows 40
  optimum-cli dobisvd eval llama-0.8 --dense ./llama --dataset held-out.txt --json -"""


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Measure and print; returns `{"perplexity": {text: {"dense": ..., "compressed": ...}}, ...}`.

    Where the dense model is not known or cannot be loaded, and was not named by --dense, only it is judged.

    Raises:
        OSError, ValueError: a model or text that cannot be used.
    """
    from ..report.table import plain_table
    from .sources import model_source, text_of

    texts = {name: text_of(name, "test") for name in options["dataset"]}
    found: dict[str, dict[str, float]] = {name: {} for name in texts}
    dense, note = _dense_source(options)
    if dense is not None:
        try:
            perplexities = _perplexities(dense, texts, options)
        except (OSError, ValueError, ImportError) as error:
            if options["dense"] is not None:
                raise
            note = f"the dense model {dense.typed} could not be judged: {' '.join(str(error).split())[:300]}"
        else:
            for name, value in perplexities.items():
                found[name]["dense"] = value
    for name, value in _perplexities(model_source(options["out"]), texts, options).items():
        found[name]["compressed"] = value

    table = plain_table(f"perplexity of {options['out']}", ("text", "dense", "compressed", "ratio"))
    for name, values in found.items():
        judged, against = values["compressed"], values.get("dense")
        ratio = ("", "") if against is None else (f"{against:.3f}", f"{judged / against:.3f}")
        table.add_row(name, ratio[0], f"{judged:.3f}", ratio[1])
    console.print(table)
    if note is not None:
        console.print(f"\n{note}")
    settings = {key: options[key] for key in ("out", "seqlen", "windows", "dtype")}
    return {**settings, "dense": dense.typed if dense is not None else None, "note": note, "perplexity": found}


SPEC = CommandSpec(
    name="eval",
    summary="Measure the perplexity of a compressed model and of the dense one, in one run.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
)


def _dense_source(options: dict[str, Any]) -> tuple[ModelSource | None, str | None]:
    """The dense model that was named, or else the one in the recipe; without either, None and why."""
    from pathlib import Path

    from .saved_recipe import RECIPE_NAME, compress_options
    from .sources import model_source

    if options["dense"] is not None:
        return model_source(options["dense"]), None
    made_with = compress_options(Path(options["out"]))
    if made_with is None or "model" not in made_with:
        return None, f"{options['out']} has no {RECIPE_NAME} that names the dense model: pass --dense to judge it too"
    try:
        return model_source(made_with["model"], made_with.get("gguf_file")), None
    except (OSError, ValueError) as error:
        return None, f"the dense model {made_with['model']} cannot be found: {error}"


def _perplexities(source: ModelSource, texts: dict[str, str], options: dict[str, Any]) -> dict[str, float]:
    """Perplexity by text; the model is gone from memory afterwards."""
    from ..report.perplexity import perplexity
    from .load_dense import load_dense, load_tokenizer

    trust = options["trust_remote_code"]
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    model = load_dense(source, dtype=options["dtype"], device_map=options["device"], trust_remote_code=trust)
    return {
        name: perplexity(
            model,
            tokenizer,
            text,
            seqlen=options["seqlen"],
            windows=options["windows"],
            progress=f"{source.typed} on {name}",
        )
        for name, text in texts.items()
    }
