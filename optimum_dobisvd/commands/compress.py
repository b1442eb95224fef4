"""`optimum-cli dobisvd compress`: a dense model and a text in, a compressed checkpoint out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option
from .running import RUNNING
from .shared_options import CALIBRATION, METHOD, MODEL, compression_config, with_method_resolved

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from torch import Tensor, nn

    from ..report.report import CompressionReport
    from .sources import ModelSource

_GROUPS = {
    "output": (
        Option("out", "folder of the compressed checkpoint", positional=True, required=True, metavar="OUT"),
        Option(
            "overwrite",
            "replace OUT even if it holds other files, which are deleted (an earlier output is replaced anyway)",
            kind=bool,
            default=False,
            transient=True,
        ),
    ),
    "model": MODEL,
    "compression": METHOD,
    "calibration": CALIBRATION,
    "evaluation": (
        Option(
            "eval_dataset",
            "measure the perplexity of the dense and the compressed model on these texts (named as for --dataset; of "
            "wikitext2, c4 and ptb the test split)",
            many=True,
            default=[],
            metavar="TEXT",
        ),
        Option(
            "eval_seqlen",
            "tokens in a window there (default: 1024, or as many positions as the model has)",
            kind=int,
            metavar="N",
        ),
        Option("eval_windows", "at most so many windows of each text (default: all)", kind=int, metavar="N"),
    ),
    "running": RUNNING,
}

_EXAMPLES = """\
  optimum-cli dobisvd compress --model meta-llama/Llama-3.2-1B --ratio 0.8 --dataset wikitext2 llama-0.8
  optimum-cli dobisvd compress --model ./llama --method svd --ratio 0.9 --override 'down_proj:{"dense": true}' OUT
  optimum-cli dobisvd compress --model ./llama --statistics stats --plan llama-0.8/dobisvd_plan.json \\
      --dataset wikitext2 --eval-dataset wikitext2 --eval-windows 40 OUT"""


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Compress and save; returns the report as JSON values.

    Raises whatever a bad option, model or text raises; then OUT is as it was.
    """
    from .output_folder import check_target, staged_output
    from .saved_recipe import save_recipe
    from .sources import calibration_dataset

    target = check_target(options["out"], options["overwrite"])
    options = with_method_resolved(options)
    config = compression_config(options, calibration_dataset(options["dataset"]))
    with staged_output(target) as folder:
        report, settled = _compress_into(folder, config, options)
        save_recipe(folder, SPEC, {**options, **settled})
    from ..report.table import print_report

    print_report(report, console)
    console.print(f"\nsaved to {options['out']}")
    return {**report.to_dict(), "out": options["out"]}


def check(options: dict[str, Any]) -> None:
    """Raise ValueError if OUT would take the place of something that the compression reads."""
    from pathlib import Path

    from ..report.write import PLAN_NAME
    from .output_folder import refuse_losing
    from .sources import model_files, text_paths

    inputs = model_files("--model", options["model"], options["gguf_file"])
    inputs += text_paths("--dataset", [options["dataset"]]) + text_paths("--eval-dataset", options["eval_dataset"])
    if options["statistics"] is not None:
        inputs.append((f"the folder --statistics {options['statistics']}", Path(options["statistics"])))
    plan, replaced = options["plan"], Path(options["out"], PLAN_NAME)
    if plan is not None and Path(plan).resolve() != replaced.resolve():  # an edited plan is written there again
        inputs.append((f"the file --plan {plan}", Path(plan)))
    refuse_losing(options["out"], inputs)


SPEC = CommandSpec(
    name="compress",
    summary="Compress a model, and save it as a checkpoint that from_pretrained loads.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
    check=check,
)


def _compress_into(folder: Path, config: Any, options: dict[str, Any]) -> tuple[CompressionReport, dict[str, Any]]:
    """Write everything of the checkpoint but its recipe; returns the report, and what the model settled."""
    from ..pipeline.stages import Stages
    from ..quantizer import DobiSVDQuantizer
    from ..report.write import write_beside
    from .load_dense import load_dense, load_tokenizer
    from .processor_files import copy_processor_files
    from .sources import model_source, text_of

    quantizer = DobiSVDQuantizer(config)
    source = model_source(options["model"], options["gguf_file"])
    trust = options["trust_remote_code"]
    stages = Stages()
    with stages.stage("total"):
        with stages.stage("loading"):
            tokenizer = load_tokenizer(source, trust_remote_code=trust)
            texts = {name: text_of(name, "test", tokenizer) for name in options["eval_dataset"]}
            evaluated = _evaluation_windows(source, tokenizer, texts, options)
            model = load_dense(
                source, dtype=options["dtype"], device_map=options["device_map"], trust_remote_code=trust
            )
        with stages.stage("perplexity, dense"):
            dense = _perplexities(model, evaluated)
        quantizer.quantize_model(model, tokenizer)
        with stages.stage("perplexity, compressed"):
            compressed = _perplexities(model, evaluated)
        report = model.dobisvd_report
        _remember_dataset(report, model, options["dataset"])
        with stages.stage("saving"):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            copy_processor_files(source, folder)
    report.perplexity = {name: {"dense": dense[name], "compressed": compressed[name]} for name in texts}
    unused = set() if texts else {"perplexity, dense", "perplexity, compressed"}
    _add_stages(report.seconds, stages.seconds, unused)
    _add_stages(report.peak_bytes, stages.peak_bytes, unused)
    write_beside(folder, model.dobisvd_plan, report, model.dobisvd_training)
    settled = {"dtype": str(model.dtype).removeprefix("torch."), "seqlen": model.config.quantization_config.seqlen}
    return report, settled


def _evaluation_windows(
    source: ModelSource, tokenizer: Any, texts: dict[str, str], options: dict[str, Any]
) -> dict[str, Tensor]:
    """The windows of these texts, cut before the model is loaded."""
    from .evaluation_windows import evaluation_seqlen, evaluation_windows

    if not texts:
        return {}
    trust = options["trust_remote_code"]
    seqlen = evaluation_seqlen(source, options["eval_seqlen"], trust_remote_code=trust)
    settings = {"seqlen": seqlen, "windows": options["eval_windows"], "trust_remote_code": trust}
    return evaluation_windows(source, tokenizer, texts, settings)


def _perplexities(model: nn.Module, windows: dict[str, Tensor]) -> dict[str, float]:
    from ..evaluation.perplexity import perplexity_of

    return {name: perplexity_of(model, ids, f"perplexity on {name}") for name, ids in windows.items()}


def _remember_dataset(report: CompressionReport, model: Any, typed: str | None) -> None:
    """Put back the words that named a text: one from a glob or a package reaches the quantizer as strings."""
    if report.dataset is not None and report.dataset["kind"] == "texts":
        report.dataset["dataset"] = typed
        model.config.quantization_config.dataset = typed


def _add_stages(into: dict[str, Any], measured: dict[str, Any], unused: set[str]) -> None:
    """Bring the stages around the quantizer's own into the order they ran in."""
    own = dict(into)
    into.clear()
    before, after = ("loading", "perplexity, dense"), ("perplexity, compressed", "saving", "total")
    into.update({name: measured[name] for name in before if name not in unused})
    into.update(own)
    into.update({name: measured[name] for name in after if name not in unused})
