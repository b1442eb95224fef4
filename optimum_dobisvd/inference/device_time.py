"""How long products take: on a GPU without launching them, which graphs and compilers take away; on a CPU by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_REPLAYS = 5
_LEAST_TURNS, _MOST_TURNS = 5, 25
"""Rounds of a measurement by turns: that many, or as many as fit into the seconds below."""
_SECONDS = 0.1
_COLD_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
"""A product in a model finds its weights in memory and not in a cache: copies are taken by turns that fill one."""
_MOST_COPIES = {"cpu": 8, "cuda": 32}


def cold_copies(size: int, device: torch.device) -> int:
    """Return how many copies of a weight of that many bytes are to be multiplied by turns."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    return max(1, min(_MOST_COPIES[kind], _COLD_BYTES[kind] // max(1, size)))


def seconds_of(call: Callable[[Any], Any], modules: Sequence[Any]) -> float:
    """Return the seconds of one call, all modules being called one after the other.

    On a GPU they are captured as a CUDA graph, which is replayed; the median counts. Elsewhere by the clock, once.
    """
    device = next(modules[0].parameters()).device
    call(modules[0])
    if device.type != "cuda":
        begun = time.perf_counter()
        for module in modules:
            call(module)
        return (time.perf_counter() - begun) / len(modules)
    with torch.cuda.device(device):
        graph = _captured(call, modules)
        times = [_replayed(graph) for _ in range(_REPLAYS + 1)]
    return statistics.median(times[1:]) / len(modules)


def ratio_by_turns(call: Callable[[Any], Any], ours: Sequence[Any], others: Sequence[Any]) -> float:
    """Return the time of one call over that of the other by the clock: called by turns, the ratio of their medians."""
    times: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    for turn in range(_MOST_TURNS):
        for modules, taken in zip((ours, others), times, strict=True):
            before = time.perf_counter()
            call(modules[turn % len(modules)])
            taken.append(time.perf_counter() - before)
        if turn >= _LEAST_TURNS and time.perf_counter() - begun > _SECONDS:
            break
    # The first is of warming up.
    return statistics.median(times[0][1:]) / statistics.median(times[1][1:])


def _captured(call: Callable[[Any], Any], modules: Sequence[Any]) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their handles and workspaces outside of the capture
        for module in modules:
            call(module)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for module in modules:
            call(module)
    return graph


def _replayed(graph: Any) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000
