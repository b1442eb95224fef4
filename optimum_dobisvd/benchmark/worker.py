"""One model in a process of its own: its memory and compiled code are its own, and it may die of want of memory."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..model.footprint import resident_bytes
from ..structures.base import compressed_linears
from .bounds import MachineSpeed, Traffic, measure_machine, traffic_of
from .generation import Cell, Timing, compiled_forward, generate, using_forward
from .matrices import MatrixTime, matrix_times
from .memory import memory_held, peak_memory

_SECONDS_TO_LEAVE = 5
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_ERRORS = {kind.__name__: kind for kind in (OSError, FileNotFoundError, ValueError, ImportError, TypeError)}


class OutOfMemory(Exception):
    """A generation, or a model, that does not fit."""


@dataclass(frozen=True)
class ModelRequest:
    """What a worker loads; it must be possible to pickle it.

    Attributes:
        load: loads, or makes, the model.
        device: that it will be on.
        attention: the name of the attention kernel in transformers.
        new_tokens: of every generation.
        files: that `load` reads: they are taken out of the system's cache before. Empty: it makes the model.
        optimize: what is done to the model then, in place.
        memory: bytes of a GPU that the process may take; None is all. Of a CPU nothing can be forbidden.
    """

    load: Callable[[], Any]
    device: str
    attention: str
    new_tokens: int
    files: tuple[str, ...] = ()
    optimize: Callable[[Any], Any] | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Loaded:
    """A model that is there.

    Attributes:
        cold: seconds of loading, the files not being in the system's cache; None where nothing is loaded.
        warm: seconds of loading once more.
        weight_bytes: in memory.
        dtype: of the model.
        offloaded: whether some of the weights are not on the device.
    """

    cold: float | None
    warm: float | None
    weight_bytes: int
    dtype: torch.dtype
    offloaded: bool = False


@dataclass(frozen=True)
class Cold:
    """The first generation of a cell: seconds, the most memory held, and what is to be said of it."""

    timing: Timing
    peak: int | None
    note: str | None = None


class Worker:
    """What is done in the process."""

    def __init__(self, request: ModelRequest) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: F401 - not to be timed with the loading

        self.request = request
        self.model: Any = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device.index or 0)
            if request.memory is not None:
                total = torch.cuda.mem_get_info()[1]
                torch.cuda.set_per_process_memory_fraction(min(1.0, request.memory / total))
        self.base = memory_held(self._device)
        self.forward: Callable[..., Any] | None = None
        self.broken_graph: str | None = None

    @property
    def _device(self) -> torch.device:
        return torch.device(self.request.device)

    def load(self) -> Loaded:
        """Load the model, twice where it is read from files, and optimize it."""
        request, cold, warm = self.request, None, None
        _forget_files(request.files)
        started = time.perf_counter()
        self.model = request.load()
        if request.files:
            cold = time.perf_counter() - started
            self.model = None
            gc.collect()
            started = time.perf_counter()
            self.model = request.load()
            warm = time.perf_counter() - started
        self.model.set_attn_implementation(request.attention)
        if request.optimize is not None:
            self.model = request.optimize(self.model)
        away = set(map(str, getattr(self.model, "hf_device_map", {}).values())) & {"cpu", "disk"}
        offloaded = "disk" in away or (self._device.type == "cuda" and "cpu" in away)
        return Loaded(cold, warm, resident_bytes(self.model), self.model.dtype, offloaded)

    def matrices(self) -> list[str]:
        """Return the names of the compressed linears."""
        return list(compressed_linears(self.model))

    def traffic(self) -> Traffic:
        """Return what one token takes."""
        return traffic_of(self.model, self._device)

    def machine(self, dtype: torch.dtype) -> MachineSpeed:
        """Return what the machine reaches."""
        return measure_machine(self._device, dtype)

    def cold(self, cell: Cell, compiled: bool) -> Cold:
        """Generate for the first time."""
        if compiled and self.forward is None:
            self.forward = compiled_forward(self.model, fullgraph=True)
        try:
            return self._cold(cell, compiled)
        except Exception as error:
            if not compiled or self.broken_graph is not None or _is_of_memory(error):
                raise
            self.broken_graph = " ".join(str(error).split())[:200]
        self.forward = compiled_forward(self.model, fullgraph=False)
        return self._cold(cell, compiled)

    def _cold(self, cell: Cell, compiled: bool) -> Cold:
        with peak_memory(self._device, self.base) as peak:
            timing = self.run(cell, compiled)
        note = None
        if compiled and self.broken_graph is not None:
            note = f"compiled with graph breaks: {self.broken_graph}"
        return Cold(timing, peak.bytes, note)

    def run(self, cell: Cell, compiled: bool) -> Timing:
        """Generate."""
        with using_forward(self.model, self.forward if compiled else None):
            return generate(self.model, cell, self.request.new_tokens, self._device, static=compiled)

    def matrix_times(self, names: list[str], cell: Cell) -> dict[str, MatrixTime]:
        """Return what every matrix takes."""
        return matrix_times(self.model, names, cell, self.request.new_tokens, self._device)

    def free(self) -> None:
        """Give unused memory back, which other processes may need."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class RemoteWorker:
    """A `Worker` in a new process: its methods by name. The process ends with `close`, or with this one."""

    def __init__(self, name: str, request: ModelRequest) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, request), daemon=True)
        self._process.start()
        other.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what a method of the worker returns.

        Raises:
            OutOfMemory: it did not fit, or the system ended the process.
            OSError, ValueError, ImportError, RuntimeError: as the method raised it.
        """
        self.begin(method, *arguments)
        return self.result()

    def begin(self, method: str, *arguments: Any) -> None:
        """Have a method called; `result` waits for it."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send((method, arguments))

    def result(self) -> Any:
        """Return what the method that was begun returns. Raises as `call` does."""
        try:
            kind, found = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(5)
            raise OutOfMemory(
                f"the process of {self.name} ended with exit code {self._process.exitcode}, most likely "
                "by want of memory"
            ) from error
        if kind == "done":
            return found
        if kind == OutOfMemory.__name__:
            raise OutOfMemory(found)
        raise _ERRORS.get(kind, RuntimeError)(found)

    def close(self) -> None:
        """End the process: it leaves when the pipe is closed, or is killed where it does not soon."""
        self._pipe.close()
        self._process.join(_SECONDS_TO_LEAVE)
        self._process.kill()
        self._process.join()


def _serve(pipe: Any, request: ModelRequest) -> None:
    """The loop of the process."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    worker: Worker | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            method, arguments = pipe.recv()
            try:
                worker = worker or Worker(request)
                pipe.send(("done", getattr(worker, method)(*arguments)))
            except Exception as error:
                kind = OutOfMemory if _is_of_memory(error) else type(error)
                known = next((each.__name__ for each in kind.__mro__ if each.__name__ in _ERRORS), kind.__name__)
                text = str(error) if known in _ERRORS else f"{type(error).__name__}: {error}"
                pipe.send((known, " ".join(text.split())[:1000]))


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY)


def _forget_files(files: Iterable[str]) -> None:
    """Take files out of the system's cache, where it lets us."""
    advise = getattr(os, "posix_fadvise", None)
    for file in files if advise is not None else ():
        with contextlib.suppress(OSError), open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
