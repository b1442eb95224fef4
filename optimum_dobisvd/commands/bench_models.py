"""A benchmark of models: what is run of them, whether that fits, and the run."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ..benchmark.bounds import bytes_needed
from ..benchmark.generation import Cell
from ..benchmark.result import Row, SpeedReport
from ..benchmark.rounds import Patience
from ..benchmark.session import Session
from ..benchmark.worker import ModelRequest, RemoteWorker
from ..config_values import size_in_bytes
from ..model.device import require_device
from ..model.input_limits import require_positions
from ..report.table import bytes_text
from .bench_sources import Models, checkpoint_models, synthetic_models
from .machine import available_device_memory, available_memory

_CHECKPOINTS = ("checkpoint", "fused", "compiled")
"""Workers that load the compressed model."""


def measure(options: dict[str, Any], console: Any) -> SpeedReport:
    """Run the benchmark that these options ask for. Raises as `bench.execute` does; before a model is loaded."""
    device = options["device"]
    require_device(device)
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"bench measures on cpu and cuda, and device is {device!r}")
    models = synthetic_models(options) if options["synthetic"] is not None else checkpoint_models(options)
    cells = [Cell(batch, prompt) for prompt in options["prompt"] for batch in options["batch"]]
    longest = max(options["prompt"]) + options["new_tokens"]
    require_positions(
        models.meta, longest, f"--prompt {max(options['prompt'])} and --new-tokens make {longest} tokens"
    )
    rows = _rows(options["rows"], models)
    with contextlib.ExitStack() as open_until_end:
        limit = _limit(options, models, cells)
        placed: Mapping[str, Any] = {}
        if limit is not None:
            folder = open_until_end.enter_context(tempfile.TemporaryDirectory(prefix="dobisvd-offloaded-"))
            placed = {"limit": limit, "folder": folder}
        requests = _requests({row.worker for row in rows}, models, options, placed)
        if limit is None:
            _check_room(requests, models, device)
        workers = open_until_end.enter_context(_started(requests))
        bar = open_until_end.enter_context(tqdm(bar_format="{elapsed} {desc}", leave=False))
        session = Session(
            workers,
            rows,
            cells,
            options["new_tokens"],
            Patience(options["rounds"], seconds=options["seconds"]),
            refuse=partial(_refusal, models, options),
            tell=bar.set_description_str,
            notes=models.notes,
        )
        return session.run(partial(_report, models, options))


def _report(models: Models, options: dict[str, Any], machine: Any, loaded: Any) -> SpeedReport:
    return SpeedReport(
        title=models.title,
        device=options["device"] if options["device"] == "cpu" else torch.cuda.get_device_name(options["device"]),
        dtype=str(loaded.dtype).removeprefix("torch."),
        attention=options["attention"],
        threads=torch.get_num_threads(),
        new_tokens=options["new_tokens"],
        machine=machine,
    )


def _requests(
    names: set[str], models: Models, options: dict[str, Any], placed: Mapping[str, Any]
) -> dict[str, ModelRequest]:
    """What every worker loads; the first one is what others are compared with."""
    requests: dict[str, ModelRequest] = {}
    memory = None if options["memory"] is None else size_in_bytes(options["memory"], "--memory")
    for name in ("dense", *_CHECKPOINTS):
        if name not in names:
            continue
        loaded = _loaded_by(name)
        where = {"device": options["device"], "limit": None, "folder": None, **placed}
        if where["folder"] is not None:
            where["folder"] = os.path.join(where["folder"], name)
        requests[name] = ModelRequest(
            partial(models.loads[loaded], **where),
            options["device"],
            options["attention"],
            options["new_tokens"],
            models.files.get(loaded, ()),
            None if name == loaded else _optimizer(options, compiled=name == "compiled"),
            memory,
        )
    return requests


def _loaded_by(worker: str) -> str:
    """What a worker loads. What is compiled has a model to itself: its weights may be stored in another order."""
    return "checkpoint" if worker in _CHECKPOINTS else worker


def _optimizer(options: dict[str, Any], *, compiled: bool) -> Callable[[Any], Any]:
    """Return what makes a model fast at what is measured: rows of one product are those of steps and of prompts."""
    from ..inference.optimize import optimize_for_inference

    batches = options["batch"]
    prefilled = {batch * prompt for batch in batches for prompt in options["prompt"]}
    return partial(optimize_for_inference, rows=sorted({*batches, *prefilled}), compiled=compiled)


def _rows(names: list[str], models: Models) -> list[Row]:
    """The rows asked for that there are models for, in order; notes say what is left out."""
    dense = "dense" in models.loads
    compared = "dense" if dense and "dense" in names else None
    compiled_against = "dense-compiled" if dense and "dense-compiled" in names else compared
    every = [
        Row("dense", "dense"),
        Row("dense-compiled", "dense", compiled=True),
        Row("checkpoint", "checkpoint", against=compared),
        Row("fused", "fused", against=compared),
        Row("compiled", "compiled", compiled=True, against=compiled_against),
    ]
    rows = [row for row in every if row.name in names and (dense or row.worker != "dense")]
    if not rows:
        raise ValueError(f"no row is left of --rows {' '.join(names)}: {'; '.join(models.notes)}")
    return rows


@contextlib.contextmanager
def _started(requests: Mapping[str, ModelRequest]) -> Iterator[dict[str, RemoteWorker]]:
    """The workers, ended in any case."""
    workers: dict[str, RemoteWorker] = {}
    try:
        for name, request in requests.items():
            workers[name] = RemoteWorker(name, request)
            workers[name].begin("free")
        for worker in workers.values():  # all have imported what they need before the first is timed
            worker.result()
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


# What fits.


def _free(device: str) -> int:
    found = available_device_memory(device)
    return available_memory() if found is None else found


def _check_room(requests: Mapping[str, ModelRequest], models: Models, device: str) -> None:
    """Raise ValueError if the models do not fit beside each other."""
    each = {name: models.bytes.get(_loaded_by(name), 0) for name in requests}
    free = _free(device)
    if sum(each.values()) > free:
        sizes = ", ".join(f"{name} {bytes_text(size)}" for name, size in each.items())
        raise ValueError(
            f"the models are measured by turns, so all are in memory at once: {sizes}, and {device} has "
            f"{bytes_text(free)} free; leave some out (--rows), take a smaller --dtype, or see --memory"
        )


def _limit(options: dict[str, Any], models: Models, cells: list[Cell]) -> int | None:
    """The bytes that weights may take on the device; None without a limit."""
    if options["memory"] is None:
        return None
    memory = size_in_bytes(options["memory"], "--memory")
    largest = max(cells, key=lambda cell: bytes_needed(models.meta, cell, options["new_tokens"]))
    needed = bytes_needed(models.meta, largest, options["new_tokens"])
    if needed >= memory:
        raise ValueError(
            f"--memory {options['memory']}: {largest} takes about {bytes_text(needed)} beside the weights; lower "
            "--batch and --prompt, or raise it"
        )
    return memory - needed


def _refusal(models: Models, options: dict[str, Any], cell: Cell) -> str | None:
    """Why a cell does not fit now that the models are there."""
    needed, free = bytes_needed(models.meta, cell, options["new_tokens"]), _free(options["device"])
    if needed <= free:
        return None
    return (
        f"it takes about {bytes_text(needed)} beside the weights, and {options['device']} has {bytes_text(free)} "
        "free; lower --batch or --prompt"
    )
