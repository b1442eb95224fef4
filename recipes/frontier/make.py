"""Make a row's checkpoint, and the dense model off its grid, and heal either."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from optimum_dobisvd import DobiSVDConfig, DobiSVDQuantizer, adapter_targets, convert
from optimum_dobisvd.allocation.plan import Plan, PlannedModule
from optimum_dobisvd.calibration.dataset import CalibrationWindows, load_windows, read_text
from optimum_dobisvd.encodings.registry import encoding_of
from optimum_dobisvd.evaluation.perplexity import window_ids
from optimum_dobisvd.pipeline.validate import check_model

from .rows import SHIPPED, Row, row_named
from .settings import Settings

ADAPTER = "adapter_config.json"
_OWN_EIGHT_BITS = ("remap", "int8")


def checkpoint_of(row: Row, work: Path, healed: bool = False) -> Path:
    """Return the folder of a row's checkpoint."""
    return work / row.slug / ("healed" if healed else "checkpoint")


def is_made(row: Row, work: Path, settings: Settings, healed: bool = False) -> bool:
    """Whether the checkpoint is there, made as the row and the settings say now."""
    return _has_record(checkpoint_of(row, work, healed), _record(row, settings, healed))


def make(row: Row, work: Path, settings: Settings) -> None:
    """Make the checkpoint of a row, in bfloat16."""
    with _complete_folder(checkpoint_of(row, work), _record(row, settings)) as folder:
        base = base_model(row.base, work, settings)
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = MAKERS[row.make](row, base, work, settings)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def heal(row: Row, work: Path, settings: Settings) -> None:
    """Train LoRA on a row's checkpoint and put the result beside it.

    Where weights are 16-bit it is merged, and costs no byte. Our own 8 bits take no adapter: they
    become 16 for the training and 8 again after it. On GPTQ and bitsandbytes the adapter stays, and its bytes count.
    Computed in float32: many CPUs multiply nothing shorter fast.
    """
    from peft import LoraConfig, get_peft_model

    made = checkpoint_of(row, work)
    with _complete_folder(checkpoint_of(row, work, healed=True), _record(row, settings, healed=True)) as folder:
        eight_bits = row.options.get("quantization") if _is_in_own_eight_bits(row) else None
        tokenizer = AutoTokenizer.from_pretrained(made)
        model = load_in(made, torch.float32, settings.device)
        if eight_bits is not None:
            model = convert(model)
        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_rank,
            target_modules=_targets(model),
            task_type="CAUSAL_LM",
        )
        adapted: Any = get_peft_model(model, lora)
        train(adapted, tokenizer, settings, settings.heal_steps, settings.lora_rate)
        adapted.config.use_cache = True  # Trainer turned it off
        if _can_merge(row):
            model = adapted.merge_and_unload().to(torch.bfloat16)
            model = model if eight_bits is None else convert(model, eight_bits)
            model.save_pretrained(folder)
        else:
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)  # as the weights beside it
            adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load_in(folder: str | Path, dtype: torch.dtype, device: str) -> Any:
    """Load a checkpoint with everything that is not quantized in `dtype`.

    transformers leaves it as saved beside bitsandbytes' linears, whatever it is asked for.
    """
    # Not on CPUs: with a map that names one, transformers saves a model as if it were offloaded.
    where = {} if device == "cpu" else {"device_map": device}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where)
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def base_model(base: str, work: Path, settings: Settings) -> str:
    """Return the folder of a dense model; the one off the grid is trained when it is first asked for."""
    if base == SHIPPED:
        return settings.model
    folder = work / "off-the-grid"
    record = _record(row_named(f"dense bf16, {base}"), settings)
    if not _has_record(folder, record):
        with _complete_folder(folder, record) as new:
            model = load_in(settings.model, torch.float32, settings.device)
            tokenizer = AutoTokenizer.from_pretrained(settings.model)
            train(model, tokenizer, settings, settings.off_grid_steps, settings.off_grid_rate)
            model.config.use_cache = True
            model.to(torch.bfloat16).save_pretrained(new)
            tokenizer.save_pretrained(new)
    return str(folder)


def train(model: Any, tokenizer: Any, settings: Settings, steps: int, rate: float) -> None:
    """Train briefly on the calibration text, in place."""
    windows = window_ids(tokenizer, read_text(settings.dataset, "train"), seqlen=settings.train_seqlen)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(settings.seed))
    arguments = TrainingArguments(
        output_dir=str(Path(settings.work) / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=settings.train_batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
        use_cpu=settings.device == "cpu",
        seed=settings.seed,
    )
    taken = windows[order[: steps * settings.train_batch]]
    Trainer(model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in taken]).train()
    model.eval()


def _dense(row: Row, base: str, work: Path, settings: Settings) -> Any:
    return load_in(base, torch.bfloat16, settings.device)


def _bnb(row: Row, base: str, work: Path, settings: Settings) -> Any:
    """Quantize with transformers alone."""
    config = BitsAndBytesConfig(**row.options)
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=config, device_map=settings.device
    )


def _compress(row: Row, base: str, work: Path, settings: Settings, plan: Plan | None = None) -> Any:
    """Compress by the method `global` with a row's options; with all matrices as a plan says, if there is one."""
    model = load_in(base, torch.bfloat16, settings.device)
    tokenizer = AutoTokenizer.from_pretrained(base)
    windows = calibration_windows(tokenizer, settings)
    options = dict(row.options)
    if isinstance(options.get("quantization"), dict):
        # Rounding by GPTQ is content with fewer windows than the importance scores of ranks.
        text = list(windows.input_ids[: settings.rounding_windows])
        options["quantization"] = {**options["quantization"], "dataset": text}
    if row.base == SHIPPED:
        statistics = settings.statistics or str(work / "statistics")
    else:
        statistics = str(Path(base) / "statistics")
    config = DobiSVDConfig(
        **options,
        method="global",
        plan=plan,
        nsamples=settings.nsamples,
        seqlen=settings.seqlen,
        seed=settings.seed,
        statistics=statistics,
    )
    quantizer = DobiSVDQuantizer(config)
    return quantizer.quantize_model(model, tokenizer, windows=windows)


def _quantize_dense(row: Row, base: str, work: Path, settings: Settings) -> Any:
    """Quantize every matrix as it is, none factorized."""
    encoding = encoding_of(row.options["quantization"]).name
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    targets = check_model(model, DobiSVDConfig(method="global")).targets
    modules = {target.name: PlannedModule("dense", encoding) for target in targets}
    plan = Plan(modules, method="global", ratio=None, allocation="global")
    return _compress(row, base, work, settings, plan)


def _quantize_low_rank(row: Row, base: str, work: Path, settings: Settings) -> Any:
    """Quantize another row's checkpoint."""
    below = checkpoint_of(row_named(row.options["on"]), work)
    model = load_in(below, torch.bfloat16, settings.device)
    windows = calibration_windows(AutoTokenizer.from_pretrained(below), settings)
    return convert(model, row.options["quantization"], windows=windows.first(settings.rounding_windows))


MAKERS = {
    "dense": _dense,
    "bnb": _bnb,
    "compress": _compress,
    "quantize_dense": _quantize_dense,
    "quantize_low_rank": _quantize_low_rank,
}
"""Functions that make a row's checkpoint, by its `make`."""


def _is_in_own_eight_bits(row: Row) -> bool:
    return row.options.get("quantization") in _OWN_EIGHT_BITS


def _can_merge(row: Row) -> bool:
    """Whether the weights under the adapter are 16-bit."""
    own = "quantization" not in row.options or _is_in_own_eight_bits(row)
    return row.make == "dense" or (row.make == "compress" and own)


def _targets(model: Any) -> list[str] | str:
    """Return every linear of the blocks; factors where there are some."""
    found = getattr(model.config, "quantization_config", None)
    return adapter_targets(model) if isinstance(found, DobiSVDConfig) else "all-linear"


def calibration_windows(tokenizer: Any, settings: Settings) -> CalibrationWindows:
    """Return the calibration windows, the same for every row."""
    return load_windows(
        settings.dataset, tokenizer, nsamples=settings.nsamples, seqlen=settings.seqlen, seed=settings.seed
    )


_RECORD = "frontier.json"


def _record(row: Row, settings: Settings, healed: bool = False) -> dict[str, Any]:
    return {"recipe": row.recipe, "settings": settings.making(healed)}


def _has_record(folder: Path, record: dict[str, Any]) -> bool:
    path = folder / _RECORD
    return path.exists() and json.loads(path.read_text(encoding="utf-8")) == record


@contextmanager
def _complete_folder(folder: Path, record: dict[str, Any]) -> Iterator[Path]:
    """Write beside the folder and move it there when it is complete; what it was made with is written in it."""
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    (scratch / _RECORD).write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
