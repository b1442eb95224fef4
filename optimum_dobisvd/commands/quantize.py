"""`optimum-cli dobisvd quantize`: GPTQ, bitsandbytes or our own 8 bits for a checkpoint that was saved without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option, UsageError
from .running import RUNNING
from .shared_options import DTYPE, INNER, TRUST_REMOTE_CODE

if TYPE_CHECKING:
    from rich.console import Console

_GROUPS = {
    "checkpoint": (
        Option("model", "folder of a low-rank checkpoint", positional=True, required=True, metavar="OUT"),
        Option("inner", f"{INNER.help}; or int8, remap: our own 8 bits, without text", required=True, metavar="FORM"),
        Option("out", "folder of the quantized checkpoint (default: OUT-FORM)", metavar="DIR"),
        Option(
            "overwrite", "replace that folder even if it holds other files", kind=bool, default=False, transient=True
        ),
        Option(
            "min_coverage",
            "smallest accepted share of the matrices' weights that can have the form (default: as OUT was compressed "
            "with, usually 0.5)",
            kind=float,
        ),
        DTYPE,
        TRUST_REMOTE_CODE,
    ),
    "calibration": (
        Option(
            "dataset",
            "text to calibrate the rounding on, named as for compress (default: the one that OUT's recipe names)",
            metavar="TEXT",
        ),
        Option("nsamples", "windows of text (default: as in OUT's recipe, else 128)", kind=int, metavar="N"),
        Option("seqlen", "tokens in a window (default: as in OUT's recipe, else 2048)", kind=int, metavar="N"),
        Option("seed", "of the draw of the windows (default: as in OUT's recipe, else 0)", kind=int, metavar="N"),
        Option("device_map", "where to put the weights: cpu, cuda, auto, ... (default: cpu)", metavar="MAP"),
    ),
    "running": RUNNING,
}

_EXAMPLES = """\
  optimum-cli dobisvd quantize llama-0.8 --inner gptq4
  optimum-cli dobisvd quantize llama-0.8 --inner nf4 --dataset wikitext2 --nsamples 32 --seqlen 1024
  optimum-cli dobisvd quantize llama-0.8-healed-merged --inner int8"""

_OWN = ("int8", "remap")


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Quantize and save; returns sizes before and after as JSON values.

    Raises whatever a bad option, checkpoint or text raises; then nothing is written.
    """
    from transformers import GPTQConfig

    from ..calibration.dataset import load_windows
    from ..inner import inner_from_name
    from ..report.table import bytes_text, ratio_text
    from ..stacking import inner_windows, require_backend
    from .checkpoint_report import read_config
    from .load_dense import load_tokenizer
    from .output_folder import check_target, staged_output
    from .saved_recipe import compress_options, save_recipe
    from .sources import calibration_dataset, model_source

    inner = None if options["inner"] in _OWN else inner_from_name(options["inner"])
    target = check_target(options["out"] or _default_folder(options), options["overwrite"])
    config = read_config(Path(options["model"]))
    if config.inner_is_applied:
        raise ValueError(f"{options['model']} is quantized already ({config.inner_forms}): give the checkpoint before")
    if inner is not None:
        require_backend(inner)
    made_with = compress_options(Path(options["model"])) or {}
    reads_text = inner is not None and not getattr(inner, "load_in_8bit", False)
    for key in ("dataset", "nsamples", "seqlen", "seed"):
        if options[key] is not None and not reads_text:
            raise UsageError(f"quantize: {options['inner']} reads no text: leave --{key} out")
    own_text = getattr(inner, "dataset", None)  # of a GPTQConfig given as JSON
    named = options["dataset"]
    if named is None and reads_text and own_text is None:
        named = made_with.get("dataset")
    tokenizer = load_tokenizer(model_source(options["model"]), trust_remote_code=options["trust_remote_code"])
    options = {**options, "dataset": named, "out": options["out"] or _default_folder(options)}
    for key, otherwise in (("nsamples", 128), ("seqlen", 2048), ("seed", 0)):
        if options[key] is None and reads_text:
            options[key] = made_with.get(key, otherwise)
    draw = {key: options[key] for key in ("nsamples", "seqlen", "seed")}
    windows = None
    if named is not None:
        windows = load_windows(calibration_dataset(named), tokenizer, **draw)
    elif isinstance(inner, GPTQConfig):
        if own_text is None:
            raise ValueError(
                f"GPTQ needs calibration text, and {options['model']} does not say what it was calibrated on: name "
                "some with --dataset"
            )
        windows = inner_windows(inner, None, None, tokenizer, **draw)
    with staged_output(target) as folder:
        before, after = _quantize_into(folder, inner, windows, tokenizer, options)
        save_recipe(folder, SPEC, options, made_with)
    console.print(f"{bytes_text(before)} -> {bytes_text(after)} ({ratio_text(after, before)}), saved to {target}")
    return {"out": str(target), "bytes_before": before, "bytes_after": after, "inner": options["inner"]}


SPEC = CommandSpec(
    name="quantize",
    summary="Quantize a low-rank checkpoint with GPTQ, bitsandbytes, or to our own 8 bits.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
)


def _default_folder(options: dict[str, Any]) -> str:
    if options["inner"].lstrip().startswith("{"):
        raise ValueError("name the folder to write with --out: there is no short name for these options")
    return f"{options['model'].rstrip('/')}-{options['inner']}"


def _quantize_into(folder: Path, inner: Any, windows: Any, tokenizer: Any, options: dict[str, Any]) -> tuple[int, int]:
    from ..calibration.layout import checkpoint_bytes
    from ..integrations.transformers_quantizer import stack_inner, store_as
    from .load_dense import load_dense
    from .sources import model_source

    model = load_dense(
        model_source(options["model"]),
        dtype=options["dtype"],
        device_map=options["device_map"],
        trust_remote_code=options["trust_remote_code"],
    )
    before = checkpoint_bytes(model)
    if inner is None:
        store_as(model, options["inner"])
    else:
        if options["min_coverage"] is not None:
            model.config.quantization_config.min_coverage = options["min_coverage"]
        stack_inner(model, inner, windows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return before, checkpoint_bytes(model)
