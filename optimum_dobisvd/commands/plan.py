"""`optimum-cli dobisvd plan`: what a compression will give and take, before anything is spent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .options import CommandSpec, Option, Refused
from .running import RUNNING
from .shared_options import CALIBRATION, METHOD, MODEL, compression_config, with_method_resolved

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..allocation.plan import Plan
    from ..config import DobiSVDConfig
    from ..model.layout import Layout
    from ..pipeline.job import Job
    from ..statistics.store import StatisticsStore
    from .sources import ModelSource

_GROUPS = {
    "model": MODEL,
    "compression": METHOD,
    "calibration": CALIBRATION,
    "output": (
        Option("out", "where the checkpoint would go: its disk is looked at", default=".", metavar="DIR"),
        Option("save_plan", "write the ranks to this JSON file, for `compress --plan`", metavar="FILE"),
    ),
    "running": RUNNING,
}

_EXAMPLES = """\
  optimum-cli dobisvd plan --model meta-llama/Llama-3.1-8B --ratio 0.6 --dataset wikitext2
  optimum-cli dobisvd plan --model ./llama --ratio 0.8 --statistics stats --save-plan ranks.json"""


def execute(options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Print bytes, arithmetic, memory, disk and time; returns them as JSON values.

    Raises:
        Refused: the machine cannot do it; the message has the numbers and a remedy.
        ValueError: a model, plan or setting that cannot work.
    """
    from ..model.device import require_device
    from ..model.experts import linearize
    from ..model.footprint import model_bytes
    from ..pipeline.job import Job
    from ..pipeline.validate import budget_of, check_encoding, check_model, given_plan
    from ..pipeline.windows import with_seqlen
    from ..report.report import module_report
    from ..report.table import coverage_line, kind_table, slower_line, summary_table
    from .dry_run_report import dry_run_report
    from .load_dense import load_meta_model
    from .sources import model_source

    options = with_method_resolved(options)
    config = compression_config(options, options["dataset"])
    source = model_source(options["model"], options["gguf_file"])
    meta_model = load_meta_model(source, dtype=options["dtype"], trust_remote_code=options["trust_remote_code"])
    linearize(meta_model)
    layout = check_model(meta_model, config)
    check_encoding(config.encoding, layout, config.min_coverage)
    if config.device is not None:
        require_device(config.device)
    config = with_seqlen(config, meta_model)
    given = given_plan(config, layout)
    job = Job(config, layout, budget_of(config, layout) if given is None else None, given)
    store = _open_store(config, layout, meta_model)
    plan, note = _plan(job, store)
    rows = [module_report(target, plan.modules[target.name], None) for target in layout.targets]
    name = source.typed.rstrip("/").rpartition("/")[2]
    report = dry_run_report(name, config, meta_model, layout, rows, model_bytes(meta_model.parameters()))
    for printed in (kind_table(report), summary_table(report), coverage_line(report), slower_line(report), note):
        if not printed:
            continue
        console.print(printed)
        console.print()
    if options["save_plan"] is not None:
        plan.save(options["save_plan"])
        console.print(f"plan written to {options['save_plan']}\n")
    needs = _needs(job, meta_model, store, {options["out"]: report.compressed_model_bytes})
    _print_needs(needs, console)
    result = {**report.to_dict(), "allocation": plan.allocation, "note": note, "needs": needs}
    if needs["lacking"]:
        raise Refused("this cannot fit: " + "; ".join(needs["lacking"]), result)
    _check_text(meta_model, config, source, options)
    return result


SPEC = CommandSpec(
    name="plan",
    summary="Tell what a compression gives and what it takes, without loading a weight; refuse what cannot fit.",
    groups=_GROUPS,
    examples=_EXAMPLES,
    execute=execute,
)


_REMEDIES = {
    "model": "load it in bfloat16",
    "hidden states of all windows": "lower --nsamples or --seqlen",
    "statistics, kept in memory": "name a --statistics folder",
    "rank training": "choose --allocation global, which learns nothing",
}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _check_text(meta_model: nn.Module, config: DobiSVDConfig, source: ModelSource, options: dict[str, Any]) -> None:
    """Draw the windows of a text that lies on this machine, so that what is wrong with them is told now."""
    from dataclasses import replace

    from ..calibration.text import HUB_TEXTS
    from ..pipeline.windows import calibration_windows
    from .load_dense import load_tokenizer
    from .sources import calibration_dataset

    if options["dataset"] is None or options["dataset"] in HUB_TEXTS:
        return
    tokenizer = load_tokenizer(source, trust_remote_code=options["trust_remote_code"])
    learns = options["plan"] is None and config.resolved_method().learns
    held_out = config.rank_training.held_out if learns else 0
    calibration_windows(
        meta_model, replace(config, dataset=calibration_dataset(options["dataset"])), tokenizer, held_out
    )


def _open_store(config: DobiSVDConfig, layout: Layout, meta_model: nn.Module) -> StatisticsStore | None:
    """The statistics, if the folder has some; checked as far as that can be done without weights and text."""
    import json
    from pathlib import Path

    from ..statistics.store import INDEX_NAME, StatisticsStore

    if config.statistics is None or not (Path(config.statistics) / INDEX_NAME).exists():
        return None
    path = Path(config.statistics) / INDEX_NAME
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder to collect statistics again") from error
    if stored.get("model_class") != type(meta_model).__name__:
        raise ValueError(
            f"the statistics in {config.statistics} are of a {stored.get('model_class')}, not of a "
            f"{type(meta_model).__name__}; name the folder that belongs to this model, or a new one"
        )
    return StatisticsStore(stored, list(layout.blocks), config.statistics)


def _plan(job: Job, store: StatisticsStore | None) -> tuple[Plan, str]:
    """Return the plan, and in words where its ranks come from."""
    from dataclasses import replace

    from ..pipeline.allocate import allocate, known_losses
    from ..pipeline.validate import budget_of

    config, method = job.config, job.method
    if job.given_plan is not None:
        return job.given_plan, f"ranks: from {config.plan}"
    learned = ", before training" if method.learns else ""
    if not method.allocator.needs_spectra:
        return allocate(job, None), f"ranks: {method.allocation}{learned}"
    spectra = store.spectra(method.metric) if store is not None else None
    if spectra is not None and all(name in spectra for name in job.layout.linears):
        # What rounding costs is measured on the weights, which are not loaded here.
        losses = known_losses(job, store)
        unknown = losses is None and any(format.loss_is_measured for format in config.formats)
        unpriced = "; compress weighs what rounding costs, too, and may choose otherwise" if unknown else ""
        return allocate(job, store, losses), (
            f"ranks: {method.allocation}{learned}, from the spectra in {config.statistics}{unpriced}"
        )
    # Of the structures that it may take, the one that most matrices will have.
    structure = config.formats[-1].structure.structure
    uniform = replace(config, allocation="uniform", structure=structure, training={}, mixed=False)
    return allocate(replace(job, config=uniform, budget=budget_of(uniform, job.layout)), None), (
        f"ranks: uniform, to give an idea; {method.allocation} needs spectra, which there are none of yet (the bytes "
        "come out the same; compress with --statistics once, then plan with the same folder)"
    )


def _needs(job: Job, meta_model: nn.Module, store: StatisticsStore | None, disk: dict[str, int]) -> dict[str, Any]:
    """Return memory, disk and seconds needed, what there is, and under `lacking` what cannot be done.

    `disk` is what the checkpoint takes, by its folder.
    """
    from . import machine
    from .estimate import Known, memory_need, needs_text, seconds_need

    config, method = job.config, job.method
    collected = store is not None and store.is_complete
    if store is not None and method.needs_gradients:
        collected = collected and all(store.has_gradients(block) for block in job.layout.blocks)
    scored = (
        job.given_plan is not None
        or not method.allocator.needs_spectra
        or (store is not None and store.spectra(method.metric) is not None)
    )
    known = Known(collected, scored)
    need = memory_need(meta_model, job, known)
    speed = machine.measure_speed(meta_model.dtype, config.device)  # type: ignore[arg-type]
    seconds = seconds_need(meta_model, job, speed, known)
    if config.statistics is not None and needs_text(config) and not collected:
        disk = {**disk, str(config.statistics): need.store}
    needs: dict[str, Any] = {
        "memory_bytes": need.host,
        "memory_available": machine.available_memory(),
        "device_memory_bytes": need.device,
        "device_memory_available": machine.available_device_memory(config.device or "cpu"),
        "statistics_bytes": need.store,
        "disk_bytes": disk,
        "disk_available": {folder: machine.available_disk(folder) for folder in disk},
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
    }
    return {**needs, "lacking": _lacking(needs)}


def _lacking(needs: dict[str, Any]) -> list[str]:
    from ..report.table import bytes_text
    from . import machine

    found = []

    def compare(what: str, needed: int, available: int | None, remedy: str) -> None:
        if available is not None and needed > available:
            found.append(f"{what} needs {bytes_text(needed)}, {bytes_text(available)} are free ({remedy})")

    memory = needs["memory_bytes"]
    largest = max(memory, key=lambda part: memory[part])
    remedy = _REMEDIES.get(largest, "lower --batch-size or --seqlen")
    compare("memory", sum(memory.values()), needs["memory_available"], f"most of it for the {largest}: {remedy}")
    compare(
        "the compute device",
        sum(needs["device_memory_bytes"].values()),
        needs["device_memory_available"],
        "lower --batch-size or --seqlen, or compute on the CPU",
    )
    for folders in machine.by_disk(needs["disk_bytes"]):
        total = sum(needs["disk_bytes"][folder] for folder in folders)
        free = needs["disk_available"][folders[0]]
        compare(f"the disk of {' and '.join(folders)}", total, free, "make room, or name a folder on another disk")
    return found


def _print_needs(needs: dict[str, Any], console: Console) -> None:
    from ..report.table import bytes_text, plain_table

    table = plain_table("what it takes", ("", "needed", "there is"))
    for part, size in needs["memory_bytes"].items():
        table.add_row(f"  {part}", bytes_text(size), "")
    total = bytes_text(sum(needs["memory_bytes"].values()))
    table.add_row("peak memory", total, bytes_text(needs["memory_available"]), end_section=True)
    if needs["device_memory_bytes"]:
        there = needs["device_memory_available"]
        size = bytes_text(sum(needs["device_memory_bytes"].values()))
        table.add_row("peak memory of the device", size, "unknown" if there is None else bytes_text(there))
    for folder, size in needs["disk_bytes"].items():
        table.add_row(f"disk, {folder}", bytes_text(size), bytes_text(needs["disk_available"][folder]))
    for stage, seconds in needs["seconds"].items():
        table.add_row(stage, _duration(seconds), "")
    table.add_row("time, about", _duration(sum(needs["seconds"].values())), "")
    console.print(table)
    console.print(
        f"\nstatistics: {bytes_text(needs['statistics_bytes'])}, an upper bound (q/k/v and gate/up are counted as "
        "sharing their input, no others). Times are operations over the best speed "
        "measured just now; those of quantization are not among them."
    )
