"""`optimum-cli dobisvd eval`: perplexity and lm-eval accuracies of a compressed model beside the dense one's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option, UsageError
from .running import RUNNING
from .shared_options import DTYPE, TRUST_REMOTE_CODE

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.tasks import LoadedTasks
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
            default=[],
            metavar="TEXT",
        ),
        Option(
            "seqlen",
            "tokens in a window (default: 1024, or as many positions as the model has)",
            kind=int,
            metavar="N",
        ),
        Option("windows", "at most so many windows of each text (default: all)", kind=int, metavar="N"),
    ),
    "tasks": (
        Option(
            "tasks",
            "tasks of lm-eval, with spaces or commas between: piqa,hellaswag,winogrande,arc_easy,arc_challenge,"
            "openbookqa,mathqa,boolq, mmlu, ... (`lm_eval ls tasks` lists them); data come from the hub",
            many=True,
            default=[],
            metavar="TASK",
        ),
        Option(
            "data_dir",
            "have those first eight from files in this folder instead, named and written as recipes/tasks says",
            metavar="DIR",
        ),
        Option("limit", "the first so many examples of each task (default: all)", kind=int, metavar="N"),
        Option(
            "num_fewshot",
            "examples with their answers before each question (default: as each task says); with --data-dir they are "
            "other lines of the same file",
            kind=int,
            metavar="N",
        ),
        Option("batch_size", "sequences per forward pass in tasks (default: 1)", kind=int, metavar="N"),
    ),
    "running": RUNNING,
}

_EXAMPLES = """\
  optimum-cli dobisvd eval llama-0.8 --dataset wikitext2 c4 --windows 40
  optimum-cli dobisvd eval llama-0.8 --dense ./llama --dataset held-out.txt --json -
  optimum-cli dobisvd eval llama-0.8 --tasks piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa,mathqa,boolq
  optimum-cli dobisvd eval llama-0.8 --tasks piqa boolq --data-dir ./data --limit 200"""


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Measure and print; returns `{"perplexity": {text: {"dense": ..., "compressed": ...}}, "tasks": {...}, ...}`.

    `tasks` is `{task: {"dense": figures, "compressed": figures}}` with the figures of `evaluation.harness.evaluate`,
    `mean_accuracy` what `evaluation.mean_accuracy.compare_means` makes of them. Where the dense model is not known or
    cannot be loaded, and was not named by --dense, only the compressed one is evaluated.

    Raises:
        ImportError: tasks without lm-eval.
        OSError, ValueError: a model, text or task that cannot be used. Texts and tasks are read before any model.
    """
    from ..evaluation.mean_accuracy import compare_means
    from .dense_source import dense_source
    from .evaluation_windows import evaluation_seqlen
    from .load_dense import load_tokenizer
    from .sources import model_source, text_of

    source, trust = model_source(options["out"]), options["trust_remote_code"]
    options = {**options, "batch_size": 1 if options["batch_size"] is None else options["batch_size"]}
    tasks = _load_tasks(options)
    if options["dataset"]:
        options["seqlen"] = evaluation_seqlen(source, options["seqlen"], trust_remote_code=trust)
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    texts = {name: text_of(name, "test", tokenizer) for name in options["dataset"]}
    found_dense = dense_source(options["out"], options["dense"])
    dense, note = found_dense.source, found_dense.note
    if note is not None:
        note = f"{note}: only the compressed one is evaluated; pass --dense to evaluate it too"
    measured: dict[str, _Measured] = {}
    if dense is not None:
        try:
            measured["dense"] = _measure(dense, texts, tasks, options)
        except (OSError, ValueError, ImportError) as error:
            if options["dense"] is not None:
                raise
            note = f"the dense model {dense.typed} could not be evaluated: {' '.join(str(error).split())[:300]}"
    measured["compressed"] = _measure(source, texts, tasks, options)

    found = {name: {which: each.perplexity[name] for which, each in measured.items()} for name in texts}
    figures = {
        name: {which: each.tasks[name] for which, each in measured.items()} for name in measured["compressed"].tasks
    }
    means = compare_means(figures)
    _print(options["out"], found, figures, means, note, console)
    settings = {
        key: options[key]
        for key in ("out", "seqlen", "windows", "dtype", "data_dir", "limit", "num_fewshot", "batch_size")
    }
    return {
        **settings,
        "dense": dense.typed if dense is not None else None,
        "note": note,
        "perplexity": found,
        "tasks": figures,
        "mean_accuracy": means,
    }


def check(options: dict[str, Any]) -> None:
    """Raise UsageError for options that ask for nothing, or for nonsense."""
    names = _task_names(options)
    if not names and not options["dataset"]:
        raise UsageError(
            "eval: nothing to evaluate on: give --dataset TEXT for perplexity, --tasks TASK for lm-eval, or both"
        )
    for key, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        value = options[key]
        if value is not None and value < least:
            raise UsageError(f"eval: --{key.replace('_', '-')} must be at least {least}, got {value}")
    for key in ("data_dir", "limit", "num_fewshot", "batch_size"):
        if options[key] is not None and not names:
            raise UsageError(f"eval: --{key.replace('_', '-')} is for tasks, and none is named: give --tasks too")
    for key in ("seqlen", "windows"):
        if options[key] is not None and not options["dataset"]:
            raise UsageError(f"eval: --{key} is for texts, and none is named: give --dataset too")


SPEC = CommandSpec(
    name="eval",
    summary="Measure perplexity and lm-eval accuracies of a compressed model and of the dense one, in one run.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
    check=check,
)


@dataclass(frozen=True)
class _Measured:
    """Figures of one model: perplexity by text, lm-eval's figures by task."""

    perplexity: dict[str, float]
    tasks: dict[str, dict[str, Any]]


def _task_names(options: dict[str, Any]) -> list[str]:
    """The names given, commas taken apart."""
    return [name.strip() for given in options["tasks"] for name in given.split(",") if name.strip()]


def _load_tasks(options: dict[str, Any]) -> LoadedTasks | None:
    from ..evaluation.tasks import load_tasks

    names = _task_names(options)
    return load_tasks(names, options["data_dir"]) if names else None


def _measure(
    source: ModelSource, texts: dict[str, str], tasks: LoadedTasks | None, options: dict[str, Any]
) -> _Measured:
    """Measure everything of one model; it is gone from memory afterwards."""
    from ..evaluation.harness import evaluate
    from ..evaluation.perplexity import perplexity_of
    from .evaluation_windows import evaluation_windows
    from .load_dense import load_dense, load_tokenizer

    trust = options["trust_remote_code"]
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    windows = evaluation_windows(source, tokenizer, texts, options)
    model = load_dense(source, dtype=options["dtype"], device_map=options["device"], trust_remote_code=trust)
    perplexities = {name: perplexity_of(model, ids, f"{source.typed} on {name}") for name, ids in windows.items()}
    if tasks is None:
        return _Measured(perplexities, {})
    settings = {key: options[key] for key in ("limit", "num_fewshot", "batch_size")}
    return _Measured(perplexities, evaluate(model, tokenizer, tasks, **settings))


def _print(
    out: str,
    perplexities: dict[str, dict[str, float]],
    figures: dict[str, dict[str, Any]],
    means: dict[str, Any] | None,
    note: str | None,
    console: Console,
) -> None:
    from ..evaluation.table import means_line, tasks_table
    from ..report.table import plain_table

    if perplexities:
        table = plain_table(f"perplexity of {out}", ("text", "dense", "compressed", "ratio"))
        for name, values in perplexities.items():
            compressed, against = values["compressed"], values.get("dense")
            ratio = ("", "") if against is None else (f"{against:.3f}", f"{compressed / against:.3f}")
            table.add_row(name, ratio[0], f"{compressed:.3f}", ratio[1])
        console.print(table)
    if figures:
        console.print(tasks_table(f"lm-eval tasks of {out}", figures, means))
        if means is not None and len(means["metrics"]) > 1:
            console.print(means_line(means))
    if note is not None:
        console.print(f"\n{note}")
