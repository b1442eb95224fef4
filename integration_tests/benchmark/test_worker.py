"""A model in a process of its own."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from integration_tests.tiny_models import tiny
from optimum_dobisvd.benchmark import worker as module
from optimum_dobisvd.benchmark.generation import Cell
from optimum_dobisvd.benchmark.worker import Cold, ModelRequest, OutOfMemory, RemoteWorker, Worker

CELL = Cell(2, 5)


LLAMA = partial(tiny, "llama")


def request(load: Any = LLAMA, **settings: Any) -> ModelRequest:
    return ModelRequest(load, **{"device": "cpu", "attention": "sdpa", "new_tokens": 4, **settings})


def test_what_is_read_from_files_is_loaded_twice_and_then_optimized(tmp_path: Path) -> None:
    file, calls = tmp_path / "weights", []
    file.write_bytes(b"x")

    def load() -> Any:
        calls.append("load")
        return tiny("llama", dtype=torch.bfloat16)

    def optimize(model: Any) -> Any:
        calls.append("optimize")
        assert model.config._attn_implementation == "eager"
        return model

    loaded = Worker(request(load, files=(str(file),), optimize=optimize, attention="eager")).load()
    assert calls == ["load", "load", "optimize"]
    assert loaded.cold > 0
    assert loaded.warm > 0
    assert loaded.dtype == torch.bfloat16
    assert not loaded.offloaded


def test_what_is_made_is_made_once_and_has_no_time_of_loading() -> None:
    loaded = Worker(request()).load()
    assert loaded.cold is None
    assert loaded.warm is None
    assert loaded.weight_bytes >= sum(each.nbytes for each in tiny("llama").parameters())


def test_the_first_generation_tells_its_peak_of_memory() -> None:
    worker = Worker(request())
    worker.load()
    cold = worker.cold(CELL, False)
    assert isinstance(cold, Cold)
    assert cold.note is None
    assert len(cold.timing.gaps) == 3
    if Path("/proc/self/clear_refs").exists():
        assert cold.peak is not None


def test_a_graph_that_breaks_is_compiled_all_the_same_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compiled_forward(model: Any, *, fullgraph: bool) -> Any:
        asked.append(fullgraph)
        plain = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if fullgraph:
                raise RuntimeError("graph break in  rank()")
            return plain(*args, **kwargs)

        return forward

    monkeypatch.setattr(module, "compiled_forward", compiled_forward)
    worker = Worker(request())
    worker.load()
    assert worker.cold(CELL, True).note == "compiled with graph breaks: graph break in rank()"
    worker.cold(Cell(1, 5), True)
    assert asked == [True, False]


def missing() -> Any:
    raise FileNotFoundError("there is no config.json")


def hungry() -> Any:
    raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")


def killed() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_errors_in_the_other_process_are_errors_here_and_its_death_is_want_of_memory() -> None:
    workers = {name: RemoteWorker(name, request(load)) for name, load in LOADS.items()}
    try:
        for each in workers.values():
            each.begin("load")
        assert workers["tiny"].result().dtype == torch.float32
        assert len(workers["tiny"].call("run", CELL, False).gaps) == 3
        with pytest.raises(FileNotFoundError, match="there is no config.json"):
            workers["missing"].result()
        with pytest.raises(OutOfMemory, match="out of memory"):
            workers["hungry"].result()
        for _ in range(2):
            with pytest.raises(OutOfMemory, match="the process of killed ended with exit code -9.*want of memory"):
                workers["killed"].result()
            workers["killed"].begin("free")
    finally:
        for each in workers.values():
            each.close()


LOADS = {"tiny": LLAMA, "missing": missing, "hungry": hungry, "killed": killed}
