"""`optimum-cli dobisvd quantize`: another encoding for a checkpoint that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option, UsageError
from .running import RUNNING
from .shared_options import DTYPE, QUANTIZATION_HELP, ROUNDING, TRUST_REMOTE_CODE

if TYPE_CHECKING:
    from rich.console import Console

    from ..calibration.dataset import CalibrationWindows
    from ..config import DobiSVDConfig
    from ..encodings.base import Encoding

_GROUPS = {
    "checkpoint": (
        Option("model", "folder of a low-rank checkpoint", positional=True, required=True, metavar="OUT"),
        Option("quantization", QUANTIZATION_HELP, required=True, metavar="ENCODING"),
        *ROUNDING,
        Option("out", "folder of the quantized checkpoint (default: OUT-ENCODING)", metavar="DIR"),
        Option(
            "overwrite", "replace that folder even if it holds other files", kind=bool, default=False, transient=True
        ),
        Option(
            "min_coverage",
            "smallest accepted share of the matrices' weights that can have the encoding (default: as OUT was "
            "compressed with, usually 0.5)",
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
        Option(
            "nsamples", "windows of text (default: as in OUT's recipe, else as for compress)", kind=int, metavar="N"
        ),
        Option(
            "seqlen", "tokens in a window (default: as in OUT's recipe, else as for compress)", kind=int, metavar="N"
        ),
        Option("seed", "of their draw (default: as in OUT's recipe, else as for compress)", kind=int, metavar="N"),
        Option("device_map", "where to put the weights: cpu, cuda, auto, ... (default: cpu)", metavar="MAP"),
    ),
    "running": RUNNING,
}

_EXAMPLES = """\
  optimum-cli dobisvd quantize llama-0.8 --quantization gptq4
  optimum-cli dobisvd quantize llama-0.8 --quantization nf4 --dataset wikitext2 --nsamples 32 --seqlen 1024
  optimum-cli dobisvd quantize llama-0.8-healed-merged --quantization int8"""

_DRAW = ("nsamples", "seqlen", "seed")


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Quantize and save; returns sizes before and after as JSON values.

    Raises whatever a bad option, checkpoint or text raises; then nothing is written.
    """
    from ..encodings.registry import encoding_of, rounded
    from ..pipeline.windows import check_windows
    from ..report.table import bytes_text, ratio_text
    from .checkpoint_report import read_config
    from .load_dense import load_meta_model, load_tokenizer
    from .output_folder import check_target, staged_output
    from .saved_recipe import compress_options, save_recipe
    from .sources import model_source

    encoding = encoding_of(options["quantization"])
    encoding = rounded(encoding, options["rounding"], options["rounding_settings"] or {})
    target = check_target(options["out"] or _default_folder(options), options["overwrite"])
    config = read_config(Path(options["model"]))
    if config.foreign_encodings:
        raise ValueError(
            f"{options['model']} is quantized already ({', '.join(config.foreign_encodings)}): give the checkpoint "
            "before"
        )
    encoding.require()
    made_with = compress_options(Path(options["model"])) or {}
    options = _with_draw(options, encoding, made_with)
    tokenizer = load_tokenizer(model_source(options["model"]), trust_remote_code=options["trust_remote_code"])
    windows = _windows(encoding, config, tokenizer, options)
    if windows is not None:
        source, trust = model_source(options["model"]), options["trust_remote_code"]
        check_windows(load_meta_model(source, trust_remote_code=trust), windows)
    options = {**options, "out": options["out"] or _default_folder(options)}
    with staged_output(target) as folder:
        before, after = _quantize_into(folder, encoding, windows, tokenizer, options)
        save_recipe(folder, SPEC, options, made_with)
    console.print(f"{bytes_text(before)} -> {bytes_text(after)} ({ratio_text(after, before)}), saved to {target}")
    return {
        "out": str(target),
        "bytes_before": before,
        "bytes_after": after,
        "quantization": options["quantization"],
    }


def check(options: dict[str, Any]) -> None:
    """Raise ValueError if the folder to write would take the place of something that is read."""
    from .output_folder import refuse_losing
    from .sources import model_files, text_paths

    inputs = model_files("OUT", options["model"]) + text_paths("--dataset", [options["dataset"]])
    refuse_losing(options["out"] or _default_folder(options), inputs)


SPEC = CommandSpec(
    name="quantize",
    summary="Quantize a compressed checkpoint: GPTQ, bitsandbytes, or 8 bits of our own.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
    check=check,
)


def _default_folder(options: dict[str, Any]) -> str:
    if options["quantization"].lstrip().startswith("{"):
        raise ValueError("name the folder to write with --out: there is no short name for these options")
    return f"{options['model'].rstrip('/')}-{options['quantization']}"


def _with_draw(options: dict[str, Any], encoding: Encoding, made_with: dict[str, Any]) -> dict[str, Any]:
    """The options with text and draw of the compression where nothing else was asked for."""
    from ..config import default_of
    from ..model.input_limits import default_seqlen
    from ..pipeline.windows import USUAL_SEQLEN
    from .load_dense import load_meta_model
    from .sources import model_source

    if not encoding.uses_text:
        for key in ("dataset", *_DRAW):
            if options[key] is not None:
                raise UsageError(f"quantize: {options['quantization']} reads no text: leave --{key} out")
        return options
    usual = {"dataset": None if encoding.own_text is not None else made_with.get("dataset")}
    usual |= {key: made_with.get(key, default_of(key)) for key in _DRAW}
    if options["seqlen"] is None and usual["seqlen"] is None:  # nothing was calibrated so far
        source, trust = model_source(options["model"]), options["trust_remote_code"]
        usual["seqlen"] = default_seqlen(load_meta_model(source, trust_remote_code=trust), USUAL_SEQLEN)
    return {**options, **{key: value for key, value in usual.items() if options[key] is None}}


def _windows(
    encoding: Encoding, config: DobiSVDConfig, tokenizer: Any, options: dict[str, Any]
) -> CalibrationWindows | None:
    """Return the windows that the rounding is calibrated on, None if on nothing."""
    from dataclasses import replace

    from ..calibration.dataset import load_windows
    from ..pipeline.windows import quantization_windows, windows_for
    from .sources import calibration_dataset

    if not encoding.uses_text:
        return None
    draw = {key: options[key] for key in _DRAW}
    if options["dataset"] is not None:
        return windows_for(encoding, load_windows(calibration_dataset(options["dataset"]), tokenizer, **draw))
    if encoding.needs_text and encoding.own_text is None:
        raise ValueError(
            f"{encoding.text_is_missing}, and {options['model']} does not say what it was calibrated on: "
            "name some with --dataset"
        )
    return quantization_windows(encoding, None, replace(config, dataset=None, **draw), tokenizer)


def _quantize_into(
    folder: Path, encoding: Encoding, windows: Any, tokenizer: Any, options: dict[str, Any]
) -> tuple[int, int]:
    from ..checkpoint.convert import convert
    from ..model.footprint import checkpoint_bytes
    from .load_dense import load_dense
    from .processor_files import copy_processor_files
    from .sources import model_source

    model = load_dense(
        model_source(options["model"]),
        dtype=options["dtype"],
        device_map=options["device_map"],
        trust_remote_code=options["trust_remote_code"],
    )
    before = checkpoint_bytes(model)
    if options["min_coverage"] is not None:
        model.config.quantization_config.min_coverage = options["min_coverage"]
    how = {key: options[key] for key in ("rounding", "rounding_settings")}
    convert(model, encoding.settings or encoding.name, windows=windows, **how)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_processor_files(model_source(options["model"]), folder)
    return before, checkpoint_bytes(model)
